package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// requestTimeout is the time after which a caller gets an error, whatever
	// its batch is waiting for.
	requestTimeout = 4 * time.Second
	// batchAlone limits the requests of a batcher that are tried alone at a time.
	batchAlone = 4
)

// errTryAlone is the result of a request that a batch left undone, so that the
// others need not wait for it.
var errTryAlone = errors.New("to be tried alone")

// result is the answer to one request of a batch, or its own failure.
type result[A any] struct {
	answer A
	err    error
}

// batcher turns concurrent calls into one. A call that finds no batch running
// starts one, of itself and whatever else waits; those who come meanwhile form
// the next. Alone, a call waits for nobody; under load, dozens share a round
// trip or a commit. A call joins only a batch that has not begun, so a read
// sees every write that was answered before it was asked.
type batcher[Q, A any] struct {
	name  string
	limit int // requests in one batch
	// apart returns what two requests of one batch may not have in common, or
	// nil. A nil func keeps nothing apart.
	apart func(Q) any
	// run answers a batch: one result for each request, in their order, or one
	// error for all of them. After an error or errTryAlone it is called with
	// single requests, from several goroutines.
	run   func(requests []Q) ([]result[A], error)
	sizes *histogram
	log   *slog.Logger
	alone chan struct{} // slots for requests that are tried alone

	mu      sync.Mutex    // guards what follows
	waiting []*call[Q, A] // in the order of their arrival
	running bool
}

type call[Q, A any] struct {
	request Q
	done    chan result[A] // holds one result, so that a batch never waits for a caller
	gone    atomic.Bool    // the caller no longer listens
}

func newBatcher[Q, A any](name string, limit int, apart func(Q) any, run func([]Q) ([]result[A], error), counts *metrics, log *slog.Logger) *batcher[Q, A] {
	return &batcher[Q, A]{name: name, limit: limit, apart: apart, run: run,
		sizes: counts.batch(name), log: log, alone: make(chan struct{}, batchAlone)}
}

// do answers one request, or fails when ctx ends or after requestTimeout. A
// request that has not begun by then never will; one that has begun is
// finished unheard.
func (b *batcher[Q, A]) do(ctx context.Context, request Q) (answer A, err error) {
	c := &call[Q, A]{request: request, done: make(chan result[A], 1)}
	b.mu.Lock()
	b.waiting = append(b.waiting, c)
	first := !b.running
	b.running = true
	b.mu.Unlock()
	if first {
		go b.lead()
	}
	late := time.NewTimer(requestTimeout) // far cheaper than a context with a timeout
	defer late.Stop()
	select {
	case r := <-c.done:
		return r.answer, r.err
	case <-ctx.Done():
		err = ctx.Err()
	case <-late.C:
		err = context.DeadlineExceeded
	}
	c.gone.Store(true)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.waiting = slices.DeleteFunc(b.waiting, func(w *call[Q, A]) bool { return w == c })
	return answer, fmt.Errorf("batch %s: %w", b.name, err)
}

// lead runs one batch after the other until nobody waits.
func (b *batcher[Q, A]) lead() {
	for {
		// Requests that have been read but not yet handed in are one scheduling
		// step away: let them come, for the price of a microsecond.
		runtime.Gosched()
		batch := b.next()
		if batch == nil {
			return
		}
		b.serve(batch)
	}
}

// next takes a batch from those who wait; nil means that nobody does.
func (b *batcher[Q, A]) next() (batch []*call[Q, A]) {
	b.mu.Lock()
	defer b.mu.Unlock()
	taken := map[any]bool{}
	var left []*call[Q, A]
	for _, c := range b.waiting {
		var key any
		if b.apart != nil {
			key = b.apart(c.request)
		}
		if len(batch) == b.limit || key != nil && taken[key] {
			left = append(left, c)
			continue
		}
		if key != nil {
			taken[key] = true
		}
		batch = append(batch, c)
	}
	b.waiting = left
	b.running = batch != nil
	return batch
}

// serve answers every call of a batch. When the batch fails as a whole, its
// requests are tried alone, so that a failure stays with its request; and so
// are those that the batch has left with errTryAlone. Nobody waits for these
// but their own callers.
func (b *batcher[Q, A]) serve(batch []*call[Q, A]) {
	b.sizes.observe(float64(len(batch)))
	requests := make([]Q, len(batch))
	for i, c := range batch {
		requests[i] = c.request
	}
	results, err := b.try(requests)
	for i, c := range batch {
		switch {
		case err == nil && !errors.Is(results[i].err, errTryAlone):
			c.done <- results[i]
		case errors.Is(err, errOutcomeUnknown):
			c.done <- result[A]{err: err}
		default:
			go b.tryAlone(c)
		}
	}
}

func (b *batcher[Q, A]) tryAlone(c *call[Q, A]) {
	b.alone <- struct{}{}
	defer func() { <-b.alone }()
	if c.gone.Load() {
		return
	}
	results, err := b.try([]Q{c.request})
	if err != nil {
		c.done <- result[A]{err: err}
		return
	}
	c.done <- results[0]
}

// try runs requests once. A panic fails them and nothing else; whether they
// were written is then not known.
func (b *batcher[Q, A]) try(requests []Q) (results []result[A], err error) {
	defer func() {
		if p := recover(); p != nil {
			b.log.Error("panic in a batch", "batch", b.name, "panic", p, "stack", string(debug.Stack()))
			results, err = nil, fmt.Errorf("panic: %v: %w", p, errOutcomeUnknown)
		}
	}()
	if results, err = b.run(requests); err != nil {
		b.log.Debug("batch failed", "batch", b.name, "size", len(requests), "err", err)
	}
	return results, err
}
