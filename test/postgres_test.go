package test

import (
	"bytes"
	"fmt"
	"net"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"goods/test/harness"
)

// An answered write is on the disk of Postgres, whatever the default of the database is. What the URL says of
// a session holds.
func TestSessions(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	w.Env["POSTGRES_URL"] += "&statement_timeout=2345"
	w.Exec(t, `
DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET synchronous_commit = off', current_database()); END $$`)
	a := w.Start(t)
	w.Exec(t, `
CREATE TABLE writes (settings text);
CREATE FUNCTION note_settings() RETURNS trigger LANGUAGE plpgsql AS
$$
BEGIN
    INSERT INTO writes
    SELECT concat_ws(' ', current_setting('synchronous_commit'), current_setting('statement_timeout'));
    RETURN NULL;
END
$$;
CREATE TRIGGER note_settings
    AFTER INSERT OR UPDATE ON goods
    FOR EACH STATEMENT EXECUTE FUNCTION note_settings()`)
	a.Stock(t, 2)
	ok(t, a, "PATCH", "/goods/update"+target(1), someName)
	ok(t, a, "PATCH", "/goods/reprioritize"+target(2), somePlace)
	ok(t, a, "DELETE", "/goods/remove"+target(1), "")
	settings := harness.One[string](t, w, `SELECT string_agg(DISTINCT settings, ', ') FROM writes`)
	harness.Equal(t, settings, "on 2345ms", "synchronous_commit and statement_timeout of writes")
}

// What takes too long ends in Postgres, too: nothing goes on for callers who have gone. The log says what it
// was.
func TestSlowStatementsEnd(t *testing.T) {
	t.Parallel()
	const update = "/goods/update"
	for cause, slow := range map[string]string{
		"statement timeout": `SELECT pg_sleep(60)`,
		"lock timeout":      `SELECT lock_priorities()`, // which the test holds
	} {
		t.Run(cause, func(t *testing.T) {
			w, a := started(t)
			a.Stock(t, 2)
			w.Exec(t, fmt.Sprintf(`
CREATE FUNCTION be_slow() RETURNS trigger LANGUAGE plpgsql AS
$$
BEGIN
    EXECUTE '%s';
    RETURN NEW;
END
$$;
CREATE TRIGGER be_slow
    BEFORE UPDATE ON goods
    FOR EACH ROW WHEN (NEW.name = 'slow') EXECUTE FUNCTION be_slow()`, slow))
			tx := w.Hold(t, `SELECT lock_priorities()`)
			refused(t, a, 8, "PATCH", update+target(1), `{"name":"slow"}`)
			line := a.AwaitLines(t, "failing", 1)[0]
			told := strings.Contains(fmt.Sprint(line["err"]), cause)
			harness.Equal(t, told, true, "the line %v tells the cause", line)
			ok(t, a, "PATCH", update+target(2), `{"name":"quick"}`)
			harness.AwaitEqual(t, 10*time.Second, func() int {
				return harness.One[int](t, w, `
SELECT count(*)
FROM pg_stat_activity
WHERE datname = current_database() AND wait_event IN ('PgSleep', 'advisory')`)
			}, 0, "statements that go on")
			harness.Must(t, tx.Rollback())
			ok(t, a, "PATCH", update+target(1), `{"name":"quick"}`)
			w.Settled(t, 15*time.Second)
		})
	}
}

// A replica that freezes in the middle of a transaction holds its locks for a few seconds, not for good.
func TestFrozenReplica(t *testing.T) {
	w, a := started(t)
	b := w.Start(t)
	tx := w.Hold(t, `SELECT lock_priorities()`)
	var running sync.WaitGroup
	running.Go(func() { a.Call(t, "POST", create, someName) }) // gets 503, or 201 where it was quick
	awaitLock(t, w)
	harness.Must(t, a.Process.Signal(syscall.SIGSTOP))
	t.Cleanup(func() { _ = a.Process.Signal(syscall.SIGCONT) })
	harness.Must(t, tx.Rollback()) // the frozen replica gets the lock
	harness.Eventually(t, 15*time.Second, func() error {
		r := b.Call(t, "POST", create, someName)
		if r.Status != 201 {
			return fmt.Errorf("create on the other replica: got %d %s", r.Status, r.Body)
		}
		return nil
	})
	harness.Must(t, a.Process.Signal(syscall.SIGCONT))
	running.Wait()
	a.Create(t, "afterwards")
	w.Settled(t, 15*time.Second)
}

// The first host of the URL takes connections and says nothing: the second one gets its turn in time.
func TestSilentFirstHost(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	harness.Must(t, err)
	defer silent.Close()
	_, silentPort, err := net.SplitHostPort(silent.Addr().String())
	harness.Must(t, err)
	u, err := url.Parse(w.Env["POSTGRES_URL"])
	harness.Must(t, err)
	w.Env["POSTGRES_URL"] += fmt.Sprintf("&host=127.0.0.1,%s&port=%s,%s", u.Hostname(), silentPort, u.Port())
	a := w.Start(t)
	harness.Eventually(t, 15*time.Second, func() error {
		r := a.Call(t, "POST", create, someName)
		if r.Status != 201 {
			return fmt.Errorf("create: got %d %s", r.Status, r.Body)
		}
		return nil
	})
}

// The connection breaks in the middle of a reply: the list is read again, whole.
func TestTornReply(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	p := w.NewProxy(t, "POSTGRES_URL")
	a := w.Start(t, "NATS_URL=nats://127.0.0.1:1") // without NATS the relay reads no goods
	makeGoods(t, w, 100)
	w.Exec(t, `UPDATE goods SET name = 'a good to be torn'`)
	var torn atomic.Bool
	p.Spoil(harness.Forward, func(to net.Conn, part []byte) error {
		first := bytes.Index(part, []byte("to be torn"))
		last := bytes.LastIndex(part, []byte("to be torn"))
		if first == last || torn.Swap(true) {
			return harness.Forward(to, part)
		}
		_ = harness.Forward(to, part[:last]) // whole rows, and then a part of one
		return net.ErrClosed
	})
	harness.Equal(t, len(a.List(t, 50, 1).Goods), 50, "goods of the page")
	harness.Equal(t, torn.Load(), true, "a reply was torn")
	p.Pass()
}

// Equal lists that are asked for together are one page for Postgres.
func TestEqualLists(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	p := w.NewProxy(t, "POSTGRES_URL")
	a := w.Start(t)
	makeGoods(t, w, 1000)
	a.List(t, 90, 888) // is cached now
	var asked atomic.Int64
	p.Spoil(func(to net.Conn, part []byte) error {
		asked.Add(int64(bytes.Count(part, []byte("977")))) // the last position of the page
		return harness.Forward(to, part)
	}, harness.Forward)
	// One list waits for this lock, and the others form a batch.
	tx := w.Hold(t, `LOCK TABLE meta IN ACCESS EXCLUSIVE MODE`)
	time.AfterFunc(500*time.Millisecond, func() { _ = tx.Rollback() })
	const callers = 40
	harness.Together(callers, func(int) {
		harness.Equal(t, len(a.List(t, 90, 888).Goods), 90, "goods of the page")
	})
	if n := asked.Load(); n < 1 || n > callers/2 {
		t.Errorf("Postgres was asked for the page %d times by %d callers, want once or twice", n, callers)
	}
}

// A restore makes the table anew. The versions in it may come again with other content: what was cached of
// the table before is not shown.
func TestRestoredTable(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	p := w.NewProxy(t, "POSTGRES_URL")
	a := w.Start(t)
	makeGoods(t, w, 3)
	a.List(t, 10, 1)
	w.Exec(t, `
ALTER TABLE goods RENAME TO goods_before;
CREATE TABLE goods (LIKE goods_before INCLUDING ALL);
INSERT INTO goods OVERRIDING SYSTEM VALUE SELECT * FROM goods_before;
UPDATE goods SET name = 'restored'`)
	p.Cut() // a restore leaves no connection either
	for _, good := range a.List(t, 10, 1).Goods {
		harness.Equal(t, good.Name, "restored", "name of good %d", good.ID)
	}
}

// Calls of all kinds at once take a connection each, and leave it for the calls that follow.
func TestConnectionsAreKept(t *testing.T) {
	w, a := started(t)
	const times = 12
	makeGoods(t, w, times)
	for n := range times {
		tx := w.Hold(t, `LOCK TABLE goods IN ACCESS EXCLUSIVE MODE`)
		var running sync.WaitGroup
		for _, call := range calls {
			running.Go(func() {
				path := strings.Replace(call.path, target(1), target(1+n), 1)
				if r := a.Call(t, call.method, path, call.body); r.Status > 201 && r.Status != 404 {
					t.Errorf("%s: got %d %s", path, r.Status, r.Body) // a removed good gets 404
				}
			})
		}
		harness.AwaitEqual(t, 10*time.Second, func() bool {
			return harness.One[bool](t, w, `
SELECT count(*) >= 6 -- updates and removals have one in common
FROM pg_stat_activity
WHERE datname = current_database() AND wait_event_type = 'Lock'`)
		}, true, "each call has its connection")
		harness.Must(t, tx.Rollback())
		running.Wait()
	}
	sessions := harness.One[int](t, w, `
SELECT sessions
FROM pg_stat_database
WHERE datname = current_database()`)
	t.Logf("%d sessions", sessions)
	if most := 25 + 4 + 2 + 5; sessions > most { // for requests, for events, at the start, and the test's
		t.Errorf("got %d sessions in Postgres, want %d at most", sessions, most)
	}
}

// A session that cannot be set up is left at once: the server's connections are for sessions that are used.
func TestSessionsThatCannotBeSetUp(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	p := w.NewProxy(t, "POSTGRES_URL")
	a := w.Start(t, "NATS_URL=nats://127.0.0.1:1") // without NATS there are few sessions for events
	a.Create(t, "before")
	sessions := func() int {
		return harness.One[int](t, w, `
SELECT count(*)
FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()`)
	}
	p.Spoil(func(to net.Conn, part []byte) error {
		return harness.Forward(to, bytes.Replace(part, []byte("set_config("), []byte("sat_config("), 1))
	}, harness.Forward)
	p.Cut()
	const callers, each = 4, 10
	harness.Together(callers, func(int) {
		for range each {
			if r := a.Call(t, "POST", create, someName); r.Status < 500 {
				t.Errorf("got %d %s from sessions that are not set up", r.Status, r.Body)
			}
		}
	})
	harness.AwaitEqual(t, 10*time.Second, func() bool { return sessions() < callers }, true,
		"fewer than %d sessions are left", callers)
	p.Pass()
	a.Create(t, "afterwards")
}

// Two calls of a kind that wait for goods at the same time, the first two since the service began, do not get
// into each other's way.
func TestFirstCallsThatWait(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	p := w.NewProxy(t, "POSTGRES_URL")
	a := w.Start(t)
	makeGoods(t, w, 4)
	p.Spoil(func(to net.Conn, part []byte) error {
		lockGood := bytes.Contains(part, []byte("\nFOR UPDATE\x00"))
		lockRange := bytes.Contains(part, []byte("SELECT goods_in_range("))
		if lockGood || lockRange {
			<-time.After(200 * time.Millisecond) // the second call comes while the first prepares this
		}
		return harness.Forward(to, part)
	}, harness.Forward)
	tx := w.Hold(t, `SELECT FROM goods FOR UPDATE`)
	time.AfterFunc(500*time.Millisecond, func() { _ = tx.Rollback() })
	harness.Together(4, func(i int) {
		call := calls[1+i%2] // update and move
		ok(t, a, call.method, strings.Replace(call.path, target(1), target(1+i), 1), call.body)
	})
}
