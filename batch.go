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
	requestTimeout = 4 * time.Second // a caller gets an error then, whatever its batch waits for
	batchAlone     = 4               // requests of a batcher that are tried alone at a time
)

// errTryAlone is the result of a request that its batch did not wait for.
var errTryAlone = errors.New("to be tried alone")

// result is the answer to one request of a batch, or its own failure.
type result[A any] struct {
	answer A
	err    error
}

// request is what a batcher takes.
type request interface {
	apart() any // what no two requests of a batch may have in common, or nil
}

// batcher turns concurrent calls into one. A call that finds no batch running starts one, of itself and whatever else
// waits; those who come meanwhile form the next. A call joins only a batch that has not begun, so a read sees every
// write that was answered before it was asked.
type batcher[Q request, A any] struct {
	name  string
	limit int // requests in one batch
	// run answers a batch: one result for each request, in their order, or one error for all of them. After an error
	// or errTryAlone it is called with single requests, from several goroutines.
	run   func(requests []Q) ([]result[A], error)
	sizes *histogram
	log   *slog.Logger
	alone chan struct{} // slots for requests that are tried alone

	mu      sync.Mutex    // guards what follows
	waiting []*call[Q, A] // in the order of their arrival
	running bool
}

type call[Q request, A any] struct {
	request Q
	done    chan result[A] // holds one result, so that a batch never waits for a caller
	gone    atomic.Bool    // the caller no longer listens
}

func newBatcher[Q request, A any](name string, limit int, run func([]Q) ([]result[A], error), counts *metrics, log *slog.Logger) *batcher[Q, A] {
	return &batcher[Q, A]{name: name, limit: limit, run: run, sizes: counts.batch(name), log: log, alone: make(chan struct{}, batchAlone)}
}

// do answers one request, or fails when ctx ends or after requestTimeout. A request that has not begun by then never
// will; one that has begun is finished unheard.
func (b *batcher[Q, A]) do(ctx context.Context, request Q) (answer A, err error) {
	c := &call[Q, A]{request: request, done: make(chan result[A], 1)}
	b.mu.Lock()
	b.waiting = append(b.waiting, c)
	if !b.running {
		b.running = true
		go b.lead()
	}
	b.mu.Unlock()
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
		// Requests that have been read but not yet handed in are one scheduling step away: let them come, for the
		// price of a microsecond.
		runtime.Gosched()
		batch := b.next()
		if batch == nil {
			return
		}
		b.sizes.observe(float64(len(batch)))
		requests := make([]Q, len(batch))
		for i, c := range batch {
			requests[i] = c.request
		}
		results, err := b.try(requests)
		for i, c := range batch {
			switch {
			case err == nil && results[i].err != errTryAlone:
				c.done <- results[i]
			case errors.Is(err, errOutcomeUnknown):
				c.done <- result[A]{err: err}
			default: // a failure stays with its request, and only its own caller waits
				go b.tryAlone(c)
			}
		}
	}
}

// next takes a batch from those who wait; nil means that nobody does.
func (b *batcher[Q, A]) next() (batch []*call[Q, A]) {
	b.mu.Lock()
	defer b.mu.Unlock()
	taken := map[any]bool{}
	b.waiting = slices.DeleteFunc(b.waiting, func(c *call[Q, A]) bool {
		key := c.request.apart()
		if len(batch) == b.limit || key != nil && taken[key] {
			return false
		}
		taken[key] = true
		batch = append(batch, c)
		return true
	})
	b.running = batch != nil
	return batch
}

func (b *batcher[Q, A]) tryAlone(c *call[Q, A]) {
	b.alone <- struct{}{}
	defer func() { <-b.alone }()
	if c.gone.Load() {
		return
	}
	results, err := b.try([]Q{c.request})
	if err != nil {
		results = []result[A]{{err: err}}
	}
	c.done <- results[0]
}

// try runs requests once. A panic fails them and nothing else; whether they were written is then not known.
func (b *batcher[Q, A]) try(requests []Q) (results []result[A], err error) {
	defer func() {
		if p := recover(); p != nil {
			b.log.Error("panic in a batch", "batch", b.name, "panic", p, "stack", string(debug.Stack()))
			results, err = nil, fmt.Errorf("panic: %v: %w", p, errOutcomeUnknown)
		}
	}()
	return b.run(requests)
}
