package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"
)

// Group commit: calls that arrive while a batch runs wait for its end, and form the next batch together. A
// batch is one statement and one commit of Postgres for dozens of calls. Most of the service's speed comes
// from that, as each commit waits for the disk, and each create for the same lock. A lone call is sent at
// once. Four rules make it safe:
//
//   - Who joins: a call joins only a batch that has not begun, so a read sees every write that was answered
//     before the read was sent. No two calls of a batch share a conflictKey.
//   - Who waits: every caller, for requestTimeout at most. No batch waits for a good that another transaction
//     has locked: it leaves out the call that needs it, which joins the next batch. When that one leaves it
//     out, too, the call is retried alone, where it may wait. At most loneRequests retries run at a time.
//   - What is retried: a call that two batches left out, and every call of a batch that failed, alone and
//     once. So a failure stays with its own call, and a pooled connection that the server closed while it was
//     idle fails no call at all.
//   - What is never repeated: a write of unknown outcome (errOutcomeUnknown). Its caller gets an error, and
//     decides.

const (
	requestTimeout = 4 * time.Second // a caller gets an error then
	loneRequests   = 2               // that a batcher retries alone at the same time
)

var (
	// errLeftOut is the result of a request that its batch left out, as it would have made the others wait.
	// The first time it joins the next batch; the second time it is retried alone.
	errLeftOut = errors.New("left out")
	// errNextBatch is the result of a request that its batch did not run: it waits for the next, before all
	// others.
	errNextBatch = errors.New("belongs to the next batch")
)

// batchable is a request that a batcher takes.
type batchable interface {
	conflictKey() any // what no two requests of one batch may have in common, or nil
}

// result is the answer to one request of a batch, or its own failure.
type result[A any] struct {
	answer A
	err    error
}

// batcher answers concurrent calls in batches. All methods may be called concurrently.
type batcher[Q batchable, A any] struct {
	name  string
	limit int // requests in one batch
	// run answers a batch: it fills in results[i] for requests[i], or returns one error for all of them.
	// Batches run one after the other. A retry runs beside them, has one request, and alone is true: the
	// error of its result must not be errLeftOut or errNextBatch.
	run   func(requests []Q, results []result[A], alone bool) error
	sizes *histogram
	log   *slog.Logger
	lone  chan struct{} // has an element for each retry that runs

	mu      sync.Mutex    // guards what follows
	waiting []*call[Q, A] // in the order of their arrival
	running bool          // a goroutine runs batches
}

// call is a request whose caller waits.
type call[Q batchable, A any] struct {
	request   Q
	answer    chan result[A]        // has room for the one result, so that a batch never waits for a caller
	abandoned atomic.Bool           // the caller has left
	leftOut   bool                  // by a batch before; only the goroutine that runs batches uses it
	failure   atomic.Pointer[error] // why it is retried
}

func newBatcher[Q batchable, A any](name string, limit int, run func([]Q, []result[A], bool) error,
	metrics *metrics, log *slog.Logger) *batcher[Q, A] {
	return &batcher[Q, A]{
		name:  name,
		limit: limit,
		run:   run,
		sizes: metrics.addBatcher(name),
		log:   log,
		lone:  make(chan struct{}, loneRequests),
	}
}

// do answers a request, or fails when ctx ends or after requestTimeout. A batch or retry that runs the
// request at that moment is finished, and its result is dropped; otherwise the request is never run again.
// The error then wraps context.Canceled or context.DeadlineExceeded, and the failure for which the request
// was to be retried, if any.
func (b *batcher[Q, A]) do(ctx context.Context, request Q) (answer A, err error) {
	c := &call[Q, A]{request: request, answer: make(chan result[A], 1)}
	b.join(c)
	timeout := time.NewTimer(requestTimeout) // much cheaper than a context with a timeout
	defer timeout.Stop()
	select {
	case r := <-c.answer:
		return r.answer, r.err
	case <-ctx.Done():
		err = ctx.Err()
	case <-timeout.C:
		err = context.DeadlineExceeded
	}
	c.abandoned.Store(true)
	if cause := c.failure.Load(); cause != nil {
		err = fmt.Errorf("%w: %w", err, *cause)
	}
	return answer, fmt.Errorf("batch %s: %w", b.name, err)
}

// join lets c wait for the next batch, and sees to it that there will be one.
func (b *batcher[Q, A]) join(c *call[Q, A]) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.waiting = append(b.waiting, c)
	if !b.running {
		b.running = true
		go b.runAll()
	}
}

// runAll runs one batch after the other until no call waits.
func (b *batcher[Q, A]) runAll() {
	for {
		// Requests that have been read, but have not joined yet, are one scheduling step away: they get to
		// join, for the price of a microsecond.
		runtime.Gosched()
		batch := b.next()
		if len(batch) == 0 {
			return
		}
		requests := make([]Q, len(batch))
		for i, c := range batch {
			requests[i] = c.request
		}
		results, err := b.try(requests, false)
		var postponed []*call[Q, A]
		for i, c := range batch {
			switch {
			case errors.Is(err, errOutcomeUnknown):
				c.answer <- result[A]{err: err}
			case err != nil:
				c.failure.Store(&err)
				go b.retryAlone(c)
			case results[i].err == errLeftOut && c.leftOut:
				c.failure.Store(&errLocked)
				go b.retryAlone(c)
			case results[i].err == errLeftOut: // most locks are short
				c.leftOut = true
				postponed = append(postponed, c)
			case results[i].err == errNextBatch:
				postponed = append(postponed, c)
			default:
				c.answer <- results[i]
			}
		}
		if n := len(batch) - len(postponed); n > 0 {
			b.sizes.observe(float64(n)) // without those that wait for the next
		}
		b.postpone(postponed)
	}
}

// busy reports whether a call waits, or a batch runs.
func (b *batcher[Q, A]) busy() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.running
}

// next takes a batch out of the calls that wait. If none does, the batch is empty, and b runs no batches
// any more: the next call to join changes that.
func (b *batcher[Q, A]) next() []*call[Q, A] {
	b.mu.Lock()
	defer b.mu.Unlock()
	var batch []*call[Q, A]
	var taken map[any]bool // conflict keys
	left := b.waiting[:0]
	for _, c := range b.waiting {
		if c.abandoned.Load() {
			continue
		}
		key := c.request.conflictKey()
		if len(batch) == b.limit || key != nil && taken[key] {
			left = append(left, c)
			continue
		}
		if key != nil {
			if taken == nil {
				taken = map[any]bool{}
			}
			taken[key] = true
		}
		batch = append(batch, c)
	}
	clear(b.waiting[len(left):]) // so that no answered call is kept in memory
	b.waiting = left
	b.running = len(batch) > 0
	return batch
}

// postpone lets calls wait before all others.
func (b *batcher[Q, A]) postpone(calls []*call[Q, A]) {
	if len(calls) == 0 {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.waiting = append(calls, b.waiting...)
}

// retryAlone runs a request alone, so that it may wait for locks.
func (b *batcher[Q, A]) retryAlone(c *call[Q, A]) {
	b.lone <- struct{}{}
	defer func() { <-b.lone }()
	if c.abandoned.Load() {
		return
	}
	results, err := b.try([]Q{c.request}, true)
	if err != nil {
		results[0].err = err
	}
	c.answer <- results[0]
}

// try runs requests once. A panic fails them and nothing else; whether they were written is not known then.
func (b *batcher[Q, A]) try(requests []Q, alone bool) (results []result[A], err error) {
	results = make([]result[A], len(requests))
	defer func() {
		if p := recover(); p != nil {
			b.log.Error("panic in a batch", "batch", b.name, "panic", p, "stack", string(debug.Stack()))
			err = fmt.Errorf("panic: %v: %w", p, errOutcomeUnknown)
		}
	}()
	return results, b.run(requests, results, alone)
}

// answerEqual gives a result to the first request and to those that are equal, and leaves the others to the
// next batch.
func answerEqual[Q comparable, A any](requests []Q, results []result[A], r result[A]) {
	for i, q := range requests {
		if q == requests[0] {
			results[i] = r
		} else {
			results[i].err = errNextBatch
		}
	}
}
