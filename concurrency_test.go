package main

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// together runs f in n goroutines at once and waits for them.
func together(n int, f func(i int)) {
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { f(i) })
	}
	all.Wait()
}

func TestCreatesAtOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a, b := w.start(t), w.start(t) // two replicas
	const clients, each = 32, 10
	var seen sync.Map
	together(clients, func(i int) {
		for n := range each {
			g := []*app{a, b}[i%2].create(t, fmt.Sprintf("%d-%d", i, n))
			if _, repeated := seen.LoadOrStore(g.Priority, true); repeated || g.Priority < 1 || g.Priority > clients*each {
				t.Errorf("priority %d was given twice, or is out of range", g.Priority)
			}
		}
	})
	if n := w.settled(t, 10*time.Second); n != clients*each {
		t.Errorf("got %d events, want %d", n, clients*each)
	}
}

func TestEditsAtOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a, b := w.start(t), w.start(t)
	const goods = 40
	a.stock(t, goods)
	var created, moved, removed, updated atomic.Int64
	together(24, func(i int) {
		service := []*app{a, b}[i%2]
		for n := range 20 {
			id := 1 + rand.IntN(goods)
			target := fmt.Sprintf("?id=%d&projectId=1", id)
			switch i % 4 {
			case 0:
				service.create(t, fmt.Sprintf("new %d-%d", i, n))
				created.Add(1)
			case 1:
				r := service.call(t, "PATCH", "/goods/reprioritize"+target, fmt.Sprintf(`{"newPriority":%d}`, 1+rand.IntN(2*goods)))
				count(t, &moved, r)
			case 2:
				count(t, &updated, service.call(t, "PATCH", "/goods/update"+target, `{"name":"updated"}`))
			case 3:
				if n%4 == 0 { // leave some for the others
					count(t, &removed, service.call(t, "DELETE", "/goods/remove"+target, ""))
				}
			}
			l := service.list(t, 1000, 1)
			if l.Meta.Total < goods || len(l.Goods) < goods {
				t.Errorf("a list has %d goods of %+v", len(l.Goods), l.Meta)
			}
		}
	})
	if got, want := one[int64](t, w, `SELECT count(*) FROM goods`), goods+created.Load(); got != want {
		t.Errorf("got %d goods, want %d", got, want)
	}
	if got := one[int64](t, w, `SELECT count(*) FROM goods WHERE removed`); got != removed.Load() {
		t.Errorf("got %d removed goods, want %d", got, removed.Load())
	}
	w.settled(t, 20*time.Second)
	t.Logf("%d created, %d moved, %d updated, %d removed", created.Load(), moved.Load(), updated.Load(), removed.Load())
}

// count counts a success; the only other answer is that the good is removed.
func count(t testing.TB, n *atomic.Int64, r reply) {
	t.Helper()
	switch r.status {
	case http.StatusOK:
		n.Add(1)
	case http.StatusNotFound:
	default:
		t.Errorf("got %d %s", r.status, r.body)
	}
}

func TestUpdatesOfOneGood(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a, b := w.start(t), w.start(t)
	a.create(t, "one")
	const clients, each = 50, 4
	together(clients, func(i int) {
		for n := range each {
			name := fmt.Sprintf("%d-%d", i, n)
			g := want[good](t, []*app{a, b}[i%2], 200, "PATCH", "/goods/update?id=1&projectId=1", fmt.Sprintf(`{"name":%q}`, name))
			if g.Name != name {
				t.Errorf("got %q, want one's own update %q", g.Name, name)
			}
		}
	})
	if got := one[int](t, w, `SELECT version FROM goods`); got != 1+clients*each {
		t.Errorf("got version %d, want %d: an update was lost", got, 1+clients*each)
	}
	if n := w.settled(t, 10*time.Second); n != 1+clients*each {
		t.Errorf("got %d events, want %d", n, 1+clients*each)
	}
}

// Without the lock between reading and writing, a good is removed twice.
func TestRemovesOfOneGood(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a, b := w.start(t), w.start(t)
	const goods = 30
	a.stock(t, goods)
	for id := 1; id <= goods; id++ {
		var removed atomic.Int64
		path := fmt.Sprintf("/goods/remove?id=%d&projectId=1", id)
		together(8, func(i int) { count(t, &removed, []*app{a, b}[i%2].call(t, "DELETE", path, "")) })
		if removed.Load() != 1 {
			t.Errorf("good %d was removed %d times", id, removed.Load())
		}
	}
	w.settled(t, 10*time.Second)
}

// A move over more goods than a call's usual time allows.
func TestLongMove(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a, b := w.start(t, "EVENTS_BATCH=1000"), w.start(t, "EVENTS_BATCH=1000")
	const goods = longMove + 100
	must(t, errorOf(w.db.Exec(`INSERT INTO goods (project_id, name) SELECT 1, n::text FROM generate_series(1, $1) AS n`, goods)))
	b.list(t, 10, 1)
	b.list(t, 10, goods-9)
	moved := want[struct{ Priorities []place }](t, a, 200, "PATCH", fmt.Sprintf("/goods/reprioritize?id=%d&projectId=1", goods), `{"newPriority":1}`).Priorities
	if len(moved) != goods || moved[0] != (place{goods, 1}) || moved[1] != (place{1, 2}) || moved[goods-1] != (place{goods - 1, goods}) {
		t.Errorf("got %d places, from %v to %v", len(moved), moved[:2], moved[len(moved)-1])
	}
	if got := b.list(t, 2, 1).Goods; got[0].ID != goods || got[1].ID != 1 {
		t.Errorf("the list begins with %+v", got)
	}
	if got := b.list(t, 10, goods).Goods; got[0].ID != goods-1 {
		t.Errorf("the list ends with %+v", got)
	}
	if n := w.settled(t, 90*time.Second); n != 2*goods {
		t.Errorf("got %d events, want %d", n, 2*goods)
	}
}

// Moves wait for each other, and must not take what lists need meanwhile.
func TestMovesLeaveListsAlone(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.start(t)
	a.stock(t, 5)
	tx := w.hold(t, `SELECT lock_priorities()`) // holds back every move
	var moves sync.WaitGroup
	for range 64 {
		moves.Go(func() {
			r := a.call(t, "PATCH", "/goods/reprioritize?id=1&projectId=1", `{"newPriority":5}`)
			if r.status != http.StatusServiceUnavailable {
				t.Errorf("a move that has to wait: got %d %s", r.status, r.body)
			}
		})
	}
	for range 100 {
		start := time.Now()
		a.list(t, 10, 1)
		want[good](t, a, 200, "PATCH", "/goods/update?id=2&projectId=1", `{"name":"x"}`)
		if took := time.Since(start); took > time.Second {
			t.Errorf("a list and an update took %v", took)
		}
	}
	moves.Wait()
	must(t, tx.Rollback())
	want[struct{}](t, a, 200, "PATCH", "/goods/reprioritize?id=1&projectId=1", `{"newPriority":5}`)
	w.settled(t, 5*time.Second)
}

// Somebody holds one good: updates of the others are slower, but made.
func TestUpdatesBesideALockedGood(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.start(t)
	a.stock(t, 12)
	tx := w.hold(t, `SELECT FROM goods WHERE id = 1 FOR UPDATE`)
	together(24, func(i int) {
		for range 2 {
			id := 1 + i%12
			status := http.StatusOK
			if id == 1 {
				status = http.StatusServiceUnavailable
			}
			want[struct{}](t, a, status, "PATCH", fmt.Sprintf("/goods/update?id=%d&projectId=1", id), `{"name":"x"}`)
		}
	})
	must(t, tx.Rollback())
	want[good](t, a, 200, "PATCH", "/goods/update?id=1&projectId=1", `{"name":"x"}`)
	w.settled(t, 5*time.Second)
}
