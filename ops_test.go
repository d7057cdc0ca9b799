package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"
)

// door stands before a server: it can be shut, or frozen.
type door struct {
	listener net.Listener
	mu       sync.Mutex
	passing  sync.Cond
	frozen   bool
	shut     bool
	conns    []net.Conn
}

// newDoor puts a door before the server that a variable of w names.
func (w *world) newDoor(t testing.TB, variable string) *door {
	t.Helper()
	u, err := url.Parse(w.env[variable])
	must(t, err)
	server := u.Host
	g := &door{}
	g.passing.L = &g.mu
	g.listener, err = net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	u.Host = g.listener.Addr().String()
	w.env[variable] = u.String()
	t.Cleanup(func() {
		g.listener.Close()
		g.set("shut")
	})
	go func() {
		for {
			client, err := g.listener.Accept()
			if err != nil {
				return
			}
			upstream, err := net.Dial("tcp", server)
			if err != nil {
				client.Close()
				continue
			}
			g.mu.Lock()
			g.conns = append(g.conns, client, upstream)
			if g.shut {
				client.Close()
				upstream.Close()
			}
			g.mu.Unlock()
			go g.copy(client, upstream)
			go g.copy(upstream, client)
		}
	}()
	return g
}

func (g *door) copy(to, from net.Conn) {
	defer to.Close()
	defer from.Close()
	for b := make([]byte, 32<<10); ; {
		n, err := from.Read(b)
		g.mu.Lock()
		for g.frozen {
			g.passing.Wait()
		}
		g.mu.Unlock()
		if err != nil {
			return
		}
		if _, err := to.Write(b[:n]); err != nil {
			return
		}
	}
}

// set makes the door open, shut (which cuts its connections) or frozen.
func (g *door) set(state string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.frozen, g.shut = state == "frozen", state == "shut"
	g.passing.Broadcast()
	if g.shut {
		for _, c := range g.conns {
			c.Close()
		}
		g.conns = nil
	}
}

// lines returns the log's lines with this message.
func (l *logBuffer) lines(message string) []map[string]any {
	var found []map[string]any
	for line := range strings.Lines(l.String()) {
		var entry map[string]any
		if json.Unmarshal([]byte(line), &entry) == nil && entry["msg"] == message {
			found = append(found, entry)
		}
	}
	return found
}

var fourServers = map[string]string{"postgres": "POSTGRES_URL", "redis": "REDIS_URL", "nats": "NATS_URL", "clickhouse": "CLICKHOUSE_URL"}

// A server that goes and comes back is one line each, whatever is tried
// meanwhile, and readyz tells it; a scrape never waits for it.
func TestDependencyComesAndGoes(t *testing.T) {
	t.Parallel()
	for name, variable := range fourServers {
		for _, how := range []string{"shut", "frozen"} {
			t.Run(name+" "+how, func(t *testing.T) {
				t.Parallel()
				w := newWorld(t)
				g := w.newDoor(t, variable)
				a := w.start(t, "LOG_LEVEL=info")
				a.create(t, "first")
				ready := func(want string, status int) {
					t.Helper()
					eventually(t, 15*time.Second, func() error {
						r := a.call(t, "GET", "/readyz", "")
						var states map[string]string
						must(t, json.Unmarshal([]byte(r.body), &states))
						for server, state := range states {
							if server == name && state != want || server != name && state != "up" || r.status != status {
								return fmt.Errorf("got %d %s, want %s %s", r.status, r.body, name, want)
							}
						}
						return nil
					})
				}
				ready("up", 200)
				g.set(how)
				status := map[bool]int{true: 503, false: 200}[name == "postgres"]
				ready("down", status)
				for range 3 {
					start := time.Now()
					a.call(t, "GET", "/metrics", "")
					a.call(t, "GET", "/readyz", "")
					want[json.RawMessage](t, a, 200, "GET", "/healthz", "")
					if took := time.Since(start); took > time.Second {
						t.Errorf("a scrape and two checks took %v", took)
					}
				}
				want[json.RawMessage](t, a, map[int]int{200: 201, 503: 503}[status], "POST", "/goods/create?projectId=1", `{"name":"x"}`)
				want[json.RawMessage](t, a, status, "GET", "/goods/list", "")
				g.set("open")
				ready("up", 200)
				a.create(t, "last")
				w.settled(t, 60*time.Second)
				ready("up", 200)
				must(t, a.stop())
				down, up := a.log.lines("dependency is down"), a.log.lines("dependency is up again")
				if len(down) != 1 || down[0]["name"] != name || down[0]["level"] != "WARN" || down[0]["err"] == "" || len(up) != 1 || up[0]["name"] != name {
					t.Errorf("got lines %v and %v, want one each, for %s", down, up, name)
				}
			})
		}
	}
}

func TestLogOfHealthyService(t *testing.T) {
	for _, level := range []string{"info", "debug"} {
		w := newWorld(t)
		a := w.start(t, "LOG_LEVEL="+level)
		start := len(a.log.lines("listening"))
		for range 20 {
			a.create(t, "x")
			a.list(t, 10, 1)
			a.call(t, "DELETE", "/goods/remove?id=0", "")
			a.call(t, "GET", "/nowhere", "")
		}
		w.settled(t, 10*time.Second)
		must(t, a.stop())
		requests := a.log.lines("request")
		if want := map[string]int{"info": 0, "debug": 80}[level]; len(requests) != want || start != 1 {
			t.Errorf("level %s: got %d lines for 80 requests, want %d", level, len(requests), want)
		}
		for line := range strings.Lines(a.log.String()) {
			var entry struct{ Level, Msg, File string }
			if err := json.Unmarshal([]byte(line), &entry); err != nil {
				t.Fatalf("%v: %s", err, line)
			}
			routine := entry.Msg == "migration applied" || entry.Msg == "listening" || entry.Msg == "shutting down"
			if entry.Level != "DEBUG" && (!routine || entry.Level != "INFO") {
				t.Errorf("level %s: got %s", level, line)
			}
		}
	}
}

func TestRequestID(t *testing.T) {
	w := newWorld(t)
	a := w.start(t)
	given := []string{"abc-123", strings.Repeat("x", 128), `{"a":"b"}`, "", strings.Repeat("x", 129), "two words", "tab\there", "é"}
	for i, id := range given {
		r, err := http.NewRequest("GET", a.url+"/goods/list?limit=0", nil)
		must(t, err)
		r.Header["X-Request-Id"] = []string{id}
		response, err := client.Do(r)
		must(t, err)
		response.Body.Close()
		got := response.Header.Get("X-Request-Id")
		if kept := i < 3; kept != (got == id) || len(got) < 7 {
			t.Errorf("X-Request-Id %q: got %q, want it kept: %v", id, got, kept)
		}
		eventually(t, time.Second, func() error {
			if lines := a.log.lines("request"); len(lines) != i+1 || lines[i]["id"] != got || lines[i]["status"] != 400.0 || lines[i]["path"] != "/goods/list" || lines[i]["method"] != "GET" {
				return fmt.Errorf("got lines %v, want the last with id %s", lines, got)
			}
			return nil
		})
	}
	for _, path := range []string{"/healthz", "/readyz", "/metrics", "/openapi.yaml", "/nowhere"} {
		if a.call(t, "GET", path, "").header.Get("X-Request-Id") == "" {
			t.Errorf("%s: got no X-Request-Id", path)
		}
	}
}

// The passwords here are right or not needed or wrong; none is ever logged,
// nor what clients send as names.
func TestNoSecretsInLog(t *testing.T) {
	const secret = "s3cret"
	w := newWorld(t)
	role := strings.ReplaceAll(w.namespace, "-", "_")
	must(t, errorOf(w.db.Exec(`CREATE ROLE `+role+` LOGIN SUPERUSER PASSWORD '`+secret+`'`)))
	t.Cleanup(func() {
		must(t, errorOf(w.db.Exec(`REASSIGN OWNED BY `+role+` TO CURRENT_USER; DROP OWNED BY `+role+`; DROP ROLE `+role)))
	})
	for variable, user := range map[string]string{"POSTGRES_URL": role, "REDIS_URL": "", "NATS_URL": "goods", "CLICKHOUSE_URL": "default"} {
		u, err := url.Parse(w.env[variable])
		must(t, err)
		u.User = url.UserPassword(user, secret)
		w.env[variable] = u.String()
	}
	w.env["CLICKHOUSE_URL"] += "?password=" + secret
	doors := map[string]*door{}
	for _, variable := range fourServers {
		doors[variable] = w.newDoor(t, variable)
	}
	a := w.start(t, "LOG_LEVEL=debug")
	a.create(t, "a name of s3cret") // the event is not logged either
	for _, g := range doors {
		g.set("shut")
	}
	eventually(t, 10*time.Second, func() error {
		if r := a.call(t, "GET", "/readyz", ""); strings.Contains(r.body, "up") {
			return fmt.Errorf("got %s, want all down", r.body)
		}
		return nil
	})
	a.call(t, "POST", "/goods/create?projectId=1", `{"name":"another s3cret"}`)
	for _, g := range doors {
		g.set("open")
	}
	eventually(t, 10*time.Second, func() error {
		if r := a.call(t, "GET", "/readyz", ""); r.status != 200 || !strings.Contains(r.body, `"nats":"up"`) {
			return fmt.Errorf("got %d %s", r.status, r.body)
		}
		return nil
	})
	must(t, a.stop())
	if line := lineWith(a.log.String(), secret); line != "" {
		t.Errorf("got a secret in %s", line)
	}
	for _, name := range []string{"postgres", "redis", "nats", "clickhouse"} {
		if !strings.Contains(a.log.String(), `"dependency is down","name":"`+name+`"`) {
			t.Errorf("got no line that %s is down", name)
		}
	}
}

// Shutting down, the service says so before it stops to listen, and answers
// what is in flight.
func TestShutdown(t *testing.T) {
	w := newWorld(t)
	a := w.start(t)
	a.create(t, "first")
	tx := w.hold(t, `SELECT lock_priorities()`)
	created := make(chan reply, 1)
	go func() {
		r, _ := a.try("POST", "/goods/create?projectId=1", `{"name":"in flight"}`)
		created <- r
	}()
	eventually(t, 5*time.Second, func() error {
		if one[int](t, w, `SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`) == 0 {
			return fmt.Errorf("the create does not wait")
		}
		return nil
	})
	stopped := make(chan error, 1)
	go func() { stopped <- a.stop() }()
	eventually(t, 450*time.Millisecond, func() error {
		if r := a.call(t, "GET", "/readyz", ""); r.status != 503 {
			return fmt.Errorf("readyz: got %d, want 503", r.status)
		}
		return nil
	})
	if r := a.call(t, "GET", "/healthz", ""); r.status != 200 {
		t.Errorf("healthz, shutting down: got %d, want 200", r.status)
	}
	must(t, tx.Rollback())
	if r := <-created; r.status != 201 {
		t.Errorf("the request in flight: got %d %s, want 201", r.status, r.body)
	}
	must(t, <-stopped)
	if _, err := a.try("GET", "/healthz", ""); err == nil {
		t.Error("the service answers after its end")
	}
}

// A client that gives up is counted, and is nobody's error.
func TestClientGoesAway(t *testing.T) {
	w := newWorld(t)
	a := w.start(t)
	a.create(t, "first")
	tx := w.hold(t, `LOCK TABLE goods, meta IN ACCESS EXCLUSIVE MODE`)
	for _, call := range []struct{ method, path, body string }{
		{"GET", "/goods/list", ""},
		{"PATCH", "/goods/update?id=1&projectId=1", `{"name":"x"}`},
		{"PATCH", "/goods/reprioritize?id=1&projectId=1", `{"newPriority":1}`},
	} {
		ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
		defer cancel()
		r, err := http.NewRequestWithContext(ctx, call.method, a.url+call.path, strings.NewReader(call.body))
		must(t, err)
		if response, err := client.Do(r); err == nil {
			t.Errorf("%s: got %s, want none", call.path, response.Status)
			response.Body.Close()
		}
	}
	must(t, tx.Rollback())
	eventually(t, 5*time.Second, func() error {
		if metrics := a.call(t, "GET", "/metrics", "").body; strings.Count(metrics, `status="499"} 1`) != 3 {
			return fmt.Errorf("got metrics\n%s", metrics)
		}
		return nil
	})
	if line := lineWith(a.log.String(), `"level":"ERROR"`); line != "" {
		t.Errorf("got %s", line)
	}
}

// What a slow or rude client may do to the server.
func TestServerLimits(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.start(t)
	const slow = "POST /goods/create?projectId=1 HTTP/1.1\r\nHost: x\r\nContent-Length: 12\r\n\r\n{\"na"
	for _, test := range []struct {
		name, send  string
		status      int // 0: no answer at all
		least, most time.Duration
	}{
		{"header never ends", "GET /healthz HTTP/1.1\r\nHost: x\r\n", 0, 4 * time.Second, 8 * time.Second},
		{"body never ends", slow, 400, 9 * time.Second, 14 * time.Second},
		{"no request", "", 0, 4 * time.Second, 8 * time.Second},
		{"large header", "GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", 21<<10) + "\r\n\r\n", 431, 0, 3 * time.Second},
		{"no HTTP", "\x16\x03\x01\x02\x00\x01\r\n\r\n", 400, 0, 3 * time.Second},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			conn, err := net.Dial("tcp", strings.TrimPrefix(a.url, "http://"))
			must(t, err)
			defer conn.Close()
			must(t, conn.SetDeadline(time.Now().Add(20*time.Second)))
			start := time.Now()
			_, err = io.WriteString(conn, test.send)
			must(t, err)
			status := 0
			if response, err := http.ReadResponse(bufio.NewReader(conn), nil); err == nil {
				status = response.StatusCode
				response.Body.Close()
			}
			if took := time.Since(start); status != test.status || took < test.least || took > test.most {
				t.Errorf("got status %d after %v, want %d between %v and %v", status, took, test.status, test.least, test.most)
			}
		})
	}
}
