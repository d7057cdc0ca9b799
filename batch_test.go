package main

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// ask is a request that asks for itself.
type ask struct {
	n   int
	key any
}

func (q ask) conflictKey() any { return q.key }

// testBatcher notes the batches that run gets.
func testBatcher(run func([]ask, []result[int], bool) error) (*batcher[ask, int], *[][]int) {
	var mu sync.Mutex
	var batches [][]int
	b := newBatcher("test", 4, func(requests []ask, results []result[int], alone bool) error {
		var batch []int
		for _, q := range requests {
			batch = append(batch, q.n)
		}
		mu.Lock()
		batches = append(batches, batch)
		mu.Unlock()
		return run(requests, results, alone)
	}, newMetrics(nil), slog.New(slog.DiscardHandler))
	return b, &batches
}

func echo(requests []ask, results []result[int], _ bool) error {
	for i, q := range requests {
		results[i].answer = q.n
	}
	return nil
}

// slowEcho takes as many milliseconds as it has requests.
func slowEcho(requests []ask, results []result[int], alone bool) error {
	time.Sleep(time.Duration(len(requests)) * time.Millisecond)
	return echo(requests, results, alone)
}

// ended is what a call came to.
type ended struct {
	n, answer int
	err       error
	took      time.Duration
}

// start makes the calls one after the other, each once the one before waits.
func start(b *batcher[ask, int], requests ...ask) chan ended {
	done := make(chan ended, len(requests))
	begin := time.Now()
	for _, q := range requests {
		go func() {
			answer, err := b.do(context.Background(), q)
			done <- ended{q.n, answer, err, time.Since(begin)}
		}()
		synctest.Wait()
	}
	return done
}

func TestBatchTakesWhatWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, batches := testBatcher(slowEcho)
		done := start(b, ask{n: 1}, ask{n: 2}, ask{n: 3}, ask{n: 4}, ask{n: 5}, ask{n: 6},
			ask{7, "a"}, ask{8, "a"}, ask{9, "b"})
		for range 9 {
			if e := <-done; e.err != nil || e.answer != e.n {
				t.Errorf("call %d: got %d, %v", e.n, e.answer, e.err)
			}
		}
		want := [][]int{{1}, {2, 3, 4, 5}, {6, 7, 9}, {8}} // four at most, and 8 apart from 7
		if !slices.EqualFunc(*batches, want, slices.Equal) {
			t.Errorf("got batches %v, want %v", *batches, want)
		}
	})
}

// What a batch postpones comes first in the next one, and is counted in the batch that runs it.
func TestBatchPostpones(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, batches := testBatcher(func(requests []ask, results []result[int], alone bool) error {
			time.Sleep(time.Millisecond)
			answerEqual(requests, results, result[int]{answer: requests[0].n})
			return nil
		})
		done := start(b, ask{n: 1}, ask{n: 2}, ask{n: 3}, ask{n: 3}, ask{n: 4}, ask{n: 5})
		for range 6 {
			if e := <-done; e.err != nil || e.answer != e.n {
				t.Errorf("call %d: got %d, %v", e.n, e.answer, e.err)
			}
		}
		want := [][]int{{1}, {2, 3, 3, 4}, {3, 3, 4, 5}, {4, 5}, {5}}
		if !slices.EqualFunc(*batches, want, slices.Equal) {
			t.Errorf("got batches %v, want %v", *batches, want)
		}
		synctest.Wait()
		if b.sizes.sum != 6 {
			t.Errorf("got sizes that add up to %g, want the 6 calls", b.sizes.sum)
		}
	})
}

func TestBatchAnswersInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan bool)
		b, batches := testBatcher(func(requests []ask, results []result[int], alone bool) error {
			<-release
			return echo(requests, results, alone)
		})
		done := start(b, ask{n: 1}, ask{n: 2}, ask{n: 3})
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if _, err := b.do(ctx, ask{n: 4}); !errors.Is(err, context.Canceled) {
			t.Errorf("a caller who goes away: got %v, want %v", err, context.Canceled)
		}
		for range 3 { // the first runs, the others wait
			if e := <-done; !errors.Is(e.err, context.DeadlineExceeded) || e.took != requestTimeout {
				t.Errorf("call %d: got %v after %v, want an error after %v",
					e.n, e.err, e.took, requestTimeout)
			}
		}
		close(release)
		synctest.Wait()
		if len(*batches) != 1 {
			t.Errorf("got batches %v, want the first: what has not begun never will", *batches)
		}
		if e := <-start(b, ask{n: 5}); e.err != nil {
			t.Errorf("after the batch that hung: %v", e.err)
		}
	})
}

func TestBatchFailures(t *testing.T) {
	bad := errors.New("bad request")
	unknown := map[int]error{2: errOutcomeUnknown, 3: errOutcomeUnknown, 4: errOutcomeUnknown}
	for name, test := range map[string]struct {
		fails func(requests []ask) error // 1 comes first and does not, then come the rest
		want  map[int]error              // by call
		runs  int
	}{
		"a failure stays with its request": {func(requests []ask) error {
			if slices.Contains(requests, ask{n: 3}) {
				return bad
			}
			return nil
		}, map[int]error{3: bad}, 1 + 1 + 3},
		"an unknown outcome is not tried again": {func([]ask) error {
			return errOutcomeUnknown
		}, unknown, 1 + 1},
		"a panic is an unknown outcome": {func([]ask) error {
			panic("unforeseen")
		}, unknown, 1 + 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b, batches := testBatcher(func(requests []ask, results []result[int], alone bool) error {
					_ = slowEcho(requests, results, alone) // has no error
					if requests[0].n > 1 {
						return test.fails(requests)
					}
					return nil
				})
				b.lone = make(chan struct{}, 1) // one slot, which each has to free
				done := start(b, ask{n: 1}, ask{n: 2}, ask{n: 3}, ask{n: 4})
				for range 4 {
					if e := <-done; !errors.Is(e.err, test.want[e.n]) {
						t.Errorf("call %d: got %v, want %v", e.n, e.err, test.want[e.n])
					}
				}
				if len(*batches) != test.runs {
					t.Errorf("got runs %v, want %d", *batches, test.runs)
				}
			})
		})
	}
}

func TestBatchStragglersHoldUpNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin, unlock := make(chan bool), make(chan bool)
		var alone []int
		b, _ := testBatcher(func(requests []ask, results []result[int], isAlone bool) error {
			<-begin
			if isAlone {
				alone = append(alone, requests[0].n)
				<-unlock
			}
			_ = echo(requests, results, isAlone) // has no error
			for i, q := range requests {
				if q.n < 0 && !isAlone {
					results[i].err = errLeftOut
				}
			}
			return nil
		})
		b.lone = make(chan struct{}, 1)
		done := start(b, ask{n: 1}, ask{n: 2}, ask{n: -1}, ask{n: 3})
		close(begin)
		for range 3 {
			if e := <-done; e.err != nil || e.took != 0 {
				t.Errorf("call %d: got %v after %v, want an answer at once", e.n, e.err, e.took)
			}
		}
		second := start(b, ask{n: -2})
		if e := <-start(b, ask{n: 4}); e.err != nil || e.took != 0 {
			t.Errorf("the next batch: got %v after %v, want an answer at once", e.err, e.took)
		}
		for _, straggler := range []chan ended{done, second} {
			e := <-straggler
			if !errors.Is(e.err, context.DeadlineExceeded) || !errors.Is(e.err, errLocked) {
				t.Errorf("straggler %d: got %v, want a timeout for a lock", e.n, e.err)
			}
		}
		close(unlock)
		synctest.Wait()
		if !slices.Equal(alone, []int{-1}) {
			t.Errorf("got %v retried alone, want only -1: nobody waited any more for -2", alone)
		}
	})
}
