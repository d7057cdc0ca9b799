//go:build faults || soak

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

const (
	loadWorkers = 16
	loadRegion  = 5                      // places of a worker's own, where it moves goods around
	loadPace    = 150 * time.Millisecond // between two writes of a worker
	unanswered  = 0                      // the status of a request without an answer
)

// load is clients that create, update, move, remove and list without end, and
// keep every answer. Each worker has goods of its own, so it knows what a list
// must show of them: the last answered write, or after a write without a good
// answer either what was before or the whole of what was asked for.
type load struct {
	w    *world
	urls atomic.Pointer[[]string] // of the replicas that a balancer would choose from
	stop func()                   // ends it, and waits for the last answer

	created atomic.Int64 // answered creates, and the goods of the beginning
	removed atomic.Int64 // answered removes

	mu      sync.Mutex
	answers []answer
	wrong   []string      // what no history of the service explains
	events  []event       // answered writes that the log must have; zero fields are not compared
	doubted []string      // names of creates without a good answer
	workers []*loadWorker // not guarded: each is its own goroutine's until stop
}

// answer is what one request came to.
type answer struct {
	call   string
	status int
	begin  time.Time
	took   time.Duration
}

func (a answer) good() bool { return a.status >= 200 && a.status <= 299 }

// content is what a client can change of a good, but for its place.
type content struct {
	name, description string
	removed           bool
}

// owned is a good of one worker, and the states that it may be in.
type owned struct {
	id       int32
	priority int // 0: somewhere in the worker's region
	states   []content
}

type loadWorker struct {
	*load
	number int
	place  int              // the first of its region
	orders [][]int32        // the orders that its region may be in
	goods  map[int32]*owned // all of them
	active []*owned         // those that it still writes
	region map[int32]*owned // those that it moves
	rand   *rand.Rand
	writes int
}

// startLoad begins the load on a service that has no goods yet.
func (w *world) startLoad(t testing.TB, apps ...*app) *load {
	t.Helper()
	l := &load{w: w}
	l.aim(apps...)
	rows, err := w.db.Query(`
INSERT INTO goods (project_id, name, description)
SELECT 1, 'seed-' || n, 'seed-' || n
FROM generate_series(1, $1::integer) AS n
RETURNING id, priority, name`, loadWorkers*loadRegion)
	must(t, err)
	defer rows.Close()
	for i := range loadWorkers {
		l.workers = append(l.workers, &loadWorker{load: l, number: i, place: i*loadRegion + 1, orders: [][]int32{make([]int32, loadRegion)},
			goods: map[int32]*owned{}, region: map[int32]*owned{}, rand: rand.New(rand.NewPCG(uint64(i), uint64(time.Now().UnixNano())))})
	}
	for rows.Next() {
		var id int32
		var priority int
		var name string
		must(t, rows.Scan(&id, &priority, &name))
		worker := l.workers[(priority-1)/loadRegion]
		g := &owned{id: id, states: []content{{name, name, false}}}
		worker.orders[0][(priority-1)%loadRegion] = id
		worker.goods[id], worker.region[id] = g, g
		worker.active = append(worker.active, g)
	}
	must(t, rows.Err())
	l.created.Store(loadWorkers * loadRegion)

	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for _, worker := range l.workers {
		running.Go(func() { worker.run(ctx) })
	}
	l.stop = sync.OnceFunc(func() {
		cancel()
		running.Wait()
	})
	t.Cleanup(l.stop)
	return l
}

// aim chooses the replicas that get requests from now on.
func (l *load) aim(apps ...*app) {
	urls := make([]string, len(apps))
	for i, a := range apps {
		urls[i] = a.url
	}
	l.urls.Store(&urls)
}

func (l *load) wrongf(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.wrong = append(l.wrong, fmt.Sprintf(format, args...))
}

// call sends a request to any replica. Only after a 2xx was the reply decoded
// into v; false means that the request may or may not have had its effect.
func (l *load) call(name, method, path, body string, v any) bool {
	urls := *l.urls.Load()
	a := answer{call: name, begin: time.Now()}
	r, err := (&app{url: urls[rand.N(len(urls))]}).try(method, path, body)
	if err == nil {
		a.status = r.status
	}
	a.took = time.Since(a.begin)
	l.mu.Lock()
	l.answers = append(l.answers, a)
	l.mu.Unlock()
	if a.status >= 400 && a.status <= 499 {
		l.wrongf("%s %s %s: got %d %s", method, path, body, r.status, r.body)
	}
	if !a.good() {
		return false
	}
	if err := json.Unmarshal([]byte(r.body), v); err != nil {
		l.wrongf("%s %s %s: %v in %s", method, path, body, err, r.body)
	}
	return true
}

func (l *load) note(e event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.events = append(l.events, e)
}

func (w *loadWorker) run(ctx context.Context) {
	tick := time.NewTicker(loadPace)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		w.writes++
		switch n := w.rand.IntN(10); {
		case n < 3:
			w.create()
		case n < 6:
			w.update()
		case n < 8:
			w.move()
		case n < 9:
			w.remove()
		default:
			w.list()
		}
	}
}

// text is a name, and a description, that nothing else has.
func (w *loadWorker) text() string { return fmt.Sprintf("w%d-%d", w.number, w.writes) }

func (w *loadWorker) create() {
	text := w.text()
	var g good
	if !w.call("create", "POST", "/goods/create?projectId=1", fmt.Sprintf(`{"name":%q,"description":%q}`, text, text), &g) {
		w.mu.Lock()
		w.doubted = append(w.doubted, text)
		w.mu.Unlock()
		return
	}
	w.created.Add(1)
	w.note(event{ID: g.ID, Name: text, Description: text, Priority: g.Priority, Version: 1})
	o := &owned{id: g.ID, priority: int(g.Priority), states: []content{{text, text, false}}}
	w.goods[g.ID] = o
	w.active = append(w.active, o)
	w.look(o)
}

func (w *loadWorker) update() {
	o := w.active[w.rand.IntN(len(w.active))]
	text := w.text()
	wanted := content{text, text, false}
	var g good
	if !w.call("update", "PATCH", fmt.Sprintf("/goods/update?id=%d&projectId=1", o.id), fmt.Sprintf(`{"name":%q,"description":%q}`, text, text), &g) {
		o.states = append(o.states, wanted)
		return
	}
	w.note(event{ID: o.id, Name: g.Name, Description: g.Description, Priority: g.Priority})
	if g.Name != text || g.Description != text || g.Removed {
		w.wrongf("update of good %d to %s: got %+v", o.id, text, g)
	}
	o.states = []content{wanted}
	w.look(o)
}

func (w *loadWorker) remove() {
	i := w.rand.IntN(len(w.active))
	o := w.active[i]
	if w.region[o.id] != nil {
		w.list() // removed goods could not be moved any more
		return
	}
	w.active = slices.Delete(w.active, i, i+1)
	if !w.call("remove", "DELETE", fmt.Sprintf("/goods/remove?id=%d&projectId=1", o.id), "", &struct{}{}) {
		for _, s := range o.states {
			o.states = append(o.states, content{s.name, s.description, true})
		}
		return
	}
	w.removed.Add(1)
	w.note(event{ID: o.id, Removed: true})
	for i := range o.states {
		o.states[i].removed = true
	}
	w.look(o)
}

// move moves a good within the worker's region.
func (w *loadWorker) move() {
	id, to := w.orders[0][w.rand.IntN(loadRegion)], w.rand.IntN(loadRegion)
	var reply struct{ Priorities []place }
	answered := w.call("reprioritize", "PATCH", fmt.Sprintf("/goods/reprioritize?id=%d&projectId=1", id), fmt.Sprintf(`{"newPriority":%d}`, w.place+to), &reply)
	before := w.orders
	if answered {
		w.orders = nil
	}
	for _, order := range before {
		from := slices.Index(order, id)
		moved := slices.Insert(slices.Delete(slices.Clone(order), from, from+1), to, id)
		var places []place
		for i := min(from, to); i <= max(from, to); i++ {
			places = append(places, place{moved[i], int32(w.place + i)})
		}
		if !answered || slices.Equal(places, reply.Priorities) {
			w.orders = append(w.orders, moved)
		}
	}
	if !answered {
		return
	}
	if len(w.orders) == 0 {
		w.wrongf("move of good %d to %d: got %v, the order was %v", id, w.place+to, reply.Priorities, before)
		w.orders = before
	}
	if len(reply.Priorities) > 1 {
		for _, p := range reply.Priorities {
			w.note(event{ID: p.ID, Priority: p.Priority})
		}
	}
	w.look(w.goods[id])
}

// look reads a good that has just been written, by its place.
func (w *loadWorker) look(o *owned) {
	offset, limit := o.priority, 1
	if o.priority == 0 {
		offset, limit = w.place, loadRegion
	}
	var page listReply
	if w.call("list", "GET", fmt.Sprintf("/goods/list?offset=%d&limit=%d", offset, limit), "", &page) {
		w.check(page.Goods, offset)
	}
}

// list reads a longer page that others write at the same time.
func (w *loadWorker) list() {
	created, removed := w.created.Load(), w.removed.Load()
	var page listReply
	if !w.call("list", "GET", "/goods/list?limit=100", "", &page) {
		return
	}
	if page.Meta.Total < int(created) || page.Meta.Removed < int(removed) {
		w.wrongf("a list says %+v after %d creates and %d removes", page.Meta, created, removed)
	}
	w.check(page.Goods, 1)
}

// check compares what stands at the places from first on with what this
// worker knows.
func (w *loadWorker) check(goods []good, first int) {
	var order []int32
	for i, g := range goods {
		if int(g.Priority) != first+i {
			w.wrongf("priority %d stands at place %d: %+v", g.Priority, first+i, g)
		}
		o := w.goods[g.ID]
		if at := first + i; o == nil {
			if at >= w.place && at < w.place+loadRegion {
				w.wrongf("good %d stands in the region of worker %d", g.ID, w.number)
			}
			continue
		}
		if c := (content{g.Name, g.Description, g.Removed}); !slices.Contains(o.states, c) {
			w.wrongf("good %d shows %v, possible are %v", g.ID, c, o.states)
		}
		if o.priority != 0 && o.priority != int(g.Priority) {
			w.wrongf("good %d stands at %d, it was created at %d", g.ID, g.Priority, o.priority)
		}
		if o.priority == 0 {
			order = append(order, g.ID)
		}
	}
	if known := func(o []int32) bool { return slices.Equal(o, order) }; len(order) > 0 && !slices.ContainsFunc(w.orders, known) {
		w.wrongf("the region of worker %d shows %v, possible are %v", w.number, order, w.orders)
	}
}
