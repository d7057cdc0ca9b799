package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

const (
	fetchLimit    = 16               // messages taken at a time
	insertWorkers = 2                // INSERTs at a time: more are slower, as each makes a part
	eventTimeout  = 5 * time.Second  // for one exchange with ClickHouse, or one statement of Postgres
	ackWait       = 3 * eventTimeout // longer than an INSERT, a migration after it, and retryMost
	// An event is lost if it was published more than lostAfter before the oldest message of the stream, and
	// is still in the outbox. Ages are measured when NATS answers, but subtracted from the time of the UPDATE,
	// which is a little later: without the margin, events that NATS still has would count as lost, too.
	lostAfter    = 2 * eventTimeout
	lookInterval = lostAfter / 2 // between two looks for lost events
	retryFirst   = 100 * time.Millisecond
	retryMost    = 2 * time.Second
)

// event is one version of a good, as it is in the outbox and in a message.
type event struct {
	OutboxID    int64     `json:"id"`
	GoodID      int32     `json:"good_id"`
	ProjectID   int32     `json:"project_id"`
	Name        string    `json:"name"`
	Description string    `json:"description"`
	Priority    int32     `json:"priority"`
	Removed     bool      `json:"removed"`
	Version     int32     `json:"version"`
	Time        time.Time `json:"event_time"`
}

// parseEvents returns the events of a message, at least one.
func parseEvents(data []byte) ([]event, error) {
	var events []event
	if err := json.Unmarshal(data, &events); err != nil {
		return nil, err
	}
	if len(events) == 0 {
		return nil, errors.New("there is no event in it")
	}
	for _, e := range events {
		year := e.Time.Year()
		inRange := year >= 1970 && year < 2106 // of ClickHouse's DateTime
		if e.OutboxID < 1 || e.GoodID < 1 || e.ProjectID < 1 || e.Version < 1 || !inRange {
			return nil, errors.New("not an event")
		}
	}
	return events, nil
}

// consumer moves events from the stream into ClickHouse, at least once each: a message becomes one INSERT,
// then its rows are deleted from the outbox, and then it is acknowledged. Repeats are harmless, so it may
// be killed at any point. Replicas share one consumer of NATS, so any number of them may run.
type consumer struct {
	db      *database
	stream  *stream
	relay   *relay
	events  *eventLog
	log     *slog.Logger
	metrics *metrics
}

// run consumes, forever.
func (c *consumer) run() {
	c.retry("migrate clickhouse", nil, c.events.migrate)
	state := &stateLog{log: c.log, name: "consumer"}
	for {
		err := c.consume(state) // reports to state while it works
		state.report(err)
		time.Sleep(time.Second)
	}
}

// consume consumes until NATS fails. It reports to state that it works.
func (c *consumer) consume(state *stateLog) error {
	pull, err := c.openPull()
	if err != nil {
		return err
	}
	lastLook := time.Now()
	for {
		if time.Since(lastLook) > lookInterval {
			lastLook = time.Now()
			if err := c.requeueLost(pull); err != nil {
				return err
			}
		}
		messages, err := fetch(pull)
		if err != nil {
			return err
		}
		state.report(nil)
		c.store(messages)
	}
}

// openPull returns the pull consumer, which all replicas share. It is created, or its settings are corrected.
func (c *consumer) openPull() (jetstream.Consumer, error) {
	// The relay does the same, but notices that the stream is gone only when it publishes.
	if err := c.relay.prepareStream(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), natsTimeout)
	defer cancel()
	return c.stream.js.CreateOrUpdateConsumer(ctx, c.stream.name(), jetstream.ConsumerConfig{
		Durable:    "clickhouse",
		AckPolicy:  jetstream.AckExplicitPolicy,
		AckWait:    ackWait,
		MaxDeliver: -1,
	})
}

// fetch returns the messages that are there. If there are none, it waits a moment for one. After an error,
// what came before it is not returned: NATS delivers it again.
func fetch(pull jetstream.Consumer) ([]jetstream.Msg, error) {
	batch, err := pull.FetchNoWait(fetchLimit)
	if err != nil {
		return nil, err
	}
	messages, err := collect(batch)
	if err != nil || len(messages) > 0 {
		return messages, err
	}
	batch, err = pull.Fetch(1, jetstream.FetchMaxWait(natsTimeout))
	if err != nil {
		return nil, err
	}
	return collect(batch)
}

// collect returns all messages of a batch, or its error.
func collect(batch jetstream.MessageBatch) ([]jetstream.Msg, error) {
	var messages []jetstream.Msg
	for m := range batch.Messages() {
		messages = append(messages, m)
	}
	if err := batch.Error(); err != nil {
		return nil, err
	}
	return messages, nil
}

// delivery is a message with its events.
type delivery struct {
	message jetstream.Msg
	events  []event
	stored  bool
}

// store stores the events of messages. It goes on until ClickHouse has them and they are no longer in the
// outbox.
func (c *consumer) store(messages []jetstream.Msg) {
	var deliveries []*delivery
	for _, m := range messages {
		events, err := parseEvents(m.Data())
		if err != nil {
			c.reject(m, err)
			continue
		}
		deliveries = append(deliveries, &delivery{message: m, events: events})
	}
	c.retry("store events", deliveries, func() error { return c.insertAll(deliveries) })
	c.retry("clear outbox", deliveries, func() error { return c.clearOutbox(deliveries) })
	for _, d := range deliveries {
		_ = d.message.Ack() // one that is lost only repeats the events
	}
}

// keepAlive says that deliveries are still being worked on: they stay with this replica.
func keepAlive(deliveries []*delivery) {
	for _, d := range deliveries {
		_ = d.message.InProgress()
	}
}

// reject takes a message that holds no events out of the stream for good.
func (c *consumer) reject(m jetstream.Msg, err error) {
	text := fmt.Sprintf("%.1000s", m.Data())
	c.log.Error("message rejected", "subject", m.Subject(), "data", text, "err", err)
	c.metrics.rejected.Add(1)
	_ = m.Term()
}

// insertAll inserts the events of deliveries that are not stored yet, one INSERT for each and some at a time.
func (c *consumer) insertAll(deliveries []*delivery) error {
	for group := range slices.Chunk(deliveries, insertWorkers) {
		keepAlive(deliveries)
		errs := make([]error, len(group))
		var inserts sync.WaitGroup
		for i, d := range group {
			if !d.stored {
				inserts.Go(func() { errs[i] = c.insert(d) })
			}
		}
		inserts.Wait()
		if err := errors.Join(errs...); err != nil {
			// The table may be gone: a ClickHouse that was emptied or replaced gets it again.
			return errors.Join(err, c.events.migrate())
		}
	}
	return nil
}

func (c *consumer) insert(d *delivery) error {
	if err := c.events.insert(d.events); err != nil {
		c.metrics.insertFailures.Add(1)
		return err
	}
	d.stored = true
	c.metrics.inserts.Add(1)
	c.metrics.inserted.Add(int64(len(d.events)))
	return nil
}

// An event is deleted by what it is, not by its number alone: a message of another deployment, or one from
// before a restore, may have the number of another event.
const deleteEventsSQL = `
DELETE FROM outbox AS o
USING json_to_recordset($1) AS e (id bigint, good_id integer, version integer, event_time timestamptz)
WHERE o.id = e.id
  AND o.good_id = e.good_id
  AND o.version = e.version
  AND o.event_time = e.event_time`

// clearOutbox deletes the events of deliveries, which ClickHouse holds, from the outbox.
func (c *consumer) clearOutbox(deliveries []*delivery) error {
	type row struct {
		ID      int64     `json:"id"`
		GoodID  int32     `json:"good_id"`
		Version int32     `json:"version"`
		Time    time.Time `json:"event_time"`
	}
	var rows []row
	for _, d := range deliveries {
		for _, e := range d.events {
			rows = append(rows, row{e.OutboxID, e.GoodID, e.Version, e.Time})
		}
	}
	if len(rows) == 0 {
		return nil
	}
	_, err := c.db.exec(deleteEventsSQL, string(encodeJSON(rows)))
	return err
}

// requeueLost has events published again that NATS lost. A message leaves the stream when it is acknowledged,
// and its events leave the outbox before that. So what is still in the outbox, but was published before the
// oldest message that the stream has, is in no message; in an empty stream there is nothing at all. What was
// published within lostAfter is left for later.
func (c *consumer) requeueLost(pull jetstream.Consumer) error {
	ctx, cancel := context.WithTimeout(context.Background(), natsTimeout)
	defer cancel()
	if _, err := pull.Info(ctx); err != nil { // a fetch from a consumer that is gone may just find nothing
		return err
	}
	stream, err := c.stream.js.Stream(ctx, c.stream.name())
	if err != nil {
		return err
	}
	info := stream.CachedInfo()
	if err := c.stream.checkOurs(info.Config); err != nil { // Postgres may be another one by now
		return err
	}
	age := lostAfter
	if info.State.Msgs > 0 {
		now := info.TimeStamp // of NATS, whose clock need not be ours; servers before 2.10 do not tell
		if now.IsZero() {
			now = time.Now()
		}
		age += max(now.Sub(info.State.FirstTime), 0)
	}
	return c.relay.requeue(age)
}

// retry repeats f, with growing pauses, until it succeeds. Meanwhile it keeps deliveries alive.
func (c *consumer) retry(name string, deliveries []*delivery, f func() error) {
	state := &stateLog{log: c.log, name: name}
	for wait := retryFirst; ; wait = min(2*wait, retryMost) {
		err := f()
		state.report(err)
		if err == nil {
			return
		}
		keepAlive(deliveries)
		time.Sleep(wait)
	}
}
