package test

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"goods/test/harness"
)

func consumer(t testing.TB, w *harness.World) jetstream.Consumer {
	t.Helper()
	c, err := w.JS.Consumer(t.Context(), w.Stream(), "clickhouse")
	harness.Must(t, err)
	return c
}

// held waits until n messages are with replicas, and checks that none was delivered twice.
func held(t testing.TB, w *harness.World, n int) {
	t.Helper()
	harness.AwaitEqual(t, 15*time.Second, func() [2]int {
		info := consumer(t, w).CachedInfo()
		return [2]int{info.NumAckPending, info.NumRedelivered}
	}, [2]int{n, 0}, "messages that replicas have, and that were delivered again")
}

// The stream and its consumer are what the service needs, also after they were changed by hand.
func TestStreamIsSetUp(t *testing.T) {
	w, a := started(t)
	setUp := func() {
		t.Helper()
		harness.AwaitEqual(t, 15*time.Second, func() string {
			s := stream(t, w).CachedInfo().Config
			c := consumer(t, w).CachedInfo().Config
			return fmt.Sprint(s.Subjects, s.Storage, s.Retention, s.Discard, s.MaxMsgs, s.MaxAge, s.Replicas,
				c.AckPolicy, c.MaxDeliver)
		}, "["+w.Subject()+"] File WorkQueue DiscardNew 1000000 0s 1 AckExplicit -1",
			"the stream and its consumer")
	}
	ready(t, a)
	setUp()
	harness.Must(t, a.Stop())
	changedStream := stream(t, w).CachedInfo().Config
	changedStream.Discard = jetstream.DiscardOld
	changedStream.MaxMsgs = 2
	changedStream.MaxAge = time.Minute
	changedStream.Duplicates = time.Minute
	_, err := w.JS.UpdateStream(t.Context(), changedStream)
	harness.Must(t, err)
	changedConsumer := consumer(t, w).CachedInfo().Config
	changedConsumer.MaxDeliver = 3
	_, err = w.JS.UpdateConsumer(t.Context(), w.Stream(), changedConsumer)
	harness.Must(t, err)
	w.Start(t)
	setUp()
}

// A consumer that is deleted while the service runs is made anew, and is not asked for messages without end.
func TestConsumerDeleted(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	fetches := counted(t, w, "NATS_URL", "$JS.API.CONSUMER.MSG.NEXT.")
	a := w.Start(t)
	ready(t, a)
	lose := func() {
		t.Helper()
		harness.Must(t, w.JS.DeleteConsumer(t.Context(), w.Stream(), "clickhouse"))
		a.Create(t, "another")
	}
	for n := range 2 {
		a.Create(t, "one")
		w.Settled(t, 15*time.Second)
		<-time.After(time.Duration(n) * 500 * time.Millisecond) // in the middle of a fetch, which fails
		lose()
		harness.Equal(t, w.Settled(t, 20*time.Second), 2*n+2, "events")
	}
	told := strings.Contains(a.Log(), "consumer deleted")
	harness.Equal(t, told, true, "the log says that the consumer was deleted")
	show := w.HideLog(t)
	a.Create(t, "one")
	held(t, w, 1)
	lose() // between two fetches: those that follow just find nothing
	show()
	harness.Equal(t, w.Settled(t, 30*time.Second), 6, "events")
	if n := fetches.Load(); n > 500 {
		t.Errorf("the service asked for messages %d times", n)
	}
}

// A message that one replica after the other could not store is still stored.
func TestMessageDeliveredOften(t *testing.T) {
	w, a := started(t)
	ready(t, a)
	harness.Must(t, a.Stop())
	b := w.Start(t, nowhere)
	makeGoods(t, w, 5)
	published(t, w)
	harness.Must(t, b.Stop())
	for n := range 10 {
		m, err := consumer(t, w).Next(jetstream.FetchMaxWait(5 * time.Second))
		if err != nil {
			t.Fatalf("delivery %d: %v", n+1, err)
		}
		harness.Must(t, m.Nak())
	}
	w.Start(t)
	harness.Equal(t, w.Settled(t, 20*time.Second), 5, "events")
}

// While ClickHouse is away, a message stays with the replica that has it. That one tries again and again,
// though not more and more rarely.
func TestMessageStaysWithReplica(t *testing.T) {
	t.Parallel()
	for how, tries := range map[string]float64{"shut": 9, "frozen": 1} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			w := harness.NewWorld(t)
			p := w.NewProxy(t, "CLICKHOUSE_URL")
			a, b := w.Start(t), w.Start(t)
			ready(t, a)
			ready(t, b)
			var inProgress atomic.Int64
			_, err := w.JS.Conn().Subscribe("$JS.ACK."+w.Stream()+".>", func(m *nats.Msg) {
				if string(m.Data) == "+WPI" {
					inProgress.Add(1)
				}
			})
			harness.Must(t, err)
			resume := p.Pass
			if how == "shut" {
				p.Shut()
			} else {
				resume = p.Freeze()
			}
			makeGoods(t, w, 5)
			harness.AwaitEqual(t, 18*time.Second, func() bool {
				const name = "goods_events_insert_failures_total"
				return value(t, a, name, "")+value(t, b, name, "") >= tries
			}, true, "there were %v failed INSERTs", tries)
			held(t, w, 1)
			if n := inProgress.Load(); float64(n) < tries {
				t.Errorf("NATS was told %d times that the message is being worked on, want %v", n, tries)
			}
			resume()
			harness.Equal(t, w.Settled(t, 20*time.Second), 5, "events")
		})
	}
}

// One of several INSERTs fails again and again: its events stay, and the others are inserted once.
func TestOneInsertFails(t *testing.T) {
	w, a := started(t)
	ready(t, a)
	harness.Must(t, a.Stop())
	b := w.Start(t, nowhere, "EVENTS_BATCH=1")
	for _, name := range []string{"fine", "unwelcome", "fine as well"} {
		b.Create(t, name)
	}
	published(t, w)
	harness.Must(t, b.Stop())

	p := w.NewProxy(t, "CLICKHOUSE_URL")
	p.Spoil(func(to net.Conn, part []byte) error {
		if bytes.Contains(part, []byte("unwelcome")) {
			return errors.New("cut")
		}
		return harness.Forward(to, part)
	}, harness.Forward)
	c := w.Start(t)
	harness.AwaitEqual(t, 15*time.Second, func() bool {
		return value(t, c, "goods_events_insert_failures_total", "") >= 4
	}, true, "there were failed INSERTs")
	p.Pass()
	harness.Equal(t, w.Settled(t, 15*time.Second), 3, "events")
	harness.Equal(t, insertSizes(t, w), []uint64{1, 1, 1}, "rows of the INSERTs")
	harness.Equal(t, value(t, c, "goods_events_batches_total", ""), 3, "INSERTs")
}

// Events that NATS lost are published again, whatever the clock said when they were published. Those that
// it still has, with a replica that cannot store them, are not.
func TestOnlyLostEventsTravelAgain(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	direct := w.Env["CLICKHOUSE_URL"]
	p := w.NewProxy(t, "CLICKHOUSE_URL")
	a := w.Start(t)
	ready(t, a)
	p.Shut()
	makeGoods(t, w, 5)
	published(t, w)
	held(t, w, 1)
	w.Exec(t, `
UPDATE outbox SET published_at = published_at - interval '9 seconds'; -- less than what is lost
INSERT INTO goods (project_id, name) VALUES (1, 'lost'), (1, 'lost before the clock was set back');
UPDATE outbox SET published_at = clock_timestamp() - interval '1 hour' WHERE id = 6;
UPDATE outbox SET published_at = clock_timestamp() + interval '1 hour' WHERE id = 7`)
	b := w.Start(t, "CLICKHOUSE_URL="+direct)
	harness.AwaitEqual(t, 30*time.Second, func() string {
		return harness.One[string](t, w, `
SELECT coalesce(string_agg(id::text, ' ' ORDER BY id), '') FROM outbox`)
	}, "1 2 3 4 5", "events in the outbox")
	const name = "goods_events_requeued_total"
	harness.Equal(t, value(t, a, name, "")+value(t, b, name, ""), 2, "events that were published again")
	held(t, w, 1)
	p.Pass()
	harness.Equal(t, w.Settled(t, 20*time.Second), 7, "events")
}

// A message may carry the number of another event's row in the outbox: it is forged, of another deployment,
// or of a future that a restored Postgres has not had. Only a row that is its event goes.
func TestForgedMessages(t *testing.T) {
	t.Parallel()
	for name, forged := range map[string]string{ // in place of what is true
		"numbers of other goods":    `jsonb_build_object('id', id - 1) FROM outbox AS o WHERE id % 2 = 0`,
		"numbers of other versions": `jsonb_build_object('id', id + 6) FROM outbox AS o WHERE id <= 6`,
		"other times": `
jsonb_build_object('event_time', event_time + interval '1 ms') FROM outbox AS o`,
	} {
		t.Run(name, func(t *testing.T) {
			w, a := started(t, nowhere)
			makeGoods(t, w, 6)
			w.Exec(t, `UPDATE goods SET name = name || '+'`) // rows 7 to 12
			published(t, w)
			harness.Must(t, a.Stop())
			harness.Must(t, stream(t, w).Purge(t.Context())) // the true messages are lost
			message := harness.One[[]byte](t, w, `
SELECT json_agg(event) FROM (SELECT to_jsonb(o) - 'published_at' || `+forged+`) AS e (event)`)
			_, err := w.JS.Publish(t.Context(), w.Subject(), message)
			harness.Must(t, err)

			b := w.Start(t)
			harness.AwaitEqual(t, 30*time.Second, func() uint64 {
				info, err := stream(t, w).Info(t.Context())
				harness.Must(t, err)
				return info.State.Msgs
			}, 0, "messages in the stream")
			harness.Equal(t, harness.One[int](t, w, `SELECT count(*) FROM outbox`), 12, "rows of the outbox")
			b.Create(t, "another")
			harness.AwaitEqual(t, time.Minute, func() int {
				passTime(t, w, "1 hour")
				return harness.One[int](t, w, `SELECT count(*) FROM outbox`)
			}, 0, "events in the outbox")
			harness.Equal(t, w.Settled(t, time.Second), 13, "events")
		})
	}
}

// A server may vanish without closing its connections, and another one take its place. The service leaves
// such connections soon, whether it waits for answers on them or has much to send.
func TestStrandedConnections(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		variable, write string
	}{
		"NATS":       {"NATS_URL", `INSERT INTO goods (project_id, name) VALUES (1, 'x')`},
		"ClickHouse": {"CLICKHOUSE_URL", `INSERT INTO goods (project_id, name) VALUES (1, 'x')`},
		"NATS, with much to be sent": {"NATS_URL", `
INSERT INTO goods (project_id, name, description)
SELECT 1, 'x', repeat('💡', 10000) FROM generate_series(1, 300)`}, // 12 MB, more than the kernel takes
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := harness.NewWorld(t)
			p := w.NewProxy(t, test.variable)
			a := w.Start(t)
			a.Create(t, "before")
			ready(t, a)
			w.Settled(t, 15*time.Second)
			p.Strand(t)
			w.Exec(t, test.write)
			w.Settled(t, 45*time.Second) // 12 MB take their time on a busy machine
			ready(t, a)
		})
	}
}

// All that holds goods or events is emptied at once, as docs/operations.md says. Nothing of the old goods is
// left beside the new ones, which have the same ids and versions.
func TestEverythingEmptied(t *testing.T) {
	w, a := started(t)
	a.Stock(t, 3)
	w.Exec(t, `UPDATE goods SET name = name || ', changed'`)
	w.Settled(t, 20*time.Second)
	harness.Equal(t, a.Stop(), nil, "how the service ended")
	w.Exec(t, `DROP SCHEMA public CASCADE; CREATE SCHEMA public`)
	harness.Must(t, w.JS.DeleteStream(t.Context(), w.Stream()))
	harness.Must(t, w.ClickHouse.Exec(t.Context(), `DROP TABLE goods_log`))
	a = w.Start(t)
	ready(t, a)
	harness.Equal(t, a.Create(t, "new").ID, 1, "the id of the first good")
	harness.Equal(t, w.Settled(t, 20*time.Second), 1, "events")
	harness.Equal(t, a.List(t, 10, 1).Goods[0].Name, "new", "the name of the first good")
}

// A ClickHouse that was emptied while the service runs gets its table again.
func TestTableDropped(t *testing.T) {
	w, a := started(t)
	ready(t, a)
	for n := range 2 {
		harness.Must(t, w.ClickHouse.Exec(t.Context(), `DROP TABLE goods_log`))
		ready(t, a, "clickhouse")
		w.Exec(t, `UPDATE goods SET name = name || '+'`)
		a.Create(t, "one")
		ready(t, a)
		harness.AwaitEqual(t, 30*time.Second, func() int {
			return harness.One[int](t, w, `SELECT count(*) FROM outbox`)
		}, 0, "events in the outbox")
		var rows uint64
		harness.Must(t, w.ClickHouse.QueryRow(t.Context(), `SELECT count() FROM goods_log FINAL`).Scan(&rows))
		harness.Equal(t, rows, uint64(n+1), "events since the table was dropped")
	}
}
