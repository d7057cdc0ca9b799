package main

import (
	"database/sql"
	_ "embed"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"time"

	"github.com/lib/pq"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	relayClaim   = 500                    // events of one transaction, at most; or one message of them
	relayPoll    = time.Second            // between two looks at the outbox, at most; a write comes earlier
	relayDelay   = 100 * time.Millisecond // after a write, so that other events get into the same message
	natsTimeout  = 2 * time.Second        // for one answer of NATS
	streamLimit  = 1_000_000              // messages; past it NATS refuses, and events wait in the outbox
	maxMessage   = 500_000                // bytes, or what the server allows if that is less
	requeueBatch = 10_000                 // rows of one statement
)

// relay publishes the events of the outbox. Any number of replicas may do so at once: each claims other
// rows. It may be killed at any point: rows that were published, but are not marked, are published again.
type relay struct {
	db      *database // commits without waiting for the disk: to lose one only repeats work
	stream  *stream
	batch   int // events in one message
	log     *slog.Logger
	metrics *metrics
	written chan struct{} // has an element when there are new events
}

func newRelay(db *database, stream *stream, batch int, metrics *metrics, log *slog.Logger) *relay {
	return &relay{
		db:      db,
		stream:  stream,
		batch:   batch,
		log:     log,
		metrics: metrics,
		written: make(chan struct{}, 1),
	}
}

// wake says that there are new events. It never blocks, and may be called concurrently.
func (r *relay) wake() {
	select {
	case r.written <- struct{}{}:
	default:
	}
}

// run publishes events, forever. After a failure it looks at the stream before anything else, and takes its
// time: writes, which go on, do not hurry it then.
func (r *relay) run() {
	state := stateLog{log: r.log, name: "relay"}
	prepared := false
	for {
		var more bool
		var err error
		if !prepared {
			err = r.prepareStream()
		}
		if err == nil {
			prepared = true
			more, err = r.publish()
		}
		state.report(err)
		switch {
		case err != nil:
			prepared = false
			time.Sleep(relayPoll)
		case !more:
			r.wait()
		}
	}
}

// wait returns when there may be something to publish.
func (r *relay) wait() {
	select {
	case <-r.written:
		time.Sleep(relayDelay)
	case <-time.After(relayPoll/2 + rand.N(relayPoll/2)):
	}
}

// prepareStream prepares the stream. When it had to be created, whatever was published before is not in it.
func (r *relay) prepareStream() error {
	created, err := r.stream.prepare()
	if err == nil && created {
		return r.requeue(0)
	}
	return err
}

//go:embed sql/queries/claim_events.sql
var claimEvents string

const markPublished = `
UPDATE outbox
SET published_at = clock_timestamp()
WHERE id = ANY ($1)`

// claimedEvent is a row of the outbox.
type claimedEvent struct {
	id   int64
	json []byte
	due  bool // it does not wait for others any more
}

// publish claims events, publishes them, and marks those that NATS has acknowledged. The rows stay locked
// meanwhile. It reports whether there may be more.
func (r *relay) publish() (more bool, err error) {
	if err := r.stream.connected(); err != nil {
		return false, err
	}
	limit := max(relayClaim, r.batch)
	var publishErr error
	err = r.db.inTx(func(tx transaction) error {
		var events []claimedEvent
		err := tx.query(claimEvents, []any{limit}, func(rows *sql.Rows) error {
			var e claimedEvent
			if err := rows.Scan(&e.id, &e.json, &e.due); err != nil {
				return err
			}
			events = append(events, e)
			return nil
		})
		if err != nil {
			return err
		}
		more = len(events) == limit
		var published pq.Int64Array
		published, publishErr = r.publishAll(pack(events, r.batch, r.stream.maxMessage()))
		if len(published) > 0 {
			r.metrics.published.Add(int64(len(published)))
			if err := tx.query(markPublished, []any{published}, ignoreRow); err != nil {
				return err
			}
		}
		return nil // what was acknowledged is committed, also when something else failed
	})
	if err == nil {
		err = publishErr
	}
	return more, err
}

// pack divides events into messages of batch events, or fewer where there would be more than maxBytes. The
// last message is left out while more events may get into it.
func pack(events []claimedEvent, batch, maxBytes int) [][]claimedEvent {
	var messages [][]claimedEvent
	first, size := 0, 0
	due := false
	for i, e := range events {
		if i-first == batch || i > first && size+len(e.json) > maxBytes {
			messages = append(messages, events[first:i])
			first, size = i, 0
			due = false
		}
		size += len(e.json) + 1 // a comma
		due = due || e.due
	}
	if due || len(events)-first == batch {
		messages = append(messages, events[first:])
	}
	return messages
}

// publishAll publishes messages, and returns the rows of those that NATS has acknowledged. The error is the
// last one.
func (r *relay) publishAll(messages [][]claimedEvent) (published pq.Int64Array, err error) {
	acks := make([]jetstream.PubAckFuture, len(messages))
	ours := jetstream.WithExpectStream(r.stream.name()) // another one that has our subject must not swallow them
	for i, events := range messages {
		var b []byte
		for _, e := range events {
			b = append(append(b, ','), e.json...)
		}
		b[0] = '['
		b = append(b, ']')
		ack, publishErr := r.stream.js.PublishAsync(r.stream.subject(), b, ours)
		if publishErr != nil {
			err = fmt.Errorf("publish %d bytes: %w", len(b), publishErr)
			continue
		}
		acks[i] = ack
	}
	for i, ack := range acks {
		if ack == nil {
			continue
		}
		select {
		case <-ack.Ok():
			for _, e := range messages[i] {
				published = append(published, e.id)
			}
		case ackErr := <-ack.Err(): // after natsTimeout, at the latest
			err = fmt.Errorf("publish: %w", ackErr)
		}
	}
	return published, err
}

// A time in the future is one from before the clock was set back.
const requeueEvents = `
UPDATE outbox
SET published_at = NULL
WHERE id IN (
    SELECT id
    FROM outbox
    WHERE published_at NOT BETWEEN clock_timestamp() - $1 * interval '1 second' AND clock_timestamp()
    LIMIT $2
)`

// requeue has everything that was published longer ago than age, and is still in the outbox, published again.
func (r *relay) requeue(age time.Duration) error {
	for {
		n, err := r.db.exec(requeueEvents, age.Seconds(), requeueBatch)
		if err != nil || n == 0 {
			return err
		}
		r.log.Warn("events that nats lost are published again", "events", n)
		r.metrics.requeued.Add(n)
		r.wake()
	}
}
