package test

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"goods/test/harness"
)

// More clients than TestLinearizability has, so that batches are large. Half of the calls are about the
// same few goods, and all clients that create use the same keys, each of which makes one good.
func TestManyClients(t *testing.T) {
	w, a := started(t, "EVENTS_BATCH=50")
	replicas := []*harness.App{a, w.Start(t, "EVENTS_BATCH=50")}
	const goods, clients, each = 60, 32, 15
	makeGoods(t, w, goods)
	var ids sync.Map // key -> the good that it made
	var made, removed atomic.Int64
	harness.Together(clients, func(i int) {
		for n := range each {
			call := calls[i%4]
			if call.method == "DELETE" && n < 10 {
				call = calls[1] // so that there is something to write before
			}
			id := 1 + rand.IntN(goods)
			if n%2 == 0 {
				id = 1 + rand.IntN(3)
			}
			path := strings.Replace(call.path, target(1), target(id), 1)
			key := fmt.Sprint(n, "-", i/16) // half of the clients share it: a batch has several
			body := strings.NewReplacer("1", fmt.Sprint(1+rand.IntN(2*goods)), "x", key).Replace(call.body)
			r := replicas[i/4%2].Call(t, call.method, path, body, keyHeader+key)
			switch {
			case call.method == "POST" && r.Status <= 201:
				if r.Status == 201 {
					made.Add(1)
				}
				var g harness.Good
				harness.Must(t, json.Unmarshal([]byte(r.Body), &g))
				first, _ := ids.LoadOrStore(key, g.ID)
				harness.Equal(t, []any{g.ID, g.Name}, []any{first, key}, "the good of key %s", key)
			case call.method == "DELETE" && r.Status == 200:
				removed.Add(1)
			case call.method == "POST" || r.Status != 200 && r.Status != 404: // which a removed one is
				t.Errorf("%s %s: got %d %s", path, body, r.Status, r.Body)
			}
		}
	})
	l := replicas[0].List(t, 1, 1)
	got := []int64{made.Load(), int64(l.Meta.Total), int64(l.Meta.Removed)}
	want := []int64{2 * each, goods + 2*each, removed.Load()}
	harness.Equal(t, got, want, "new goods, all goods, removed goods")
	if events := w.Settled(t, 30*time.Second); events < l.Meta.Total+l.Meta.Removed+100 {
		t.Errorf("got %d events for %d goods, %d of them removed: hardly any update or move",
			events, l.Meta.Total, l.Meta.Removed)
	}
}

// A move renumbers at most 10,000 goods within a request's time, and says so of a longer one.
func TestLongMove(t *testing.T) {
	w, a := started(t, "EVENTS_BATCH=1000")
	const most = 10_000
	makeGoods(t, w, most+2)
	details := refused(t, a, 2, "PATCH", "/goods/reprioritize"+target(most+2), somePlace)
	told := strings.Contains(details["newPriority"], fmt.Sprint(most))
	harness.Equal(t, told, true, "the limit is in the details %v", details)
	moved := harness.Want[answer](t, a, 200, "PATCH", "/goods/reprioritize"+target(most+1), somePlace).Priorities
	harness.Equal(t, []any{len(moved), moved[0], moved[1], moved[most]},
		[]any{most + 1, place{most + 1, 1}, place{1, 2}, place{most, most + 1}}, "places")
	end := a.List(t, 2, most+1).Goods
	harness.Equal(t, []int{end[0].ID, end[1].ID}, []int{most, most + 2}, "the end of the list")
}

// Moves wait for each other, and who asks for a good that is locked elsewhere waits for it. Neither may
// hold up, or take what is needed by, any other call, however often it is repeated.
func TestCallsThatWait(t *testing.T) {
	w, a := started(t, "EVENTS_BATCH=50")
	a.Stock(t, 12)
	tx := w.Hold(t, `SELECT lock_priorities(); SELECT FROM goods WHERE id = 1 FOR UPDATE`)
	const moves, edits, others = 32, 8, 4
	begin := time.Now()
	var mu sync.Mutex
	took := map[string][]time.Duration{}
	harness.Together(moves+edits+others, func(i int) {
		for n := 0; time.Since(begin) < 8*time.Second; n++ {
			asked := time.Now()
			switch {
			case i < moves:
				refused(t, a, 8, "PATCH", calls[2].path, somePlace)
			case i < moves+edits:
				refused(t, a, 8, "PATCH", calls[1].path, someName)
				<-time.After(20 * time.Millisecond)
			case i%2 == 0:
				a.List(t, 10, 1)
			default:
				ok(t, a, "PATCH", "/goods/update"+target(2+n%11), someName)
			}
			if i >= moves+edits {
				mu.Lock()
				name := [2]string{"list", "update"}[i%2]
				took[name] = append(took[name], time.Since(asked))
				mu.Unlock()
			}
		}
	})
	for name, times := range took {
		slices.Sort(times)
		p90, slowest := times[len(times)*9/10], times[len(times)-1]
		t.Logf("%d calls of %s: p90 %v, slowest %v", len(times), name, p90, slowest)
		if p90 > 500*time.Millisecond || slowest > 2*time.Second {
			t.Errorf("%s: p90 %v, slowest %v while other calls wait for locks", name, p90, slowest)
		}
	}
	harness.Must(t, tx.Rollback())
	ok(t, a, "PATCH", calls[2].path, `{"newPriority":5}`)
	ok(t, a, "PATCH", calls[1].path, someName)
	w.Settled(t, 15*time.Second)
}
