package main

import (
	"context"
	"database/sql"
	_ "embed"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/lib/pq"
	"github.com/nats-io/nats.go"
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

// stream is the service's stream in NATS: a work queue of messages, each of them a JSON array of events.
// NATS may lose everything: an event stays in the outbox until ClickHouse holds it. All methods may be
// called concurrently.
type stream struct {
	conn      *nats.Conn
	js        jetstream.JetStream
	namespace string
	replicas  int
	metrics   *metrics
	log       *slog.Logger

	mu        sync.Mutex      // guards what follows
	lastError error           // of the connection, since it was made
	noted     map[string]bool // the errors that were logged since
}

// openStream returns the stream of a namespace. It is connected to NATS, and again after each failure, in the
// background. Only a bad URL is an error.
func openStream(url, namespace string, replicas int, metrics *metrics, log *slog.Logger) (*stream, error) {
	s := &stream{namespace: namespace, replicas: replicas, metrics: metrics, log: log, noted: map[string]bool{}}
	conn, err := nats.Connect(url,
		nats.Name("goods"),
		nats.RetryOnFailedConnect(true),
		nats.MaxReconnects(-1),
		nats.IgnoreAuthErrorAbort(), // a password may be corrected
		nats.ReconnectWait(500*time.Millisecond),
		nats.ReconnectBufSize(-1), // what was not sent is still in the outbox
		nats.Timeout(natsTimeout),
		nats.PingInterval(time.Second), // a frozen server is left within three seconds
		nats.MaxPingsOutstanding(2),
		nats.ConnectHandler(func(*nats.Conn) { s.forgetErrors() }),
		nats.ReconnectHandler(func(*nats.Conn) { s.forgetErrors() }),
		nats.ReconnectErrHandler(func(_ *nats.Conn, err error) { s.noteError(err) }),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) { s.noteError(err) }),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { s.noteError(err) }))
	if err != nil {
		return nil, errors.New("NATS_URL cannot be used") // err may have a password in it
	}
	js, err := jetstream.New(conn, jetstream.WithPublishAsyncTimeout(natsTimeout))
	if err != nil {
		return nil, err
	}
	s.conn = conn
	s.js = js
	return s, nil
}

// noteError logs why the connection fails, or what NATS does not permit: each reason once, until there is a
// new connection.
func (s *stream) noteError(err error) {
	if err == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lastError = err
	if !s.noted[err.Error()] {
		s.noted[err.Error()] = true
		s.log.Warn("nats connection", "err", err)
	}
}

func (s *stream) forgetErrors() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lastError = nil
	clear(s.noted)
}

func (s *stream) name() string    { return strings.ToUpper(s.namespace) }
func (s *stream) subject() string { return s.namespace + ".events" }

// connected returns an error while there is no connection, with the reason.
func (s *stream) connected() error {
	if s.conn.IsConnected() {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lastError != nil {
		return fmt.Errorf("%w: %w", nats.ErrDisconnected, s.lastError)
	}
	return nats.ErrDisconnected
}

func (s *stream) config() jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name:      s.name(),
		Subjects:  []string{s.subject()},
		Retention: jetstream.WorkQueuePolicy,
		Discard:   jetstream.DiscardNew,
		Storage:   jetstream.FileStorage,
		MaxMsgs:   streamLimit,
		Replicas:  s.replicas,
	}
}

// checkOurs returns an error if a stream of our name belongs to another application. Nothing of that one is
// changed.
func (s *stream) checkOurs(found jetstream.StreamConfig) error {
	if found.Retention == jetstream.WorkQueuePolicy && slices.Equal(found.Subjects, []string{s.subject()}) {
		return nil
	}
	return fmt.Errorf("the stream %s belongs to another application (its subjects are %s): set NAMESPACE to another name",
		s.name(), strings.Join(found.Subjects, ", "))
}

// prepare makes the stream what it has to be, and reports whether it had to be created.
func (s *stream) prepare() (created bool, err error) {
	if err := s.connected(); err != nil {
		return false, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), natsTimeout)
	defer cancel()
	found, err := s.js.Stream(ctx, s.name())
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		_, err = s.js.CreateStream(ctx, s.config())
		return err == nil, err
	}
	if err != nil {
		return false, err
	}
	if err := s.checkOurs(found.CachedInfo().Config); err != nil {
		return false, err
	}
	_, err = s.js.UpdateStream(ctx, s.config())
	return false, err
}

// ping reports whether the stream can be used.
func (s *stream) ping(ctx context.Context) error {
	if err := s.connected(); err != nil {
		return err
	}
	found, err := s.js.Stream(ctx, s.name())
	if err != nil {
		return err
	}
	info := found.CachedInfo()
	s.metrics.backlog.Store(int64(info.State.Msgs))
	return s.checkOurs(info.Config)
}

// maxMessage returns how many bytes a message may have.
func (s *stream) maxMessage() int {
	const header = 512 // is enough for ours
	return min(maxMessage, int(s.conn.MaxPayload())-header)
}

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
	return &relay{db: db, stream: stream, batch: batch, log: log, metrics: metrics, written: make(chan struct{}, 1)}
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

// message is a batch of events, as it is published.
type message struct {
	ids  pq.Int64Array // of the rows
	json []byte
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

// pack puts batch events into each message, or fewer where it would have more than maxBytes. The last
// message is left out while more events may get into it.
func pack(events []claimedEvent, batch, maxBytes int) []message {
	var messages []message
	var current message
	due := false
	for _, e := range events {
		full := len(current.ids) == batch || len(current.json)+len(e.json)+1 > maxBytes
		if len(current.ids) > 0 && full {
			messages = append(messages, current.close())
			current = message{}
			due = false
		}
		current.add(e)
		due = due || e.due
	}
	if len(current.ids) == batch || due {
		messages = append(messages, current.close())
	}
	return messages
}

func (m *message) add(e claimedEvent) {
	separator := byte(',')
	if len(m.ids) == 0 {
		separator = '['
	}
	m.ids = append(m.ids, e.id)
	m.json = append(m.json, separator)
	m.json = append(m.json, e.json...)
}

func (m *message) close() message {
	return message{ids: m.ids, json: append(m.json, ']')}
}

// publishAll publishes messages, and returns the rows of those that NATS has acknowledged. The error is the
// last one.
func (r *relay) publishAll(messages []message) (published pq.Int64Array, err error) {
	acks := make([]jetstream.PubAckFuture, len(messages))
	for i, m := range messages {
		// With the name, another stream that has our subject cannot swallow it.
		ack, publishErr := r.stream.js.PublishAsync(r.stream.subject(), m.json, jetstream.WithExpectStream(r.stream.name()))
		if publishErr != nil {
			err = fmt.Errorf("publish %d bytes: %w", len(m.json), publishErr)
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
			published = append(published, messages[i].ids...)
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
