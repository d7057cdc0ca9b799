package test

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"goods/test/harness"
)

// send makes a call. Only a replica that was killed may leave it unanswered.
func (q ask) send(t testing.TB, a *harness.App) (r answer) {
	query := fmt.Sprintf("?id=%d&projectId=%d", q.id, q.project)
	var method, path, body string
	switch q.call {
	case "create":
		method, path = "POST", fmt.Sprint("/goods/create?projectId=", q.project)
		body = fmt.Sprintf(`{"name":%q}`, q.name)
	case "update":
		method, path, body = "PATCH", "/goods/update"+query, fmt.Sprintf(`{"name":%q}`, q.name)
	case "move":
		method, path, body = "PATCH", "/goods/reprioritize"+query, fmt.Sprintf(`{"newPriority":%d}`, q.to)
	case "remove":
		method, path = "DELETE", "/goods/remove"+query
	case "get":
		method, path = "GET", "/goods/get"+query
	case "list":
		method, path = "GET", fmt.Sprintf("/goods/list?offset=%d&limit=%d", q.first, q.last-q.first+1)
		if q.project != 0 {
			path += fmt.Sprint("&projectId=", q.project)
		}
	}
	var header []string
	if q.version != 0 {
		header = []string{ifMatch + fmt.Sprintf(`"%d"`, q.version)}
	}
	reply, _ := a.Try(method, path, body, header...) // status 0 after an error
	r.status = reply.Status
	var err error
	switch r.status {
	case 0, 404, 412:
		return r
	case 200, 201:
		err = json.Unmarshal([]byte(reply.Body), &r)
		r.version, _ = strconv.Atoi(strings.Trim(reply.Header.Get("ETag"), `"`)) // 0 without one
	default:
		err = errors.New("an unexpected status")
	}
	if err != nil {
		t.Errorf("%s %s %s: got %d %s, %v", method, path, body, r.status, reply.Body, err)
	}
	return r
}

// history is calls of several clients on two replicas, and what came of them.
type history struct {
	testing.TB
	w        *harness.World
	replicas [2]*harness.App
	clients  int
	each     int            // calls of a client
	calls    map[string]int // how often each is made, relative to the others

	mu         sync.Mutex // guards what follows
	operations []porcupine.Operation
	outcomes   map[string]int // how often each call got each status
}

var start = time.Now()

// call makes a call of a client, and notes it. An unanswered one never returns.
func (h *history) call(client int, q ask) answer {
	o := porcupine.Operation{
		ClientId: client,
		Input:    q,
		Call:     time.Since(start).Nanoseconds(),
		Return:   math.MaxInt64,
	}
	r := q.send(h, h.replicas[client%2])
	o.Output = r
	if r.status != 0 {
		o.Return = time.Since(start).Nanoseconds()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.outcomes[fmt.Sprint(q.call, " ", r.status)]++
	if r.status != 0 || !q.isRead() {
		h.operations = append(h.operations, o)
	}
	return r
}

// round lets the clients call at once, about new goods of two projects at the end of the list, while during
// happens, and checks that some order of the calls explains all that they saw. When during has returned, no
// more may come of unanswered calls.
func (h *history) round(during func()) {
	const goods = 8
	h.w.Exec(h, fmt.Sprintf(`
INSERT INTO goods (project_id, name)
SELECT 1 + n %% 2, n::text
FROM generate_series(1, %d) AS n`, goods))
	all := ask{call: "list", first: h.replicas[0].List(h, 1, 1).Meta.Total - goods + 1}
	all.last = all.first + 999
	end := all.send(h, h.replicas[0])
	before := map[int]count{0: {end.Meta.Total - goods, end.Meta.Removed}}
	for project := 1; project <= 2; project++ {
		meta := projectPage(h, h.replicas[0], project, 1, 1).Meta
		before[project] = count{meta.Total - goods/2, meta.Removed}
	}
	for i := range end.Goods {
		end.Goods[i].version = 1
	}
	h.operations = nil
	var running sync.WaitGroup
	running.Go(during)
	for client := range h.clients {
		running.Go(func() { h.run(client, end.Goods, before) })
	}
	running.Wait()
	h.call(h.clients, all)
	result := porcupine.CheckOperationsTimeout(modelOf(end.Goods, before), h.operations, 30*time.Second)
	if result != porcupine.Ok {
		slices.SortFunc(h.operations, func(a, b porcupine.Operation) int { return int(a.Call - b.Call) })
		for _, o := range h.operations {
			h.Logf("client %d, %d to %d us: %+v: %+v", o.ClientId, o.Call/1000, o.Return/1000, o.Input, o.Output)
		}
		h.Fatalf("linearizable: %s; the end of the list was %v", result, end.Goods)
	}
}

// run makes the calls of a client, until its replica is gone. It knows the goods at the end of the list, and
// those that it makes, with the versions that it has seen.
func (h *history) run(client int, end []item, before map[int]count) {
	var bag []string
	for _, call := range slices.Sorted(maps.Keys(h.calls)) {
		bag = append(bag, slices.Repeat([]string{call}, h.calls[call])...)
	}
	known := slices.Clone(end)
	for n := range h.each {
		good := &known[rand.N(len(known))]
		q := ask{call: bag[rand.N(len(bag))], project: good.ProjectID, id: good.ID}
		switch q.call {
		case "create":
			q.name = fmt.Sprintf("%d-%d", client, n)
			q.id = 0
		case "update":
			q.name = fmt.Sprintf("%d-%d", client, n)
		case "move":
			q.to = end[0].Priority + rand.N(len(end))
		case "list":
			q.id, q.project = 0, rand.N(3)
			q.first = before[q.project].goods + 1 + rand.N(len(end))
			q.last = q.first + rand.N(10)
		}
		if !q.isRead() && q.call != "create" && rand.N(2) == 0 {
			q.version = good.version
		}
		r := h.call(client, q)
		switch {
		case r.status == 0:
			return
		case q.call == "create":
			known = append(known, r.item)
		case r.version != 0:
			good.version = r.version
		}
	}
}

// mixed are all calls, most of them reads.
var mixed = map[string]int{"list": 8, "get": 4, "move": 5, "update": 5, "create": 2, "remove": 1}

func TestLinearizability(t *testing.T) {
	t.Parallel()
	for name, rounds := range map[string]func(h *history){
		"at peace": func(h *history) {
			h.replicas[1] = h.w.Start(h)
			for range 150 {
				h.round(func() {})
			}
		},
		"moves in batches": func(h *history) {
			h.replicas[1] = h.w.Start(h)
			h.clients, h.each = 12, 4
			h.calls = map[string]int{"move": 10, "list": 3, "get": 1, "update": 1, "create": 1, "remove": 1}
			for n := range 60 {
				h.round(func() {
					// Whoever needs these locks waits, and forms a batch with the others.
					tx := h.w.Hold(h, []string{
						`SELECT lock_priorities()`,
						`SELECT FROM goods ORDER BY priority DESC LIMIT 1 FOR UPDATE`,
						`SELECT FROM goods WHERE id > (SELECT max(id) - 3 FROM goods) ORDER BY id FOR UPDATE`,
					}[n%3])
					<-time.After(rand.N(20 * time.Millisecond))
					harness.Must(h, tx.Rollback())
				})
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
			const query = `
SELECT count(*)
FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'mortal'`
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
			h := &history{TB: t, w: harness.NewWorld(t), clients: 6, each: 5, calls: mixed}
			h.outcomes = map[string]int{}
			h.w.Unchecked = true // other tests look at replies
			h.w.Env["EVENTS_BATCH"], h.w.Env["LOG_LEVEL"] = "50", "info"
			h.replicas[0] = h.w.Start(t)
			h.w.Exec(t, `INSERT INTO campaigns (name) VALUES ('second')`)
			rounds(h)
			t.Log("calls and their statuses: ", h.outcomes)
			h.w.Settled(t, 30*time.Second)
		})
	}
}
