package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"
	"github.com/lib/pq"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	relayBatch   = 500         // events claimed in one transaction
	relayPoll    = time.Second // on average; a nudge comes earlier
	relaySettle  = 20 * time.Millisecond
	maxMessage   = 256 << 10       // bytes of events in one message, but for a single larger one
	eventTimeout = 5 * time.Second // for one exchange with ClickHouse, or one statement of Postgres
	natsTimeout  = 2 * time.Second // for one answer of NATS; what is then sent again is a repeat
	fetchWait    = 2 * time.Second // for a message to come
	batchWait    = time.Second     // for a batch to fill
	ackWait      = 10 * time.Second
	lostAfter    = 30 * time.Second
	retryFirst   = 100 * time.Millisecond
	retryMost    = 2 * time.Second
	streamLimit  = 1_000_000 // messages; past it NATS refuses, and rows wait in Postgres
)

// event is one version of a good, as it travels from the outbox to ClickHouse.
// A message of NATS is a JSON array of events.
type event struct {
	Outbox      int64     `json:"outbox"` // the row to delete once ClickHouse holds the event
	ID          int32     `json:"id"`
	ProjectID   int32     `json:"projectId"`
	Name        string    `json:"name"`
	Description string    `json:"description"`
	Priority    int32     `json:"priority"`
	Removed     bool      `json:"removed"`
	Version     int32     `json:"version"`
	Time        time.Time `json:"time"`
}

// valid tells an event from whatever else may be published on the subject.
func (e *event) valid() bool {
	year := e.Time.Year() // ClickHouse counts 32-bit seconds from 1970
	return e.Outbox > 0 && e.ID > 0 && e.ProjectID > 0 && e.Version > 0 && year >= 1970 && year < 2106
}

// pipeline moves events from the outbox through NATS into ClickHouse. An
// outbox row goes only when ClickHouse holds its event, so NATS may lose
// everything: what is still in the outbox travels again. Repeats are harmless,
// so it may be killed anywhere.
type pipeline struct {
	db         *database // commits without waiting for the disk: losing one only repeats work
	nats       *nats.Conn
	js         jetstream.JetStream
	clickhouse clickhouse.Conn
	namespace  string
	replicas   int
	batch      int // events in one INSERT
	log        *slog.Logger
	counts     *metrics
	nudge      chan struct{} // holds one: there is something to relay
}

func (p *pipeline) stream() string  { return strings.ToUpper(p.namespace) }
func (p *pipeline) subject() string { return p.namespace + ".events" }

// wake tells the relay that something was written. It never blocks.
func (p *pipeline) wake() {
	select {
	case p.nudge <- struct{}{}:
	default:
	}
}

// pingNATS reports whether the stream can be reached.
func (p *pipeline) pingNATS(ctx context.Context) error {
	stream, err := p.js.Stream(ctx, p.stream())
	if err == nil {
		p.counts.backlog.Store(int64(stream.CachedInfo().State.Msgs))
	}
	return err
}

// pingClickHouse reports whether the table can be reached.
func (p *pipeline) pingClickHouse(ctx context.Context) error {
	return p.clickhouse.Exec(ctx, `SELECT Id FROM goods_log LIMIT 0`)
}

// relay publishes what waits in the outbox, until ctx ends. Any number of
// replicas may relay at once.
func (p *pipeline) relay(ctx context.Context) {
	state := state{log: p.log, name: "relay"}
	for ctx.Err() == nil {
		n, err := p.publish(ctx)
		state.report(err)
		if err == nil && n == relayBatch {
			continue
		}
		nudge := p.nudge
		if err != nil {
			nudge = nil // writes go on meanwhile; they must not hurry the next try
		}
		select {
		case <-ctx.Done():
		case <-nudge:
			pause(ctx, relaySettle) // one write seldom comes alone
		case <-time.After(relayPoll/2 + rand.N(relayPoll)):
		}
	}
}

const claimEvents = `
SELECT id, good_id, project_id, name, description, priority, removed, version, event_time
FROM outbox
WHERE published_at IS NULL
ORDER BY id
LIMIT $1
FOR UPDATE SKIP LOCKED`

const markPublished = `
UPDATE outbox
SET published_at = clock_timestamp()
WHERE id = ANY ($1)`

// publish claims, publishes and marks one batch, and returns its size. The
// rows stay locked until NATS has acknowledged all of them.
func (p *pipeline) publish(ctx context.Context) (int, error) {
	if !p.nats.IsConnected() {
		return 0, nats.ErrDisconnected
	}
	var events []event
	var ids pq.Int64Array
	err := p.db.inTx(func(tx *sql.Tx) error {
		err := p.db.query(tx, claimEvents, []any{relayBatch}, func(rows *sql.Rows) error {
			var e event
			err := rows.Scan(&e.Outbox, &e.ID, &e.ProjectID, &e.Name, &e.Description, &e.Priority, &e.Removed, &e.Version, &e.Time)
			events, ids = append(events, e), append(ids, e.Outbox)
			return err
		})
		if err != nil || len(events) == 0 {
			return err
		}
		if err := p.send(ctx, events); err != nil {
			return fmt.Errorf("publish: %w", err)
		}
		return p.db.query(tx, markPublished, []any{ids}, nil)
	})
	return len(events), err
}

// send publishes events and waits until NATS has acknowledged each message.
func (p *pipeline) send(ctx context.Context, events []event) error {
	var acks []jetstream.PubAckFuture
	all := len(events)
	for len(events) > 0 {
		message := []byte{'['}
		n := 0
		for ; n < min(len(events), p.batch); n++ {
			text, err := json.Marshal(events[n])
			if err != nil {
				return err
			}
			if n > 0 && len(message)+len(text) > maxMessage {
				break
			}
			message = append(append(message, text...), ',')
		}
		message[len(message)-1] = ']'
		id := fmt.Sprintf("%d-%d", events[0].Outbox, events[n-1].Outbox)
		ack, err := p.js.PublishAsync(p.subject(), message, jetstream.WithMsgID(id))
		if err != nil {
			return err
		}
		acks, events = append(acks, ack), events[n:]
	}
	for _, ack := range acks {
		select {
		case <-ack.Ok():
		case err := <-ack.Err(): // after natsTimeout, at the latest
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	p.counts.published.Add(int64(all))
	return nil
}

// connect makes the stream and its consumer what they have to be. When the
// stream had to be created, all that was published before is not in it.
func (p *pipeline) connect(ctx context.Context) (jetstream.Consumer, error) {
	limited, cancel := context.WithTimeout(ctx, natsTimeout)
	defer cancel()
	cfg := jetstream.StreamConfig{
		Name:      p.stream(),
		Subjects:  []string{p.subject()},
		Retention: jetstream.WorkQueuePolicy,
		Discard:   jetstream.DiscardNew,
		Storage:   jetstream.FileStorage,
		MaxMsgs:   streamLimit,
		Replicas:  p.replicas,
		// Shorter than lostAfter: NATS must take again what it has lost.
		Duplicates: lostAfter / 2,
	}
	begin := time.Now()
	_, err := p.js.UpdateStream(limited, cfg)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		if _, err = p.js.CreateStream(limited, cfg); err == nil {
			err = p.requeue(time.Since(begin))
		}
	}
	if err != nil {
		return nil, fmt.Errorf("stream %s: %w", p.stream(), err)
	}
	return p.js.CreateOrUpdateConsumer(limited, p.stream(), jetstream.ConsumerConfig{
		Durable:    "drain",
		AckPolicy:  jetstream.AckExplicitPolicy,
		AckWait:    ackWait,
		MaxDeliver: -1,
	})
}

const requeueEvents = `
UPDATE outbox
SET published_at = NULL
WHERE id IN (SELECT id FROM outbox WHERE published_at < clock_timestamp() - $1 * interval '1 second' LIMIT $2)`

// requeue has what was published longer ago than age published again, in as
// many steps as a long outage needs.
func (p *pipeline) requeue(age time.Duration) error {
	const step = 10_000
	for n := int64(step); n == step; {
		done, err := p.db.Exec(requeueEvents, age.Seconds(), step)
		if err != nil {
			return fmt.Errorf("requeue events: %w", err)
		}
		if n, err = done.RowsAffected(); err == nil && n > 0 {
			p.log.Warn("events lost by nats travel again", "events", n)
			p.counts.requeued.Add(n)
			p.wake()
		}
	}
	return nil
}
