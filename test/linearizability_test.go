package test

import (
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"goods/test/harness"
)

// item is a good of the model.
type item struct {
	id      int // 0: its create was not answered
	name    string
	removed bool
}

type place struct{ ID, Priority int }

// ask is a call of a client.
type ask struct {
	call        string
	id          int
	to          int    // of a move
	name        string // of a create or an update; a create's is its own
	first, last int    // of a list: the first position, and the last
}

// answer is what came of it.
type answer struct {
	status int // 0: none, so it may or may not have had its effect
	good   harness.Good
	places []place
	page   harness.ListReply
}

// window is the end of the list from the position skip+1 on: what stands before
// it is left alone. Its state is a []item.
type window struct {
	skip, removed int // goods before, and the removed ones among them
}

// from returns a porcupine model of what each call does to the list, and what
// it must answer.
func (m window) from(list []item) porcupine.Model {
	n := porcupine.NondeterministicModel{
		Init:  func() []any { return []any{list} },
		Equal: func(a, b any) bool { return slices.Equal(a.([]item), b.([]item)) },
		Step: func(state, input, output any) []any {
			list, q, r := state.([]item), input.(ask), output.(answer)
			if q.call == "list" {
				return m.seen(list, q, r.page)
			}
			next, expected := m.apply(list, q)
			switch {
			case r.status == 0:
				return []any{list, next}
			case expected.status != r.status:
				return nil
			case q.call == "create":
				expected.good.ID = r.good.ID
				next[len(next)-1].id = r.good.ID
			}
			if expected.good != r.good || !slices.Equal(expected.places, r.places) {
				return nil
			}
			return []any{next}
		},
	}
	return n.ToModel()
}

// describe shows a call in a line.
func describe(q ask, r answer) string {
	text := fmt.Sprintf("%s good %d", q.call, q.id)
	switch q.call {
	case "create":
		text = fmt.Sprintf("create %s: %d, good %d at %d", q.name, r.status, r.good.ID, r.good.Priority)
	case "update":
		text += fmt.Sprintf(" to %s: %d %s at %d", q.name, r.status, r.good.Name, r.good.Priority)
	case "move":
		text += fmt.Sprintf(" to %d: %d %v", q.to, r.status, r.places)
	case "remove":
		text += fmt.Sprintf(": %d", r.status)
	case "list":
		text = fmt.Sprintf("list %d to %d: %+v", q.first, q.last, r.page.Meta)
		for _, g := range r.page.Goods {
			text += fmt.Sprint(" ", item{g.ID, g.Name, g.Removed})
		}
	}
	return text
}

// apply returns the list after a write, and what that must answer.
func (m window) apply(list []item, q ask) ([]item, answer) {
	next := slices.Clone(list)
	if q.call == "create" {
		next = append(next, item{name: q.name})
		return next, answer{status: http.StatusCreated, good: m.good(next, len(list))}
	}
	at := slices.IndexFunc(list, func(i item) bool { return i.id == q.id })
	if list[at].removed {
		return next, answer{status: http.StatusNotFound}
	}
	r := answer{status: http.StatusOK}
	switch q.call {
	case "update":
		next[at].name = q.name
		r.good = m.good(next, at)
	case "remove":
		next[at].removed = true
	case "move":
		to := min(q.to-m.skip, len(list)) - 1
		next = slices.Insert(slices.Delete(next, at, at+1), to, list[at])
		for i := min(at, to); i <= max(at, to); i++ {
			r.places = append(r.places, place{next[i].id, m.skip + i + 1})
		}
	}
	return next, r
}

func (m window) good(list []item, at int) harness.Good {
	return harness.Good{ID: list[at].id, Name: list[at].name, Priority: m.skip + at + 1, Removed: list[at].removed}
}

// seen returns the list if a page shows it as it is, and with it the ids of
// goods whose create was not answered.
func (m window) seen(list []item, q ask, page harness.ListReply) []any {
	removed := m.removed
	for _, i := range list {
		if i.removed {
			removed++
		}
	}
	from, to := min(q.first-1-m.skip, len(list)), min(q.last-m.skip, len(list))
	if page.Meta.Total != m.skip+len(list) || page.Meta.Removed != removed || len(page.Goods) != to-from {
		return nil
	}
	next := slices.Clone(list)
	for i, g := range page.Goods {
		if at := &next[from+i]; at.id == 0 && at.name == g.Name {
			at.id = g.ID
		}
		if m.good(next, from+i) != g {
			return nil
		}
	}
	return []any{next}
}

// do sends one call. Only a replica that was killed may leave it unanswered.
func (q ask) do(t testing.TB, a *harness.App) (r answer) {
	call := map[string][3]string{
		"create": {"POST", create, fmt.Sprintf(`{"name":%q}`, q.name)},
		"update": {"PATCH", fmt.Sprintf("/goods/update?projectId=1&id=%d", q.id), fmt.Sprintf(`{"name":%q}`, q.name)},
		"move":   {"PATCH", fmt.Sprintf("/goods/reprioritize?projectId=1&id=%d", q.id), fmt.Sprintf(`{"newPriority":%d}`, q.to)},
		"remove": {"DELETE", fmt.Sprintf("/goods/remove?projectId=1&id=%d", q.id), ""},
		"list":   {"GET", fmt.Sprintf("/goods/list?offset=%d&limit=%d", q.first, q.last-q.first+1), ""},
	}[q.call]
	reply, err := a.Try(call[0], call[1], call[2])
	if err != nil {
		return r
	}
	r.status = reply.Status
	var into any = &r.good
	switch q.call {
	case "move":
		into = &struct{ Priorities *[]place }{&r.places}
	case "remove":
		into = &struct{}{}
	case "list":
		into = &r.page
	}
	if r.status == 200 || r.status == 201 {
		err = json.Unmarshal([]byte(reply.Body), into)
	}
	if err != nil || r.status != 200 && r.status != 201 && r.status != 404 {
		t.Errorf("%+v: got %d %s", q, reply.Status, reply.Body)
	}
	plain := func(g *harness.Good) { g.ProjectID, g.CreatedAt = 0, time.Time{} }
	plain(&r.good)
	for i := range r.page.Goods {
		plain(&r.page.Goods[i])
	}
	return r
}

// history is calls of several clients on two replicas, and what came of them.
type history struct {
	t        testing.TB
	w        *harness.World
	replicas [2]*harness.App
	names    [2]string // of their connections to Postgres
	started  int
	m        window
	rounds   int
	start    time.Time

	mu         sync.Mutex
	operations []porcupine.Operation
}

func newHistory(t testing.TB) *history {
	h := &history{t: t, w: harness.NewWorld(t), start: time.Now()}
	h.w.Unchecked = true // other tests do, and this one has no time for it
	h.w.Env["EVENTS_BATCH"], h.w.Env["LOG_LEVEL"] = "50", "info"
	return h
}

// run starts a replica.
func (h *history) run(replica int) {
	h.t.Helper()
	u, err := url.Parse(h.w.Env["POSTGRES_URL"])
	harness.Must(h.t, err)
	h.started++
	h.names[replica] = fmt.Sprint("replica-", h.started)
	values := u.Query()
	values.Set("application_name", h.names[replica])
	u.RawQuery = values.Encode()
	h.replicas[replica] = h.w.Start(h.t, "POSTGRES_URL="+u.String())
}

// begin starts both replicas, and gives them some goods.
func (h *history) begin() {
	h.t.Helper()
	h.run(0)
	h.run(1)
	h.replicas[0].Stock(h.t, 8)
}

func (h *history) do(client int, a *harness.App, q ask) answer {
	call := time.Since(h.start).Nanoseconds()
	r := q.do(h.t, a)
	o := porcupine.Operation{ClientId: client, Input: q, Call: call, Output: r, Return: time.Since(h.start).Nanoseconds()}
	if r.status == 0 {
		o.Return = math.MaxInt64
	}
	if r.status != 0 || q.call != "list" {
		h.mu.Lock()
		h.operations = append(h.operations, o)
		h.mu.Unlock()
	}
	return r
}

// round lets six clients call at once, about the last goods of the list, while
// during happens, and checks that some order of the calls explains all that
// they saw.
func (h *history) round(during func()) {
	t := h.t
	t.Helper()
	const clients, each, goods = 6, 5, 8
	all := ask{call: "list", first: h.m.skip + 1, last: h.m.skip + 1000}
	page := all.do(t, h.replicas[0]).page
	// Begin so that some of them can still be changed.
	begin, usable := len(page.Goods), 0
	for begin > 0 && (len(page.Goods)-begin < goods || usable < goods/2) {
		if begin--; !page.Goods[begin].Removed {
			usable++
		}
	}
	h.m = window{h.m.skip + begin, page.Meta.Removed}
	all.first = h.m.skip + 1
	var list []item
	for _, g := range page.Goods[begin:] {
		list = append(list, item{g.ID, g.Name, g.Removed})
		if g.Removed {
			h.m.removed--
		}
	}
	h.rounds++
	h.operations = nil
	var running sync.WaitGroup
	running.Go(during)
	for client := range clients {
		running.Go(func() {
			for n := range each {
				q := ask{id: list[rand.N(len(list))].id, name: fmt.Sprintf("%d-%d-%d", h.rounds, client, n)}
				q.to, q.first = all.first+rand.N(len(list)), all.first+rand.N(len(list))
				q.last = q.first + rand.N(10)
				switch dice := rand.N(20); {
				case dice < 10:
					q.call = "list"
				case dice < 14:
					q.call = "move"
				case dice < 17:
					q.call = "update"
				case dice < 19:
					q.call = "create"
				default:
					q.call = "remove"
				}
				if h.do(client, h.replicas[client%2], q).status == 0 {
					return // its replica is gone
				}
			}
		})
	}
	running.Wait()
	h.settle()
	h.do(clients, h.replicas[0], all)
	if result := porcupine.CheckOperationsTimeout(h.m.from(list), h.operations, 30*time.Second); result != porcupine.Ok {
		slices.SortFunc(h.operations, func(a, b porcupine.Operation) int { return int(a.Call - b.Call) })
		for _, o := range h.operations {
			t.Logf("client %d, %d to %d us: %v", o.ClientId, o.Call/1000, o.Return/1000, describe(o.Input.(ask), o.Output.(answer)))
		}
		t.Fatalf("round %d: linearizable: %s; from position %d on the list was %v", h.rounds, result, all.first, list)
	}
}

// settle waits until nothing that a killed replica began is still under way.
func (h *history) settle() {
	harness.Eventually(h.t, 10*time.Second, func() error {
		const gone = `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name NOT IN ($1, $2, '')`
		if n := harness.One[int](h.t, h.w, gone, h.names[0], h.names[1]); n > 0 {
			return fmt.Errorf("a killed replica still has %d connections", n)
		}
		return nil
	})
}

func TestLinearizability(t *testing.T) {
	t.Parallel()
	nothing := func() {}
	t.Run("at peace", func(t *testing.T) {
		t.Parallel()
		h := newHistory(t)
		h.begin()
		for range 150 {
			h.round(nothing)
		}
		h.w.Settled(t, 30*time.Second)
	})
	t.Run("Redis freezes and dies", func(t *testing.T) {
		t.Parallel()
		h := newHistory(t)
		p := h.w.NewProxy(t, "REDIS_URL")
		h.begin()
		for n := range 90 {
			resume := func() {}
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
			p.Pass()
		}
		h.w.Settled(t, 30*time.Second)
	})
	t.Run("a replica is killed", func(t *testing.T) {
		t.Parallel()
		h := newHistory(t)
		h.begin()
		for range 12 {
			h.round(func() {
				<-time.After(rand.N(40 * time.Millisecond))
				harness.Must(t, h.replicas[1].Process.Kill())
			})
			h.run(1)
			h.round(nothing)
		}
		h.w.Settled(t, 30*time.Second)
	})
}
