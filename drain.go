package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/lib/pq"
	"github.com/nats-io/nats.go/jetstream"
)

// drain moves events from NATS into ClickHouse, until ctx ends. Replicas share
// one consumer, so any number may drain at once.
func (p *pipeline) drain(ctx context.Context) {
	p.retry(ctx, "migrate clickhouse", func() error { return migrateClickHouse(ctx, p.clickhouse, migrations) })
	state := state{log: p.log, name: "drain"}
	for ; ctx.Err() == nil; pause(ctx, retryMost/2) {
		consumer, err := p.connect(ctx)
		state.report(err)
		if err == nil {
			err = p.drainFrom(ctx, consumer)
			p.log.Debug("drain ended", "err", err)
		}
	}
}

// held is an event that has been fetched and is not yet stored.
type held struct {
	event
	message jetstream.Msg // of which this is the last event; else nil
}

// drainFrom stores what consumer has, in batches that are full or as old as
// batchWait, until ctx ends or NATS fails.
func (p *pipeline) drainFrom(ctx context.Context, consumer jetstream.Consumer) error {
	var events []held
	var since, looked time.Time // when the first event came; when find was called
	for ctx.Err() == nil {
		wait := fetchWait
		if len(events) > 0 {
			wait = max(time.Until(since.Add(batchWait)), time.Millisecond)
		}
		message, err := fetch(ctx, consumer, wait)
		if err != nil {
			return err
		}
		if message != nil {
			if len(events) == 0 {
				since = time.Now()
			}
			events = append(events, p.read(message)...)
		}
		for len(events) >= p.batch || len(events) > 0 && time.Since(since) >= batchWait {
			n := min(len(events), p.batch)
			p.store(ctx, events[:n], events)
			events, since = events[n:], time.Now()
		}
		if message == nil && len(events) == 0 && time.Since(looked) > lostAfter/3 {
			looked = time.Now()
			if err := p.find(ctx, consumer); err != nil {
				return err
			}
		}
	}
	return nil
}

// fetch waits for a message; nil means that none came.
func fetch(ctx context.Context, consumer jetstream.Consumer, wait time.Duration) (message jetstream.Msg, err error) {
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	fetched, err := consumer.Fetch(1, jetstream.FetchContext(ctx))
	if err != nil {
		return nil, err
	}
	for m := range fetched.Messages() {
		message = m
	}
	if ctx.Err() != nil { // the usual end of waiting
		return message, nil
	}
	return message, fetched.Error()
}

// read returns the events of a message, none if it has anything else.
func (p *pipeline) read(m jetstream.Msg) []held {
	var events []held
	err := json.Unmarshal(m.Data(), &events)
	for _, e := range events {
		if !e.valid() {
			err = errors.New("not an event")
		}
	}
	if err != nil || len(events) == 0 {
		p.log.Error("message thrown away", "subject", m.Subject(), "data", fmt.Sprintf("%.1000s", m.Data()), "err", err)
		p.counts.thrownAway.Add(1)
		_ = m.Term()
		return nil
	}
	events[len(events)-1].message = m
	return events
}

// store inserts batch into ClickHouse, deletes its outbox rows, and only then
// acknowledges the messages that end in it. It tries until it succeeds, or ctx
// ends. Meanwhile NATS is told that all, of which batch is the beginning, is
// being worked on: else another replica would get it.
func (p *pipeline) store(ctx context.Context, batch, all []held) {
	each := func(events []held, f func(jetstream.Msg) error) {
		for _, e := range events {
			if e.message != nil {
				_ = f(e.message) // what is lost here only repeats the events
			}
		}
	}
	for _, step := range []func(context.Context, []held) error{p.insert, p.forget} {
		p.retry(ctx, "store events", func() error {
			err := step(ctx, batch)
			if err != nil {
				each(all, jetstream.Msg.InProgress)
			}
			return err
		})
	}
	if ctx.Err() == nil {
		each(batch, jetstream.Msg.Ack)
	}
}

// insert adds events to ClickHouse in one INSERT.
func (p *pipeline) insert(ctx context.Context, events []held) (err error) {
	ctx, cancel := context.WithTimeout(ctx, eventTimeout)
	defer cancel()
	defer func() {
		if err != nil {
			p.counts.insertFailures.Add(1)
		}
	}()
	const insert = `INSERT INTO goods_log (Id, ProjectId, Name, Description, Priority, Removed, EventTime, Version)`
	batch, err := p.clickhouse.PrepareBatch(ctx, insert)
	if err != nil {
		return fmt.Errorf("insert events: %w", err)
	}
	defer batch.Close()
	for _, e := range events {
		removed := uint8(0) // ClickHouse 18.16 has no Bool
		if e.Removed {
			removed = 1
		}
		if err := batch.Append(e.ID, e.ProjectID, e.Name, e.Description, e.Priority, removed, e.Time.UTC(), uint32(e.Version)); err != nil {
			return fmt.Errorf("insert events: %w", err)
		}
	}
	if err := batch.Send(); err != nil {
		return fmt.Errorf("insert events: %w", err)
	}
	p.counts.inserted.Add(int64(len(events)))
	p.counts.batches.Add(1)
	return nil
}

const forgetEvents = `
DELETE FROM outbox
WHERE id = ANY ($1)`

// forget deletes the outbox rows of events that ClickHouse holds.
func (p *pipeline) forget(_ context.Context, events []held) error {
	ids := make(pq.Int64Array, len(events))
	for i, e := range events {
		ids[i] = e.Outbox
	}
	return p.db.query(nil, forgetEvents, []any{ids}, nil)
}

// find looks for events that NATS lost: the consumer has nothing left, and
// rows published half a minute ago are still in the outbox.
func (p *pipeline) find(ctx context.Context, consumer jetstream.Consumer) error {
	ctx, cancel := context.WithTimeout(ctx, natsTimeout)
	defer cancel()
	info, err := consumer.Info(ctx) // a fetch from a consumer that is gone may just find nothing
	if err != nil || info.NumPending > 0 || info.NumAckPending > 0 {
		return err
	}
	return p.requeue(lostAfter)
}

// retry repeats f with growing pauses until it succeeds, or ctx ends.
func (p *pipeline) retry(ctx context.Context, name string, f func() error) {
	state := state{log: p.log, name: name}
	for wait := retryFirst; ctx.Err() == nil; wait = min(2*wait, retryMost) {
		err := f()
		state.report(err)
		if err == nil {
			return
		}
		pause(ctx, wait)
	}
}
