package test

import (
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"goods/test/harness"
)

// ask is a call of a client.
type ask struct {
	call        string
	id          int
	to          int    // of a move
	name        string // of a create or an update; nothing else has it
	first, last int    // of a list: positions
}

// answer is what came of it. Its exported fields are the JSON of every reply.
type answer struct {
	status int // 0: none, so it may or may not have had its effect
	item
	Priorities []place
	Meta       struct{ Total, Removed int }
	Goods      []item
}

type place struct{ ID, Priority int }

// item is a good, and one of the model's list.
type item struct {
	ID       int // 0: its create was not answered
	Name     string
	Priority int
	Removed  bool
}

// modelOf says what each call does to the end of the list, and what it must answer. What comes before, with
// so many removed goods, is left alone. A state is a []item. A call without an answer may come after all
// others, as if it had no effect.
func modelOf(end []item, removedBefore int) porcupine.Model {
	return porcupine.Model{
		Init:  func() any { return end },
		Equal: func(a, b any) bool { return slices.Equal(a.([]item), b.([]item)) },
		Step: func(state, input, output any) (bool, any) {
			list, q, r := state.([]item), input.(ask), output.(answer)
			if q.call == "list" {
				return see(list, removedBefore, q, r)
			}
			next, want := apply(list, q)
			if q.call == "create" {
				want.ID, next[len(next)-1].ID = r.ID, r.ID
			}
			right := want.status == r.status && want.item == r.item && slices.Equal(want.Priorities, r.Priorities)
			return right || r.status == 0, next
		},
	}
}

// apply returns the list after a write, and what that must answer.
func apply(list []item, q ask) (next []item, want answer) {
	next, want.status = slices.Clone(list), 200
	first := list[0].Priority
	at := slices.IndexFunc(list, func(i item) bool { return i.ID == q.id })
	switch {
	case q.call == "create":
		want.status, want.item = 201, item{Name: q.name, Priority: first + len(list)}
		next = append(next, want.item)
	case list[at].Removed:
		want.status = 404
	case q.call == "update":
		next[at].Name = q.name
		want.item = next[at]
	case q.call == "remove":
		next[at].Removed = true
		want.item = item{ID: q.id, Removed: true}
	case q.call == "move":
		to := min(q.to-first, len(list)-1)
		next = slices.Insert(slices.Delete(next, at, at+1), to, list[at])
		for i := min(at, to); i <= max(at, to); i++ {
			next[i].Priority = first + i
			want.Priorities = append(want.Priorities, place{next[i].ID, first + i})
		}
	}
	return next, want
}

// see tells whether a page shows the list as it is. It returns the list, with the ids of goods whose create
// was not answered.
func see(list []item, removed int, q ask, page answer) (bool, []item) {
	for _, i := range list {
		if i.Removed {
			removed++
		}
	}
	before := list[0].Priority - 1
	from, to := min(q.first-1-before, len(list)), min(q.last-before, len(list))
	if page.Meta.Total != before+len(list) || page.Meta.Removed != removed || len(page.Goods) != to-from {
		return false, nil
	}
	next := slices.Clone(list)
	for i := range page.Goods {
		if at := &next[from+i]; at.ID == 0 {
			at.ID = page.Goods[i].ID
		}
	}
	return slices.Equal(next[from:to], page.Goods), next
}

// send makes a call. Only a replica that was killed may leave it unanswered.
func (q ask) send(t testing.TB, a *harness.App) (r answer) {
	method, path, body := "PATCH", "/goods/update"+target(q.id), fmt.Sprintf(`{"name":%q}`, q.name)
	switch q.call {
	case "create":
		method, path = "POST", create
	case "move":
		path, body = "/goods/reprioritize"+target(q.id), fmt.Sprintf(`{"newPriority":%d}`, q.to)
	case "remove":
		method, path, body = "DELETE", "/goods/remove"+target(q.id), ""
	case "list":
		method, path, body = "GET", fmt.Sprintf("/goods/list?offset=%d&limit=%d", q.first, q.last-q.first+1), ""
	}
	reply, err := a.Try(method, path, body)
	r.status = reply.Status
	if err == nil && r.status != 404 {
		err = json.Unmarshal([]byte(reply.Body), &r)
	}
	if r.status != 0 && (err != nil || r.status > 201 && r.status != 404) {
		t.Errorf("%s %s %s: got %d %s, %v", method, path, body, r.status, reply.Body, err)
	}
	return r
}

// history is calls of several clients on two replicas, and what came of them.
type history struct {
	testing.TB
	w        *harness.World
	replicas [2]*harness.App

	mu         sync.Mutex
	operations []porcupine.Operation
}

var start = time.Now()

// call notes a call of a client. An unanswered one never returns.
func (h *history) call(client int, q ask) (answered bool) {
	o := porcupine.Operation{ClientId: client, Input: q, Call: time.Since(start).Nanoseconds(), Return: math.MaxInt64}
	r := q.send(h, h.replicas[client%2])
	if o.Output = r; r.status != 0 {
		o.Return = time.Since(start).Nanoseconds()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if r.status != 0 || q.call != "list" {
		h.operations = append(h.operations, o)
	}
	return r.status != 0
}

// round lets six clients call at once, about new goods at the end of the list, while during happens, and
// checks that some order of the calls explains all that they saw. When during has returned, no more may
// come of unanswered calls.
func (h *history) round(during func()) {
	const clients, each, goods = 6, 5, 8
	makeGoods(h, h.w, goods)
	end := ask{call: "list", first: h.replicas[0].List(h, 1, 1).Meta.Total - goods + 1}
	end.last = end.first + 999
	before := end.send(h, h.replicas[0])
	h.operations = nil
	var running sync.WaitGroup
	running.Go(during)
	for client := range clients {
		running.Go(func() {
			for n, answered := 0, true; n < each && answered; n++ {
				q := ask{call: "list", id: before.Goods[rand.N(goods)].ID, name: fmt.Sprintf("%d-%d", client, n)}
				q.to, q.first = end.first+rand.N(goods), end.first+rand.N(goods)
				q.last = q.first + rand.N(10)
				if dice := rand.N(20); dice < 10 {
					q.call = []string{"move", "move", "move", "move", "update", "update", "update", "create", "create", "remove"}[dice]
				}
				answered = h.call(client, q) // else its replica is gone
			}
		})
	}
	running.Wait()
	h.call(clients, end)
	result := porcupine.CheckOperationsTimeout(modelOf(before.Goods, before.Meta.Removed), h.operations, 30*time.Second)
	if result != porcupine.Ok {
		slices.SortFunc(h.operations, func(a, b porcupine.Operation) int { return int(a.Call - b.Call) })
		for _, o := range h.operations {
			h.Logf("client %d, %d to %d us: %+v: %+v", o.ClientId, o.Call/1000, o.Return/1000, o.Input, o.Output)
		}
		h.Fatalf("linearizable: %s; the end of the list was %v", result, before.Goods)
	}
}

func TestLinearizability(t *testing.T) {
	t.Parallel()
	for name, rounds := range map[string]func(h *history){
		"at peace": func(h *history) {
			h.replicas[1] = h.w.Start(h)
			for range 150 {
				h.round(func() {})
			}
		},
		"one replica's Redis freezes and dies": func(h *history) {
			p := h.w.NewProxy(h, "REDIS_URL")
			h.replicas[1] = h.w.Start(h)
			for n := range 90 {
				resume := p.Pass
				h.round(func() {
					<-time.After(rand.N(10 * time.Millisecond))
					switch n % 3 {
					case 0:
						resume = p.Freeze()
					case 1:
						p.Shut()
					}
				})
				resume()
			}
		},
		"a replica is killed": func(h *history) {
			const query = `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'mortal'`
			connections := func() int { return harness.One[int](h, h.w, query) }
			for range 12 {
				h.replicas[1] = h.w.Start(h, "PGAPPNAME=mortal")
				h.round(func() {
					<-time.After(rand.N(40 * time.Millisecond))
					harness.Must(h, h.replicas[1].Process.Kill())
					harness.AwaitEqual(h, 10*time.Second, connections, 0, "connections of the killed replica")
				})
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := &history{TB: t, w: harness.NewWorld(t)}
			h.w.Unchecked = true // other tests look at replies
			h.w.Env["EVENTS_BATCH"], h.w.Env["LOG_LEVEL"] = "50", "info"
			h.replicas[0] = h.w.Start(t)
			rounds(h)
			h.w.Settled(t, 30*time.Second)
		})
	}
}
