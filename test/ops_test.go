package test

import (
	"fmt"
	"io"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"goods/test/harness"
)

var servers = map[string]string{
	"clickhouse": "CLICKHOUSE_URL",
	"nats":       "NATS_URL",
	"postgres":   "POSTGRES_URL",
	"redis":      "REDIS_URL",
}

// ready waits until /readyz says that exactly these servers are down.
func ready(t testing.TB, a *harness.App, down ...string) {
	t.Helper()
	want := `200 {"clickhouse":"up","nats":"up","postgres":"up","redis":"up"}` + "\n"
	for _, name := range down {
		want = strings.Replace(want, name+`":"up"`, name+`":"down"`, 1)
		if name == "postgres" {
			want = strings.Replace(want, "200", "503", 1)
		}
	}
	harness.AwaitEqual(t, 20*time.Second, func() string {
		r := a.Call(t, "GET", "/readyz", "")
		return fmt.Sprint(r.Status, " ", r.Body)
	}, want, "/readyz")
}

const secret = "s3cret"

// withUser returns rawURL with a user whose password is the secret.
func withUser(t testing.TB, rawURL, user string) string {
	t.Helper()
	u, err := url.Parse(rawURL)
	harness.Must(t, err)
	u.User = url.UserPassword(user, secret)
	return u.String()
}

// inLog counts the lines with this message that are about a server.
func inLog(a *harness.App, message, server string) int {
	return strings.Count(a.Log(), fmt.Sprintf(`"msg":%q,"name":%q`, message, server))
}

// A server that goes and comes back is one line each in the log, whatever is tried meanwhile, and /readyz
// tells it; the calls that do not need it are served, and those that do are answered in time. Passwords are
// never logged, nor is what clients send.
func TestServerComesAndGoes(t *testing.T) {
	t.Parallel()
	for name, variable := range servers {
		for _, how := range []string{"shut", "frozen"} {
			t.Run(name+" "+how, func(t *testing.T) {
				t.Parallel()
				w := harness.NewWorld(t)
				user := "default" // Redis and NATS take any password
				if name == "postgres" {
					user = strings.ReplaceAll(w.Namespace, "-", "_")
					w.Exec(t, fmt.Sprintf(`
CREATE ROLE %s LOGIN PASSWORD '%s';
GRANT ALL ON SCHEMA public TO %[1]s`, user, secret))
					t.Cleanup(func() {
						w.Exec(t, fmt.Sprintf(`
REASSIGN OWNED BY %s TO CURRENT_USER;
DROP OWNED BY %[1]s;
DROP ROLE %[1]s`, user))
					})
				}
				if name != "clickhouse" { // which would refuse it: see TestStartWithOnlyPostgres
					w.Env[variable] = withUser(t, w.Env[variable], user)
				}
				p := w.NewProxy(t, variable)
				a := w.Start(t)
				for range len(calls) {
					a.Create(t, "first "+secret)
				}
				ready(t, a)
				w.Settled(t, 15*time.Second)
				resume := p.Pass
				if how == "shut" {
					p.Shut()
				} else {
					resume = p.Freeze()
				}
				ready(t, a, name)
				asked := append(calls, call{"GET", "/metrics", ""})
				harness.Together(len(asked), func(i int) {
					// Each has a good of its own.
					path := strings.Replace(asked[i].path, target(1), target(1+i), 1)
					start := time.Now()
					r := a.Call(t, asked[i].method, path, strings.Replace(asked[i].body, "x", secret, 1))
					refused := name == "postgres" && path != "/metrics"
					took := time.Since(start)
					if (r.Status == 503) != refused || !refused && r.Status > 201 || took > 5*time.Second {
						t.Errorf("%s: got %d after %v, want an answer within five seconds", path, r.Status, took)
					}
				})
				failures := func() int { return inLog(a, "failing", name) }
				harness.AwaitEqual(t, 15*time.Second, failures, 1, "failures in the log")
				resume()
				ready(t, a)
				a.Create(t, "last")
				w.Settled(t, time.Minute)
				for _, part := range []string{"relay", "consumer", "store events", "clear outbox"} {
					harness.AwaitEqual(t, 5*time.Second, func() int {
						return inLog(a, "failing", part) - inLog(a, "recovered", part)
					}, 0, "failures of %s that are not over", part)
				}
				harness.Must(t, a.Stop())
				harness.Equal(t, failures(), 1, "lines \"failing\" in the log")
				harness.Equal(t, inLog(a, "recovered", name), 1, "lines \"recovered\" in the log")
				told := strings.Contains(a.Log(), secret)
				harness.Equal(t, told, false, "a password, or what a client sent, is in the log")
			})
		}
	}
}

// Each request is one line at the level debug, with its id. Nothing that clients ask of a healthy service
// is worth a warning.
func TestRequestsInLog(t *testing.T) {
	w, a := started(t)
	ids := []string{"abc-123", strings.Repeat("x", 128), `{"a":"b"}`,
		"", strings.Repeat("x", 129), "two words", "tab\there", "é"}
	for i, id := range ids {
		got := a.Call(t, "GET", "/goods/list?limit=0", "", "X-Request-Id: "+id).Header.Get("X-Request-Id")
		if kept := i < 3; kept != (got == id) || len(got) < 7 {
			t.Errorf("X-Request-Id %q: got %q, want it kept: %v", id, got, kept)
		}
		line := a.AwaitLines(t, "request", i+1)[i]
		told := fmt.Sprint(line["id"], line["method"], line["path"], line["status"])
		harness.Equal(t, told, got+"GET/goods/list400", "the line in the log")
	}
	quiet := w.Start(t, "LOG_LEVEL=") // the default
	for _, a := range []*harness.App{a, quiet} {
		a.Stock(t, 10)
		a.List(t, 10, 1)
		refused(t, a, 2, "DELETE", "/goods/remove?id=0", "")
		refused(t, a, 5, "GET", "/nowhere", "")
	}
	w.Settled(t, 15*time.Second)
	for a, want := range map[*harness.App]int{a: len(ids) + 13, quiet: 0} {
		harness.Must(t, a.Stop())
		harness.Equal(t, strings.Count(a.Log(), `"msg":"request"`), want, "lines for requests")
		for line := range strings.Lines(a.Log()) {
			if !strings.Contains(line, `"level":"INFO"`) && !strings.Contains(line, `"level":"DEBUG"`) {
				t.Errorf("got a line %s", line)
			}
		}
	}
}

// A slow or rude client gets an answer, or loses its connection, before long. Some of these answers are
// Go's own, without JSON.
func TestServerLimits(t *testing.T) {
	_, a := started(t)
	const get, host = "GET /goods/list HTTP/1.1\r\n", "Host: goods\r\n"
	for _, test := range []struct {
		name, request string
		status        int // 0: no answer at all
	}{
		{"header never ends", get + host, 0},
		{"no request", "", 0},
		{"large header", get + host + "X: " + strings.Repeat("x", 17<<10) + "\r\n\r\n", 431},
		{"no HTTP", "\x16\x03\x01\x02\x00\x01\r\n\r\n", 400},
		{"another HTTP", "GET /goods/list HTTP/9.9\r\n" + host + "\r\n", 505},
		{"no host", get + "\r\n", 400},
		{"no header", get + host + "nonsense\r\n\r\n", 400},
		{"bad escape in the path", "GET /goods/%zz HTTP/1.1\r\n" + host + "\r\n", 400},
		{"unknown expectation", get + host + "Expect: foo\r\n\r\n", 417},
		{"unknown encoding", get + host + "Transfer-Encoding: foo\r\n\r\n", 501},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			status, _, err := send(t, a, test.request, 30*time.Second)
			if timeout, ok := err.(net.Error); ok && timeout.Timeout() || status != test.status {
				t.Errorf("got status %d, %v, want %d", status, err, test.status)
			}
		})
	}
}

// An outbox that cannot be looked at, or only slowly, is no reason to take the service for down: lists work
// all the same. Here it is being rewritten by hand; the fault tests have one with a million dead rows.
func TestOutboxOutOfReach(t *testing.T) {
	w, a := started(t)
	ready(t, a)
	w.Hold(t, `LOCK TABLE outbox IN ACCESS EXCLUSIVE MODE`)
	begin := time.Now()
	for ; time.Since(begin) < 8*time.Second; <-time.After(100 * time.Millisecond) {
		asked := time.Now()
		r := a.Call(t, "GET", "/readyz", "")
		if r.Status != 200 || !strings.Contains(r.Body, `"postgres":"up"`) {
			t.Fatalf("/readyz after %v: %d %s", time.Since(begin), r.Status, r.Body)
		}
		value(t, a, "goods_outbox_rows", "")
		a.List(t, 10, 1)
		if took := time.Since(asked); took > 2*time.Second {
			t.Errorf("/readyz, /metrics and a list took %v", took)
		}
	}
	locked := time.Since(begin).Seconds()
	if age := value(t, a, "goods_outbox_sample_age_seconds", ""); age < locked-1 || age > locked+10 {
		t.Errorf("the figures of the outbox are %v s old, it was locked for %v s", age, locked)
	}
	harness.Equal(t, inLog(a, "failing", "postgres"), 0, "failures of Postgres in the log")
	// Who looks at the figures sees that they are old.
	if age := value(t, a, "goods_outbox_sample_age_seconds", ""); age < 5 || age > 1000 {
		t.Errorf("the figures of the outbox are %g seconds old, want the 8 seconds of the lock", age)
	}
}

// A server that answers only a moment after the service has started is not worth a line in the log.
func TestLateServer(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	p := w.NewProxy(t, "REDIS_URL")
	asked := make(chan struct{}, 1)
	p.Spoil(func(net.Conn, []byte) error {
		select {
		case asked <- struct{}{}:
		default:
		}
		return io.ErrClosedPipe
	}, harness.Forward)
	a := w.Start(t)
	<-asked
	p.Pass()
	ready(t, a)
	harness.Equal(t, inLog(a, "failing", "redis"), 0, "failures of Redis in the log")
}
