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
	"sync/atomic"
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

	relayErr, drainErr, storeErr atomic.Pointer[error] // of the last try, or nil
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

// failed notes how a step went, for ping and the log.
func (p *pipeline) failed(last *atomic.Pointer[error], step string, err error) bool {
	if err == nil {
		last.Store(nil)
		return false
	}
	err = fmt.Errorf("%s: %w", step, err)
	last.Store(&err)
	p.log.Debug("events do not move", "err", err)
	return true
}

// pingNATS reports whether events can pass through NATS.
func (p *pipeline) pingNATS(ctx context.Context) error {
	for _, last := range []*atomic.Pointer[error]{&p.relayErr, &p.drainErr} {
		if err := last.Load(); err != nil {
			return *err
		}
	}
	stream, err := p.js.Stream(ctx, p.stream())
	if err == nil {
		p.counts.backlog.Store(int64(stream.CachedInfo().State.Msgs))
	}
	return err
}

// pingClickHouse reports whether events can be stored.
func (p *pipeline) pingClickHouse(ctx context.Context) error {
	if err := p.storeErr.Load(); err != nil {
		return *err
	}
	return p.clickhouse.Exec(ctx, `SELECT Id FROM goods_log LIMIT 0`)
}

// relay publishes what waits in the outbox, until ctx ends. Any number of
// replicas may relay at once.
func (p *pipeline) relay(ctx context.Context) {
	for ctx.Err() == nil {
		n, err := p.publish(ctx)
		nudge := p.nudge
		if p.failed(&p.relayErr, "relay", err) {
			nudge = nil // writes go on meanwhile; they must not hurry the next try
		} else if n == relayBatch {
			continue
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
	err := p.db.inTx(func(tx *sql.Tx) error {
		rows, err := p.db.query(tx, claimEvents, relayBatch)
		if err != nil {
			return fmt.Errorf("claim events: %w", err)
		}
		defer rows.Close()
		for rows.Next() {
			var e event
			if err := rows.Scan(&e.Outbox, &e.ID, &e.ProjectID, &e.Name, &e.Description, &e.Priority, &e.Removed, &e.Version, &e.Time); err != nil {
				return fmt.Errorf("claim events: %w", err)
			}
			events = append(events, e)
		}
		if err := rows.Err(); err != nil || len(events) == 0 {
			return err
		}
		if err := p.send(ctx, events); err != nil {
			return fmt.Errorf("publish: %w", err)
		}
		_, err = p.db.query(tx, markPublished, outboxIDs(events))
		return err
	})
	return len(events), err
}

// send publishes events and waits until NATS has acknowledged each message.
func (p *pipeline) send(ctx context.Context, events []event) error {
	var acks []jetstream.PubAckFuture
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
		p.counts.published.Add(int64(n))
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
	return nil
}

func outboxIDs(events []event) any {
	ids := make(pq.Int64Array, len(events))
	for i, e := range events {
		ids[i] = e.Outbox
	}
	return ids
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
