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
	// answerWithin is the time in which a call is answered, if only by a 503.
	answerWithin = 4 * time.Second
	// batchAlone is how many requests of a failed batch are tried at a time.
	batchAlone = 8
)

// errOutcomeUnknown marks an error after which a write may or may not stand:
// it is never tried again by the service.
var errOutcomeUnknown = errors.New("outcome unknown")

// errTryAlone is what a batch answers for a request that it left undone, lest
// the others wait for it.
var errTryAlone = errors.New("to be tried alone")

// errStopped answers calls that a closed batcher did not begin.
var errStopped = errors.New("shutting down")

// result is the answer to one request of a batch, or its own failure.
type result[A any] struct {
	answer A
	err    error
}

// batcher turns concurrent calls into one. A caller that finds no batch running
// runs one, of its own request and whatever else waits at that moment; those
// who come meanwhile wait for the next. Alone, a request waits for nobody;
// under load, a round trip or a commit is shared by dozens. A request joins
// only a batch that has not begun, so a read sees every write that was answered
// before it was asked.
type batcher[Q, A any] struct {
	name  string
	limit int // requests in one batch
	// run answers a batch: one result for each request, in their order, or one
	// error for all of them. After an error or errTryAlone, it is called with
	// single requests, from several goroutines.
	run   func(ctx context.Context, requests []Q) ([]result[A], error)
	sizes *histogram
	log   *slog.Logger

	mu      sync.Mutex    // guards what follows
	waiting []*call[Q, A] // in the order of their arrival
	running bool
	closed  bool
	batches sync.WaitGroup // counts the running one, for close
}

type call[Q, A any] struct {
	request Q
	done    chan result[A] // holds one result, so that a batch never waits for a caller
	gone    atomic.Bool    // the caller listens no more
}

// close waits for the batch that runs; callers still waiting get errStopped,
// as do those that come later.
func (b *batcher[Q, A]) close() {
	b.mu.Lock()
	b.closed = true
	for _, c := range b.waiting {
		c.done <- result[A]{err: errStopped}
	}
	b.waiting = nil
	b.mu.Unlock()
	b.batches.Wait()
}

// do answers one request, in company or alone, or fails after answerWithin.
// When ctx ends first, a request that has not begun is dropped; one that has
// begun is finished unheard. Whoever runs a batch stays until it is done, for
// which answerWithin is the limit, too.
func (b *batcher[Q, A]) do(ctx context.Context, request Q) (answer A, err error) {
	c := &call[Q, A]{request: request, done: make(chan result[A], 1)}
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		return answer, errStopped
	}
	b.waiting = append(b.waiting, c)
	first := !b.running
	if first {
		b.running = true
		b.batches.Add(1)
	}
	b.mu.Unlock()
	if first {
		b.lead() // right here: to change goroutines would take longer than to run
		r := <-c.done
		return r.answer, r.err
	}
	// A timer of its own is far cheaper than one in a context.
	late := time.NewTimer(answerWithin)
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
	return answer, err
}

// lead runs one batch of those who wait, and has the next one follow.
func (b *batcher[Q, A]) lead() {
	// Requests that have been read but not yet handed in are one scheduling
	// step away: let them come, for the price of a microsecond.
	runtime.Gosched()
	b.mu.Lock()
	size := min(len(b.waiting), b.limit)
	batch := slices.Clone(b.waiting[:size])
	b.waiting = slices.Delete(b.waiting, 0, size)
	b.mu.Unlock()
	defer func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		if len(b.waiting) > 0 {
			go b.lead() // this caller has its own reply to send
			return
		}
		b.running = false
		b.batches.Done()
	}()
	if size > 0 { // else everybody has left
		b.serve(batch)
	}
}

// serve answers every call of a batch. When the batch fails as a whole, its
// requests are tried each alone, so that a failure stays with its request; and
// so are those that the batch has left with errTryAlone.
func (b *batcher[Q, A]) serve(batch []*call[Q, A]) {
	// The batch belongs to no single caller: it has a time limit of its own.
	ctx, cancel := context.WithTimeout(context.Background(), answerWithin)
	defer cancel()
	b.sizes.observe(float64(len(batch)))
	requests := make([]Q, len(batch))
	for i, c := range batch {
		requests[i] = c.request
	}
	results, err := b.try(ctx, requests)
	if err != nil {
		b.log.Debug("batch failed", "batch", b.name, "size", len(batch), "err", err)
		results = make([]result[A], len(batch))
		for i := range results {
			results[i].err = err
		}
	}
	var alone sync.WaitGroup
	places := make(chan struct{}, batchAlone) // what waits for a lock does not keep the others
	for i, c := range batch {
		again := err != nil && !errors.Is(err, errOutcomeUnknown) || errors.Is(results[i].err, errTryAlone)
		if !again {
			c.done <- results[i]
			continue
		}
		alone.Go(func() {
			places <- struct{}{}
			defer func() { <-places }()
			if c.gone.Load() || ctx.Err() != nil {
				c.done <- result[A]{err: context.DeadlineExceeded}
			} else if results, err := b.try(ctx, requests[i:i+1]); err != nil {
				c.done <- result[A]{err: err}
			} else {
				c.done <- results[0]
			}
		})
	}
	alone.Wait()
}

// try runs requests once. A panic fails them and nothing else; whether they
// were written is then not known.
func (b *batcher[Q, A]) try(ctx context.Context, requests []Q) (results []result[A], err error) {
	defer func() {
		if p := recover(); p != nil {
			b.log.Error("panic in a batch", "batch", b.name, "panic", p, "stack", string(debug.Stack()))
			results, err = nil, fmt.Errorf("panic: %v: %w", p, errOutcomeUnknown)
		}
	}()
	results, err = b.run(ctx, requests)
	if err == nil && len(results) != len(requests) {
		err = fmt.Errorf("%d results for %d requests: %w", len(results), len(requests), errOutcomeUnknown)
	}
	return results, err
}
