package main

import (
	"context"
	"database/sql"
	_ "embed"
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
	relayBatch   = 500                    // events claimed in one transaction, or one batch of them
	relayPoll    = time.Second            // at most; a nudge comes earlier
	relaySettle  = 100 * time.Millisecond // for more events than the first to come
	eventTimeout = 5 * time.Second        // for one exchange with ClickHouse, or one statement of Postgres
	natsTimeout  = 2 * time.Second        // for one answer of NATS; what is then sent again is a repeat
	ackWait      = 10 * time.Second
	lostAfter    = 30 * time.Second
	retryFirst   = 100 * time.Millisecond
	retryMost    = 2 * time.Second
	streamLimit  = 1_000_000 // messages; past it NATS refuses, and rows wait in Postgres
)

// event is one version of a good, as it travels from the outbox to ClickHouse: a row of the outbox as JSON.
type event struct {
	Outbox      int64     `json:"id"` // the row to delete once ClickHouse holds the event
	ID          int32     `json:"good_id"`
	ProjectID   int32     `json:"project_id"`
	Name        string    `json:"name"`
	Description string    `json:"description"`
	Priority    int32     `json:"priority"`
	Removed     bool      `json:"removed"`
	Version     int32     `json:"version"`
	Time        time.Time `json:"event_time"`
}

// pipeline moves events from the outbox through NATS into ClickHouse: a message is one batch, a JSON array of events,
// and becomes one INSERT. An outbox row goes only when ClickHouse holds its event, so NATS may lose everything: what
// is still in the outbox travels again. Repeats are harmless, so it may be killed anywhere.
type pipeline struct {
	db         *database // commits without waiting for the disk: losing one only repeats work
	nats       *nats.Conn
	js         jetstream.JetStream
	clickhouse clickhouse.Conn
	namespace  string
	replicas   int
	batch      int // events in one message
	log        *slog.Logger
	counts     *metrics
	nudge      chan struct{} // holds one: there is something to relay
}

func (p *pipeline) stream() string { return strings.ToUpper(p.namespace) }

// wake tells the relay that something was written. It never blocks.
func (p *pipeline) wake() {
	select {
	case p.nudge <- struct{}{}:
	default:
	}
}

func (p *pipeline) pingNATS(ctx context.Context) error {
	if !p.nats.IsConnected() { // or the error would be one of a buffer
		return nats.ErrDisconnected
	}
	stream, err := p.js.Stream(ctx, p.stream())
	if err == nil {
		p.counts.backlog.Store(int64(stream.CachedInfo().State.Msgs))
	}
	return err
}

func (p *pipeline) pingClickHouse(ctx context.Context) error {
	return p.clickhouse.Exec(ctx, `SELECT Id FROM goods_log LIMIT 0`)
}

// relay publishes what waits in the outbox, forever. Any number of replicas may relay at once.
func (p *pipeline) relay() {
	for state := (state{log: p.log, name: "relay"}); ; {
		more, err := p.publish()
		state.report(err)
		if more {
			continue
		}
		nudge := p.nudge
		if err != nil {
			nudge = nil // writes go on meanwhile; they must not hurry the next try
		}
		select {
		case <-nudge:
			time.Sleep(relaySettle)
		case <-time.After(relayPoll/2 + rand.N(relayPoll/2)):
		}
	}
}

//go:embed sql/queries/claim.sql
var claimEvents string

const markPublished = `
UPDATE outbox
SET published_at = clock_timestamp()
WHERE id = ANY ($1)`

// publish claims, publishes and marks events, and tells whether there may be more. The rows stay locked until NATS
// has acknowledged all of them.
func (p *pipeline) publish() (more bool, err error) {
	if !p.nats.IsConnected() {
		return false, nats.ErrDisconnected
	}
	most := max(relayBatch/p.batch, 1) * p.batch
	var all pq.Int64Array
	err = p.db.inTx(func(tx *sql.Tx) error {
		var acks []jetstream.PubAckFuture
		err := p.db.query(tx, claimEvents, []any{most, p.batch}, func(rows *sql.Rows) error {
			var ids pq.Int64Array
			var message []byte
			if err := rows.Scan(&ids, &message); err != nil {
				return err
			}
			ack, err := p.js.PublishAsync(p.namespace+".events", message)
			all, acks = append(all, ids...), append(acks, ack)
			return err
		})
		if err != nil || len(all) == 0 {
			return err
		}
		for _, ack := range acks {
			select {
			case <-ack.Ok():
			case err := <-ack.Err(): // after natsTimeout, at the latest
				return fmt.Errorf("publish: %w", err)
			}
		}
		p.counts.published.Add(int64(len(all)))
		return p.db.query(tx, markPublished, []any{all}, nil)
	})
	return err == nil && len(all) == most, err
}

// drain moves events from NATS into ClickHouse, forever. Replicas share one consumer: any number may drain.
func (p *pipeline) drain() {
	p.retry("create stream", nil, func() error { _, err := p.connect(); return err }) // the relay needs the stream
	p.retry("migrate clickhouse", nil, func() error { return migrateClickHouse(context.Background(), p.clickhouse) })
	for state := (state{log: p.log, name: "drain"}); ; time.Sleep(retryMost / 2) {
		consumer, err := p.connect()
		for looked := time.Now(); err == nil; {
			state.report(nil)
			var message jetstream.Msg
			if message, err = fetch(consumer); message != nil {
				p.store(message)
			} else if err == nil && time.Since(looked) > lostAfter/3 {
				looked = time.Now()
				err = p.find(consumer)
			}
		}
		state.report(err)
	}
}

// connect makes the stream and its consumer what they have to be. When the stream had to be created, all that was
// published before is not in it.
func (p *pipeline) connect() (jetstream.Consumer, error) {
	ctx, cancel := context.WithTimeout(context.Background(), natsTimeout)
	defer cancel()
	cfg := jetstream.StreamConfig{
		Name:      p.stream(),
		Subjects:  []string{p.namespace + ".events"},
		Retention: jetstream.WorkQueuePolicy,
		Discard:   jetstream.DiscardNew,
		Storage:   jetstream.FileStorage,
		MaxMsgs:   streamLimit,
		Replicas:  p.replicas,
	}
	begin := time.Now()
	_, err := p.js.UpdateStream(ctx, cfg)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		if _, err = p.js.CreateStream(ctx, cfg); err == nil {
			err = p.requeue(time.Since(begin))
		}
	}
	if err != nil {
		return nil, err
	}
	return p.js.CreateOrUpdateConsumer(ctx, p.stream(), jetstream.ConsumerConfig{
		Durable:    "drain",
		AckPolicy:  jetstream.AckExplicitPolicy,
		AckWait:    ackWait,
		MaxDeliver: -1,
	})
}

// fetch waits a moment for a message; nil means that none came.
func fetch(consumer jetstream.Consumer) (message jetstream.Msg, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), natsTimeout)
	defer cancel()
	fetched, err := consumer.Fetch(1, jetstream.FetchContext(ctx))
	if err != nil {
		return nil, err
	}
	message = <-fetched.Messages()
	if message == nil && ctx.Err() == nil { // else it is the usual end of waiting
		err = fetched.Error()
	}
	return message, err
}

const forgetEvents = `
DELETE FROM outbox
WHERE id = ANY ($1)`

// store inserts the events of m into ClickHouse, deletes their outbox rows, and only then acknowledges m.
func (p *pipeline) store(m jetstream.Msg) {
	var events []event
	var ids pq.Int64Array
	err := json.Unmarshal(m.Data(), &events)
	for _, e := range events {
		ids = append(ids, e.Outbox)
		year := e.Time.Year() // ClickHouse counts 32-bit seconds from 1970
		if e.Outbox < 1 || e.ID < 1 || e.ProjectID < 1 || e.Version < 1 || year < 1970 || year >= 2106 {
			err = errors.New("not an event")
		}
	}
	if err != nil || len(events) == 0 {
		p.log.Error("message thrown away", "subject", m.Subject(), "data", fmt.Sprintf("%.1000s", m.Data()), "err", err)
		p.counts.thrownAway.Add(1)
		_ = m.Term()
		return
	}
	p.retry("store events", m, func() error {
		err := p.insert(events)
		if err != nil {
			p.counts.insertFailures.Add(1)
		}
		return err
	})
	p.counts.inserted.Add(int64(len(events)))
	p.counts.batches.Add(1)
	p.retry("clear outbox", m, func() error { return p.db.query(nil, forgetEvents, []any{ids}, nil) })
	_ = m.Ack() // one that is lost only repeats the events
}

// insert adds events to ClickHouse in one INSERT.
func (p *pipeline) insert(events []event) error {
	ctx, cancel := context.WithTimeout(context.Background(), eventTimeout)
	defer cancel()
	batch, err := p.clickhouse.PrepareBatch(ctx, `INSERT INTO goods_log (Id, ProjectId, Name, Description, Priority, Removed, EventTime, Version)`)
	if err != nil {
		return err
	}
	defer batch.Close()
	for _, e := range events {
		removed := map[bool]uint8{true: 1}[e.Removed] // ClickHouse 18.16 has no Bool
		if err := batch.Append(e.ID, e.ProjectID, e.Name, e.Description, e.Priority, removed, e.Time.UTC(), uint32(e.Version)); err != nil {
			return err
		}
	}
	return batch.Send()
}

// find looks for events that NATS lost: the consumer has nothing left, but the outbox has rows of half a minute ago.
func (p *pipeline) find(consumer jetstream.Consumer) error {
	ctx, cancel := context.WithTimeout(context.Background(), natsTimeout)
	defer cancel()
	info, err := consumer.Info(ctx) // a fetch from a consumer that is gone may just find nothing
	if err != nil || info.NumPending > 0 || info.NumAckPending > 0 {
		return err
	}
	return p.requeue(lostAfter)
}

const requeueEvents = `
UPDATE outbox
SET published_at = NULL
WHERE id IN (SELECT id FROM outbox WHERE published_at < clock_timestamp() - $1 * interval '1 second' LIMIT 10000)`

// requeue has what was published longer ago than age published again, in as many steps as a long outage needs.
func (p *pipeline) requeue(age time.Duration) error {
	for {
		done, err := p.db.Exec(requeueEvents, age.Seconds())
		if err != nil {
			return err
		}
		n, err := done.RowsAffected()
		if n == 0 {
			return err
		}
		p.log.Warn("events lost by nats travel again", "events", n)
		p.counts.requeued.Add(n)
		p.wake()
	}
}

// retry repeats f, which works on m, with growing pauses until it succeeds.
func (p *pipeline) retry(name string, m jetstream.Msg, f func() error) {
	state := state{log: p.log, name: name}
	for wait := retryFirst; ; wait = min(2*wait, retryMost) {
		err := f()
		state.report(err)
		if err == nil {
			return
		}
		if m != nil {
			_ = m.InProgress() // else another replica gets it meanwhile
		}
		time.Sleep(wait)
	}
}
