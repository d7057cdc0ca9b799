package main

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// drain moves events from NATS into ClickHouse, until ctx ends. Replicas share
// one consumer, so any number may drain at once.
func (p *pipeline) drain(ctx context.Context) {
	p.retry(ctx, func() error {
		err := migrateClickHouse(ctx, p.clickhouse, migrations, p.log)
		if ctx.Err() == nil {
			p.chUp.report("migrations", err)
		}
		return err
	})
	var looked time.Time
	for ctx.Err() == nil {
		messages, err := p.fetch(ctx)
		p.natsUp.report("drain", err)
		if err != nil {
			p.log.Debug("fetch failed", "err", err)
			pause(ctx, relayPoll)
			_, _ = p.connect(ctx)
			continue
		}
		if len(messages) > 0 {
			p.store(ctx, messages)
		} else if time.Since(looked) > lostAfter/3 {
			looked = time.Now()
			if err := p.find(ctx); err != nil && ctx.Err() == nil {
				p.log.Debug("search for lost events failed", "err", err)
			}
		}
	}
}

// fetch waits a moment for a first message, and then up to a second until a
// batch is full. Without messages it returns none, and no error.
func (p *pipeline) fetch(ctx context.Context) ([]jetstream.Msg, error) {
	p.mu.Lock()
	consumer := p.consumer
	p.mu.Unlock()
	if consumer == nil {
		var err error
		if consumer, err = p.connect(ctx); err != nil {
			return nil, err
		}
	}
	messages, err := fetchUpTo(ctx, consumer, 1, 2*time.Second)
	if err != nil || len(messages) == 0 || p.batch == 1 {
		return messages, err
	}
	// What has arrived is stored even if the rest could not be fetched.
	more, _ := fetchUpTo(ctx, consumer, p.batch-1, time.Second)
	return append(messages, more...), nil
}

func fetchUpTo(ctx context.Context, consumer jetstream.Consumer, n int, wait time.Duration) ([]jetstream.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	batch, err := consumer.Fetch(n, jetstream.FetchContext(ctx))
	if err != nil {
		return nil, err
	}
	var messages []jetstream.Msg
	for m := range batch.Messages() {
		messages = append(messages, m)
	}
	if err := batch.Error(); err != nil && ctx.Err() == nil {
		return messages, err
	}
	return messages, nil
}

// store inserts the messages as one batch, deletes their outbox rows, and only
// then acknowledges them. It tries until it succeeds or ctx ends.
func (p *pipeline) store(ctx context.Context, messages []jetstream.Msg) {
	var events []event
	var good []jetstream.Msg
	for _, m := range messages {
		var e event
		if err := json.Unmarshal(m.Data(), &e); err != nil || !e.valid() {
			p.log.Error("not an event, thrown away", "subject", m.Subject(), "data", string(m.Data()), "err", err)
			p.counts.thrownAway.Add(1)
			_ = m.Term()
			continue
		}
		events, good = append(events, e), append(good, m)
	}
	if len(events) == 0 {
		return
	}
	again := false
	stored := p.retry(ctx, func() error {
		for _, m := range good {
			if again {
				_ = m.InProgress() // else another replica gets them meanwhile
			}
		}
		again = true
		return p.insert(ctx, events)
	}) && p.retry(ctx, func() error { return p.forget(ctx, events) })
	for _, m := range good {
		// An acknowledgement that is lost only repeats the event.
		if stored {
			_ = m.Ack()
		} else {
			_ = m.Nak()
		}
	}
}

// insert adds events to ClickHouse in one INSERT.
func (p *pipeline) insert(ctx context.Context, events []event) (err error) {
	limited, cancel := context.WithTimeout(ctx, eventTimeout)
	defer cancel()
	defer func() {
		if err != nil {
			err = fmt.Errorf("insert events: %w", err)
			p.counts.insertFailures.Add(1)
		}
		if ctx.Err() == nil {
			p.chUp.report("insert", err)
		}
	}()
	const insert = `INSERT INTO goods_log (Id, ProjectId, Name, Description, Priority, Removed, EventTime, Version)`
	batch, err := p.clickhouse.PrepareBatch(limited, insert)
	if err != nil {
		return err
	}
	defer batch.Close()
	for _, e := range events {
		removed := uint8(0) // ClickHouse 18.16 has no Bool
		if e.Removed {
			removed = 1
		}
		if err := batch.Append(e.ID, e.ProjectID, e.Name, e.Description, e.Priority, removed, e.Time.UTC(), uint32(e.Version)); err != nil {
			return err
		}
	}
	if err := batch.Send(); err != nil {
		return err
	}
	p.counts.inserted.Add(int64(len(events)))
	p.counts.batches.Add(1)
	return nil
}

// forget deletes the outbox rows of events that ClickHouse holds.
func (p *pipeline) forget(ctx context.Context, events []event) error {
	ctx, cancel := context.WithTimeout(ctx, eventTimeout)
	defer cancel()
	const forget = `
DELETE FROM outbox
WHERE id = ANY ($1)`
	_, err := p.db.ExecContext(ctx, forget, outboxIDs(events))
	return err
}

// retry repeats f with growing pauses until it succeeds; false means that ctx
// ended first.
func (p *pipeline) retry(ctx context.Context, f func() error) bool {
	for wait := retryFirst; ctx.Err() == nil; wait = min(2*wait, retryMost) {
		err := f()
		if err == nil {
			return true
		}
		p.log.Debug("storing events failed", "err", err)
		pause(ctx, wait)
	}
	return false
}
