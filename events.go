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
	"sync"
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
	eventTimeout = 5 * time.Second // for one exchange with NATS or ClickHouse
	natsTimeout  = 2 * time.Second // for one answer of NATS; what is then sent again is a repeat
	ackWait      = 10 * time.Second
	lostAfter    = 30 * time.Second
	retryFirst   = 100 * time.Millisecond
	retryMost    = 2 * time.Second
	streamLimit  = 1_000_000 // messages; past it NATS refuses, and rows wait in Postgres
)

// event is one version of a good, as it travels from the outbox to ClickHouse.
// (ID, Version) is its name: NATS and ClickHouse tell repeats by it.
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
// everything: what is still in the outbox travels again. Repeats are harmless.
type pipeline struct {
	db         *database // commits of its own: losing one in a crash only repeats work
	nats       *nats.Conn
	js         jetstream.JetStream
	clickhouse clickhouse.Conn
	stream     string
	replicas   int
	batch      int // events in one INSERT
	log        *slog.Logger
	counts     *metrics
	natsUp     *dependency
	chUp       *dependency

	nudge chan struct{} // holds one: there is something to relay

	mu       sync.Mutex // guards what follows
	consumer jetstream.Consumer
}

func (p *pipeline) subject() string { return strings.ToLower(p.stream) + ".events" }

// wake tells the relay that something was written. It never blocks.
func (p *pipeline) wake() {
	select {
	case p.nudge <- struct{}{}:
	default:
	}
}

// relay publishes what waits in the outbox, until ctx ends. Any number of
// replicas may relay at once.
func (p *pipeline) relay(ctx context.Context) {
	_, _ = p.connect(ctx) // else the first event of all finds no stream
	for ctx.Err() == nil {
		n, err := p.publish(ctx)
		if err != nil && ctx.Err() == nil {
			p.log.Debug("relay failed", "err", err)
			_, _ = p.connect(ctx) // the stream may be gone; the next round tells
		}
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

// publish claims, publishes and marks one batch, and returns its size. The
// rows stay locked until NATS has acknowledged all of them.
func (p *pipeline) publish(ctx context.Context) (n int, err error) {
	if !p.nats.IsConnected() {
		p.natsUp.report("relay", nats.ErrDisconnected)
		return 0, nats.ErrDisconnected
	}
	ctx, cancel := context.WithTimeout(ctx, eventTimeout)
	defer cancel()
	err = inTx(ctx, p.db, func(tx *sql.Tx) error {
		events, err := p.claim(ctx, tx)
		if err != nil {
			return fmt.Errorf("claim events: %w", err)
		}
		err = p.send(ctx, events)
		p.natsUp.report("relay", err)
		if err != nil || len(events) == 0 {
			return err
		}
		const mark = `
UPDATE outbox
SET published_at = clock_timestamp()
WHERE id = ANY ($1)`
		n = len(events)
		_, err = tx.ExecContext(ctx, mark, outboxIDs(events))
		return err
	})
	return n, err
}

func (p *pipeline) claim(ctx context.Context, tx *sql.Tx) ([]event, error) {
	const claim = `
SELECT id, good_id, project_id, name, description, priority, removed, version, event_time
FROM outbox
WHERE published_at IS NULL
ORDER BY id
LIMIT $1
FOR UPDATE SKIP LOCKED`
	rows, err := p.db.query(ctx, tx, claim, relayBatch)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var events []event
	for rows.Next() {
		var e event
		if err := rows.Scan(&e.Outbox, &e.ID, &e.ProjectID, &e.Name, &e.Description, &e.Priority, &e.Removed, &e.Version, &e.Time); err != nil {
			return nil, err
		}
		events = append(events, e)
	}
	return events, rows.Err()
}

// send publishes events and waits until NATS has acknowledged each.
func (p *pipeline) send(ctx context.Context, events []event) error {
	acks := make([]jetstream.PubAckFuture, len(events))
	for i, e := range events {
		data, err := json.Marshal(e)
		if err != nil {
			return err
		}
		if acks[i], err = p.js.PublishAsync(p.subject(), data, jetstream.WithMsgID(fmt.Sprintf("%d-%d", e.ID, e.Version))); err != nil {
			return fmt.Errorf("publish: %w", err)
		}
	}
	for _, ack := range acks {
		select {
		case <-ack.Ok():
		case err := <-ack.Err():
			return fmt.Errorf("publish: %w", err)
		case <-ctx.Done():
			return fmt.Errorf("publish: %w", ctx.Err())
		}
	}
	p.counts.published.Add(int64(len(events)))
	return nil
}

func outboxIDs(events []event) any {
	ids := make([]int64, len(events))
	for i, e := range events {
		ids[i] = e.Outbox
	}
	return pq.Array(ids)
}

// connect finds or creates the stream and its consumer. When the stream had
// to be created, nothing that was published before is in it, and is published
// again.
func (p *pipeline) connect(ctx context.Context) (jetstream.Consumer, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.consumer = nil
	start := time.Now()
	limited, cancel := context.WithTimeout(ctx, natsTimeout)
	defer cancel()
	stream, err := p.js.Stream(limited, p.stream)
	missing := errors.Is(err, jetstream.ErrStreamNotFound)
	if missing {
		stream, err = p.js.CreateStream(limited, jetstream.StreamConfig{
			Name:      p.stream,
			Subjects:  []string{p.subject()},
			Retention: jetstream.WorkQueuePolicy,
			Discard:   jetstream.DiscardNew,
			Storage:   jetstream.FileStorage,
			MaxMsgs:   streamLimit,
			Replicas:  p.replicas,
			// Shorter than lostAfter: NATS must take again what it has lost.
			Duplicates: lostAfter / 2,
		})
	}
	if err != nil {
		return nil, fmt.Errorf("stream %s: %w", p.stream, err)
	}
	consumer, err := stream.Consumer(limited, "drain")
	if errors.Is(err, jetstream.ErrConsumerNotFound) {
		consumer, err = stream.CreateConsumer(limited, jetstream.ConsumerConfig{
			Durable:    "drain",
			AckPolicy:  jetstream.AckExplicitPolicy,
			AckWait:    ackWait,
			MaxDeliver: -1,
		})
	}
	if err != nil {
		return nil, fmt.Errorf("consumer of %s: %w", p.stream, err)
	}
	p.consumer = consumer
	if missing {
		_ = p.requeue(ctx, time.Since(start)) // without Postgres now, find does it later
	}
	return consumer, nil
}

// requeue has what was published longer ago than age published again, in as
// many steps as a long outage needs.
func (p *pipeline) requeue(ctx context.Context, age time.Duration) error {
	const step = 10_000
	const requeue = `
UPDATE outbox
SET published_at = NULL
WHERE id IN (SELECT id FROM outbox WHERE published_at < now() - $1 * interval '1 second' LIMIT $2)`
	for n := int64(step); n == step; {
		limited, cancel := context.WithTimeout(ctx, eventTimeout)
		done, err := p.db.ExecContext(limited, requeue, age.Seconds(), step)
		cancel()
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

// find looks for events that NATS lost: the consumer has nothing left, and
// rows published half a minute ago are still in the outbox.
func (p *pipeline) find(ctx context.Context) error {
	p.mu.Lock()
	consumer := p.consumer
	p.mu.Unlock()
	if consumer == nil {
		return nil
	}
	limited, cancel := context.WithTimeout(ctx, eventTimeout)
	info, err := consumer.Info(limited)
	cancel()
	if err != nil { // a fetch from a consumer that is gone may just find nothing
		if _, err = p.connect(ctx); ctx.Err() == nil {
			p.natsUp.report("drain", err)
		}
		return err
	}
	if info.NumPending > 0 || info.NumAckPending > 0 {
		return nil
	}
	return p.requeue(ctx, lostAfter)
}

// pause waits for d, or less when ctx ends.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
