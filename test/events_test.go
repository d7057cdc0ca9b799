package test

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"goods/test/harness"
)

// nowhere is a ClickHouse that does not answer: events stay in NATS.
const nowhere = "CLICKHOUSE_URL=clickhouse://127.0.0.1:1/default"

// published waits until every event in the outbox is published, and returns the messages in the stream.
func published(t testing.TB, w *harness.World) []*jetstream.RawStreamMsg {
	t.Helper()
	harness.Eventually(t, 15*time.Second, func() error {
		var left int
		err := w.DB.QueryRow(`SELECT count(*) FROM outbox WHERE published_at IS NULL`).Scan(&left)
		if err == nil && left > 0 {
			err = fmt.Errorf("%d events are not published", left)
		}
		return err
	})
	stream := stream(t, w)
	var messages []*jetstream.RawStreamMsg
	for n, state := uint64(0), stream.CachedInfo().State; n < state.Msgs; n++ {
		m, err := stream.GetMsg(t.Context(), state.FirstSeq+n)
		harness.Must(t, err)
		messages = append(messages, m)
	}
	return messages
}

// events counts the events in messages.
func events(t testing.TB, messages []*jetstream.RawStreamMsg) (n int) {
	t.Helper()
	for _, m := range messages {
		var list []json.RawMessage
		harness.Must(t, json.Unmarshal(m.Data, &list))
		n += len(list)
	}
	return n
}

func stream(t testing.TB, w *harness.World) jetstream.Stream {
	t.Helper()
	s, err := w.JS.Stream(t.Context(), w.Stream())
	harness.Must(t, err)
	return s
}

// emptied waits until every message in the stream is acknowledged.
func emptied(t testing.TB, w *harness.World) {
	t.Helper()
	harness.Eventually(t, 30*time.Second, func() error {
		if n := stream(t, w).CachedInfo().State.Msgs; n > 0 {
			return fmt.Errorf("%d messages are left", n)
		}
		return nil
	})
}

// insertSizes returns the rows of each INSERT that ClickHouse has seen, sorted.
func insertSizes(t testing.TB, w *harness.World) (sizes []int) {
	t.Helper()
	rows, err := w.ClickHouse.Query(context.Background(),
		`SELECT rows FROM system.parts WHERE database = currentDatabase() AND table = 'goods_log' AND level = 0`)
	harness.Must(t, err)
	defer rows.Close()
	for rows.Next() {
		var n uint64
		harness.Must(t, rows.Scan(&n))
		sizes = append(sizes, int(n))
	}
	harness.Must(t, rows.Err())
	slices.Sort(sizes)
	return sizes
}

// What is fewer than a batch does not wait for more than a second.
func TestEventsFiveAtATime(t *testing.T) {
	t.Parallel()
	for batch, want := range map[string][]int{"5": {3, 5, 5, 5, 5}, "1": slices.Repeat([]int{1}, 23), "1000": {23}} {
		w := harness.NewWorld(t)
		w.Start(t, "EVENTS_BATCH="+batch)
		// Writes by hand are logged like any other.
		w.Exec(t, `INSERT INTO goods (project_id, name) SELECT 1, n::text FROM generate_series(1, 13) AS n; UPDATE goods SET removed = true WHERE id <= 10`)
		harness.Equal(t, w.Settled(t, 15*time.Second), 23, "events")
		harness.Equal(t, insertSizes(t, w), want, "EVENTS_BATCH=%s: rows of the INSERTs", batch)
	}
}

func TestStreamDeleted(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	a := w.Start(t, nowhere)
	a.Stock(t, 12)
	harness.Equal(t, events(t, published(t, w)), 12, "events in the stream")
	harness.Must(t, w.JS.DeleteStream(t.Context(), w.Stream()))
	harness.Must(t, a.Stop())

	w.Start(t) // finds no stream, and events that were published
	harness.Equal(t, w.Settled(t, 30*time.Second), 12, "events")

	// The same while the service runs, and nothing is written afterwards that could show the loss.
	harness.Must(t, w.ClickHouse.Exec(t.Context(), `RENAME TABLE goods_log TO away`))
	w.Exec(t, `UPDATE goods SET name = 'x'`)
	published(t, w)
	harness.Must(t, w.JS.DeleteStream(t.Context(), w.Stream()))
	harness.Must(t, w.ClickHouse.Exec(t.Context(), `RENAME TABLE away TO goods_log`))
	harness.Equal(t, w.Settled(t, 30*time.Second), 24, "events")
}

// The messages vanish while the stream stays, as after a crash of NATS.
func TestEventsLostByNATS(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	a := w.Start(t, nowhere)
	a.Stock(t, 7)
	published(t, w)
	harness.Must(t, a.Stop())
	harness.Must(t, stream(t, w).Purge(t.Context()))
	w.Start(t)
	harness.Eventually(t, time.Minute, func() error {
		// As if half a minute had passed.
		w.Exec(t, `UPDATE outbox SET published_at = published_at - interval '1 hour'`)
		if n := harness.One[int](t, w, `SELECT count(*) FROM outbox`); n > 0 {
			return fmt.Errorf("%d events are still in the outbox", n)
		}
		return nil
	})
	harness.Equal(t, w.Settled(t, time.Second), 7, "events")
}

func TestEventsTwice(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	a := w.Start(t, nowhere)
	w.Exec(t, `INSERT INTO goods (project_id, name) SELECT 1, n::text FROM generate_series(1, 10) AS n`)
	messages := published(t, w)

	// The mark was lost: the relay publishes again.
	w.Exec(t, `UPDATE outbox SET published_at = NULL`)
	harness.Equal(t, events(t, published(t, w)), 20, "events in the stream")
	// What was published comes once more, the newest first.
	slices.Reverse(messages)
	for _, m := range messages {
		_, err := w.JS.Publish(t.Context(), w.Subject(), m.Data)
		harness.Must(t, err)
	}
	harness.Must(t, a.Stop())
	w.Start(t)
	emptied(t, w)
	harness.Equal(t, w.Settled(t, 15*time.Second), 10, "distinct events")
	harness.Equal(t, insertSizes(t, w), []int{5, 5, 5, 5, 5, 5}, "rows of the INSERTs, each of 10 three times")
}

// The service is killed after it has inserted a batch and before it has deleted the rows and acknowledged the
// message: the batch comes again.
func TestKilledBetweenInsertAndAck(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	a := w.Start(t, nowhere)
	w.Exec(t, `INSERT INTO goods (project_id, name) SELECT 1, n::text FROM generate_series(1, 5) AS n`)
	published(t, w)
	harness.Must(t, a.Stop())

	tx := w.Hold(t, `SELECT FROM outbox FOR UPDATE`)
	b := w.Start(t)
	inserted := func(times int) {
		t.Helper()
		harness.Eventually(t, 30*time.Second, func() error {
			if _, err := w.JS.Stream(t.Context(), w.Stream()); err != nil {
				return err
			}
			if sizes := insertSizes(t, w); len(sizes) < times {
				return fmt.Errorf("got INSERTs of %v rows, want %d", sizes, times)
			}
			return nil
		})
	}
	inserted(1)
	harness.Must(t, b.Process.Kill())
	_ = b.Stop() // says that it was killed
	harness.Must(t, tx.Rollback())

	w.Start(t)
	inserted(2)
	emptied(t, w)
	harness.Equal(t, w.Settled(t, 15*time.Second), 5, "distinct events")
}

// What is not an event is logged, counted, and in nobody's way.
func TestGarbageInTheStream(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	a := w.Start(t)
	a.Create(t, "before")
	w.Settled(t, 15*time.Second)
	const event = `"id":1,"projectId":1,"version":1,"time":"2026-01-02T15:04:05Z"`
	garbage := []string{
		"", "no event \x00\xff", "null", "[]", "{}", "1", `"text"`, "[", "[1]", strings.Repeat("x", 100_000), `{"outbox":1,` + event + `}`,
		`[{"outbox":-1,` + event + `}]`, `[{` + event + `}]`,
		`[{"outbox":1,"id":"1","projectId":1,"version":1,"time":"2026-01-02T15:04:05Z"}]`,
		`[{"outbox":1,"id":1,"projectId":1,"version":-1,"time":"2026-01-02T15:04:05Z"}]`,
		`[{"outbox":1,"id":99999999999,"projectId":1,"version":1,"time":"2026-01-02T15:04:05Z"}]`,
		`[{"outbox":1,"id":1,"projectId":1,"version":1,"time":"1906-01-02T15:04:05Z"}]`,
		`[{"outbox":1,"id":1,"projectId":1,"version":1,"time":"2206-01-02T15:04:05Z"}]`,
		`[{"outbox":1,"id":1,"projectId":1,"version":1,"time":"yesterday"}]`,
	}
	for _, g := range garbage {
		_, err := w.JS.Publish(t.Context(), w.Subject(), []byte(g))
		harness.Must(t, err)
	}
	a.Create(t, "after")
	emptied(t, w)
	harness.Equal(t, w.Settled(t, 30*time.Second), 2, "events")
	a.AwaitLines(t, "message thrown away", len(garbage))
	harness.Equal(t, int(value(t, a, "goods_events_thrown_away_total")), len(garbage), "messages thrown away")
}
