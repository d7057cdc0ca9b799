package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// nowhere is a ClickHouse that does not answer: events stay in NATS.
const nowhere = "CLICKHOUSE_URL=clickhouse://127.0.0.1:1/default"

// waiting waits until n messages are in the stream, and the relay is done.
func (w *world) waiting(t testing.TB, n int) jetstream.Stream {
	t.Helper()
	var stream jetstream.Stream
	eventually(t, 10*time.Second, func() error {
		var err error
		if stream, err = w.js.Stream(context.Background(), w.stream()); err != nil {
			return err
		}
		left := one[int](t, w, `SELECT count(*) FROM outbox WHERE published_at IS NULL`)
		if got := int(stream.CachedInfo().State.Msgs); got != n || left > 0 {
			return fmt.Errorf("%d messages are in the stream and %d events are not published, want %d and 0", got, left, n)
		}
		return nil
	})
	return stream
}

// emptied waits until every message in the stream is acknowledged.
func (w *world) emptied(t testing.TB) {
	t.Helper()
	eventually(t, 30*time.Second, func() error {
		s, err := w.js.Stream(context.Background(), w.stream())
		if err == nil && s.CachedInfo().State.Msgs > 0 {
			err = fmt.Errorf("%d messages are left", s.CachedInfo().State.Msgs)
		}
		return err
	})
}

// insertSizes returns the rows of each INSERT that ClickHouse has seen.
func (w *world) insertSizes(t testing.TB) []int {
	t.Helper()
	rows, err := w.clickhouse.Query(context.Background(),
		`SELECT rows FROM system.parts WHERE database = currentDatabase() AND table = 'goods_log' AND level = 0 ORDER BY name`)
	must(t, err)
	defer rows.Close()
	var sizes []int
	for rows.Next() {
		var n uint64
		must(t, rows.Scan(&n))
		sizes = append(sizes, int(n))
	}
	must(t, rows.Err())
	return sizes
}

func TestEventsFiveAtATime(t *testing.T) {
	w := newWorld(t)
	a := w.start(t)
	a.stock(t, 40)
	for i := range 60 {
		want[good](t, a, 200, "PATCH", fmt.Sprintf("/goods/update?id=%d&projectId=1", 1+i%7), fmt.Sprintf(`{"name":"n%d"}`, i))
	}
	for id := 1; id <= 3; id++ {
		want[json.RawMessage](t, a, 200, "DELETE", fmt.Sprintf("/goods/remove?id=%d&projectId=1", id), "")
	}
	eventually(t, 2*time.Second, func() error {
		if n := w.logged(t); n != 103 {
			return fmt.Errorf("ClickHouse has %d events two seconds after the last write, want 103", n)
		}
		return nil
	})
	if n := w.settled(t, 5*time.Second); n != 103 {
		t.Errorf("got %d events, want 103", n)
	}
	sizes := w.insertSizes(t)
	slices.Sort(sizes)
	if len(sizes) != 21 || sizes[0] != 3 || sizes[1] != 5 || sizes[20] != 5 {
		t.Errorf("got INSERTs of %v rows, want 3 and twenty times 5", sizes)
	}
}

func TestEventsBatchSize(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.start(t, "EVENTS_BATCH=1")
	a.stock(t, 4)
	w.settled(t, 5*time.Second)
	if got := w.insertSizes(t); !slices.Equal(got, []int{1, 1, 1, 1}) {
		t.Errorf("got INSERTs of %v rows, want four of 1", got)
	}
}

func TestEventsStreamDeleted(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.start(t, nowhere)
	a.stock(t, 12)
	w.waiting(t, 12)
	must(t, w.js.DeleteStream(context.Background(), w.stream()))
	must(t, a.stop())

	b := w.start(t) // finds no stream, and events that were published
	if n := w.settled(t, 15*time.Second); n != 12 {
		t.Errorf("got %d events, want 12", n)
	}
	must(t, w.js.DeleteStream(context.Background(), w.stream()))
	b.create(t, "after") // while the service runs
	if n := w.settled(t, 15*time.Second); n != 13 {
		t.Errorf("got %d events, want 13", n)
	}
}

// The messages vanish while the stream stays, as after a crash of NATS.
func TestEventsLostByNATS(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.start(t, nowhere)
	a.stock(t, 7)
	stream := w.waiting(t, 7)
	must(t, a.stop())
	must(t, stream.Purge(context.Background()))
	w.start(t)
	eventually(t, 50*time.Second, func() error {
		// Half a minute is not waited for, but NATS' own window for repeats is.
		must(t, errorOf(w.db.Exec(`UPDATE outbox SET published_at = published_at - interval '1 hour'`)))
		if n := one[int](t, w, `SELECT count(*) FROM outbox`); n > 0 {
			return fmt.Errorf("%d events are still in the outbox", n)
		}
		return nil
	})
	if n := w.settled(t, 5*time.Second); n != 7 {
		t.Errorf("got %d events, want 7", n)
	}
}

func TestEventsTwice(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	w := newWorld(t)
	a := w.start(t, nowhere)
	a.stock(t, 5)
	stream := w.waiting(t, 5)

	// The mark was lost: the relay publishes again, and NATS knows the names.
	must(t, errorOf(w.db.Exec(`UPDATE outbox SET published_at = NULL`)))
	w.waiting(t, 5)

	// NATS has forgotten the names: the same events are in the stream twice.
	first := stream.CachedInfo().State.FirstSeq
	for i := range uint64(5) {
		m, err := stream.GetMsg(ctx, first+i)
		must(t, err)
		must(t, errorOf(w.js.Publish(ctx, w.subject(), m.Data)))
	}
	w.waiting(t, 10)
	must(t, a.stop())
	w.start(t)
	w.emptied(t)
	if n := w.settled(t, 5*time.Second); n != 5 {
		t.Errorf("got %d distinct events, want 5", n)
	}
	total := 0
	for _, n := range w.insertSizes(t) {
		total += n
	}
	if total != 10 {
		t.Errorf("got %d inserted rows, want each of 5 twice", total)
	}
}

// The service is killed after it has inserted a batch and before it has
// acknowledged it: the batch is delivered again.
func TestEventsKilledBetweenInsertAndAck(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.start(t, nowhere)
	a.stock(t, 5)
	w.waiting(t, 5)
	must(t, a.stop())

	tx := w.hold(t, `SELECT FROM outbox FOR UPDATE`) // holds the outbox, so that its rows can not be deleted
	b := w.exec(t)
	eventually(t, 20*time.Second, func() error {
		if _, err := w.js.Stream(context.Background(), w.stream()); err != nil {
			return err
		}
		if n := len(w.insertSizes(t)); n == 0 {
			return fmt.Errorf("nothing is inserted")
		}
		return nil
	})
	must(t, b.process.Signal(os.Kill))
	if err := b.stop(); err == nil {
		t.Error("the process ended well, want it killed")
	}
	must(t, tx.Rollback())

	w.start(t)
	w.emptied(t)
	if n := w.settled(t, 5*time.Second); n != 5 {
		t.Errorf("got %d distinct events, want 5", n)
	}
	if got := len(w.insertSizes(t)); got < 2 {
		t.Errorf("got %d INSERTs, want the batch inserted again", got)
	}
}

func TestEventsGarbage(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	w := newWorld(t)
	a := w.start(t)
	a.create(t, "before")
	w.settled(t, 5*time.Second)
	garbage := []string{"", "no event \x00\xff", "null", "[]", `{"id":1}`, `{"outbox":-1,"id":1,"projectId":1,"version":1,"time":"2026-01-02T15:04:05Z"}`, strings.Repeat("x", 100_000)}
	for _, g := range garbage {
		must(t, errorOf(w.js.Publish(ctx, w.subject(), []byte(g))))
	}
	a.create(t, "after")
	if n := w.settled(t, 10*time.Second); n != 2 {
		t.Errorf("got %d events, want 2", n)
	}
	eventually(t, 10*time.Second, func() error {
		metrics := a.call(t, "GET", "/metrics", "").body
		if want := fmt.Sprintf("goods_events_thrown_away_total %d\n", len(garbage)); !strings.Contains(metrics, want) {
			return fmt.Errorf("no %q in the metrics", want)
		}
		return nil
	})
	if !strings.Contains(a.log.String(), strings.Repeat("x", 100_000)) {
		t.Error("the log does not have the whole message")
	}
	w.emptied(t)
}

// Writes made by hand are logged like any other.
func TestEventsByHand(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.start(t)
	must(t, errorOf(w.db.Exec(`INSERT INTO goods (project_id, name) SELECT 1, n::text FROM generate_series(1, 12) AS n`)))
	must(t, errorOf(w.db.Exec(`UPDATE goods SET removed = true WHERE id % 2 = 0`)))
	if n := w.settled(t, 10*time.Second); n != 18 {
		t.Errorf("got %d events, want 18", n)
	}
	if got := a.list(t, 10, 1).Meta; got.Total != 12 || got.Removed != 6 {
		t.Errorf("got %+v", got)
	}
}
