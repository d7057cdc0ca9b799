package faults

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
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
	pace       = 200 * time.Millisecond // between two writes of a worker
	unanswered = 0                      // the status of a request without an answer
)

// lingers is the time after a bad answer in which a write may still be done: by a service that is slow, or by
// Postgres for one that was killed.
var lingers = map[int]time.Duration{503: 10 * time.Second, 502: time.Second, unanswered: time.Second}

// load is clients that create, update, move, remove and list without end, and keep every answer. Each
// worker has goods of its own, so it knows what a list must show of them. A create is repeated with its key
// until it is answered. Any other write that gets a bad answer may be done or not, now or somewhat later:
// its unit is not written again until that is settled.
type load struct {
	testing.TB // fails at an answer that no history of the service explains

	apps  atomic.Pointer[[]*harness.App] // that a balancer would choose from
	ended atomic.Bool
	void  atomic.Bool  // Postgres may lose what was answered: nothing that clients know holds
	hung  atomic.Int64 // until then, in Unix nanoseconds, a COMMIT may wait: no write of unknown outcome settles
	stop  func()       // ends it, and waits for the last answer

	asked, created   atomic.Int64 // creates begun, and answered; the goods of the beginning among both
	leaving, removed atomic.Int64 // removes begun, and answered

	mu      sync.Mutex
	answers []answer
	keys    map[string]int // of creates: the ids that they were answered with
	workers []*worker      // not guarded: each is its own goroutine's until stop
}

// answer is what one request came to.
type answer struct {
	call       string
	status     int
	err        error // why there is none
	begin, end time.Time
}

func good(status int) bool { return status == 200 || status == 201 }

type worker struct {
	*load
	written int     // numbers its names
	units   []*unit // the first is its region, of goods that move; the others are one good each
}

// unit is goods at places in a row, which one worker writes.
type unit struct {
	place    int              // the first
	possible [][]harness.Good // what a list may show of it
	settles  time.Time        // when what a list shows is what stays
}

// startLoad begins the load on a service that has no goods yet.
func startLoad(s *scene) *load {
	l := &load{TB: s, keys: map[string]int{}}
	l.aim(s.apps...)
	s.Exec(s, fmt.Sprintf(`
INSERT INTO goods (project_id, name, description)
SELECT 1, n, n FROM generate_series(1, %d) AS n`, workers*region))
	l.asked.Store(workers * region)
	l.created.Store(workers * region)
	for place := 1; place < workers*region; place += region {
		goods := s.apps[0].List(s, region, place).Goods
		w := &worker{load: l, units: []*unit{{place: place, possible: [][]harness.Good{goods}}}}
		l.workers = append(l.workers, w)
	}
	l.start()
	s.Cleanup(func() { l.stop() })
	return l
}

func (l *load) start() {
	l.ended.Store(false)
	var running sync.WaitGroup
	for _, w := range l.workers {
		running.Go(w.run)
	}
	l.stop = func() {
		l.ended.Store(true)
		running.Wait()
	}
}

// forget has the clients, which have stopped, take what Postgres holds for what was answered, and go on.
func (l *load) forget(s *scene) {
	stored, keys := s.stored()
	l.keys = keys
	removed := 0
	for _, g := range stored {
		if g.Removed {
			removed++
		}
	}
	l.asked.Store(int64(len(stored)))
	l.created.Store(int64(len(stored)))
	l.leaving.Store(int64(removed))
	l.removed.Store(int64(removed))
	for _, w := range l.workers {
		var kept []*unit
		for _, u := range w.units {
			first, end := u.place-1, u.place-1+len(u.possible[0])
			if end <= len(stored) {
				kept = append(kept, &unit{place: u.place, possible: [][]harness.Good{stored[first:end]}})
			}
		}
		w.units = kept
	}
	l.void.Store(false)
	l.start()
}

// Errorf fails the test, unless what the clients know is void.
func (l *load) Errorf(format string, args ...any) {
	if !l.void.Load() {
		l.TB.Errorf(format, args...)
	}
}

// aim chooses the replicas that get requests from now on.
func (l *load) aim(apps ...*harness.App) {
	apps = slices.Clone(apps)
	l.apps.Store(&apps)
}

// call sends a request to any replica, and returns the status. A 2xx is decoded into v.
func (l *load) call(method, name, query, body string, v any, header ...string) int {
	apps := *l.apps.Load()
	begin := time.Now()
	// An error leaves the status 0: unanswered.
	r, err := apps[rand.N(len(apps))].Try(method, "/goods/"+name+"?"+query, body, header...)
	l.mu.Lock()
	l.answers = append(l.answers, answer{name, r.Status, err, begin, time.Now()})
	l.mu.Unlock()
	if r.Status/100 == 4 || good(r.Status) && json.Unmarshal([]byte(r.Body), v) != nil {
		l.Errorf("%s %s %s %s: got %d %s", method, name, query, body, r.Status, r.Body)
	}
	return r.Status
}

func text(s string) string { return fmt.Sprintf(`{"name":%q,"description":%[1]q}`, s) }

// create makes the good with this key, which is its text, too. It repeats the request until that is
// answered, or the load is void.
func (l *load) create(key string) (g harness.Good, status, tries int) {
	for ; !good(status) && tries < 1000 && !l.void.Load(); tries++ {
		if tries > 0 {
			<-time.After(pace / 4)
		}
		// In lower case, because net/http would know the name, and repeat by itself.
		status = l.call("POST", "create", "projectId=1", text(key), &g, "idempotency-key: "+key)
	}
	l.mu.Lock()
	before := l.keys[key]
	l.keys[key] = g.ID
	l.mu.Unlock()
	if before == 0 {
		l.created.Add(1)
	}
	if before != 0 && (before != g.ID || status != 200) || g.Name != key || g.Description != key || g.Removed {
		l.Errorf("create of %s: got %d %+v, before that good %d", key, status, g, before)
	}
	return g, status, tries
}

func (w *worker) run() {
	tick := time.Tick(pace)
	for !w.ended.Load() && !w.void.Load() {
		w.written++
		name := fmt.Sprintf("w%d-%d", w.units[0].place, w.written) // that nothing else has
		u := w.units[rand.N(len(w.units))]
		free := len(u.possible) == 1 && !u.possible[0][0].Removed
		switch choice := rand.N(10); {
		case choice < 3:
			u = w.make(name)
		case choice < 6 && free:
			w.update(u, name)
		case choice < 7 && free && u != w.units[0]: // a removed good could not be moved any more
			w.remove(u)
		case choice < 9 && len(w.units[0].possible) == 1:
			u = w.units[0]
			w.move(u)
		default:
			w.list(1, 1000)
		}
		w.list(u.place, len(u.possible[0]))
		<-tick
	}
}

func (w *worker) make(name string) *unit {
	w.asked.Add(1)
	g, status, tries := w.create(name)
	if tries == 1 && status != 201 {
		w.Errorf("the first create of %s: got %d", name, status)
	}
	if rand.N(4) == 0 {
		w.create(name) // must find the same good
	}
	u := &unit{place: g.Priority, possible: [][]harness.Good{{g}}}
	w.units = append(w.units, u)
	return u
}

// write sends a request that makes a unit what is wanted.
func (w *worker) write(u *unit, wanted []harness.Good, method, name string, id int, body string, v any) int {
	status := w.call(method, name, fmt.Sprintf("id=%d&projectId=1", id), body, v)
	if good(status) {
		u.possible = nil
	}
	u.possible, u.settles = append(u.possible, wanted), time.Now().Add(lingers[status])
	return status
}

func (w *worker) update(u *unit, to string) {
	wanted := slices.Clone(u.possible[0])
	changed := &wanted[rand.N(len(wanted))]
	changed.Name, changed.Description = to, to
	var g harness.Good
	if good(w.write(u, wanted, "PATCH", "update", changed.ID, text(to), &g)) && g != *changed {
		w.Errorf("update: got %+v, want %+v", g, *changed)
	}
}

func (w *worker) remove(u *unit) {
	wanted := slices.Clone(u.possible[0])
	wanted[0].Removed = true
	w.leaving.Add(1)
	if good(w.write(u, wanted, "DELETE", "remove", wanted[0].ID, "", &struct{}{})) {
		w.removed.Add(1)
	}
}

// move moves a good within its unit.
func (w *worker) move(u *unit) {
	before, from, to := u.possible[0], rand.N(region), rand.N(region)
	wanted := slices.Insert(slices.Delete(slices.Clone(before), from, from+1), to, before[from])
	var changed []harness.Good // their ids and priorities, which is all that the reply has
	for i := range wanted {
		wanted[i].Priority = u.place + i
		if min(from, to) <= i && i <= max(from, to) {
			changed = append(changed, harness.Good{ID: wanted[i].ID, Priority: u.place + i})
		}
	}
	body := fmt.Sprintf(`{"newPriority":%d}`, u.place+to)
	var reply struct{ Priorities []harness.Good }
	status := w.write(u, wanted, "PATCH", "reprioritize", before[from].ID, body, &reply)
	if good(status) && !slices.Equal(reply.Priorities, changed) {
		w.Errorf("move of good %d to %d: got %v, want %v", before[from].ID, u.place+to, reply.Priorities, changed)
	}
}

// list reads a page, which must be one moment of the whole list, after it was asked for.
func (w *worker) list(offset, limit int) {
	begin, created, removed := time.Now(), w.created.Load(), w.removed.Load()
	var page harness.ListReply
	if !good(w.call("GET", "list", fmt.Sprintf("offset=%d&limit=%d", offset, limit), "", &page)) {
		return
	}
	m, asked, leaving := page.Meta, w.asked.Load(), w.leaving.Load()
	gone := len(slices.DeleteFunc(slices.Clone(page.Goods), func(g harness.Good) bool { return !g.Removed }))
	if int64(m.Total) < created || int64(m.Total) > asked || int64(m.Removed) < removed ||
		int64(m.Removed) > leaving {
		w.Errorf("a list says %+v after %d to %d creates and %d to %d removes", m, created, asked, removed, leaving)
	}
	if len(page.Goods) != max(0, min(limit, m.Total-offset+1)) ||
		len(page.Goods) == m.Total && gone != m.Removed {
		w.Errorf("a list has %d goods, of them %d removed, and says %+v", len(page.Goods), gone, m)
	}
	w.check(page.Goods, offset, begin)
}

// check compares what stands at the places from first on with what this worker knows. It was asked for at
// begin.
func (w *worker) check(goods []harness.Good, first int, begin time.Time) {
	for i, g := range goods {
		if g.Priority != first+i || g.Name != g.Description {
			w.Errorf("at place %d stands %+v", first+i, g)
		}
	}
	for _, u := range w.units {
		from, to := u.place-first, u.place-first+len(u.possible[0])
		if from < 0 || to > len(goods) {
			continue
		}
		shown := goods[from:to]
		if !slices.ContainsFunc(u.possible, func(p []harness.Good) bool { return slices.Equal(p, shown) }) {
			w.Errorf("from place %d on stand %+v, possible are %+v", u.place, shown, u.possible)
		}
		if begin.After(u.settles) && begin.UnixNano() > w.hung.Load() {
			u.possible = [][]harness.Good{shown}
		}
	}
}

// works returns when the last request failed of those that began after then, and an error unless every call
// has succeeded since.
func (l *load) works(then time.Time) (failed time.Time, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	seen := map[string]bool{}
	for _, a := range l.answers {
		if !a.begin.After(then) {
			continue
		}
		if seen[a.call] = true; !good(a.status) {
			failed = a.end
			clear(seen)
		}
	}
	if len(seen) < 5 {
		err = fmt.Errorf("since the last failure at %v, only these calls have succeeded: %v", failed, seen)
	}
	return failed, err
}

// verify compares every answer with what Postgres holds now. The load must have stopped.
func (l *load) verify(s *scene) {
	stored, keys := s.stored()
	if !maps.Equal(keys, l.keys) || len(stored) != workers*region+len(keys) {
		s.Errorf("Postgres has %d goods, those of keys are %v, answered were %v", len(stored), keys, l.keys)
	}
	for _, w := range l.workers {
		w.check(stored, 1, time.Now())
	}
}
