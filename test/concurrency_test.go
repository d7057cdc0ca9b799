package test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"goods/test/harness"
)

// target is the query of a good in project 1.
func target(id int) string { return fmt.Sprintf("?id=%d&projectId=1", id) }

// count counts a success; the only other reply is that the good is removed.
func count(t testing.TB, n *atomic.Int64, r harness.Reply) {
	t.Helper()
	switch r.Status {
	case http.StatusOK:
		n.Add(1)
	case http.StatusNotFound:
	default:
		t.Errorf("got %d %s", r.Status, r.Body)
	}
}

func TestEverythingAtOnce(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	w.Env["EVENTS_BATCH"] = "50"
	replicas := []*harness.App{w.Start(t), w.Start(t)}
	const goods = 40
	replicas[0].Stock(t, goods)
	var places sync.Map // of the creates
	var created, moved, removed, updated atomic.Int64
	harness.Together(24, func(i int) {
		a := replicas[i/4%2]
		for n := range 15 {
			id := 1 + rand.IntN(goods)
			switch i % 4 {
			case 0:
				g := a.Create(t, fmt.Sprintf("new %d-%d", i, n))
				if _, repeated := places.LoadOrStore(g.Priority, true); repeated {
					t.Errorf("priority %d was given twice", g.Priority)
				}
				created.Add(1)
			case 1:
				count(t, &moved, a.Call(t, "PATCH", "/goods/reprioritize"+target(id), fmt.Sprintf(`{"newPriority":%d}`, 1+rand.IntN(2*goods))))
			case 2:
				count(t, &updated, a.Call(t, "PATCH", "/goods/update"+target(id), someName))
			case 3:
				if n%4 == 0 { // leave some for the others
					count(t, &removed, a.Call(t, "DELETE", "/goods/remove"+target(id), ""))
				}
			}
			if l := a.List(t, 1000, 1); len(l.Goods) != l.Meta.Total || l.Meta.Total < goods {
				t.Errorf("a list has %d goods of %+v", len(l.Goods), l.Meta)
			}
		}
	})
	if got, want := harness.One[int64](t, w, `SELECT count(*) FROM goods`), goods+created.Load(); got != want {
		t.Errorf("got %d goods, want %d", got, want)
	}
	if got := harness.One[int64](t, w, `SELECT count(*) FROM goods WHERE removed`); got != removed.Load() {
		t.Errorf("got %d removed goods, want %d", got, removed.Load())
	}
	w.Settled(t, 30*time.Second)
}

// No update of a good gets lost, and a good is removed once.
func TestWritesOfOneGood(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	replicas := []*harness.App{w.Start(t), w.Start(t)}
	const clients, each, goods = 32, 4, 10
	replicas[0].Stock(t, goods)
	harness.Together(clients, func(i int) {
		for n := range each {
			name := fmt.Sprintf("%d-%d", i, n)
			g := harness.Want[harness.Good](t, replicas[i%2], 200, "PATCH", "/goods/update"+target(1), fmt.Sprintf(`{"name":%q}`, name))
			if g.Name != name {
				t.Errorf("got %q, want one's own update %q", g.Name, name)
			}
		}
	})
	if got := harness.One[int](t, w, `SELECT version FROM goods WHERE id = 1`); got != 1+clients*each {
		t.Errorf("got version %d, want %d", got, 1+clients*each)
	}
	for id := 1; id <= goods; id++ {
		var removed atomic.Int64
		harness.Together(8, func(i int) { count(t, &removed, replicas[i%2].Call(t, "DELETE", "/goods/remove"+target(id), "")) })
		if removed.Load() != 1 {
			t.Errorf("good %d was removed %d times", id, removed.Load())
		}
	}
	w.Settled(t, 15*time.Second)
}

// A move renumbers at most 50,000 goods within a request's time, and says so
// of a longer one.
func TestLongMove(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	w.Env["EVENTS_BATCH"] = "1000"
	a := w.Start(t)
	const most = 50_000
	w.Exec(t, fmt.Sprintf(`INSERT INTO goods (project_id, name) SELECT 1, n::text FROM generate_series(1, %d) AS n`, most+2))
	f := refused(t, a, 400, 2, "errors.request.invalid", "PATCH", "/goods/reprioritize"+target(most+2), somePlace)
	if !strings.Contains(f.Details["newPriority"], fmt.Sprint(most)) {
		t.Errorf("got details %v, want the limit for newPriority", f.Details)
	}
	moved := harness.Want[struct{ Priorities []place }](t, a, 200, "PATCH", "/goods/reprioritize"+target(most+1), somePlace).Priorities
	if len(moved) != most+1 || moved[0] != (place{most + 1, 1}) || moved[1] != (place{1, 2}) || moved[most] != (place{most, most + 1}) {
		t.Errorf("got %d places, from %v to %v", len(moved), moved[:2], moved[len(moved)-1])
	}
	if got := a.List(t, 2, most+1).Goods; got[0].ID != most || got[1].ID != most+2 {
		t.Errorf("the list ends with %+v", got)
	}
}

// Moves wait for each other, and must not take what the other calls need.
func TestMovesThatWait(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	a := w.Start(t)
	a.Stock(t, 5)
	tx := w.Hold(t, `SELECT lock_priorities()`)
	var waiting atomic.Int64
	var moves sync.WaitGroup
	for range 64 {
		waiting.Add(1)
		moves.Go(func() {
			refused(t, a, 503, 8, "errors.service.unavailable", "PATCH", "/goods/reprioritize"+target(1), `{"newPriority":5}`)
			waiting.Add(-1)
		})
	}
	served := 0
	for ; waiting.Load() == 64; served++ {
		a.List(t, 10, 1)
		harness.Want[harness.Good](t, a, 200, "PATCH", "/goods/update"+target(2), someName)
	}
	moves.Wait()
	if served < 20 {
		t.Errorf("%d lists and updates were served while moves waited for seconds", served)
	}
	harness.Must(t, tx.Rollback())
	harness.Want[json.RawMessage](t, a, 200, "PATCH", "/goods/reprioritize"+target(1), `{"newPriority":5}`)
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
			id := 1 + i%12
			status := http.StatusOK
			if id == 1 {
				status = http.StatusServiceUnavailable
			}
			harness.Want[json.RawMessage](t, a, status, "PATCH", "/goods/update"+target(id), someName)
		}
	})
	harness.Must(t, tx.Rollback())
	harness.Want[harness.Good](t, a, 200, "PATCH", "/goods/update"+target(1), someName)
	w.Settled(t, 15*time.Second)
}

// Requests sent one after the other, without waiting for replies, are served
// in that order, whatever else travels with them.
func TestOrderOnOneConnection(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	a := w.Start(t)
	a.Stock(t, 4)
	const clients, each = 8, 20
	harness.Together(clients, func(i int) {
		conn, err := net.Dial("tcp", strings.TrimPrefix(a.URL, "http://"))
		harness.Must(t, err)
		defer conn.Close()
		var all strings.Builder
		for n := range each {
			body := fmt.Sprintf(`{"name":"%d-%d"}`, i, n)
			fmt.Fprintf(&all, "PATCH /goods/update%s HTTP/1.1\r\nHost: goods\r\nContent-Length: %d\r\n\r\n%s", target(1+i%4), len(body), body)
			fmt.Fprint(&all, "GET /goods/list HTTP/1.1\r\nHost: goods\r\n\r\n")
		}
		fmt.Fprint(&all, "GET /healthz HTTP/1.1\r\nHost: goods\r\nConnection: close\r\n\r\n")
		_, err = io.WriteString(conn, all.String())
		harness.Must(t, err)
		harness.Must(t, conn.SetReadDeadline(time.Now().Add(30*time.Second)))
		replies, err := io.ReadAll(conn)
		harness.Must(t, err)
		last := -1
		for n := range each {
			own := bytes.Index(replies, fmt.Appendf(nil, "\n"+`{"id":%d,"projectId":1,"name":"%d-%d"`, 1+i%4, i, n))
			if own <= last {
				t.Errorf("client %d: the reply to update %d is missing, or not in its turn", i, n)
			}
			last = own
		}
	})
	w.Settled(t, 15*time.Second)
	rows, err := w.ClickHouse.Query(t.Context(), `SELECT Name FROM goods_log FINAL WHERE Version > 1 ORDER BY Id, Version`)
	harness.Must(t, err)
	defer rows.Close()
	next := map[int]int{}
	for rows.Next() {
		var name string
		var i, n int
		harness.Must(t, rows.Scan(&name))
		_, err := fmt.Sscanf(name, "%d-%d", &i, &n)
		harness.Must(t, err)
		if n != next[i] {
			t.Fatalf("client %d: its update %d was written when %d was due", i, n, next[i])
		}
		next[i]++
	}
	harness.Must(t, rows.Err())
}
