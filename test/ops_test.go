package test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"goods/test/harness"
)

var servers = map[string]string{"clickhouse": "CLICKHOUSE_URL", "nats": "NATS_URL", "postgres": "POSTGRES_URL", "redis": "REDIS_URL"}

// ready waits until /readyz says that exactly these servers are down.
func ready(t testing.TB, a *harness.App, down ...string) {
	t.Helper()
	want := map[string]string{"clickhouse": "up", "nats": "up", "postgres": "up", "redis": "up"}
	for _, name := range down {
		want[name] = "down"
	}
	harness.Eventually(t, 20*time.Second, func() error {
		r := a.Call(t, "GET", "/readyz", "")
		var got map[string]string
		err := json.Unmarshal([]byte(r.Body), &got)
		if fmt.Sprint(got) != fmt.Sprint(want) || (r.Status == 200) != (want["postgres"] == "up") {
			err = fmt.Errorf("/readyz: got %d %s, want %v", r.Status, r.Body, want)
		}
		return err
	})
}

// about returns the log's lines with this message that are about a server.
func about(a *harness.App, message, server string) []map[string]any {
	return slices.DeleteFunc(a.Log.Lines(message), func(line map[string]any) bool { return line["name"] != server })
}

// A server that goes and comes back is one line each in the log, whatever is tried meanwhile, and /readyz tells it;
// the calls that do not need it are served, and those that do are answered in time.
func TestServerComesAndGoes(t *testing.T) {
	t.Parallel()
	for name, variable := range servers {
		for _, how := range []string{"shut", "frozen"} {
			t.Run(name+" "+how, func(t *testing.T) {
				t.Parallel()
				w := harness.NewWorld(t)
				p := w.NewProxy(t, variable)
				a := w.Start(t, "LOG_LEVEL=info")
				a.Create(t, "first")
				ready(t, a)
				w.Settled(t, 15*time.Second)
				resume := p.Pass
				if how == "shut" {
					p.Shut()
				} else {
					resume = p.Freeze()
				}
				ready(t, a, name)
				for _, call := range append(calls, struct{ method, path, body string }{"GET", "/metrics", ""}) {
					start := time.Now()
					status := a.Call(t, call.method, call.path, call.body).Status
					if refused := name == "postgres" && call.path != "/metrics"; (status == 503) != refused || !refused && status > 201 || time.Since(start) > 5*time.Second {
						t.Errorf("%s: got %d after %v, want an answer within five seconds", call.path, status, time.Since(start))
					}
				}
				harness.Eventually(t, 15*time.Second, func() error {
					if len(about(a, "failing", name)) == 0 {
						return fmt.Errorf("the log does not say that %s fails", name)
					}
					return nil
				})
				resume()
				ready(t, a)
				a.Create(t, "last")
				w.Settled(t, time.Minute)
				harness.Must(t, a.Stop())
				harness.Equal(t, []int{len(about(a, "failing", name)), len(about(a, "recovered", name))}, []int{1, 1}, "lines in the log")
			})
		}
	}
}

func TestLogOfHealthyService(t *testing.T) {
	t.Parallel()
	for level, want := range map[string]int{"info": 0, "debug": 40} {
		w := harness.NewWorld(t)
		a := w.Start(t, "LOG_LEVEL="+level)
		for range 10 {
			a.Create(t, "x")
			a.List(t, 10, 1)
			refused(t, a, 2, "DELETE", "/goods/remove?id=0", "")
			refused(t, a, 5, "GET", "/nowhere", "")
		}
		w.Settled(t, 15*time.Second)
		harness.Must(t, a.Stop())
		harness.Equal(t, len(a.Log.Lines("request")), want, "level %s: lines for 40 requests", level)
		for line := range strings.Lines(a.Log.String()) {
			var entry struct{ Level string }
			if err := json.Unmarshal([]byte(line), &entry); err != nil || entry.Level != "INFO" && entry.Level != "DEBUG" {
				t.Errorf("level %s: got %v, %s", level, err, line)
			}
		}
	}
}

func TestRequestID(t *testing.T) {
	t.Parallel()
	a := harness.NewWorld(t).Start(t)
	for i, id := range []string{"abc-123", strings.Repeat("x", 128), `{"a":"b"}`, "", strings.Repeat("x", 129), "two words", "tab\there", "é"} {
		got := a.Call(t, "GET", "/goods/list?limit=0", "", "X-Request-Id: "+id).Header.Get("X-Request-Id")
		if kept := i < 3; kept != (got == id) || len(got) < 7 {
			t.Errorf("X-Request-Id %q: got %q, want it kept: %v", id, got, kept)
		}
		line := a.AwaitLines(t, "request", i+1)[i]
		harness.Equal(t, fmt.Sprint(line["id"], line["method"], line["path"], line["status"]), got+"GET/goods/list400", "the line in the log")
	}
}

// Passwords are never logged, whether they are right, or not needed, or wrong; nor is what clients send.
func TestNoSecretsInLog(t *testing.T) {
	t.Parallel()
	const secret = "s3cret"
	w := harness.NewWorld(t)
	role := strings.ReplaceAll(w.Namespace, "-", "_")
	w.Exec(t, `CREATE ROLE `+role+` LOGIN PASSWORD '`+secret+`'; GRANT ALL ON SCHEMA public TO `+role)
	t.Cleanup(func() {
		w.Exec(t, `REASSIGN OWNED BY `+role+` TO CURRENT_USER; DROP OWNED BY `+role+`; DROP ROLE `+role)
	})
	users := map[string]string{"postgres": role, "nats": "goods", "clickhouse": "default"}
	proxies := map[string]*harness.Proxy{}
	for name, variable := range servers {
		u, err := url.Parse(w.Env[variable])
		harness.Must(t, err)
		u.User = url.UserPassword(users[name], secret)
		w.Env[variable] = u.String()
		proxies[name] = w.NewProxy(t, variable)
	}
	a := w.Start(t, "LOG_LEVEL=debug")
	a.Create(t, "a name of "+secret)
	for name, p := range proxies {
		p.Shut()
		harness.Eventually(t, 20*time.Second, func() error {
			if len(about(a, "failing", name)) == 0 {
				return fmt.Errorf("the log does not say that %s fails", name)
			}
			return nil
		})
	}
	a.Call(t, "POST", create, `{"name":"another `+secret+`"}`)
	for _, p := range proxies {
		p.Pass()
	}
	harness.Eventually(t, 20*time.Second, func() error {
		_, err := a.Try("GET", "/readyz", "")
		if err == nil && len(about(a, "recovered", "postgres")) == 0 {
			err = fmt.Errorf("postgres is not up again")
		}
		return err
	})
	a.Create(t, "a last "+secret)
	harness.Must(t, a.Stop())
	for line := range strings.Lines(a.Log.String()) {
		if strings.Contains(line, secret) {
			t.Errorf("got a secret in %s", line)
		}
	}
}

// A client that gives up is counted, and is nobody's error.
func TestClientGoesAway(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	a := w.Start(t)
	a.Create(t, "first")
	w.Hold(t, `LOCK TABLE goods, meta IN ACCESS EXCLUSIVE MODE`)
	for _, call := range calls {
		ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
		defer cancel()
		r, err := http.NewRequestWithContext(ctx, call.method, a.URL+call.path, strings.NewReader(call.body))
		harness.Must(t, err)
		if response, err := harness.Client.Do(r); err == nil {
			t.Errorf("%s: got %s, want none", call.path, response.Status)
			response.Body.Close()
		}
	}
	harness.Eventually(t, 10*time.Second, func() error {
		if n := value(t, a, "goods_http_requests_total", `value:"499"`); int(n) != len(calls) {
			return fmt.Errorf("%v clients went away, want %d", n, len(calls))
		}
		return nil
	})
	if strings.Contains(a.Log.String(), `"level":"ERROR"`) {
		t.Error("a client that went away is an error in the log")
	}
}

// A slow or rude client gets an answer, or loses its connection, before long.
func TestServerLimits(t *testing.T) {
	t.Parallel()
	a := harness.NewWorld(t).Start(t)
	for _, test := range []struct {
		name, send string
		status     int // 0: no answer at all
	}{
		{"header never ends", "GET /healthz HTTP/1.1\r\nHost: x\r\n", 0},
		{"body never ends", "POST " + create + " HTTP/1.1\r\nHost: x\r\nContent-Length: 12\r\n\r\n{\"na", 400},
		{"no request", "", 0},
		{"large header", "GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", 21<<10) + "\r\n\r\n", 431},
		{"no HTTP", "\x16\x03\x01\x02\x00\x01\r\n\r\n", 400},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			conn, err := net.Dial("tcp", strings.TrimPrefix(a.URL, "http://"))
			harness.Must(t, err)
			defer conn.Close()
			harness.Must(t, conn.SetDeadline(time.Now().Add(30*time.Second)))
			_, err = io.WriteString(conn, test.send)
			harness.Must(t, err)
			status := 0
			response, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err == nil {
				status = response.StatusCode
				response.Body.Close()
			}
			if timeout, ok := err.(net.Error); ok && timeout.Timeout() || status != test.status {
				t.Errorf("got status %d, %v, want %d", status, err, test.status)
			}
		})
	}
}
