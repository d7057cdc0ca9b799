package main

import (
	"bytes"
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
	relayClaim   = 500                    // rows claimed at a time; EVENTS_BATCH, if that is more
	relayPoll    = time.Second            // between two looks at the outbox, at most; a write wakes the relay
	relayDelay   = 100 * time.Millisecond // after a write, so that other events get into the same message
	requeueBatch = 10_000                 // rows of one statement

	sampleInterval = 2 * time.Second
)

// relay publishes the events of the outbox. Any number of replicas may do so at once: each claims rows of
// its own. It may be killed at any point: rows that were published, but are not marked, are published again.
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

// run publishes events, forever. After a failure it waits for relayPoll, which wake does not shorten, and
// prepares the stream again.
func (r *relay) run() {
	state := &stateLog{log: r.log, name: "relay"}
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

// The identity of the database: standbys have the same, but not what is restored from a dump.
const databaseIDSQL = `
SELECT concat_ws('-', system_identifier, d.oid, to_regclass('goods')::oid)
FROM pg_control_system(), pg_database AS d
WHERE d.datname = current_database()`

// prepareStream makes the stream what it has to be. If it had to be created, NATS has lost everything that
// was published before this call: it is published again. What was published during this call is left alone,
// as the new stream may hold it. If the requeue fails, requeueLost finds those events later.
func (r *relay) prepareStream() error {
	start := time.Now()
	var owner string
	err := r.db.query(databaseIDSQL, nil, func(rows *sql.Rows) error { return rows.Scan(&owner) })
	if err != nil {
		return err
	}
	created, err := r.stream.prepare(owner)
	if err == nil && created {
		return r.requeue(time.Since(start))
	}
	return err
}

//go:embed sql/queries/claim_events.sql
var claimEventsSQL string

const markPublishedSQL = `
UPDATE outbox
SET published_at = clock_timestamp()
WHERE id = ANY ($1)`

// claimedEvent is a row of the outbox.
type claimedEvent struct {
	id   int64
	json []byte
	due  bool // it does not wait for others any more
}

// publish claims events, publishes them, and marks those that NATS has acknowledged. The transaction stays
// open while NATS answers, natsTimeout at most: its locks keep other replicas from publishing the same
// rows. It reports whether there may be more.
func (r *relay) publish() (more bool, err error) {
	if err := r.stream.connected(); err != nil {
		return false, err
	}
	limit := max(relayClaim, r.batch)
	var publishErr error // is reported after the commit of what was acknowledged
	err = r.db.inTx(func(tx transaction) error {
		var events []claimedEvent
		err := tx.query(claimEventsSQL, []any{limit}, func(rows *sql.Rows) error {
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
			if err := tx.query(markPublishedSQL, []any{published}, ignoreRow); err != nil {
				return err
			}
		}
		return nil
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
	first := 0 // event of the message
	size := 0
	due := false
	for i, e := range events {
		full := i-first == batch
		tooLarge := i > first && size+len(e.json) > maxBytes
		if full || tooLarge {
			messages = append(messages, events[first:i])
			first = i
			size = 0
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
	// Another stream that has our subject must not swallow the events.
	ours := jetstream.WithExpectStream(r.stream.name())
	for i, events := range messages {
		var texts [][]byte
		for _, e := range events {
			texts = append(texts, e.json)
		}
		array := fmt.Appendf(nil, "[%s]", bytes.Join(texts, []byte(",")))
		ack, publishErr := r.stream.js.PublishAsync(r.stream.subject(), array, ours)
		if publishErr != nil {
			err = fmt.Errorf("publish %d bytes: %w", len(array), publishErr)
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

// A published_at in the future was written before the clock was set back. One that is less than ten seconds
// ahead is left alone: clocks are corrected by so much, and soon it is in the past.
const requeueEventsSQL = `
UPDATE outbox
SET published_at = NULL
WHERE id IN (
    SELECT id
    FROM outbox
    WHERE published_at < statement_timestamp() - $1 * interval '1 second'
       OR published_at > statement_timestamp() + interval '10 seconds'
    LIMIT $2
)`

// requeue has everything that was published longer ago than age, and is still in the outbox, published again.
func (r *relay) requeue(age time.Duration) error {
	start := time.Now()
	for {
		// It grows as time passes, so that it always means the same moment: what the relay has published
		// since is younger.
		olderThan := age + time.Since(start)
		n, err := r.db.exec(requeueEventsSQL, olderThan.Seconds(), requeueBatch)
		if err != nil || n == 0 {
			return err
		}
		r.log.Warn("events that nats lost are published again", "events", n)
		r.metrics.requeued.Add(n)
		r.wake()
	}
}

//go:embed sql/queries/sample_outbox.sql
var sampleOutboxSQL string

// sample tells the metrics how much waits in the outbox, forever.
func (r *relay) sample() {
	for {
		var count, ageMillis int64 // stay 0 when the outbox is empty
		err := r.db.query(sampleOutboxSQL, nil, func(rows *sql.Rows) error {
			return rows.Scan(&count, &ageMillis)
		})
		if err == nil {
			r.metrics.outboxRows.Store(count)
			r.metrics.outboxAgeMillis.Store(ageMillis)
			r.metrics.outboxSampled.Store(time.Now().UnixMilli())
		}
		time.Sleep(sampleInterval)
	}
}
