package test

import (
	"bytes"
	"database/sql"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"goods/test/harness"
)

// wiretap counts what a replica asks of Redis through a proxy.
type wiretap struct {
	lists atomic.Int64 // commands that ask for goods
	mu    sync.Mutex   // guards what follows
	conns map[net.Conn]bool
}

func (c *wiretap) count(to net.Conn, part []byte) error {
	c.mu.Lock()
	c.conns[to] = true
	c.mu.Unlock()
	c.lists.Add(int64(bytes.Count(part, []byte("MGET")) - bytes.Count(part, []byte(":ping2"))))
	return harness.Forward(to, part)
}

// connections returns how many connections have been used since it was called last.
func (c *wiretap) connections() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := len(c.conns)
	c.conns = map[net.Conn]bool{}
	return n
}

// What one replica has read, another gets from Redis, and keeps what is small. It uses few connections, and
// does without Redis while it is away.
func TestReplicasShareRedis(t *testing.T) {
	w, a := started(t)
	const half = 125 // more than one MGET asks for
	makeLargeGoods(t, w, half)
	makeGoods(t, w, half)
	page := a.List(t, 2*half, 1)
	keys := cached(t, w, firstVersions(2*half)...)

	tap := &wiretap{conns: map[net.Conn]bool{}}
	p := w.NewProxy(t, "REDIS_URL")
	p.Spoil(tap.count, harness.Forward)
	b := w.Start(t)
	errors := func() float64 { return value(t, b, "goods_cache_errors_total", "") }
	// awaitHits lists all goods until so many of them are cached, and the others are not. On a busy machine
	// Redis may be too slow once.
	awaitHits := func(want int, when string, prepare func()) {
		t.Helper()
		counts := func(name string) int { return int(value(t, b, "goods_cache_"+name+"_total", "")) }
		harness.AwaitEqual(t, 20*time.Second, func() [2]int {
			prepare()
			hits, misses := counts("hits"), counts("misses")
			b.List(t, 2*half, 1)
			return [2]int{counts("hits") - hits, counts("misses") - misses}
		}, [2]int{want, 2*half - want}, "hits and misses of a list %s", when)
	}
	harness.Equal(t, b.List(t, 2*half, 1), page, "a list from Redis")
	awaitHits(2*half, "from Redis", func() {})
	harness.AwaitEqual(t, 15*time.Second, func() int64 {
		b.List(t, half, half+1)
		before := tap.lists.Load()
		b.List(t, half, half+1)
		return tap.lists.Load() - before
	}, 0, "questions to Redis for small goods that were listed before")
	const lists = 40
	tap.connections()
	for range lists {
		harness.Equal(t, b.List(t, half, 1).Goods, page.Goods[:half], "goods of a list of large ones")
	}
	if n := tap.connections(); n > lists/2 {
		t.Errorf("%d lists used %d connections to Redis", lists, n)
	}
	awaitHits(2*half-30, "of which Redis lacks some", func() {
		for id := half - 29; id <= half; id++ {
			w.Redis(t, "DEL", keys[fmt.Sprint(id, ":1")])
		}
	})

	// While Redis is away it is asked once a second, not for every list.
	before, begin := errors(), time.Now()
	p.Shut()
	for range lists {
		harness.Equal(t, len(b.List(t, half, 1).Goods), half, "goods of a list without Redis")
	}
	if n, most := errors()-before, 3+2*time.Since(begin).Seconds(); n < 1 || n > most {
		t.Errorf("%d lists without Redis: it failed %g times, want 1 to %g", lists, n, most)
	}
	p.Spoil(tap.count, harness.Forward)
	awaitHits(2*half, "with Redis again", func() {})

	// When it ends all connections, they are not tried one after the other.
	late := func(to net.Conn, part []byte) error {
		<-time.After(50 * time.Millisecond)
		return harness.Forward(to, part)
	}
	p.Spoil(tap.count, late)
	harness.AwaitEqual(t, 20*time.Second, func() bool {
		tap.connections()
		harness.Together(3, func(i int) {
			switch i {
			case 0:
				b.List(t, half, 1)
			case 1:
				projectPage(t, b, 1, half, 1)
			default:
				for range 8 { // what was cached of it is deleted in the background
					ok(t, b, "PATCH", "/goods/update"+target(1), someName)
				}
			}
		})
		return tap.connections() >= 6
	}, true, "six connections at once")
	p.Spoil(tap.count, harness.Forward)
	<-time.After(500 * time.Millisecond) // none of them is in use any more
	before = errors()
	p.Cut()
	awaitHits(2*half, "after the end of all connections", func() {})
	if n := errors() - before; n > 2 {
		t.Errorf("after the end of all connections Redis failed %g times, want once", n)
	}
	w.Settled(t, 15*time.Second)
}

// When another database takes the place of the one that the service has, as in a restore, lists show what
// that has, though its goods have the same versions with other content, and the stream is left alone.
func TestDatabaseReplaced(t *testing.T) {
	w, a := started(t)
	a.Stock(t, 3)
	a.List(t, 10, 1) // from now on the replica holds them itself
	cached(t, w, "1:1", "2:1", "3:1")

	name := harness.One[string](t, w, `SELECT current_database()`)
	admin, err := sql.Open("postgres", harness.WithPath(t, w.Env["POSTGRES_URL"], "postgres"))
	harness.Must(t, err)
	defer admin.Close()
	exec := func(statements ...string) {
		t.Helper()
		for _, statement := range statements {
			_, err := admin.Exec(statement)
			harness.Must(t, err)
		}
	}
	exec(`ALTER DATABASE `+name+` ALLOW_CONNECTIONS false`,
		`SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = '`+name+`'`,
		`CREATE DATABASE `+name+`_restored TEMPLATE `+name)
	restored, err := sql.Open("postgres", harness.WithPath(t, w.Env["POSTGRES_URL"], name+"_restored"))
	harness.Must(t, err)
	defer restored.Close()
	_, err = restored.Exec(`SET session_replication_role = replica; UPDATE goods SET name = 'restored'`)
	harness.Must(t, err)
	restored.Close()
	exec(`ALTER DATABASE `+name+` RENAME TO `+name+`_old`,
		`ALTER DATABASE `+name+`_restored RENAME TO `+name)
	t.Cleanup(func() { w.Exec(t, `DROP DATABASE `+name+`_old WITH (FORCE)`) })

	for _, replica := range []*harness.App{a, a, w.Start(t)} {
		var reply harness.Reply
		harness.Eventually(t, 15*time.Second, func() error {
			reply = replica.Call(t, "GET", "/goods/list", "")
			if reply.Status == 503 { // the first that finds its connection gone
				return fmt.Errorf("got %s", reply.Body)
			}
			return nil
		})
		restored := strings.Count(reply.Body, `"name":"restored"`)
		harness.Equal(t, restored, 3, "restored goods in %s", reply.Body)
	}
	// The stream has events of the database before: they do not get into the history of this one.
	for _, part := range []string{"relay", "consumer"} {
		failures := func() int { return inLog(a, "failing", part) }
		harness.AwaitEqual(t, 15*time.Second, failures, 1, "failures of the %s", part)
	}
	ready(t, a, "nats")
}
