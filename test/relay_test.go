package test

import (
	"bytes"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"goods/test/harness"
)

// Events that are too few for a message wait for others for a second, and no longer: not for ever younger
// ones.
func TestIncompleteMessage(t *testing.T) {
	w, _ := started(t, nowhere, "EVENTS_BATCH=1000")
	harness.AwaitEqual(t, 15*time.Second, func() bool {
		makeGoods(t, w, 1)
		return harness.One[bool](t, w, `SELECT published_at IS NOT NULL FROM outbox WHERE id = 1`)
	}, true, "the oldest event is published while others come")
	wait := harness.One[float64](t, w, `
SELECT extract(epoch FROM published_at - event_time) FROM outbox WHERE id = 1`)
	if wait < 1 {
		t.Errorf("an incomplete message was published after %v s", wait)
	}
}

// An event keeps its time and its version. One whose time is in the future, since the clock was set back,
// does not wait until then.
func TestTimeAndVersion(t *testing.T) {
	w, a := started(t, "EVENTS_BATCH=50")
	const changes = 300 // are more than fit into a byte
	w.Exec(t, fmt.Sprintf(`
INSERT INTO goods (project_id, name) VALUES (1, 'x');
DO $$
BEGIN
    FOR n IN 1..%d LOOP
        UPDATE goods SET name = n::text;
    END LOOP;
END
$$;
UPDATE outbox SET event_time = '2040-02-03T04:05:06.789Z'`, changes))
	harness.Equal(t, w.Settled(t, 15*time.Second), changes+1, "events")
	page := harness.Want[historyPage](t, a, 200, "GET", "/goods/history"+target(1)+"&limit=1000", "")
	for i, v := range page.Versions {
		harness.Equal(t, v, version{
			Version: changes + 1 - i, Name: v.Name, Priority: 1, Time: "2040-02-03T04:05:06Z",
		}, "a version")
	}
}

// A write is published at once when it fills a message, and not when the relay looks the next time. Many
// events are published without pauses, the oldest first.
func TestRelayIsPrompt(t *testing.T) {
	w, a := started(t, nowhere, "EVENTS_BATCH=1")
	fastest := 1.0
	for range 5 {
		a.Create(t, "one")
		published(t, w) // after which the relay waits
		fastest = min(fastest, harness.One[float64](t, w, `
SELECT extract(epoch FROM published_at - event_time) FROM outbox ORDER BY id DESC LIMIT 1`))
	}
	if fastest > 0.4 {
		t.Errorf("the fastest of five events was published %v s after its write", fastest)
	}

	makeGoods(t, w, 2500) // five claims
	published(t, w)
	const gaps = `
SELECT concat_ws(' ', min(gap) < 0.4, bool_and(gap > 0))
FROM (
    SELECT extract(epoch FROM
        min(published_at) - lag(max(published_at)) OVER (ORDER BY (id - 6) / 500)) AS gap
    FROM outbox
    WHERE id > 5
    GROUP BY (id - 6) / 500
) AS claim`
	harness.Equal(t, harness.One[string](t, w, gaps), "t t",
		"claims follow each other without a pause, and the oldest comes first")
}

// Replicas share the events: none publishes what another one has claimed, or waits for it.
func TestReplicasShareEvents(t *testing.T) {
	w, a := started(t, nowhere, "EVENTS_BATCH=1")
	b := w.Start(t, nowhere, "EVENTS_BATCH=1")
	const events = 8000 // are more than one relay publishes until the other one looks
	makeGoods(t, w, events)
	published(t, w)
	sum := value(t, a, "goods_events_published_total", "") + value(t, b, "goods_events_published_total", "")
	harness.Equal(t, sum, events, "events that the replicas published")
	harness.Must(t, a.Stop())
	harness.Must(t, b.Stop())

	makeGoods(t, w, 12)
	claim := w.Hold(t, `
SELECT
FROM outbox
WHERE published_at IS NULL
ORDER BY id
LIMIT 1
FOR UPDATE`) // by a replica that is frozen
	w.Start(t, nowhere)
	harness.AwaitEqual(t, 15*time.Second, func() int {
		return harness.One[int](t, w, `SELECT count(*) FROM outbox WHERE published_at IS NULL`)
	}, 1, "events that are not published while one is locked")
	harness.Must(t, claim.Rollback())
	published(t, w)
}

// A claim reads what is not published yet, however much is published and waits for ClickHouse.
func TestClaimReadsNothingElse(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	goods(t, w, "migrate postgres")
	w.Exec(t, `
INSERT INTO outbox
    (good_id, project_id, name, description, priority, removed, version, event_time, published_at)
SELECT 1, 1, 'x', '', 1, false, n, now(), now() FROM generate_series(1, 30000) AS n;
ANALYZE outbox`)
	makeGoods(t, w, 3)
	claim := strings.ReplaceAll(string(harness.File(t, "sql/queries/claim_events.sql")), "$1", "500")
	tx := w.Hold(t, `SET LOCAL enable_seqscan = off`) // as the service has it
	rows, err := tx.Query("EXPLAIN (ANALYZE, BUFFERS) " + claim)
	harness.Must(t, err)
	defer rows.Close()
	var plan []string
	for rows.Next() {
		var line string
		harness.Must(t, rows.Scan(&line))
		plan = append(plan, line)
	}
	harness.Must(t, rows.Err())
	var hit, read int
	_, buffers, _ := strings.Cut(strings.Join(plan, "\n"), "Buffers: shared")
	_, _ = fmt.Sscanf(buffers, " hit=%d read=%d", &hit, &read) // one without the other is fine
	if pages := hit + read; pages == 0 || pages > 50 {
		t.Errorf("a claim of three events reads %d pages:\n%s", pages, strings.Join(plan, "\n"))
	}
}

// counted puts a proxy before a server, and returns the number of what the service has sent to it so far
// that contains text.
func counted(t testing.TB, w *harness.World, variable, text string) *atomic.Int64 {
	t.Helper()
	n := new(atomic.Int64)
	w.NewProxy(t, variable).Spoil(func(to net.Conn, part []byte) error {
		if bytes.Contains(part, []byte(text)) {
			n.Add(1)
		}
		return harness.Forward(to, part)
	}, harness.Forward)
	return n
}

// A service that has nothing to do, or waits for something, does not keep its servers busy.
func TestQuietWhileWaiting(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	requests := map[string]*atomic.Int64{}
	for name, variable := range servers {
		requests[name] = counted(t, w, variable, "")
	}
	const seconds, most = 3, 25 // a second
	quiet := func(while string) {
		t.Helper()
		before := map[string]int64{}
		for name, n := range requests {
			before[name] = n.Load()
		}
		<-time.After(seconds * time.Second)
		for name, n := range requests {
			if sent := n.Load() - before[name]; sent > most*seconds {
				t.Errorf("%s was sent %d requests in %d seconds %s", name, sent, seconds, while)
			}
		}
	}
	a := w.Start(t)
	ready(t, a)
	quiet("without anything to do")
	a.Create(t, "one")
	quiet("while one event waits for others")
}

// While NATS refuses, writes do not have the relay ask it more often.
func TestRelayIsPatient(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	asked := counted(t, w, "NATS_URL", "$JS.API.STREAM.INFO."+w.Stream())
	_, err := w.JS.CreateStream(t.Context(), jetstream.StreamConfig{
		Name:     w.Stream(), // as another application has it
		Subjects: []string{w.Namespace + ".orders"},
	})
	harness.Must(t, err)
	a := w.Start(t)
	warned(t, a, `"msg":"failing"`, `"name":"relay"`)
	const seconds = 3
	before := asked.Load()
	for begin := time.Now(); time.Since(begin) < seconds*time.Second; <-time.After(20 * time.Millisecond) {
		a.Create(t, "one")
	}
	// The relay, the consumer and /readyz ask once a second each.
	if n := asked.Load() - before; n > 4*(seconds+1) {
		t.Errorf("NATS was asked %d times in %d seconds", n, seconds)
	}
}

// Lost events may be published again by one replica while another still looks for them: they do not count
// as lost once more.
func TestPublishedWhileRequeued(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	goods(t, w, "migrate postgres")
	makeGoods(t, w, 5)
	// The triggers are the other replica.
	w.Exec(t, `
UPDATE outbox SET published_at = clock_timestamp() - interval '1 hour';
CREATE FUNCTION publish() RETURNS trigger LANGUAGE plpgsql AS
$$
BEGIN
    NEW.published_at := clock_timestamp();
    RETURN NEW;
END
$$;
CREATE TRIGGER publish
    BEFORE UPDATE ON outbox
    FOR EACH ROW WHEN (NEW.published_at IS NULL) EXECUTE FUNCTION publish();
CREATE FUNCTION take_time() RETURNS trigger LANGUAGE plpgsql AS
$$
BEGIN
    PERFORM pg_sleep(0.5);
    RETURN NULL;
END
$$;
CREATE TRIGGER take_time
    AFTER UPDATE ON outbox
    FOR EACH STATEMENT EXECUTE FUNCTION take_time()`)
	a := w.Start(t, nowhere)
	a.Create(t, "another")
	published(t, w)
	const name = "goods_events_requeued_total"
	harness.Equal(t, value(t, a, name, ""), 5, "events that were published again")
}
