package test

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"goods/test/harness"
)

// nowhere is a ClickHouse that does not answer: events stay in NATS.
const nowhere = "CLICKHOUSE_URL=clickhouse://127.0.0.1:1/default"

// published waits until every event in the outbox is published.
func published(t testing.TB, w *harness.World) {
	t.Helper()
	waiting := func() int {
		return harness.One[int](t, w, `SELECT count(*) FROM outbox WHERE published_at IS NULL`)
	}
	harness.AwaitEqual(t, 15*time.Second, waiting, 0, "events that are not published")
}

// passTime makes the events look as if so much more time had passed since they were published. It takes no
// row's lock while the service may hold another's.
func passTime(t testing.TB, w *harness.World, interval string) {
	t.Helper()
	w.Exec(t, `
LOCK TABLE outbox IN EXCLUSIVE MODE;
UPDATE outbox SET published_at = published_at - interval '`+interval+`'`)
}

func stream(t testing.TB, w *harness.World) jetstream.Stream {
	t.Helper()
	s, err := w.JS.Stream(t.Context(), w.Stream())
	harness.Must(t, err)
	return s
}

// insertSizes returns the rows of each INSERT that ClickHouse has seen, sorted.
func insertSizes(t testing.TB, w *harness.World) (sizes []uint64) {
	t.Helper()
	harness.Must(t, w.ClickHouse.QueryRow(t.Context(), `
SELECT arraySort(groupArray(rows))
FROM system.parts
WHERE database = currentDatabase() AND table = 'goods_log' AND level = 0`).Scan(&sizes))
	return sizes
}

// makeGoods makes n goods by hand, with an event each.
func makeGoods(t testing.TB, w *harness.World, n int) {
	t.Helper()
	w.Exec(t, fmt.Sprintf(`
INSERT INTO goods (project_id, name)
SELECT 1, n::text FROM generate_series(1, %d) AS n`, n))
}

// Unless told otherwise, five are a batch. What is fewer than that does not wait for more than a second.
func TestEventsFiveAtATime(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		batch  string
		events int
		want   []uint64
	}{
		{"", 23, []uint64{3, 5, 5, 5, 5}},
		{"1", 23, slices.Repeat([]uint64{1}, 23)},
		{"1000", 23, []uint64{23}},
		{"700", 1500, []uint64{100, 700, 700}},
	} {
		w := harness.NewWorld(t)
		w.Start(t, "EVENTS_BATCH="+test.batch)
		// Writes by hand are logged like all others.
		w.Exec(t, fmt.Sprintf(`
INSERT INTO goods (project_id, name) SELECT 1, n::text FROM generate_series(1, %d) AS n;
UPDATE goods SET removed = true WHERE id <= 10`, test.events-10))
		harness.Equal(t, w.Settled(t, 15*time.Second), test.events, "events")
		harness.Equal(t, insertSizes(t, w), test.want, "EVENTS_BATCH=%s: rows of the INSERTs", test.batch)
	}
}

// The events of a write are published at once, not when the relay next looks for some.
func TestWritesWakeTheRelay(t *testing.T) {
	w, a := started(t, "EVENTS_BATCH=1")
	const times = 5
	a.Stock(t, 2+times)
	for name, write := range map[string]func(n int){
		"create": func(n int) { a.Create(t, fmt.Sprint(n)) },
		"update": func(n int) { ok(t, a, "PATCH", "/goods/update"+target(1), someName) },
		"move": func(n int) {
			body := fmt.Sprintf(`{"newPriority":%d}`, 2-n%2)
			ok(t, a, "PATCH", "/goods/reprioritize"+target(1), body)
		},
		"remove": func(n int) { ok(t, a, "DELETE", "/goods/remove"+target(3+n), "") },
	} {
		published(t, w)
		fastest := time.Hour
		for n := range times {
			begin := time.Now()
			write(n)
			published(t, w)
			fastest = min(fastest, time.Since(begin))
		}
		if fastest > relayPoll {
			t.Errorf("%s: its event was published after %v at best, want less than %v", name, fastest, relayPoll)
		}
	}
}

// relayPoll is the least time between two looks of the relay for events that nobody has told it of.
const relayPoll = 400 * time.Millisecond

// Events from before a clock was set back do not wait until it is that late again.
func TestClockSetBack(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	goods(t, w, "migrate postgres")
	makeGoods(t, w, 3) // fewer than a batch
	w.Exec(t, `UPDATE outbox SET event_time = event_time + interval '1 hour'`)
	w.Start(t)
	harness.Equal(t, w.Settled(t, 15*time.Second), 3, "events")
}

// What NATS loses travels again.
func TestEventsLostByNATS(t *testing.T) {
	w, a := started(t, nowhere)
	makeGoods(t, w, 12)
	published(t, w)
	harness.Must(t, w.JS.DeleteStream(t.Context(), w.Stream()))
	harness.Must(t, a.Stop())
	b := w.Start(t) // finds no stream, and events that were published
	harness.Equal(t, w.Settled(t, 30*time.Second), 12, "events")
	if n := value(t, b, "goods_events_requeued_total", ""); n < 12 {
		t.Errorf("got %g events that were published again, want 12 at least", n)
	}
	when := func(message string) time.Time {
		t.Helper()
		at, err := time.Parse(time.RFC3339Nano, fmt.Sprint(b.AwaitLines(t, message, 1)[0]["time"]))
		harness.Must(t, err)
		return at
	}
	took := when("events that nats lost are published again").Sub(when("listening"))
	if took > 4*time.Second {
		t.Errorf("they were published again after %v, want that at once, as the stream is new", took)
	}

	// The same while the service runs, and nothing is written afterwards that could show the loss.
	lose := func(how func() error) {
		t.Helper()
		show := w.HideLog(t)
		w.Exec(t, `UPDATE goods SET name = name || '+'`)
		published(t, w)
		harness.Must(t, how())
		show()
	}
	lose(func() error { return w.JS.DeleteStream(t.Context(), w.Stream()) })
	harness.Equal(t, w.Settled(t, 30*time.Second), 24, "events")

	// The messages vanish while the stream stays, as after a crash of NATS.
	lose(func() error { return stream(t, w).Purge(t.Context()) })
	harness.AwaitEqual(t, time.Minute, func() int {
		passTime(t, w, "-1 hour") // as if the clock had been set back; TestForgedMessages lets time pass
		return harness.One[int](t, w, `SELECT count(*) FROM outbox`)
	}, 0, "events in the outbox")
	harness.Equal(t, w.Settled(t, time.Second), 36, "events")
}

// The service is killed after it has inserted a batch and before it has deleted the rows and acknowledged the
// message: the batch comes again.
func TestKilledBetweenInsertAndAck(t *testing.T) {
	w, a := started(t, nowhere)
	makeGoods(t, w, 5)
	published(t, w)
	harness.Must(t, a.Stop())

	tx := w.Hold(t, `SELECT FROM outbox FOR UPDATE`)
	b := w.Start(t)
	inserted := func(times int) {
		t.Helper()
		harness.AwaitEqual(t, 30*time.Second, func() bool {
			return len(insertSizes(t, w)) >= times
		}, true, "%d INSERTs or more", times)
	}
	inserted(1)
	harness.Must(t, b.Process.Kill())
	harness.Must(t, tx.Rollback())

	w.Start(t)
	inserted(2)
	harness.Equal(t, w.Settled(t, 15*time.Second), 5, "distinct events")

	// In time, merges remove what was inserted twice. Here they are told to.
	harness.Must(t, w.ClickHouse.Exec(t.Context(), `OPTIMIZE TABLE goods_log FINAL`))
	var rows uint64
	harness.Must(t, w.ClickHouse.QueryRow(t.Context(), `SELECT count() FROM goods_log`).Scan(&rows))
	harness.Equal(t, rows, 5, "rows after a merge")
}

// A message is acknowledged when its rows are deleted, not before.
func TestRowsThatStay(t *testing.T) {
	w, a := started(t)
	w.Exec(t, `
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
$$
BEGIN
    RAISE EXCEPTION 'rows stay';
END
$$;
CREATE TRIGGER refuse
    BEFORE DELETE ON outbox
    FOR EACH ROW EXECUTE FUNCTION refuse()`)
	makeGoods(t, w, 3)
	line := a.AwaitLines(t, "failing", 1)[0]
	harness.Equal(
		t,
		strings.Contains(fmt.Sprint(line["err"]), "rows stay"),
		true,
		"the line %v tells the cause",
		line,
	)
	harness.Equal(t, stream(t, w).CachedInfo().State.Msgs, 1, "messages in the stream")
	w.Exec(t, `DROP TRIGGER refuse ON outbox`)
	harness.Equal(t, w.Settled(t, 15*time.Second), 3, "events")
}

// What is not an event is logged, counted, and in nobody's way.
func TestGarbageInTheStream(t *testing.T) {
	w, a := started(t)
	a.Create(t, "before")
	w.Settled(t, 15*time.Second)
	const event = `"id":1,"good_id":1,"project_id":1,"version":1,"event_time":"2026-01-02T15:04:05Z"`
	garbage := []string{
		"", "no event \x00\xff", "null", "[]", "{}", "1", `"text"`, "[", "[1]", strings.Repeat("x", 100_000),
		"{" + event + "}",
	}
	for _, change := range [][2]string{
		{`"id":1,`, ``}, {`"id":1`, `"id":-1`},
		{`"good_id":1`, `"good_id":"1"`}, {`"good_id":1`, `"good_id":99999999999`},
		{`"project_id":1`, `"project_id":0`}, {`"version":1`, `"version":-1`},
		{`2026-01-02T15:04:05Z`, `1969-12-31T23:59:59Z`},
		{`2026-01-02T15:04:05Z`, `2106-01-01T00:00:00Z`},
		{`2026-01-02T15:04:05Z`, `yesterday`},
	} {
		garbage = append(garbage, "[{"+strings.Replace(event, change[0], change[1], 1)+"}]")
	}
	for _, g := range garbage {
		_, err := w.JS.Publish(t.Context(), w.Subject(), []byte(g))
		harness.Must(t, err)
	}
	a.Create(t, "after")
	left := func() uint64 { return stream(t, w).CachedInfo().State.Msgs }
	harness.AwaitEqual(t, 30*time.Second, left, 0, "messages in the stream")
	harness.Equal(t, w.Settled(t, 30*time.Second), 2, "events")
	a.AwaitLines(t, "message rejected", len(garbage))
	harness.Equal(t, int(value(t, a, "goods_events_rejected_total", "")), len(garbage), "messages rejected")
	harness.Equal(t, value(t, a, "goods_events_batches_total", ""), 2, "INSERTs")
}

// The times of versions are taken when their locks are held, so they never run backwards, however long a
// call waited.
func TestTimesOfVersions(t *testing.T) {
	w, a := started(t, "NATS_URL=nats://127.0.0.1:1") // the outbox keeps its rows
	a.Stock(t, 4)
	waiting := []struct{ method, path, body string }{
		{"POST", create, someName},
		{"PATCH", "/goods/reprioritize" + target(4), somePlace},
		{"PATCH", "/goods/update" + target(2), someName},
		{"DELETE", "/goods/remove" + target(3), ""},
	}
	tx := w.Hold(t, `SELECT lock_priorities(); SELECT FROM goods WHERE id IN (2, 3) FOR UPDATE`)
	var running sync.WaitGroup
	for _, call := range waiting {
		running.Go(func() {
			if r := a.Call(t, call.method, call.path, call.body); r.Status > 201 {
				t.Errorf("%s: got %d %s", call.path, r.Status, r.Body)
			}
		})
	}
	harness.AwaitEqual(t, 2*time.Second, func() bool {
		return harness.One[int](t, w, `
SELECT count(*)
FROM pg_stat_activity
WHERE datname = current_database() AND wait_event_type = 'Lock'`) >= 3 // the last two may be in one batch
	}, true, "the calls wait")
	w.Exec(t, `UPDATE goods SET name = 'by hand' WHERE id = 4`) // while the move of this good waits
	last := harness.One[int](t, w, `SELECT max(id) FROM outbox`)
	released := harness.One[string](t, w, `SELECT clock_timestamp()::text`)
	harness.Must(t, tx.Rollback())
	running.Wait()

	harness.Equal(t, harness.One[int](t, w, `
SELECT count(*)
FROM (
	SELECT event_time < lag(event_time) OVER (PARTITION BY good_id ORDER BY version) AS older FROM outbox
) AS o
WHERE older`), 0, "versions that are older than the one before")
	harness.Equal(t, harness.One[int](t, w, fmt.Sprintf(`
SELECT count(*) FROM outbox WHERE id > %d AND event_time < '%s'`, last, released)), 0,
		"versions that are older than their locks")
	harness.Equal(t, harness.One[int](t, w, fmt.Sprintf(`
SELECT count(*) FROM goods WHERE id = 5 AND created_at < '%s'`, released)), 0,
		"new goods that are older than their locks")

	last = harness.One[int](t, w, `SELECT max(id) FROM outbox`)
	w.Exec(t, `UPDATE goods SET name = name || '+'`)
	harness.Equal(t, harness.One[string](t, w, fmt.Sprintf(`
SELECT concat_ws(' ', count(*), count(DISTINCT event_time)) FROM outbox WHERE id > %d`, last)), "5 1",
		"events and moments of one statement")
}
