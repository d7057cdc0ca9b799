package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// drain moves events from NATS into ClickHouse, until ctx ends. Replicas share
// one consumer, so any number may drain at once.
func (p *pipeline) drain(ctx context.Context) {
	retry(ctx, func() bool {
		return p.failed(&p.storeErr, "migrate", migrateClickHouse(ctx, p.clickhouse, migrations, p.log))
	})
	for ctx.Err() == nil {
		consumer, err := p.connect(ctx)
		if err == nil {
			err = p.drainFrom(ctx, consumer)
		}
		p.failed(&p.drainErr, "drain", err)
		pause(ctx, retryMost/2)
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
		wait := 2 * time.Second
		if len(events) > 0 {
			wait = max(time.Until(since.Add(batchWait)), time.Millisecond)
		}
		limited, cancel := context.WithTimeout(ctx, wait)
		fetched, err := consumer.Fetch(1, jetstream.FetchContext(limited))
		if err != nil {
			cancel()
			return err
		}
		for m := range fetched.Messages() {
			if len(events) == 0 {
				since = time.Now()
			}
			events = append(events, p.read(m)...)
		}
		err = fetched.Error()
		late := limited.Err() != nil
		cancel()
		for len(events) >= p.batch || len(events) > 0 && time.Since(since) >= batchWait {
			n := min(len(events), p.batch)
			if !p.store(ctx, events[:n], events) {
				return ctx.Err()
			}
			events, since = events[n:], time.Now()
		}
		if err != nil && !late {
			return err
		}
		p.failed(&p.drainErr, "drain", nil)
		if len(events) == 0 && late && time.Since(looked) > lostAfter/3 {
			looked = time.Now()
			if err := p.find(ctx, consumer); err != nil {
				return err
			}
		}
	}
	return ctx.Err()
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
// ends; false means the latter. Meanwhile NATS is told that all, of which
// batch is the beginning, is being worked on.
func (p *pipeline) store(ctx context.Context, batch, all []held) bool {
	events := make([]event, len(batch))
	for i, e := range batch {
		events[i] = e.event
	}
	inserted := false
	retry(ctx, func() (again bool) {
		var err error
		if !inserted {
			err = p.insert(ctx, events)
			inserted = err == nil
		}
		if inserted {
			err = p.forget(events)
		}
		if p.failed(&p.storeErr, "store", err) {
			for _, e := range all {
				if e.message != nil {
					_ = e.message.InProgress() // else another replica gets it meanwhile
				}
			}
		}
		return err != nil
	})
	if ctx.Err() != nil {
		return false
	}
	for _, e := range batch {
		if e.message != nil {
			_ = e.message.Ack() // one that is lost only repeats the events
		}
	}
	return true
}

// insert adds events to ClickHouse in one INSERT.
func (p *pipeline) insert(ctx context.Context, events []event) (err error) {
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
func (p *pipeline) forget(events []event) error {
	_, err := p.db.Exec(forgetEvents, outboxIDs(events))
	return err
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

// retry repeats f with growing pauses while it asks for it, until ctx ends.
func retry(ctx context.Context, f func() (again bool)) {
	for wait := retryFirst; ctx.Err() == nil && f(); wait = min(2*wait, retryMost) {
		pause(ctx, wait)
	}
}
