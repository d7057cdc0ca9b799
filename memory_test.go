package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// buildOf makes replies of so many bytes, which it estimates first, unless the estimate is 0.
func buildOf(bytes, estimate int) builder {
	return func(_ context.Context, maxBytes int, reserved bool) ([]byte, error) {
		switch {
		case !reserved && estimate > maxBytes:
			return nil, replyTooLargeError(estimate)
		case bytes > maxBytes:
			return nil, replyTooLargeError(bytes)
		}
		return make([]byte, bytes), nil
	}
}

// hold builds n replies that are not released yet.
func hold(t *testing.T, m replyMemory, n, bytes, estimate int) (release func()) {
	t.Helper()
	var releases []func()
	for range n {
		begin := time.Now()
		reply, release, err := m.build(context.Background(), buildOf(bytes, estimate))
		if err != nil || len(reply) != bytes {
			t.Fatalf("a reply of %d bytes: got %d bytes, %v", bytes, len(reply), err)
		}
		if waited := time.Since(begin); waited > 0 {
			t.Errorf("a reply of %d bytes waited for %v", bytes, waited)
		}
		releases = append(releases, release)
	}
	return func() {
		for _, release := range releases {
			release()
		}
	}
}

// refused builds a reply for which there is no memory.
func refused(t *testing.T, m replyMemory, bytes int) {
	t.Helper()
	begin := time.Now()
	_, _, err := m.build(context.Background(), buildOf(bytes, 0))
	if waited := time.Since(begin); !errors.Is(err, errNoMemory) || waited != requestTimeout {
		t.Errorf("a reply of %d bytes: got %v after %v, want errNoMemory after %v",
			bytes, err, waited, requestTimeout)
	}
}

// The memory of replies is bounded, whatever their size, and all of it comes back. Replies of one size do
// not wait for those of another.
func TestReplyMemory(t *testing.T) {
	const free, small, medium, large = freeReply, 100 << 10, 800 << 10, largeMemory
	for _, test := range []struct {
		name            string
		bytes, estimate int
		most            int // at once
	}{
		{"one byte too large to be free", free + 1, 0, mediumMemory / memoryUnit},
		{"small", small, 0, mediumMemory / memoryUnit / 2},
		{"medium", medium, 0, mediumMemory / (15 * memoryUnit)}, // with an eighth for escapes
		{"large", large / 4, 0, 3},
		{"as large as all memory", large, 0, 1},
		{"with more memory than there is", large + 1, 0, 1},
		{"estimated too low", large * 3 / 4, mediumReply + 1, 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := newReplyMemory()
				for range 2 {
					release := hold(t, m, test.most, test.bytes, test.estimate)
					refused(t, m, test.bytes)
					refused(t, m, test.bytes)
					hold(t, m, 1000, free, 0)
					if test.bytes > mediumReply {
						hold(t, m, 2, medium, 0)()
					} else {
						hold(t, m, 1, large, 0)()
					}
					release()
				}
			})
		})
	}
}

// A reply that waits for memory is built when others have been released, and one that fails or is no longer
// wanted takes none.
func TestReplyMemoryIsGivenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newReplyMemory()
		release := hold(t, m, 1, largeMemory*3/4, 0)
		time.AfterFunc(time.Second, release)
		begin := time.Now()
		reply, release, err := m.build(context.Background(), buildOf(largeMemory, 0))
		if waited := time.Since(begin); err != nil || len(reply) != largeMemory || waited != time.Second {
			t.Fatalf("got %d bytes, %v after %v, want %d after 1s", len(reply), err, waited, largeMemory)
		}
		release()

		failure := errors.New("failure")
		for _, reserved := range []bool{false, true} {
			build := func(_ context.Context, _ int, now bool) ([]byte, error) {
				if now == reserved {
					return nil, fmt.Errorf("build: %w", failure)
				}
				return nil, replyTooLargeError(largeMemory)
			}
			if _, _, err := m.build(context.Background(), build); !errors.Is(err, failure) {
				t.Errorf("got %v, want the failure of the build", err)
			}
		}
		release = hold(t, m, 1, largeMemory/2, 0)
		gone, cancel := context.WithCancel(context.Background())
		time.AfterFunc(time.Second, cancel)
		if _, _, err := m.build(gone, buildOf(largeMemory, 0)); !errors.Is(err, errNoMemory) {
			t.Errorf("got %v for a client that has gone, want errNoMemory", err)
		}
		hold(t, m, 1, largeMemory/4, 0)()
		release()
		hold(t, m, 1, largeMemory, 0)()
	})
}

// Among many replies that were estimated too low, some are built: each would be built in vain otherwise.
func TestRepliesEstimatedTooLow(t *testing.T) {
	const replies, reading = 64, 100 * time.Millisecond
	synctest.Test(t, func(t *testing.T) {
		m := newReplyMemory()
		build := buildOf(largeMemory, largeMemory/6) // JSON needs up to six bytes for one
		// Not a mutex: while a goroutine waits for one, the clock of a bubble stands still.
		oneAtATime := make(chan struct{}, 1)
		slowly := func(ctx context.Context, maxBytes int, reserved bool) ([]byte, error) {
			if reserved {
				oneAtATime <- struct{}{}
				defer func() { <-oneAtATime }()
				time.Sleep(reading)
			}
			return build(ctx, maxBytes, reserved)
		}
		var built, refused atomic.Int32
		var running sync.WaitGroup
		for range replies {
			running.Go(func() {
				_, release, err := m.build(context.Background(), slowly)
				if err != nil {
					refused.Add(1)
					return
				}
				release()
				built.Add(1)
			})
		}
		running.Wait()
		// There is time for 50 readings; each reply takes two, and may wait for others that are read first.
		if n := built.Load(); n < 10 {
			t.Errorf("%d replies were built and %d refused, want 10 built at least", n, refused.Load())
		}
	})
}
