package faults

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"goods/test/harness"
)

const (
	workers    = 16
	region     = 5                      // places of a worker's own, where it moves goods around
	pace       = 200 * time.Millisecond // between two writes of a worker
	unanswered = 0                      // the status of a request without an answer
)

// lingers is the time after a bad answer in which a write may still be done: by a service that is slow, or by
// Postgres for one that was killed.
var lingers = map[int]time.Duration{503: 10 * time.Second, unanswered: time.Second}

// load is clients that create, update, move, remove and list without end, and keep every answer. Each worker has
// goods of its own, so it knows what a list must show of them. A create is repeated with its key until it is
// answered. Any other write that gets a bad answer may be done or not, now or somewhat later: its good is not written
// again.
type load struct {
	apps atomic.Pointer[[]*harness.App] // that a balancer would choose from
	stop func()                         // ends it, and waits for the last answer

	asked, created   atomic.Int64 // creates begun, and answered; the goods of the beginning among both
	leaving, removed atomic.Int64 // removes begun, and answered

	mu      sync.Mutex
	answers []answer
	wrong   []string       // what no history of the service explains
	keys    map[string]int // of creates: the ids that they were answered with
	workers []*worker      // not guarded: each is its own goroutine's until stop
}

// answer is what one request came to.
type answer struct {
	call       string
	status     int
	begin, end time.Time
}

func good(status int) bool { return status == 200 || status == 201 }

// state is what a client can change of a good, but for its place. The text is its name, and its description.
type state struct {
	text    string
	removed bool
}

// owned is a good of one worker, and the states that it may be in.
type owned struct {
	id, priority int // priority 0: somewhere in the worker's region
	states       []state
}

type worker struct {
	*load
	place   int            // the first of its region
	orders  [][]int        // the orders that its region may be in
	settles time.Time      // when the region is in the order that a list shows
	goods   map[int]*owned // all of them
	active  []*owned       // those that it still writes
	texts   int
}

// place is where a move put a good.
type place struct{ ID, Priority int }

// startLoad begins the load on a service that has no goods yet.
func startLoad(t testing.TB, w *harness.World, apps []*harness.App) *load {
	t.Helper()
	l := &load{keys: map[string]int{}}
	l.aim(apps...)
	w.Exec(t, fmt.Sprintf(`INSERT INTO goods (project_id, name, description) SELECT 1, n, n FROM generate_series(1, %d) AS n`, workers*region))
	l.asked.Store(workers * region)
	l.created.Store(workers * region)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for i := range workers {
		w := &worker{load: l, place: i*region + 1, goods: map[int]*owned{}}
		var order []int
		for _, g := range apps[0].List(t, region, w.place).Goods {
			w.own(&owned{id: g.ID, states: []state{{text: g.Name}}})
			order = append(order, g.ID)
		}
		w.orders = [][]int{order}
		l.workers = append(l.workers, w)
		running.Go(func() { w.run(ctx) })
	}
	l.stop = sync.OnceFunc(func() {
		cancel()
		running.Wait()
	})
	t.Cleanup(l.stop)
	return l
}

// aim chooses the replicas that get requests from now on.
func (l *load) aim(apps ...*harness.App) {
	apps = slices.Clone(apps)
	l.apps.Store(&apps)
}

func (l *load) wrongf(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.wrong = append(l.wrong, fmt.Sprintf(format, args...))
}

// call sends a request to any replica, and returns the status. A 2xx is decoded into v.
func (l *load) call(name, method, path, body string, v any, header ...string) int {
	apps := *l.apps.Load()
	begin := time.Now()
	r, _ := apps[rand.N(len(apps))].Try(method, path, body, header...) // an error leaves the status 0: unanswered
	l.mu.Lock()
	l.answers = append(l.answers, answer{name, r.Status, begin, time.Now()})
	l.mu.Unlock()
	if r.Status >= 400 && r.Status <= 499 {
		l.wrongf("%s %s %s: got %d %s", method, path, body, r.Status, r.Body)
	} else if err := json.Unmarshal([]byte(r.Body), v); err != nil && good(r.Status) {
		l.wrongf("%s %s %s: %v in %s", method, path, body, err, r.Body)
	}
	return r.Status
}

func text(s string) string { return fmt.Sprintf(`{"name":%q,"description":%[1]q}`, s) }

// create makes the good with this key, which is its text, too. It repeats the request until that is answered.
func (l *load) create(key string) (g harness.Good, status, tries int) {
	for ; !good(status) && tries < 1000; tries++ {
		if tries > 0 {
			<-time.After(pace / 4)
		}
		// In lower case, because net/http would know the name, and repeat by itself.
		status = l.call("create", "POST", "/goods/create?projectId=1", text(key), &g, "idempotency-key: "+key)
	}
	l.mu.Lock()
	id := l.keys[key]
	l.keys[key] = g.ID
	l.mu.Unlock()
	if id == 0 {
		l.created.Add(1)
	}
	if id != 0 && id != g.ID || g.Name != key || g.Description != key || g.Removed {
		l.wrongf("create of %s: got %+v, before that good %d", key, g, id)
	}
	return g, status, tries
}

func (w *worker) run(ctx context.Context) {
	tick := time.NewTicker(pace)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		w.texts++
		text := fmt.Sprintf("w%d-%d", w.place, w.texts) // that nothing else has
		n, i := rand.N(10), rand.N(max(1, len(w.active)))
		switch {
		case n < 3 || len(w.active) == 0:
			w.make(text)
		case n < 6:
			w.update(i, text)
		case n < 8 && len(w.orders) == 1:
			w.move()
		case n < 9 && w.active[i].priority > 0: // a removed good could not be moved any more
			w.remove(i)
		default:
			w.list(1, 1000)
		}
	}
}

func (w *worker) own(o *owned) {
	w.goods[o.id] = o
	w.active = append(w.active, o)
}

func (w *worker) make(text string) {
	w.asked.Add(1)
	g, status, tries := w.create(text)
	if tries == 1 && status != 201 {
		w.wrongf("the first create of %s: got %d", text, status)
	}
	if rand.N(4) == 0 {
		if _, status, _ := w.create(text); status != 200 {
			w.wrongf("create of %s, repeated: got %d", text, status)
		}
	}
	o := &owned{id: g.ID, priority: g.Priority, states: []state{{text: text}}}
	w.own(o)
	w.list(o.priority, 1)
}

// wrote notes what a write of a good came to.
func (w *worker) wrote(i, status int, wanted state) {
	o := w.active[i]
	if good(status) {
		o.states = nil
	}
	o.states = append(o.states, wanted)
	if !good(status) || wanted.removed {
		w.active = slices.Delete(w.active, i, i+1)
	}
	if o.priority > 0 {
		w.list(o.priority, 1)
	} else {
		w.list(w.place, region)
	}
}

func (w *worker) update(i int, to string) {
	var g harness.Good
	status := w.call("update", "PATCH", fmt.Sprintf("/goods/update?id=%d&projectId=1", w.active[i].id), text(to), &g)
	if good(status) && (g.Name != to || g.Description != to || g.Removed) {
		w.wrongf("update of good %d to %s: got %+v", w.active[i].id, to, g)
	}
	w.wrote(i, status, state{text: to})
}

func (w *worker) remove(i int) {
	w.leaving.Add(1)
	status := w.call("remove", "DELETE", fmt.Sprintf("/goods/remove?id=%d&projectId=1", w.active[i].id), "", &struct{}{})
	if good(status) {
		w.removed.Add(1)
	}
	w.wrote(i, status, state{w.active[i].states[0].text, true})
}

// move moves a good within the worker's region.
func (w *worker) move() {
	before, from, to := w.orders[0], rand.N(region), rand.N(region)
	after := slices.Insert(slices.Delete(slices.Clone(before), from, from+1), to, before[from])
	var reply struct{ Priorities []place }
	status := w.call("reprioritize", "PATCH", fmt.Sprintf("/goods/reprioritize?id=%d&projectId=1", before[from]), fmt.Sprintf(`{"newPriority":%d}`, w.place+to), &reply)
	w.orders, w.settles = append(w.orders, after), time.Now().Add(lingers[status])
	if good(status) {
		w.orders = [][]int{after}
		var places []place
		for i := min(from, to); i <= max(from, to); i++ {
			places = append(places, place{after[i], w.place + i})
		}
		if !slices.Equal(places, reply.Priorities) {
			w.wrongf("move of good %d to %d: got %v, want %v", before[from], w.place+to, reply.Priorities, places)
		}
	}
	w.list(w.place, region)
}

// list reads a page, which must be one moment of the whole list, after it was asked for.
func (w *worker) list(offset, limit int) {
	begin, created, removed := time.Now(), w.created.Load(), w.removed.Load()
	var page harness.ListReply
	if !good(w.call("list", "GET", fmt.Sprintf("/goods/list?offset=%d&limit=%d", offset, limit), "", &page)) {
		return
	}
	m, asked, leaving, gone := page.Meta, w.asked.Load(), w.leaving.Load(), 0
	for _, g := range page.Goods {
		if g.Removed {
			gone++
		}
	}
	if int64(m.Total) < created || int64(m.Total) > asked || int64(m.Removed) < removed || int64(m.Removed) > leaving {
		w.wrongf("a list says %+v after %d to %d creates and %d to %d removes", m, created, asked, removed, leaving)
	}
	if len(page.Goods) != max(0, min(limit, m.Total-offset+1)) || len(page.Goods) == m.Total && gone != m.Removed {
		w.wrongf("a list has %d goods, of them %d removed, and says %+v", len(page.Goods), gone, m)
	}
	if order := w.check(page.Goods, offset); len(order) > 0 && begin.After(w.settles) {
		w.orders = [][]int{order}
	}
}

// check compares what stands at the places from first on with what this worker knows, and returns what it has seen of
// the region.
func (w *worker) check(goods []harness.Good, first int) (order []int) {
	for i, g := range goods {
		if g.Priority != first+i || g.Name != g.Description {
			w.wrongf("at place %d stands %+v", first+i, g)
		}
		o := w.goods[g.ID]
		if o == nil {
			continue
		}
		if s := (state{g.Name, g.Removed}); !slices.Contains(o.states, s) {
			w.wrongf("good %d shows %v, possible are %v", g.ID, s, o.states)
		}
		if o.priority == 0 {
			order = append(order, g.ID)
		} else if o.priority != g.Priority {
			w.wrongf("good %d stands at %d, it was created at %d", g.ID, g.Priority, o.priority)
		}
	}
	if len(order) > 0 && !slices.ContainsFunc(w.orders, func(o []int) bool { return slices.Equal(o, order) }) {
		w.wrongf("from place %d on stand %v, possible are %v", w.place, order, w.orders)
	}
	return order
}

// since returns the answers to requests that began after then.
func (l *load) since(then time.Time) []answer {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(l.answers), func(a answer) bool { return !a.begin.After(then) })
}

// works reports whether every call succeeded since then, and none failed.
func (l *load) works(then time.Time) error {
	seen := map[string]bool{}
	for _, a := range l.since(then) {
		if seen[a.call] = true; !good(a.status) {
			return fmt.Errorf("%s got %d", a.call, a.status)
		}
	}
	if len(seen) < 5 {
		return fmt.Errorf("only these calls were answered: %v", seen)
	}
	return nil
}

// verify compares every answer with what Postgres holds now. The load must have stopped.
func (l *load) verify(t testing.TB, w *harness.World) {
	t.Helper()
	var stored []harness.Good
	var keys map[string]int
	harness.Must(t, json.Unmarshal(harness.One[[]byte](t, w, `SELECT json_agg(g ORDER BY priority) FROM goods AS g`), &stored))
	harness.Must(t, json.Unmarshal(harness.One[[]byte](t, w, `SELECT json_object_agg(idempotency_key, id) FROM goods WHERE idempotency_key IS NOT NULL`), &keys))
	if !maps.Equal(keys, l.keys) || len(stored) != workers*region+len(keys) {
		l.wrongf("Postgres has %d goods, those of keys are %v, answered were %v", len(stored), keys, l.keys)
	}
	for _, w := range l.workers {
		w.check(stored, 1)
	}
	if n := len(l.wrong); n > 0 {
		t.Errorf("%d wrong answers, such as:\n%s", n, strings.Join(l.wrong[:min(10, n)], "\n"))
	}
}
