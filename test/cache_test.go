package test

import (
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"

	"goods/test/harness"
)

func redisDo(t testing.TB, w *harness.World, command string, args ...any) any {
	t.Helper()
	conn := w.Redis.Get()
	defer conn.Close()
	v, err := conn.Do(command, args...)
	harness.Must(t, err)
	return v
}

// cached waits until exactly these versions are in Redis, each an id and a version such as "1:1", and returns their
// keys. On a busy machine what is put there may get lost: a list by a replica that holds nothing itself puts it again.
func cached(t testing.TB, w *harness.World, list bool, versions ...string) map[string]string {
	t.Helper()
	found := map[string]string{}
	var listed time.Time
	harness.Eventually(t, 30*time.Second, func() error {
		if list && time.Since(listed) > 3*time.Second {
			w.Start(t).List(t, 10, 1)
			listed = time.Now()
		}
		clear(found)
		keys, err := redis.Strings(redisDo(t, w, "KEYS", w.Namespace+":*:*:*"), nil)
		for _, key := range keys {
			found[strings.SplitN(key, ":", 3)[2]] = key
		}
		if got := slices.Sorted(maps.Keys(found)); err == nil && !slices.Equal(got, versions) {
			err = fmt.Errorf("versions in Redis: got %v, want %v", got, versions)
		}
		return err
	})
	return found
}

func TestCacheNamesVersions(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	a := w.Start(t)
	a.Stock(t, 3)
	page := a.Call(t, "GET", "/goods/list", "").Body
	for version, key := range cached(t, w, true, "1:1", "2:1", "3:1") {
		if value, err := redis.String(redisDo(t, w, "GET", key), nil); err != nil || !strings.Contains(page, value) {
			t.Errorf("%s is cached as %s, %v, want the JSON of %s", version, value, err, page)
		}
		if life := redisDo(t, w, "PTTL", key).(int64); life > 60_000 || life < 1 {
			t.Errorf("%s lives %d ms, want 60 s at most", version, life)
		}
	}
	// An edit deletes the keys of the versions that it replaced.
	ok(t, a, "PATCH", "/goods/update"+target(2), `{"name":"two"}`)
	cached(t, w, false, "1:1", "3:1")
	cached(t, w, true, "1:1", "2:2", "3:1")
	ok(t, a, "PATCH", "/goods/reprioritize"+target(1), `{"newPriority":2}`)
	ok(t, a, "DELETE", "/goods/remove"+target(3), "")
	cached(t, w, false)
	keys := cached(t, w, true, "1:2", "2:3", "3:2")

	// What Redis has is what another replica shows: Postgres is not asked.
	value, err := redis.String(redisDo(t, w, "GET", keys["2:3"]), nil)
	harness.Must(t, err)
	harness.Eventually(t, 30*time.Second, func() error {
		redisDo(t, w, "SET", keys["2:3"], strings.Replace(value, "two", "planted", 1))
		if name := w.Start(t).List(t, 10, 1).Goods[0].Name; name != "planted" {
			return fmt.Errorf("a list shows the name %q, want what is cached", name)
		}
		return nil
	})
}

// Values that are no goods are read around, whatever they are, and so is a Redis that has forgotten everything.
func TestStrangeValuesInRedis(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	a := w.Start(t)
	a.Stock(t, 6)
	page := a.List(t, 10, 1)
	keys := cached(t, w, true, "1:1", "2:1", "3:1", "4:1", "5:1", "6:1")
	fourth, err := redis.String(redisDo(t, w, "GET", keys["4:1"]), nil)
	harness.Must(t, err)
	redisDo(t, w, "SET", keys["1:1"], "nonsense")
	redisDo(t, w, "SET", keys["2:1"], "")
	redisDo(t, w, "DEL", keys["3:1"])
	redisDo(t, w, "RPUSH", keys["3:1"], "a", "b")
	redisDo(t, w, "SET", keys["4:1"], fourth[:len(fourth)/2])
	redisDo(t, w, "SET", keys["5:1"], fourth)
	b := w.Start(t)
	harness.Equal(t, b.List(t, 10, 1), page, "a list over strange values")
	harness.Equal(t, b.List(t, 10, 1), page, "the next one")
	for _, key := range keys {
		redisDo(t, w, "DEL", key)
	}
	harness.Equal(t, w.Start(t).List(t, 10, 1), page, "a list without values")
}

// What answers in the place of Redis need not be Redis.
func TestNonsenseFromRedis(t *testing.T) {
	t.Parallel()
	for _, nonsense := range []string{"*2\r\n$3\r\nfoo\r\n:12\r\n?nonsense\r\n", "HTTP/1.1 400 Bad Request\r\n\r\n", "-LOADING\r\n", ":1\r\n:1\r\n", "*1\r\n$-1\r\n"} {
		w := harness.NewWorld(t)
		w.NewProxy(t, "REDIS_URL").Spoil(nil, func(to net.Conn, _ []byte) error {
			_, err := to.Write([]byte(nonsense))
			return err
		})
		a := w.Start(t)
		for i := range 5 {
			a.Create(t, fmt.Sprint(i))
			l := a.List(t, 10, 1)
			harness.Equal(t, fmt.Sprintf("%d %d %s", l.Meta.Total, len(l.Goods), l.Goods[i].Name), fmt.Sprintf("%d %d %d", i+1, i+1, i), "list with %q", nonsense)
			ok(t, a, "PATCH", "/goods/update"+target(1), `{"name":"0"}`)
		}
	}
}
