package faults

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"goods/test/harness"
)

const (
	workers    = 16
	region     = 5                      // places of a worker's own, where it moves goods around
	pace       = 150 * time.Millisecond // between two writes of a worker
	lingers    = 10 * time.Second       // that a write may still be done after a bad answer
	unanswered = 0                      // the status of a request without an answer
)

// load is clients that create, update, move, remove and list without end, and
// keep every answer. Each worker has goods of its own, so it knows what a list
// must show of them: the last answered write, or after a write without a good
// answer either what was before or the whole of what was asked for. A create
// is repeated with its key until it is answered.
type load struct {
	w    *harness.World
	apps atomic.Pointer[[]*harness.App] // that a balancer would choose from
	stop func()                         // ends it, and waits for the last answer

	asked, created   atomic.Int64 // creates begun, and answered; the goods of the beginning among both
	leaving, removed atomic.Int64 // removes begun, and answered

	mu      sync.Mutex
	answers []answer
	wrong   []string       // what no history of the service explains
	writes  []harness.Good // answered writes that the log must have; zero fields are not compared
	keys    map[string]int // of creates: the ids that they were answered with
	workers []*worker      // not guarded: each is its own goroutine's until stop
}

// answer is what one request came to.
type answer struct {
	call   string
	status int
	begin  time.Time
	took   time.Duration
}

func good(status int) bool { return status >= 200 && status <= 299 }

// content is what a client can change of a good, but for its place.
type content struct {
	name, description string
	removed           bool
}

// owned is a good of one worker, and the states that it may be in.
type owned struct {
	id       int
	priority int // 0: somewhere in the worker's region
	states   []content
}

// move puts a good at an index of the region.
type move struct {
	id, to int
	ended  time.Time
}

type worker struct {
	*load
	number int
	place  int            // the first of its region
	orders [][]int        // the orders that its region may be in
	late   []move         // without a good answer: they may still happen
	goods  map[int]*owned // all of them
	active []*owned       // those that it still writes
	texts  int
}

// place is where a move put a good.
type place struct{ ID, Priority int }

// startLoad begins the load on a service that has no goods yet.
func startLoad(t testing.TB, w *harness.World, apps ...*harness.App) *load {
	t.Helper()
	l := &load{w: w, keys: map[string]int{}}
	l.aim(apps...)
	for i := range workers {
		l.workers = append(l.workers, &worker{load: l, number: i, place: i*region + 1, orders: [][]int{make([]int, region)}, goods: map[int]*owned{}})
	}
	rows, err := w.DB.Query(`
INSERT INTO goods (project_id, name, description)
SELECT 1, 'seed-' || n, 'seed-' || n
FROM generate_series(1, $1::integer) AS n
RETURNING id, priority, name`, workers*region)
	harness.Must(t, err)
	defer rows.Close()
	for rows.Next() {
		var id, priority int
		var name string
		harness.Must(t, rows.Scan(&id, &priority, &name))
		w := l.workers[(priority-1)/region]
		w.orders[0][(priority-1)%region] = id
		w.own(&owned{id: id, states: []content{{name, name, false}}})
	}
	harness.Must(t, rows.Err())
	l.asked.Store(workers * region)
	l.created.Store(workers * region)

	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for _, w := range l.workers {
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

func (l *load) note(g harness.Good) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.writes = append(l.writes, g)
}

// call sends a request to any replica, and returns the status. Only after a
// 2xx is it known what became of the request, and the reply decoded into v.
func (l *load) call(name, method, path, body string, v any, header ...string) int {
	apps := *l.apps.Load()
	begin := time.Now()
	r, _ := apps[rand.N(len(apps))].Try(method, path, body, header...) // an error leaves the status 0: unanswered
	a := answer{name, r.Status, begin, time.Since(begin)}
	l.mu.Lock()
	l.answers = append(l.answers, a)
	l.mu.Unlock()
	if a.status >= 400 && a.status <= 499 {
		l.wrongf("%s %s %s: got %d %s", method, path, body, r.Status, r.Body)
	}
	if good(a.status) {
		if err := json.Unmarshal([]byte(r.Body), v); err != nil {
			l.wrongf("%s %s %s: %v in %s", method, path, body, err, r.Body)
		}
	}
	return a.status
}

// once creates the good with this key, which is its text, too. It repeats the
// request until that is answered.
func (l *load) once(key string) (g harness.Good, status, tries int) {
	body := fmt.Sprintf(`{"name":%q,"description":%q}`, key, key)
	for begin := time.Now(); !good(status); tries++ {
		if tries > 0 {
			<-time.After(pace / 3)
		}
		if time.Since(begin) > time.Minute {
			l.wrongf("create of %s was not answered in a minute", key)
			return g, status, tries
		}
		// In lower case, because net/http would know the name, and repeat by itself.
		status = l.call("create", "POST", "/goods/create?projectId=1", body, &g, "idempotency-key: "+key)
	}
	l.mu.Lock()
	id, known := l.keys[key]
	l.keys[key] = g.ID
	l.mu.Unlock()
	if known && id != g.ID {
		l.wrongf("create of %s made goods %d and %d", key, id, g.ID)
	}
	if g.Name != key || g.Description != key || g.Removed {
		l.wrongf("create of %s: got %+v", key, g)
	}
	if !known {
		l.created.Add(1)
		l.note(harness.Good{ID: g.ID, Name: key, Description: key, Priority: g.Priority})
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
		switch n := rand.N(10); {
		case n < 3 || len(w.active) == 0:
			w.create()
		case n < 6:
			w.update()
		case n < 8:
			w.move()
		case n < 9:
			w.remove()
		default:
			w.list(1, 1000)
		}
	}
}

// text is a name, and a description, that nothing else has.
func (w *worker) text() string { return fmt.Sprintf("w%d-%d", w.number, w.texts) }

func (w *worker) own(o *owned) {
	w.goods[o.id] = o
	w.active = append(w.active, o)
}

func (w *worker) create() {
	text := w.text()
	w.asked.Add(1)
	g, status, tries := w.once(text)
	if !good(status) {
		return
	}
	if tries == 1 && status != http.StatusCreated {
		w.wrongf("the first create of %s: got %d", text, status)
	}
	if rand.N(4) == 0 {
		if _, status, _ := w.once(text); status != http.StatusOK {
			w.wrongf("create of %s, repeated: got %d", text, status)
		}
	}
	o := &owned{id: g.ID, priority: g.Priority, states: []content{{text, text, false}}}
	w.own(o)
	w.look(o)
}

// update leaves a good alone for good when the answer is bad: it may be late.
func (w *worker) update() {
	i := rand.N(len(w.active))
	o, text := w.active[i], w.text()
	wanted := content{text, text, false}
	var g harness.Good
	if !good(w.call("update", "PATCH", fmt.Sprintf("/goods/update?id=%d&projectId=1", o.id), fmt.Sprintf(`{"name":%q,"description":%q}`, text, text), &g)) {
		o.states = append(o.states, wanted)
		w.active = slices.Delete(w.active, i, i+1)
		return
	}
	w.note(harness.Good{ID: o.id, Name: g.Name, Description: g.Description, Priority: g.Priority})
	if (content{g.Name, g.Description, g.Removed}) != wanted {
		w.wrongf("update of good %d to %s: got %+v", o.id, text, g)
	}
	o.states = []content{wanted}
	w.look(o)
}

func (w *worker) remove() {
	i := rand.N(len(w.active))
	o := w.active[i]
	if o.priority == 0 {
		w.list(1, 1000) // a removed good could not be moved any more
		return
	}
	w.active = slices.Delete(w.active, i, i+1)
	w.leaving.Add(1)
	gone := o.states[0]
	gone.removed = true
	if !good(w.call("remove", "DELETE", fmt.Sprintf("/goods/remove?id=%d&projectId=1", o.id), "", &struct{}{})) {
		o.states = append(o.states, gone)
		return
	}
	w.removed.Add(1)
	w.note(harness.Good{ID: o.id, Removed: true})
	o.states = []content{gone}
	w.look(o)
}

// move moves a good within the worker's region.
func (w *worker) move() {
	m := move{id: w.orders[0][rand.N(region)], to: rand.N(region)}
	var reply struct{ Priorities []place }
	status := w.call("reprioritize", "PATCH", fmt.Sprintf("/goods/reprioritize?id=%d&projectId=1", m.id), fmt.Sprintf(`{"newPriority":%d}`, w.place+m.to), &reply)
	if m.ended = time.Now(); !good(status) {
		w.late = append(w.late, m)
		w.stand(w.orders)
		return
	}
	var after [][]int
	for _, order := range w.orders {
		moved, places := m.apply(order, w.place)
		if slices.Equal(places, reply.Priorities) {
			after = append(after, moved)
		}
	}
	if after == nil {
		w.wrongf("move of good %d to %d: got %v, the order was %v", m.id, w.place+m.to, reply.Priorities, w.orders)
		after = w.orders
	}
	w.stand(after)
	if len(reply.Priorities) > 1 {
		for _, p := range reply.Priorities {
			w.note(harness.Good{ID: p.ID, Priority: p.Priority})
		}
	}
	w.look(w.goods[m.id])
}

// apply returns the order after m, and the places that have changed.
func (m move) apply(order []int, first int) (moved []int, places []place) {
	from := slices.Index(order, m.id)
	moved = slices.Insert(slices.Delete(slices.Clone(order), from, from+1), m.to, m.id)
	for i := min(from, m.to); i <= max(from, m.to); i++ {
		places = append(places, place{moved[i], first + i})
	}
	return moved, places
}

// stand notes the orders that the region may be in, and what late moves may
// still make of them.
func (w *worker) stand(orders [][]int) {
	w.late = slices.DeleteFunc(w.late, func(m move) bool { return time.Since(m.ended) > lingers })
	w.orders = orders
	for i := 0; i < len(w.orders); i++ {
		for _, m := range w.late {
			if moved, _ := m.apply(w.orders[i], w.place); !w.possible(moved) {
				w.orders = append(w.orders, moved)
			}
		}
	}
}

func (w *worker) possible(order []int) bool {
	return slices.ContainsFunc(w.orders, func(o []int) bool { return slices.Equal(o, order) })
}

// look reads a good that has just been written, by its place.
func (w *worker) look(o *owned) {
	if o.priority == 0 {
		w.list(w.place, region)
	} else {
		w.list(o.priority, 1)
	}
}

// list reads a page. It must be one moment of the list, from after it was
// asked for.
func (w *worker) list(offset, limit int) {
	created, removed := w.created.Load(), w.removed.Load()
	var page harness.ListReply
	if !good(w.call("list", "GET", fmt.Sprintf("/goods/list?offset=%d&limit=%d", offset, limit), "", &page)) {
		return
	}
	m, asked, leaving := page.Meta, w.asked.Load(), w.leaving.Load()
	if int64(m.Total) < created || int64(m.Total) > asked || int64(m.Removed) < removed || int64(m.Removed) > leaving {
		w.wrongf("a list says %+v after %d to %d creates and %d to %d removes", m, created, asked, removed, leaving)
	}
	if want := max(0, min(limit, m.Total-offset+1)); len(page.Goods) != want {
		w.wrongf("a list of %d has %d goods, and says %+v", want, len(page.Goods), m)
	}
	gone := 0
	for _, g := range page.Goods {
		if g.Removed {
			gone++
		}
	}
	if len(page.Goods) == m.Total && gone != m.Removed {
		w.wrongf("a list of everything has %d removed goods, and says %+v", gone, m)
	}
	w.check(page.Goods, offset)
}

// check compares what stands at the places from first on with what this
// worker knows.
func (w *worker) check(goods []harness.Good, first int) {
	var order []int
	for i, g := range goods {
		at := first + i
		if g.Priority != at {
			w.wrongf("priority %d stands at place %d: %+v", g.Priority, at, g)
		}
		o := w.goods[g.ID]
		if o == nil {
			if at >= w.place && at < w.place+region {
				w.wrongf("good %d stands in the region of worker %d", g.ID, w.number)
			}
			continue
		}
		if c := (content{g.Name, g.Description, g.Removed}); !slices.Contains(o.states, c) {
			w.wrongf("good %d shows %v, possible are %v", g.ID, c, o.states)
		}
		if o.priority == 0 {
			order = append(order, g.ID)
		} else if o.priority != g.Priority {
			w.wrongf("good %d stands at %d, it was created at %d", g.ID, g.Priority, o.priority)
		}
	}
	switch {
	case len(order) == 0:
	case w.possible(order):
		w.stand([][]int{order})
	default:
		w.wrongf("the region of worker %d shows %v, possible are %v", w.number, order, w.orders)
	}
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
		if !good(a.status) {
			return fmt.Errorf("%s got %d", a.call, a.status)
		}
		seen[a.call] = true
	}
	for _, call := range []string{"create", "update", "reprioritize", "remove", "list"} {
		if !seen[call] {
			return fmt.Errorf("no %s was answered", call)
		}
	}
	return nil
}

// verify compares every answer with what Postgres and ClickHouse hold now. The
// load must have stopped, and the queues be empty.
func (l *load) verify(t testing.TB) {
	t.Helper()
	rows, err := l.w.DB.Query(`SELECT id, name, description, priority, removed, coalesce(idempotency_key, '') FROM goods ORDER BY priority`)
	harness.Must(t, err)
	defer rows.Close()
	var stored []harness.Good
	keys := map[string]int{}
	for rows.Next() {
		var g harness.Good
		var key string
		harness.Must(t, rows.Scan(&g.ID, &g.Name, &g.Description, &g.Priority, &g.Removed, &key))
		stored = append(stored, g)
		if g.Name != g.Description {
			l.wrongf("good %d was written in part: %+v", g.ID, g)
		}
		if key != "" {
			keys[key] = g.ID
		}
	}
	harness.Must(t, rows.Err())
	for key, id := range l.keys {
		if keys[key] != id {
			l.wrongf("create of %s was answered with good %d, Postgres has %d", key, id, keys[key])
		}
	}
	if got, want := len(stored), workers*region+len(l.keys); got != want || len(keys) != len(l.keys) {
		l.wrongf("Postgres has %d goods and %d keys, %d and %d were asked for", got, len(keys), want, len(l.keys))
	}
	for _, w := range l.workers {
		w.check(stored, 1)
	}

	logged := map[int][]harness.Good{}
	events, err := l.w.ClickHouse.Query(context.Background(), `SELECT toInt64(Id), Name, Description, toInt64(Priority), Removed FROM goods_log FINAL`)
	harness.Must(t, err)
	defer events.Close()
	for events.Next() {
		var id, priority int64
		var removed uint8
		var g harness.Good
		harness.Must(t, events.Scan(&id, &g.Name, &g.Description, &priority, &removed))
		g.ID, g.Priority, g.Removed = int(id), int(priority), removed == 1
		logged[g.ID] = append(logged[g.ID], g)
	}
	harness.Must(t, events.Err())
	for _, g := range l.writes {
		same := func(e harness.Good) bool {
			return (g.Name == "" || g.Name == e.Name && g.Description == e.Description) && (g.Priority == 0 || g.Priority == e.Priority) && (e.Removed || !g.Removed)
		}
		if !slices.ContainsFunc(logged[g.ID], same) {
			l.wrongf("answered, and not in the log: %+v", g)
		}
	}
	for i, text := range l.wrong {
		if i == 10 {
			t.Errorf("and %d more like these", len(l.wrong)-i)
			break
		}
		t.Error(text)
	}
}
