package test

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"goods/test/harness"
)

// More clients than TestLinearizability has, so that batches are large; half of the calls are about the same few
// goods.
func TestManyClients(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	w.Env["EVENTS_BATCH"] = "50"
	replicas := []*harness.App{w.Start(t), w.Start(t)}
	const goods = 60
	replicas[0].Stock(t, goods)
	var places sync.Map // of the creates
	var created, removed, written atomic.Int64
	harness.Together(32, func(i int) {
		a := replicas[i/4%2]
		for n := range 15 {
			id := 1 + rand.IntN(goods)
			if n%2 == 0 {
				id = 1 + rand.IntN(3)
			}
			count := func(done *atomic.Int64, method, path, body string) {
				if r := a.Call(t, method, path+target(id), body); r.Status == 200 {
					done.Add(1)
				} else if r.Status != http.StatusNotFound { // which a removed one is
					t.Errorf("%s %s: got %d %s", path, body, r.Status, r.Body)
				}
			}
			switch {
			case i%4 == 0:
				if _, repeated := places.LoadOrStore(a.Create(t, "new").Priority, true); repeated {
					t.Errorf("a priority was given twice")
				}
				created.Add(1)
			case i%4 == 1:
				count(&written, "PATCH", "/goods/reprioritize", fmt.Sprintf(`{"newPriority":%d}`, 1+rand.IntN(2*goods)))
			case i%4 == 2 || n < 10:
				count(&written, "PATCH", "/goods/update", someName)
			default: // late, so that there is something to write before
				count(&removed, "DELETE", "/goods/remove", "")
			}
		}
	})
	l := replicas[0].List(t, 1000, 1)
	harness.Equal(t, l.Meta.Total, goods+int(created.Load()), "goods")
	harness.Equal(t, l.Meta.Removed, int(removed.Load()), "removed goods")
	if events := w.Settled(t, 30*time.Second); events < l.Meta.Total+int(removed.Load()) || written.Load() < 100 {
		t.Errorf("got %d events for %d goods, %d of them removed, and %d other writes", events, l.Meta.Total, removed.Load(), written.Load())
	}
}

// A move renumbers at most 20,000 goods within a request's time, and says so of a longer one.
func TestLongMove(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	a := w.Start(t, "EVENTS_BATCH=1000")
	const most = 20_000
	w.Exec(t, fmt.Sprintf(`INSERT INTO goods (project_id, name) SELECT 1, n::text FROM generate_series(1, %d) AS n`, most+2))
	if details := refused(t, a, 2, "PATCH", "/goods/reprioritize"+target(most+2), somePlace); !strings.Contains(details["newPriority"], fmt.Sprint(most)) {
		t.Errorf("got details %v, want the limit for newPriority", details)
	}
	moved := harness.Want[struct{ Priorities []place }](t, a, 200, "PATCH", "/goods/reprioritize"+target(most+1), somePlace).Priorities
	harness.Equal(t, fmt.Sprint(len(moved), moved[:2], moved[len(moved)-1]), fmt.Sprint(most+1, []place{{most + 1, 1}, {1, 2}}, place{most, most + 1}), "places")
	end := a.List(t, 2, most+1).Goods
	harness.Equal(t, []int{end[0].ID, end[1].ID}, []int{most, most + 2}, "the end of the list")
}

// Moves wait for each other, and must not take what other calls need.
func TestMovesThatWait(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	a := w.Start(t)
	a.Stock(t, 5)
	tx := w.Hold(t, `SELECT lock_priorities()`)
	const clients = 64
	var given atomic.Int64
	var moves sync.WaitGroup
	for range clients {
		moves.Go(func() {
			refused(t, a, 8, "PATCH", "/goods/reprioritize"+target(1), `{"newPriority":5}`)
			given.Add(1)
		})
	}
	served := 0
	for ; given.Load() == 0; served++ {
		a.List(t, 10, 1)
		ok(t, a, "PATCH", "/goods/update"+target(2), someName)
	}
	moves.Wait()
	if served < 20 {
		t.Errorf("%d lists and updates were served while moves waited for seconds", served)
	}
	harness.Must(t, tx.Rollback())
	ok(t, a, "PATCH", "/goods/reprioritize"+target(1), `{"newPriority":5}`)
	w.Settled(t, 15*time.Second)
}

// A good that is locked elsewhere holds up only those who ask for it.
func TestLockedGood(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	a := w.Start(t)
	a.Stock(t, 12)
	tx := w.Hold(t, `SELECT FROM goods WHERE id = 1 FOR UPDATE`)
	harness.Together(24, func(i int) {
		for range 2 {
			if i%12 == 0 {
				refused(t, a, 8, "PATCH", "/goods/update"+target(1), someName)
			} else {
				ok(t, a, "PATCH", "/goods/update"+target(1+i%12), someName)
			}
		}
	})
	harness.Must(t, tx.Rollback())
	ok(t, a, "PATCH", "/goods/update"+target(1), someName)
	w.Settled(t, 15*time.Second)
}
