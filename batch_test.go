package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// desk is a batcher of numbers whose run function is the test's own. It
// remembers the batches that were run.
type desk struct {
	batcher[int, int]
	mu      sync.Mutex
	batches [][]int
}

// newDesk returns a desk for use inside a synctest bubble: there synctest.Wait
// returns once every caller waits for something, so no test has to guess how
// long that takes. Without run each request is answered by itself.
func newDesk(limit int, run func(requests []int) ([]result[int], error)) *desk {
	d := &desk{}
	d.limit, d.sizes, d.log = limit, newHistogram(), slog.New(slog.DiscardHandler)
	d.run = func(_ context.Context, requests []int) ([]result[int], error) {
		d.mu.Lock()
		d.batches = append(d.batches, slices.Clone(requests))
		d.mu.Unlock()
		if run != nil {
			return run(requests)
		}
		results := make([]result[int], len(requests))
		for i, q := range requests {
			results[i].answer = q
		}
		return results, nil
	}
	return d
}

// ask calls the batcher in the background.
func (d *desk) ask(ctx context.Context, request int) <-chan result[int] {
	done := make(chan result[int], 1)
	go func() {
		answer, err := d.do(ctx, request)
		done <- result[int]{answer, err}
	}()
	return done
}

// gate is a run function that answers once it is opened.
type gate chan struct{}

func (g gate) run(requests []int) ([]result[int], error) {
	<-g
	results := make([]result[int], len(requests))
	for i, q := range requests {
		results[i].answer = q
	}
	return results, nil
}

// answered fails the test unless the answer is there already.
func answered(t testing.TB, done <-chan result[int], answer int, err error) {
	t.Helper()
	select {
	case r := <-done:
		if r.answer != answer || !errors.Is(r.err, err) {
			t.Errorf("got %d and error %v, want %d and %v", r.answer, r.err, answer, err)
		}
	default:
		t.Errorf("no answer, want %d and %v", answer, err)
	}
}

func TestBatchTakesWhoeverWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := make(gate)
		d := newDesk(4, g.run)
		first := d.ask(t.Context(), 1) // waits for nobody
		synctest.Wait()
		var rest []<-chan result[int]
		for i := 2; i <= 7; i++ {
			rest = append(rest, d.ask(t.Context(), i)) // the first batch has begun: not with it
			synctest.Wait()                            // so that they wait in this order
		}
		if got := fmt.Sprint(d.batches); got != "[[1]]" {
			t.Errorf("got batches %s, want [[1]] alone to be under way", got)
		}
		close(g)
		synctest.Wait()
		answered(t, first, 1, nil)
		for i, r := range rest {
			answered(t, r, i+2, nil)
		}
		if got := fmt.Sprint(d.batches); got != "[[1] [2 3 4 5] [6 7]]" {
			t.Errorf("got batches %s, want [[1] [2 3 4 5] [6 7]]", got)
		}
		d.close()
	})
}

func TestBatchFailures(t *testing.T) {
	errOwn, errAll := errors.New("its own"), errors.New("all of them")
	synctest.Test(t, func(t *testing.T) {
		g := make(gate)
		d := newDesk(8, func(requests []int) ([]result[int], error) {
			results, err := g.run(requests)
			for i, q := range requests {
				switch q {
				case 2:
					results[i] = result[int]{err: errOwn}
				case 13:
					return nil, errAll
				}
			}
			return results, err
		})
		for _, requests := range [][]int{{1, 2, 3}, {11, 12, 13, 2, 14}} {
			d.batches, g = nil, make(gate)
			hold := d.ask(t.Context(), 0)
			synctest.Wait()
			var done []<-chan result[int]
			for _, q := range requests {
				done = append(done, d.ask(t.Context(), q))
				synctest.Wait() // so that they wait in this order
			}
			close(g)
			synctest.Wait()
			answered(t, hold, 0, nil)
			if !slices.Equal(d.batches[1], requests) {
				t.Fatalf("got batches %v, want %v to travel together", d.batches, requests)
			}
			for i, q := range requests {
				switch q {
				case 2:
					answered(t, done[i], 0, errOwn)
				case 13:
					answered(t, done[i], 0, errAll)
				default:
					answered(t, done[i], q, nil)
				}
			}
		}
		d.close()
	})
}

func TestBatchOfUnknownOutcomeIsNotRepeated(t *testing.T) {
	for name, fail := range map[string]func() ([]result[int], error){
		"error": func() ([]result[int], error) { return nil, fmt.Errorf("commit: %w", errOutcomeUnknown) },
		"panic": func() ([]result[int], error) { panic("in a batch") },
		"lost":  func() ([]result[int], error) { return nil, nil },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g, broken := make(gate), true
				d := newDesk(8, func(requests []int) ([]result[int], error) {
					results, err := g.run(requests)
					if broken {
						return fail()
					}
					return results, err
				})
				hold := d.ask(t.Context(), 0)
				synctest.Wait()
				a, b := d.ask(t.Context(), 1), d.ask(t.Context(), 2)
				synctest.Wait()
				close(g)
				synctest.Wait()
				for _, done := range []<-chan result[int]{hold, a, b} {
					answered(t, done, 0, errOutcomeUnknown)
				}
				if len(d.batches) != 2 {
					t.Errorf("got batches %v, want each run once", d.batches)
				}
				broken = false
				c := d.ask(t.Context(), 3)
				synctest.Wait()
				answered(t, c, 3, nil) // the next batch runs
				d.close()
			})
		})
	}
}

func TestBatchCallerGoesAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := make(gate)
		d := newDesk(64, g.run)
		begun, leaveBegun := context.WithCancel(t.Context())
		first := d.ask(begun, 1)
		synctest.Wait()
		waiting, leaveWaiting := context.WithCancel(t.Context())
		var gone []<-chan result[int]
		for i := range 100 {
			gone = append(gone, d.ask(waiting, 100+i))
		}
		stays := d.ask(t.Context(), 2)
		synctest.Wait()
		leaveBegun()
		leaveWaiting()
		synctest.Wait()
		for _, r := range gone {
			answered(t, r, 0, context.Canceled)
		}
		close(g)
		synctest.Wait()
		answered(t, first, 1, nil) // whoever runs a batch finishes it for the others
		answered(t, stays, 2, nil)
		// Those who left while waiting took no place in a batch.
		if got := fmt.Sprint(d.batches); got != "[[1] [2]]" {
			t.Errorf("got batches %s, want [[1] [2]]", got)
		}
		d.close() // and the bubble ends: nobody is left behind
	})
}

func TestBatchCallerGoesAwayBeforeTheRetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, both := make(gate), make(gate)
		d := newDesk(8, func(requests []int) ([]result[int], error) {
			if len(requests) == 1 {
				return g.run(requests)
			}
			<-both
			return nil, errors.New("all of them")
		})
		hold := d.ask(t.Context(), 0)
		synctest.Wait()
		hurried, leave := context.WithCancel(t.Context())
		leaves := d.ask(hurried, 1)
		synctest.Wait()
		stays := d.ask(t.Context(), 2)
		synctest.Wait()
		close(g)
		synctest.Wait()
		answered(t, hold, 0, nil)
		leave()
		synctest.Wait()
		close(both)
		synctest.Wait()
		answered(t, leaves, 0, context.Canceled)
		answered(t, stays, 2, nil)
		if got := fmt.Sprint(d.batches); got != "[[0] [1 2] [2]]" {
			t.Errorf("got batches %s, want [[0] [1 2] [2]]: nobody waits for 1 any more", got)
		}
		d.close()
	})
}

// A request that fails by itself gets a second try, too.
func TestBatchOfOneIsTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tries := 0
		d := newDesk(8, func(requests []int) ([]result[int], error) {
			if tries++; tries == 1 {
				return nil, errors.New("deadlock")
			}
			return []result[int]{{answer: requests[0]}}, nil
		})
		r := d.ask(t.Context(), 1)
		synctest.Wait()
		answered(t, r, 1, nil)
		d.close()
	})
}

// Whoever is left to be tried alone is not waited for by the others; nor are
// more than batchAlone tried at a time, nor fewer while there are more.
func TestBatchStragglers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := make(gate)
		stragglers := make(gate)
		d := newDesk(64, func(requests []int) ([]result[int], error) {
			if len(requests) == 1 && requests[0] > 1 {
				return stragglers.run(requests)
			}
			results, err := g.run(requests)
			for i, q := range requests {
				if q > 1 {
					results[i].err = errTryAlone
				}
			}
			return results, err
		})
		hold := d.ask(t.Context(), 0)
		synctest.Wait()
		first := d.ask(t.Context(), 1)
		var rest []<-chan result[int]
		for i := range 2*batchAlone + 1 {
			rest = append(rest, d.ask(t.Context(), 2+i))
		}
		synctest.Wait()
		close(g)
		synctest.Wait()
		answered(t, hold, 0, nil)
		answered(t, first, 1, nil)
		if tried := len(d.batches) - 2; tried != batchAlone {
			t.Errorf("%d are tried alone at a time, want %d", tried, batchAlone)
		}
		close(stragglers)
		synctest.Wait()
		for i, r := range rest {
			answered(t, r, 2+i, nil)
		}
		d.close()
	})
}

// Nobody waits longer than answerWithin, neither in a batch nor for one; what
// has no time left is not tried again, and nobody's batch is not run.
func TestBatchInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk(8, nil)
		end := make(gate)
		d.run = func(ctx context.Context, requests []int) ([]result[int], error) {
			d.batches = append(d.batches, requests)
			<-ctx.Done()
			<-end // it does not end at once
			return nil, ctx.Err()
		}
		first := d.ask(t.Context(), 1)
		synctest.Wait()
		asked := time.Now()
		second := <-d.ask(t.Context(), 2)
		if took := time.Since(asked); !errors.Is(second.err, context.DeadlineExceeded) || took != answerWithin {
			t.Errorf("got error %v after %v, want %v after %v", second.err, took, context.DeadlineExceeded, answerWithin)
		}
		close(end)
		synctest.Wait()
		answered(t, first, 0, context.DeadlineExceeded)
		d.close()
		if got := fmt.Sprint(d.batches); got != "[[1]]" {
			t.Errorf("got batches %s, want [[1]]", got)
		}
	})
}

func TestBatchShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := make(gate)
		d := newDesk(64, g.run)
		begun := d.ask(t.Context(), 1)
		synctest.Wait()
		var waiting []<-chan result[int]
		for i := range 10 {
			waiting = append(waiting, d.ask(t.Context(), i))
		}
		synctest.Wait()
		closed := make(chan struct{})
		go func() {
			d.close()
			close(closed)
		}()
		synctest.Wait()
		for _, r := range waiting {
			answered(t, r, 0, errStopped)
		}
		select {
		case <-closed:
			t.Error("closed before the batch under way was answered")
		default:
		}
		close(g)
		<-closed
		synctest.Wait()
		answered(t, begun, 1, nil)
		late := d.ask(t.Context(), 2)
		synctest.Wait()
		answered(t, late, 0, errStopped)
		if !unavailable(errStopped) {
			t.Error("a client is not told to come again")
		}
	})
}

// newService makes a service without its server, relay and drain, on the
// stores that getenv names, for tests that hand batches in themselves.
func newService(t testing.TB, getenv func(string) string) *service {
	t.Helper()
	cfg, err := readConfig(getenv)
	must(t, err)
	log := slog.New(slog.DiscardHandler)
	must(t, preparePostgres(t.Context(), cfg, log))
	db, err := openPostgres(cfg.postgres, answerWithin)
	must(t, err)
	t.Cleanup(func() { db.Close() })
	counts, health := newMetrics(db), newHealth(log)
	s := &service{
		db: db, slow: db, wake: func() {}, log: log, counts: counts, health: health,
	}
	s.cache = newCache(cfg.redis, cfg.namespace, s.raiseEpoch, health.redis, counts)
	s.start()
	t.Cleanup(s.close)
	return s
}

// serveTogether runs exactly these requests as one batch.
func serveTogether[Q, A any](t testing.TB, b *batcher[Q, A], requests ...Q) []result[A] {
	var batch []*call[Q, A]
	for _, q := range requests {
		batch = append(batch, &call[Q, A]{request: q, done: make(chan result[A], 1)})
	}
	b.serve(batch)
	var results []result[A]
	for _, c := range batch {
		results = append(results, <-c.done)
	}
	return results
}

func edit(id int32, name string) updateRequest {
	return updateRequest{target: target{id, 1}, name: name}
}

// names checks the answers to updates; "" stands for a good that is not found.
func names(t testing.TB, results []result[good], want ...string) {
	t.Helper()
	for i, r := range results {
		if want[i] == "" && !errors.Is(r.err, errGoodNotFound) || want[i] != "" && (r.err != nil || r.answer.Name != want[i]) {
			t.Errorf("request %d: got %q and error %v, want %q", i, r.answer.Name, r.err, want[i])
		}
	}
}

// history is what was ever written to a good, in order of its versions.
func history(t testing.TB, w *world, id int) string {
	t.Helper()
	return one[string](t, w, `SELECT string_agg(concat(version, ' ', name, CASE WHEN removed THEN ' removed' END), ', ' ORDER BY id) FROM outbox WHERE good_id = $1`, id)
}

func TestBatchOfWrites(t *testing.T) {
	w := newWorld(t)
	s := newService(t, w.getenv())
	log := &logBuffer{}
	s.creates.log, s.updates.log, s.removes.log = newLog(log, slog.LevelDebug), newLog(log, slog.LevelDebug), newLog(log, slog.LevelDebug)
	must(t, errorOf(w.db.Exec(`INSERT INTO campaigns (name) VALUES ('second')`)))

	created := serveTogether(t, &s.creates,
		createRequest{1, "a", ""}, createRequest{9, "nowhere", ""}, createRequest{2, "b", "two"},
		createRequest{1, "c", ""}, createRequest{0, "nowhere", ""}, createRequest{1, "d", ""})
	names(t, slices.Concat(created[:1], created[2:4], created[5:]), "a", "b", "c", "d")
	for _, i := range []int{1, 4} {
		if !errors.Is(created[i].err, errCampaignNotFound) {
			t.Errorf("create for no project: got %v", created[i].err)
		}
	}
	for i, r := range slices.Concat(created[:1], created[2:4], created[5:]) {
		if int(r.answer.Priority) != i+1 {
			t.Errorf("created %+v, want priority %d: the order of the requests", r.answer, i+1)
		}
	}
	a, b, c, d := created[0].answer.ID, created[2].answer.ID, created[3].answer.ID, created[5].answer.ID

	text := "kept"
	described := edit(a, "a2")
	described.description = &text
	updated := serveTogether(t, &s.updates, edit(c, "c2"), described, edit(b, "other project"), edit(a, "a3"), edit(99, "nobody"), edit(a, "a4"), edit(d, "d2"))
	names(t, updated, "c2", "a2", "", "a3", "", "a4", "d2")
	for _, i := range []int{1, 3, 5} {
		if updated[i].answer.Description != "kept" {
			t.Errorf("update %d: got description %q, want that of the update before it", i, updated[i].answer.Description)
		}
	}
	if got := history(t, w, int(a)); got != "1 a, 2 a2, 3 a3, 4 a4" {
		t.Errorf("good named three times: got %s", got)
	}

	removed := serveTogether(t, &s.removes, target{a, 1}, target{b, 1}, target{a, 1}, target{c, 1})
	for i, want := range []error{nil, errGoodNotFound, errGoodNotFound, nil} {
		if !errors.Is(removed[i].err, want) || want == nil && !removed[i].answer.Removed {
			t.Errorf("remove %d: got %+v, want error %v", i, removed[i], want)
		}
	}
	if got := history(t, w, int(a)); got != "1 a, 2 a2, 3 a3, 4 a4, 5 a4 removed" {
		t.Errorf("good removed twice: got %s", got)
	}
	names(t, serveTogether(t, &s.updates, edit(a, "late"), edit(d, "d3")), "", "d3")

	if log.String() != "" {
		t.Errorf("a batch was not written as one:\n%s", log.String())
	}

	pages := serveTogether(t, &s.lists, listRequest{2, 1}, listRequest{10, 3}, listRequest{2, 1}, listRequest{3, 2}, listRequest{1, 9})
	for i, want := range []string{"a4 b", "c2 d3", "a4 b", "b c2 d3", ""} {
		var l listReply
		must(t, pages[i].err)
		must(t, json.Unmarshal(pages[i].answer, &l))
		var got []string
		for _, g := range l.Goods {
			got = append(got, g.Name)
		}
		if strings.Join(got, " ") != want || l.Meta.Total != 4 || l.Meta.Removed != 2 {
			t.Errorf("page %d: got %s, want %q of 4", i, pages[i].answer, want)
		}
	}
}

// A text that Postgres refuses fails the statement, and with it the batch.
func TestBatchWithOneThatNobodyForesaw(t *testing.T) {
	w := newWorld(t)
	s := newService(t, w.getenv())
	created := serveTogether(t, &s.creates, createRequest{1, "a", ""}, createRequest{1, "\x00", ""}, createRequest{1, "b", ""})
	names(t, []result[good]{created[0], created[2]}, "a", "b")
	if created[1].err == nil {
		t.Error("U+0000 was stored")
	}
	a, b := created[0].answer, created[2].answer
	updated := serveTogether(t, &s.updates, edit(a.ID, "a2"), edit(a.ID, "\x00"), edit(b.ID, "b2"))
	names(t, []result[good]{updated[0], updated[2]}, "a2", "b2")
	if updated[1].err == nil || errors.Is(updated[1].err, errOutcomeUnknown) {
		t.Errorf("U+0000: got %v, want the refusal", updated[1].err)
	}
	for id, want := range map[int32]string{a.ID: "1 a, 2 a2", b.ID: "1 b, 2 b2"} {
		if got := history(t, w, int(id)); got != want {
			t.Errorf("good %d: got %s, want %s", id, got, want)
		}
	}
}

// held starts a batch that updates goods 1 and 2 while another transaction
// holds the outbox, and returns once it has locked the goods and waits for that.
func held(t testing.TB, w *world, s *service, begin ...string) (other func(query string) error, results <-chan []result[good]) {
	t.Helper()
	for i := range 2 {
		must(t, errorOf(s.insertGoods(t.Context(), []createRequest{{1, fmt.Sprint(i), ""}})))
	}
	conn, err := w.db.Conn(t.Context())
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	other = func(query string) error { return errorOf(conn.ExecContext(t.Context(), query)) }
	for _, query := range append(begin, `BEGIN`, `LOCK TABLE outbox`) {
		must(t, other(query))
	}
	done := make(chan []result[good], 1)
	go func() {
		done <- serveTogether(t, &s.updates, edit(1, "a"), edit(2, "b"), edit(1, "c"), edit(7, "nobody"))
	}()
	eventually(t, 5*time.Second, func() error {
		if one[int](t, w, waiters) == 0 {
			return errors.New("the batch waits for no lock")
		}
		return nil
	})
	return other, done
}

const waiters = `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`

func TestBatchMeetsDeadlock(t *testing.T) {
	w := newWorld(t)
	must(t, errorOf(w.db.Exec(`ALTER DATABASE `+strings.ReplaceAll(w.namespace, "-", "_")+` SET deadlock_timeout = '50ms'`)))
	s := newService(t, w.getenv())
	log := &logBuffer{}
	s.updates.log = newLog(log, slog.LevelDebug)
	other, done := held(t, w, s, `SET deadlock_timeout = '1min'`) // so that the batch is the victim
	must(t, other(`UPDATE goods SET name = 'other' WHERE id = 1`))
	must(t, other(`COMMIT`))
	names(t, <-done, "a", "b", "c", "")
	// Alone, requests are tried side by side: both orders are right.
	if got := history(t, w, 1); got != "1 0, 2 other, 3 a, 4 c" && got != "1 0, 2 other, 3 c, 4 a" {
		t.Errorf("got %s", got)
	}
	if got := history(t, w, 2); got != "1 1, 2 b" {
		t.Errorf("got %s", got)
	}
	if !strings.Contains(log.String(), "deadlock") {
		t.Errorf("there was no deadlock:\n%s", log.String())
	}
}

func TestBatchLosesItsConnection(t *testing.T) {
	w := newWorld(t)
	s := newService(t, w.getenv())
	other, done := held(t, w, s)
	must(t, errorOf(w.db.Exec(strings.Replace(waiters, "count(*)", "pg_terminate_backend(pid)", 1))))
	must(t, other(`COMMIT`))
	names(t, <-done, "a", "b", "c", "")
	if got := history(t, w, 1); got != "1 0, 2 a, 3 c" && got != "1 0, 2 c, 3 a" {
		t.Errorf("got %s", got)
	}
}

// commitCutter stands between the service and Postgres and, once armed, cuts
// the connection that sends a COMMIT: before Postgres has it, or before its
// answer comes back. The service can not know which.
type commitCutter struct {
	address string
	armed   atomic.Bool
	deliver bool // whether Postgres gets the COMMIT
	seen    atomic.Int32
}

// newCommitCutter returns it with the URL that leads through it.
func newCommitCutter(t testing.TB, postgres string, deliver bool) (*commitCutter, string) {
	t.Helper()
	u, err := url.Parse(postgres)
	must(t, err)
	c := &commitCutter{address: u.Host, deliver: deliver}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			go c.connect(client)
		}
	}()
	u.Host = listener.Addr().String()
	return c, u.String()
}

func (c *commitCutter) connect(client net.Conn) {
	defer client.Close()
	server, err := net.Dial("tcp", c.address)
	if err != nil {
		return
	}
	defer server.Close()
	go func() {
		defer client.Close()
		_, _ = io.Copy(client, server)
	}()
	b := make([]byte, 64<<10)
	for {
		n, err := client.Read(b)
		if err != nil {
			return
		}
		if c.armed.Load() && bytes.Contains(b[:n], []byte("COMMIT\x00")) && c.seen.Add(1) == 1 {
			client.Close()
			if c.deliver {
				_, _ = server.Write(b[:n])
			}
			return
		}
		if _, err := server.Write(b[:n]); err != nil {
			return
		}
	}
}

func TestBatchWithUnknownCommit(t *testing.T) {
	for name, deliver := range map[string]bool{"cut before it": false, "cut after it": true} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			cutter, through := newCommitCutter(t, w.env["POSTGRES_URL"], deliver)
			s := newService(t, w.getenv("POSTGRES_URL="+through))
			for i := range 3 {
				names(t, serveTogether(t, &s.creates, createRequest{1, fmt.Sprint(i), ""}), fmt.Sprint(i))
			}
			page := serveTogether(t, &s.lists, listRequest{10, 1})[0] // is cached now
			if page.err != nil || bytes.Count(page.answer, goodPrefix) != 3 {
				t.Fatalf("got %s and error %v", page.answer, page.err)
			}
			cutter.armed.Store(true)
			for i, r := range serveTogether(t, &s.updates, edit(1, "a"), edit(2, "b"), edit(1, "c")) {
				if !errors.Is(r.err, errOutcomeUnknown) || !unavailable(r.err) {
					t.Errorf("request %d: got %+v, want an error that tells it is not known, and a 503", i, r)
				}
			}
			if n := cutter.seen.Load(); n != 1 {
				t.Errorf("got %d commits, want 1: it must not be repeated", n)
			}
			want := map[bool]string{false: "1 0", true: "1 0, 2 a, 3 c"}[deliver]
			eventually(t, 5*time.Second, func() error {
				if got := history(t, w, 1); got != want {
					return fmt.Errorf("got %s, want %s", got, want)
				}
				return nil
			})
			// Whichever it was, the cache must not hide it.
			page = serveTogether(t, &s.lists, listRequest{10, 1})[0]
			if stored := one[string](t, w, `SELECT name FROM goods WHERE id = 1`); page.err != nil || !bytes.Contains(page.answer, []byte(`{"id":1,"projectId":1,"name":"`+stored+`"`)) {
				t.Errorf("got %s and error %v, want the name %s", page.answer, page.err, stored)
			}
		})
	}
}

// Requests that a client sends one after another, without waiting for replies,
// are served in that order, whatever else travels with them.
func TestOrderOnOneConnection(t *testing.T) {
	w := newWorld(t)
	a := w.start(t)
	a.stock(t, 4)
	const clients, each = 8, 30
	together(clients, func(i int) {
		address, _ := url.Parse(a.url)
		conn, err := net.Dial("tcp", address.Host)
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		var all strings.Builder
		for n := range each {
			body := fmt.Sprintf(`{"name":"%d-%d"}`, i, n)
			fmt.Fprintf(&all, "PATCH /goods/update?id=%d&projectId=1 HTTP/1.1\r\nHost: goods\r\nContent-Length: %d\r\n\r\n%s", 1+i%4, len(body), body)
			fmt.Fprint(&all, "GET /goods/list HTTP/1.1\r\nHost: goods\r\n\r\n")
		}
		fmt.Fprint(&all, "GET /healthz HTTP/1.1\r\nHost: goods\r\nConnection: close\r\n\r\n")
		if _, err := io.WriteString(conn, all.String()); err != nil {
			t.Error(err)
			return
		}
		_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
		replies, err := io.ReadAll(conn)
		if err != nil {
			t.Error(err)
		}
		last := -1
		for n := range each {
			own := bytes.Index(replies, fmt.Appendf(nil, "\n"+`{"id":%d,"projectId":1,"name":"%d-%d"`, 1+i%4, i, n))
			if own <= last {
				t.Errorf("client %d: the reply to update %d is missing, or not in its turn", i, n)
			}
			last = own
		}
	})
	w.settled(t, 10*time.Second)
	rows, err := w.clickhouse.Query(t.Context(), `SELECT Name FROM goods_log FINAL WHERE Version > 1 ORDER BY Id, Version`)
	must(t, err)
	defer rows.Close()
	next := map[int]int{}
	for rows.Next() {
		var name string
		must(t, rows.Scan(&name))
		var i, n int
		_, err := fmt.Sscanf(name, "%d-%d", &i, &n)
		must(t, err)
		if n != next[i] {
			t.Fatalf("client %d: its update %d was written when %d was due", i, n, next[i])
		}
		next[i]++
	}
	must(t, rows.Err())
}

// A list asked after a write was answered shows it, though lists share batches
// and pages.
func TestReadsJoinNoBatchThatHasBegun(t *testing.T) {
	w := newWorld(t)
	a := w.start(t)
	a.stock(t, 10)
	stop := make(chan struct{})
	var readers sync.WaitGroup
	for range 24 {
		readers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					_, _ = a.try("GET", "/goods/list", "")
				}
			}
		})
	}
	together(8, func(i int) {
		for n := range 60 {
			name := fmt.Sprintf("%d-%d", i, n)
			want[good](t, a, 200, "PATCH", fmt.Sprintf("/goods/update?id=%d&projectId=1", i+1), fmt.Sprintf(`{"name":%q}`, name))
			if got := a.list(t, 10, 1).Goods[i].Name; got != name {
				t.Errorf("got %s after the update to %s was answered", got, name)
			}
		}
	})
	close(stop)
	readers.Wait()
}
