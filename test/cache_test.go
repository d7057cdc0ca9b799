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

// cached waits until exactly these versions are in Redis, each an id and a version such as "1:1", and
// returns their keys. On a busy machine what is put there may get lost: a list by a replica that holds
// nothing itself puts it again.
func cached(t testing.TB, w *harness.World, versions ...string) map[string]string {
	t.Helper()
	found := map[string]string{}
	var listed time.Time
	harness.AwaitEqual(t, 30*time.Second, func() []string {
		if time.Since(listed) > 3*time.Second {
			w.Start(t).List(t, 1000, 1)
			listed = time.Now()
		}
		clear(found)
		keys, err := redis.Strings(w.Redis(t, "KEYS", w.Namespace+":*:*:*"), nil)
		harness.Must(t, err)
		for _, key := range keys {
			found[strings.SplitN(key, ":", 3)[2]] = key
		}
		return slices.Sorted(maps.Keys(found))
	}, versions, "versions in Redis")
	return found
}

// firstVersions returns version 1 of the goods 1 to n, as cached takes them.
func firstVersions(n int) (versions []string) {
	for id := 1; id <= n; id++ {
		versions = append(versions, fmt.Sprint(id, ":1"))
	}
	slices.Sort(versions)
	return versions
}

func TestCacheNamesVersions(t *testing.T) {
	w, a := started(t)
	a.Stock(t, 3)
	page := a.Call(t, "GET", "/goods/list", "").Body
	for version, key := range cached(t, w, "1:1", "2:1", "3:1") {
		if value := string(w.Redis(t, "GET", key).([]byte)); !strings.Contains(page, value) {
			t.Errorf("%s is cached as %s, want the JSON of %s", version, value, page)
		}
		if life := w.Redis(t, "PTTL", key).(int64); life > 60_000 || life < 1 {
			t.Errorf("%s lives %d ms, want 60 s at most", version, life)
		}
	}
	// An edit deletes the keys of the versions that it replaced.
	ok(t, a, "PATCH", "/goods/update"+target(2), `{"name":"two"}`)
	cached(t, w, "1:1", "2:2", "3:1")
	ok(t, a, "PATCH", "/goods/reprioritize"+target(1), `{"newPriority":2}`)
	ok(t, a, "DELETE", "/goods/remove"+target(3), "")
	key := cached(t, w, "1:2", "2:3", "3:2")["2:3"]

	// What Redis has is what another replica shows: Postgres is not asked.
	planted := strings.Replace(string(w.Redis(t, "GET", key).([]byte)), "two", "planted", 1)
	harness.AwaitEqual(t, 30*time.Second, func() string {
		w.Redis(t, "SET", key, planted)
		return w.Start(t).List(t, 10, 1).Goods[0].Name
	}, "planted", "the name of a good that is cached")
}

// Values that are no goods are read around, whatever they are; so is a Redis that has forgotten everything,
// and what answers in its place.
func TestStrangeValuesInRedis(t *testing.T) {
	w, a := started(t)
	const goods = 12
	a.Stock(t, goods)
	page := a.List(t, goods, 1)
	keys := cached(t, w, firstVersions(goods)...)
	twelfth := w.Redis(t, "GET", keys["12:1"]).([]byte)
	strange := []struct {
		name  string
		value func(good []byte) []byte
	}{
		{"the good 12 for the good 1", func([]byte) []byte { return twelfth }},
		{"the good 12 for the good 2", func([]byte) []byte { return twelfth }},
		{"nonsense", func([]byte) []byte { return []byte("nonsense") }},
		{"nothing", func([]byte) []byte { return []byte{} }},
		{"half of a good", func(good []byte) []byte { return good[:len(good)/2] }},
		{"a good without its last byte", func(good []byte) []byte { return good[:len(good)-1] }},
		{"a good without its first byte", func(good []byte) []byte { return good[1:] }},
		{"a list", nil},
	}
	for i, s := range strange {
		key := keys[fmt.Sprint(i+1, ":1")]
		good := w.Redis(t, "GET", key).([]byte)
		w.Redis(t, "DEL", key)
		if s.value != nil {
			w.Redis(t, "SET", key, s.value(good))
		} else {
			w.Redis(t, "RPUSH", key, good)
		}
	}
	b := w.Start(t) // holds no goods itself
	for i, s := range strange {
		for range 2 {
			got := b.List(t, 1, i+1).Goods // with nothing else that Redis lacks
			harness.Equal(t, got, page.Goods[i:i+1], "a list with %s in Redis", s.name)
		}
	}
	for _, key := range keys {
		w.Redis(t, "DEL", key)
	}
	harness.Equal(t, w.Start(t).List(t, goods, 1), page, "a list without values")

	p := w.NewProxy(t, "REDIS_URL")
	for _, nonsense := range []string{
		"*2\r\n$3\r\nfoo\r\n:12\r\n?nonsense\r\n", "HTTP/1.1 400 Bad Request\r\n\r\n", "-LOADING\r\n",
		":1\r\n:1\r\n", "*1\r\n$-1\r\n", "*13\r\n" + strings.Repeat("$-1\r\n", 13),
	} {
		p.Spoil(harness.Forward, func(to net.Conn, _ []byte) error {
			return harness.Forward(to, []byte(nonsense))
		})
		b := w.Start(t)
		harness.Equal(t, b.List(t, goods, 1), page, "a list with %q from Redis", nonsense)
		page.Goods[5].Name += "+"
		body := fmt.Sprintf(`{"name":%q}`, page.Goods[5].Name)
		updated := harness.Want[harness.Good](t, b, 200, "PATCH", "/goods/update"+target(6), body)
		harness.Equal(t, updated, page.Goods[5], "update")
		harness.Equal(t, b.List(t, goods, 1), page, "the next list with %q from Redis", nonsense)
	}
}

// A Redis that never finishes the TLS handshake delays lists no more than one that is frozen later: it is
// asked once a second.
func TestSilentTLSRedis(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	silent, err := net.Listen("tcp", "127.0.0.1:0") // the kernel accepts, nobody answers
	harness.Must(t, err)
	defer silent.Close()
	a := w.Start(t, "REDIS_URL=rediss://"+silent.Addr().String()+"/0")
	makeLargeGoods(t, w, 3)
	begin := time.Now()
	for time.Since(begin) < 5*time.Second {
		harness.Together(8, func(int) {
			asked := time.Now()
			harness.Equal(t, a.List(t, 10, 1).Meta.Total, 3, "goods")
			if took := time.Since(asked); took > 2*time.Second {
				t.Errorf("a list took %v", took)
			}
		})
	}
	failures := value(t, a, "goods_cache_errors_total", "")
	if most := 3 * time.Since(begin).Seconds(); failures < 3 || failures > most {
		t.Errorf("Redis failed %g times, want 3 to %g", failures, most)
	}
	ready(t, a, "redis")
}

// makeLargeGoods makes n goods that a replica does not hold itself: each list asks Redis.
func makeLargeGoods(t testing.TB, w *harness.World, n int) {
	t.Helper()
	w.Exec(t, fmt.Sprintf(`
INSERT INTO goods (project_id, name, description)
SELECT 1, n::text, repeat('d', 1200)
FROM generate_series(1, %d) AS n`, n))
}

// A Redis that answers pings but not what lists need is down, and the log says why.
func TestRedisThatRefusesCommands(t *testing.T) {
	t.Parallel()
	withoutSlots, _ := harness.NewRedis(t, "--cluster-enabled", "yes")
	cluster, _ := harness.NewRedis(t, "--cluster-enabled", "yes")
	conn, err := redis.Dial("tcp", cluster)
	harness.Must(t, err)
	defer conn.Close()
	_, err = conn.Do("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
	harness.Must(t, err)
	harness.Eventually(t, 15*time.Second, func() error {
		_, err := conn.Do("GET", "any")
		return err
	})
	shared := harness.NewWorld(t)
	for name, test := range map[string]struct{ address, rights, cause string }{
		"cluster without slots":   {withoutSlots, "", "CLUSTERDOWN"},
		"cluster":                 {cluster, "", "CROSSSLOT"},
		"may not MGET":            {"", "~* +@all -mget", "NOPERM"},
		"may not SET":             {"", "~* +@all -set", "NOPERM"},
		"may not use these keys":  {"", "~others:* +@all", "NOPERM"},
		"read only for this user": {"", "%R~* +@all", "NOPERM"},
		"wrong password":          {"", "resetpass", "WRONGPASS"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := harness.NewWorld(t)
			address := "redis://" + test.address + "/0"
			if test.rights != "" {
				user := w.Namespace
				rule := append([]any{"SETUSER", user, "on", ">" + secret}, words(test.rights)...)
				shared.Redis(t, "ACL", rule...)
				t.Cleanup(func() { shared.Redis(t, "ACL", "DELUSER", user) })
				address = withUser(t, w.Env["REDIS_URL"], user)
			}
			a := w.Start(t, "REDIS_URL="+address)
			a.Stock(t, 3)
			for range 3 {
				harness.Equal(t, a.List(t, 10, 1).Meta.Total, 3, "goods")
			}
			ready(t, a, "redis")
			warned(t, a, `"msg":"failing","name":"redis"`, test.cause)
			harness.Equal(t, inLog(a, "failing", "redis"), 1, "failures of Redis in the log")
			failures := func() bool { return value(t, a, "goods_cache_errors_total", "") > 0 }
			harness.AwaitEqual(t, 15*time.Second, failures, true, "failures of Redis were counted")
			if test.rights != "" {
				shared.Redis(t, "ACL", "SETUSER", w.Namespace, "~*", "+@all", ">"+secret)
				ready(t, a)
			}
		})
	}
}

// words returns the words of s as arguments of a command.
func words(s string) (arguments []any) {
	for _, word := range strings.Fields(s) {
		arguments = append(arguments, word)
	}
	return arguments
}

// An edited good is in the process that edited it: the next list of that one reads no good.
func TestEditedGoodsAreCached(t *testing.T) {
	w, a := started(t)
	a.Stock(t, 3)
	a.List(t, 10, 1)
	before := value(t, a, "goods_cache_misses_total", "")
	ok(t, a, "PATCH", "/goods/update"+target(1), someName)
	ok(t, a, "DELETE", "/goods/remove"+target(2), "")
	a.List(t, 10, 1)
	harness.Equal(t, value(t, a, "goods_cache_misses_total", ""), before, "misses after edits and a list")
	w.Settled(t, 15*time.Second)
}
