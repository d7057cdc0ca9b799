package test

import (
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"net/url"
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

// answer is what came of it.
type answer struct {
	status int // 0: none, so it may or may not have had its effect
	good   harness.Good
	places []place
	page   harness.ListReply
	text   string // the whole of it, and the call, for people
}

type place struct{ ID, Priority int }

// item is a good of the model.
type item struct {
	id      int // 0: its create was not answered
	name    string
	removed bool
}

// window is the end of the list from the position skip+1 on: what comes before it is left alone. Its state is a
// []item.
type window struct {
	skip, removed int // goods before it, and the removed ones among them
}

// model says what each call does to the list, and what it must answer.
func (w window) model(list []item) porcupine.Model {
	m := porcupine.NondeterministicModel{
		Init:  func() []any { return []any{list} },
		Equal: func(a, b any) bool { return slices.Equal(a.([]item), b.([]item)) },
		Step: func(state, input, output any) []any {
			list, q, r := state.([]item), input.(ask), output.(answer)
			if q.call == "list" {
				return w.see(list, q, r.page)
			}
			next, want := w.apply(list, q)
			if r.status == 0 {
				return []any{list, next}
			}
			if q.call == "create" {
				want.good.ID, next[len(next)-1].id = r.good.ID, r.good.ID
			}
			if want.status != r.status || want.good != r.good || !slices.Equal(want.places, r.places) {
				return nil
			}
			return []any{next}
		},
	}
	return m.ToModel()
}

// apply returns the list after a write, and what that must answer.
func (w window) apply(list []item, q ask) (next []item, r answer) {
	next = slices.Clone(list)
	at := slices.IndexFunc(list, func(i item) bool { return i.id == q.id })
	switch {
	case q.call == "create":
		next = append(next, item{name: q.name})
		return next, answer{status: 201, good: w.good(next, len(list))}
	case list[at].removed:
		return next, answer{status: 404}
	case q.call == "update":
		next[at].name = q.name
		r.good = w.good(next, at)
	case q.call == "remove":
		next[at].removed = true
	case q.call == "move":
		to := min(q.to-w.skip, len(list)) - 1
		next = slices.Insert(slices.Delete(next, at, at+1), to, list[at])
		for i := min(at, to); i <= max(at, to); i++ {
			r.places = append(r.places, place{next[i].id, w.skip + i + 1})
		}
	}
	r.status = 200
	return next, r
}

func (w window) good(list []item, at int) harness.Good {
	return harness.Good{ID: list[at].id, Name: list[at].name, Priority: w.skip + at + 1, Removed: list[at].removed}
}

// see returns the list if a page shows it as it is, and with it the ids of goods whose create was not answered.
func (w window) see(list []item, q ask, page harness.ListReply) []any {
	removed := w.removed
	for _, i := range list {
		if i.removed {
			removed++
		}
	}
	from, to := min(q.first-1-w.skip, len(list)), min(q.last-w.skip, len(list))
	if page.Meta.Total != w.skip+len(list) || page.Meta.Removed != removed || len(page.Goods) != to-from {
		return nil
	}
	next := slices.Clone(list)
	for i, g := range page.Goods {
		if at := &next[from+i]; at.id == 0 && at.name == g.Name {
			at.id = g.ID
		}
		if w.good(next, from+i) != g {
			return nil
		}
	}
	return []any{next}
}

// send makes a call. Only a replica that was killed may leave it unanswered.
func (q ask) send(t testing.TB, a *harness.App) (r answer) {
	var into any = &r.good
	method, path, body := "PATCH", "/goods/update"+target(q.id), fmt.Sprintf(`{"name":%q}`, q.name)
	switch q.call {
	case "create":
		method, path = "POST", create
	case "move":
		path, body, into = "/goods/reprioritize"+target(q.id), fmt.Sprintf(`{"newPriority":%d}`, q.to), &struct{ Priorities *[]place }{&r.places}
	case "remove":
		method, path, body, into = "DELETE", "/goods/remove"+target(q.id), "", &struct{}{}
	case "list":
		method, path, body, into = "GET", fmt.Sprintf("/goods/list?offset=%d&limit=%d", q.first, q.last-q.first+1), "", &r.page
	}
	reply, err := a.Try(method, path, body)
	r.status, r.text = reply.Status, fmt.Sprintf("%s %s %s: %d %s", method, path, body, reply.Status, reply.Body)
	if err == nil && reply.Status < 300 {
		err = json.Unmarshal([]byte(reply.Body), into)
	}
	if reply.Status != 0 && (err != nil || reply.Status >= 300 && reply.Status != 404) {
		t.Errorf("%s: %v", r.text, err)
	}
	r.good.ProjectID, r.good.CreatedAt = 0, time.Time{}
	for i := range r.page.Goods {
		r.page.Goods[i].ProjectID, r.page.Goods[i].CreatedAt = 0, time.Time{}
	}
	return r
}

// history is calls of several clients on two replicas, and what came of them.
type history struct {
	testing.TB
	w        *harness.World
	replicas [2]*harness.App
	names    [2]string // of their connections to Postgres
	started  int
	window   window
	rounds   int

	mu         sync.Mutex
	operations []porcupine.Operation
}

func newHistory(t testing.TB) *history {
	h := &history{TB: t, w: harness.NewWorld(t)}
	h.w.Unchecked = true // other tests look at replies
	h.w.Env["EVENTS_BATCH"], h.w.Env["LOG_LEVEL"] = "50", "info"
	h.run(0)
	h.replicas[0].Stock(t, 8)
	return h
}

// run starts a replica.
func (h *history) run(replica int) {
	h.Helper()
	u, err := url.Parse(h.w.Env["POSTGRES_URL"])
	harness.Must(h, err)
	h.started++
	h.names[replica] = fmt.Sprint("replica-", h.started)
	values := u.Query()
	values.Set("application_name", h.names[replica])
	u.RawQuery = values.Encode()
	h.replicas[replica] = h.w.Start(h, "POSTGRES_URL="+u.String())
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

// round lets six clients call at once, about the last goods of the list, while during happens, and checks that some
// order of the calls explains all that they saw.
func (h *history) round(during func()) {
	h.Helper()
	const clients, each, goods = 6, 5, 8
	all := ask{call: "list", first: h.window.skip + 1, last: h.window.skip + 1000}
	page := all.send(h, h.replicas[0]).page
	begin, usable := len(page.Goods), 0
	for begin > 0 && (len(page.Goods)-begin < goods || usable < goods/2) {
		if begin--; !page.Goods[begin].Removed {
			usable++
		}
	}
	h.window = window{h.window.skip + begin, page.Meta.Removed}
	all.first = h.window.skip + 1
	var list []item
	for _, g := range page.Goods[begin:] {
		list = append(list, item{g.ID, g.Name, g.Removed})
		if g.Removed {
			h.window.removed--
		}
	}
	h.rounds++
	h.operations = nil
	var running sync.WaitGroup
	running.Go(during)
	for client := range clients {
		running.Go(func() {
			for n, answered := 0, true; n < each && answered; n++ {
				q := ask{call: "list", id: list[rand.N(len(list))].id, name: fmt.Sprintf("%d-%d-%d", h.rounds, client, n)}
				q.to, q.first = all.first+rand.N(len(list)), all.first+rand.N(len(list))
				q.last = q.first + rand.N(10)
				if dice := rand.N(20); dice < 10 {
					q.call = []string{"move", "move", "move", "move", "update", "update", "update", "create", "create", "remove"}[dice]
				}
				answered = h.call(client, q) // else its replica is gone
			}
		})
	}
	running.Wait()
	// Nothing that a killed replica began may still be under way.
	harness.Eventually(h, 10*time.Second, func() error {
		const gone = `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name NOT IN ($1, $2, '')`
		if n := harness.One[int](h, h.w, gone, h.names[0], h.names[1]); n > 0 {
			return fmt.Errorf("a killed replica still has %d connections", n)
		}
		return nil
	})
	h.call(clients, all)
	if result := porcupine.CheckOperationsTimeout(h.window.model(list), h.operations, 30*time.Second); result != porcupine.Ok {
		slices.SortFunc(h.operations, func(a, b porcupine.Operation) int { return int(a.Call - b.Call) })
		for _, o := range h.operations {
			h.Logf("client %d, %d to %d us: %s", o.ClientId, o.Call/1000, o.Return/1000, o.Output.(answer).text)
		}
		h.Fatalf("round %d: linearizable: %s; from position %d on the list was %v", h.rounds, result, all.first, list)
	}
}

func TestLinearizability(t *testing.T) {
	t.Parallel()
	nothing := func() {}
	t.Run("at peace", func(t *testing.T) {
		t.Parallel()
		h := newHistory(t)
		h.run(1)
		for range 150 {
			h.round(nothing)
		}
		h.w.Settled(t, 30*time.Second)
	})
	t.Run("one replica's Redis freezes and dies", func(t *testing.T) {
		t.Parallel()
		h := newHistory(t)
		p := h.w.NewProxy(t, "REDIS_URL")
		h.run(1)
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
		h.w.Settled(t, 30*time.Second)
	})
	t.Run("a replica is killed", func(t *testing.T) {
		t.Parallel()
		h := newHistory(t)
		for range 12 {
			h.run(1)
			h.round(func() {
				<-time.After(rand.N(40 * time.Millisecond))
				harness.Must(t, h.replicas[1].Process.Kill())
			})
			h.names[1] = ""
		}
		h.w.Settled(t, 30*time.Second)
	})
}
