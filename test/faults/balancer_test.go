package faults

import (
	"bytes"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"goods/test/harness"
)

const turns = 5 // that a balancer sees each replica restarted

// rolledBehind restarts the replicas one after the other, while clients know only the balancer before them.
func rolledBehind(balancer string) func(*scene) {
	return func(s *scene) {
		seen := harness.StartBalancer(s, balancer, s.apps...)
		s.load.aim(seen)
		var clients sync.WaitGroup
		var ended atomic.Bool
		for range workers {
			clients.Go(func() {
				for !ended.Load() {
					s.load.call("GET", "list", "limit=1", "", &harness.ListReply{})
					s.last(pace / 8)
				}
			})
		}
		s.last(aWhile / 2)
		for range turns {
			for i, a := range s.apps {
				harness.Equal(s, a.Stop(), nil, "how the service ended")
				s.apps[i] = s.Start(s, "HTTP_ADDR="+a.Host())
				harness.Eventually(s, recoversWithin, s.apps[i].Ready)
				s.last(aWhile / 4)
			}
		}
		ended.Store(true)
		clients.Wait()
		s.load.aim(s.apps...)
	}
}

// TestBalancers checks what each balancer lets pass, refuses and repeats.
func TestBalancers(t *testing.T) {
	for _, b := range []struct {
		name    string
		repeats bool // a DELETE whose replica has gone
		checks  bool // whether a replica can serve
	}{
		{"nginx", true, false},
		{"haproxy", false, true},
	} {
		t.Run(b.name, func(t *testing.T) {
			w := harness.NewWorld(t)
			direct := w.Env["POSTGRES_URL"]
			proxy := w.NewProxy(t, "POSTGRES_URL")
			first := w.Start(t)
			w.Env["POSTGRES_URL"] = direct
			seen := harness.StartBalancer(t, b.name, first, w.Start(t))
			anonymous := *seen
			anonymous.URL = strings.Replace(seen.URL, "goods:secret@", "", 1)

			const create = "/goods/create?projectId=1"
			for _, c := range []struct {
				app                *harness.App
				method, path, body string
				header             []string
				status             int
			}{
				{seen, "GET", "/", "", nil, 200},
				{seen, "GET", "/openapi.yaml", "", nil, 200},
				{seen, "GET", "/metrics", "", nil, 404},
				{seen, "GET", "/readyz", "", nil, 404},
				{seen, "GET", "/goods/../metrics", "", nil, 404},
				{&anonymous, "GET", "/", "", nil, 401},
				{&anonymous, "POST", create, text("anonymous"), nil, 401},
				{seen, "POST", create, text("no browser"), nil, 201},
				{seen, "POST", create, text("our page"), []string{"Origin: " + anonymous.URL}, 201},
				{seen, "POST", create, text("another page"), []string{"Origin: https://example.com"}, 403},
				{seen, "POST", create, text(strings.Repeat("x", 10_000)), nil, 400},
				{seen, "POST", create, text(strings.Repeat("x", 200_000)), nil, 413},
			} {
				r := c.app.Call(t, c.method, c.path, c.body, c.header...)
				harness.Equal(t, r.Status, c.status, "status of %s %s %.30s %v", c.method, c.path, c.body, c.header)
			}
			if b.checks {
				leftOut(t, proxy, first, seen)
			}
			removedTwice(t, w, proxy, first, seen, b.repeats)
			tooOften(t, seen)
		})
	}
}

// tooOften asks as often as it can. Some requests are refused, and the limit passes all the time: also a
// client that does not pause gets answers.
func tooOften(t *testing.T, seen *harness.App) {
	passed, refused := 0, 0 // in the last second
	end := time.Now().Add(3 * time.Second)
	for time.Now().Before(end) {
		status := seen.Call(t, "GET", "/goods/list?limit=1", "").Status
		switch {
		case time.Until(end) > time.Second:
		case status == 429:
			refused++
		case status == 200:
			passed++
		}
	}
	if passed < 50 || refused == 0 {
		t.Errorf("a client that asks too often got %d answers and %d refusals a second", passed, refused)
	}
}

// leftOut has the first replica lose Postgres. The balancer then sends everything to the second.
func leftOut(t *testing.T, proxy *harness.Proxy, first, seen *harness.App) {
	proxy.Shut()
	state := func() int { return first.Call(t, "GET", "/readyz", "").Status }
	harness.AwaitEqual(t, 15*time.Second, state, 503, "/readyz without Postgres")
	harness.Eventually(t, 5*time.Second, func() error {
		for range 20 {
			if status := seen.Call(t, "GET", "/goods/list?limit=1", "").Status; status != 200 {
				return fmt.Errorf("got %d from a balancer with one good replica", status)
			}
		}
		return nil
	})
	proxy.Pass()
	harness.Eventually(t, 15*time.Second, first.Ready)
}

// removedTwice has the first replica remove a good, and end before it answers. A balancer that repeats the
// DELETE gets 404, as the good is removed.
func removedTwice(
	t *testing.T, w *harness.World, proxy *harness.Proxy, first, seen *harness.App, repeats bool,
) {
	proxy.Spoil(harness.Forward, func(to net.Conn, part []byte) error {
		if bytes.Contains(part, []byte("COMMIT\x00")) {
			return nil // is lost
		}
		return harness.Forward(to, part)
	})
	for {
		good := harness.One[int](t, w, `INSERT INTO goods (project_id, name) VALUES (1, 'removed') RETURNING id`)
		answer := make(chan int, 1)
		go func() {
			r, _ := seen.Try("DELETE", fmt.Sprintf("/goods/remove?id=%d&projectId=1", good), "")
			answer <- r.Status
		}()
		query := fmt.Sprintf(`SELECT removed FROM goods WHERE id = %d`, good)
		removed := func() bool { return harness.One[bool](t, w, query) }
		harness.AwaitEqual(t, 10*time.Second, removed, true, "removed")
		select {
		case <-answer: // of the second replica
			continue
		case <-time.After(time.Second):
		}
		harness.Must(t, first.Process.Kill())
		status := <-answer
		switch {
		case repeats:
			harness.Equal(t, status, 404, "status of a DELETE that was repeated")
		case status != 502 && status != unanswered: // unanswered, where the balancer passes the closing on
			t.Errorf("a DELETE whose replica ended after its COMMIT: got %d, want 502 or no answer", status)
		}
		return
	}
}
