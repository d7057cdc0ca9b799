package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"
	"github.com/gomodule/redigo/redis"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// asProgram makes the test binary run as goods itself, so that tests can kill it.
const asProgram = "GOODS_TEST_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		go reportVitals()
		main()
		return
	}
	for _, name := range []string{"POSTGRES_URL", "REDIS_URL", "NATS_URL", "CLICKHOUSE_URL"} {
		if os.Getenv(name) == "" {
			fmt.Fprintf(os.Stderr, "%s is not set: start the servers with ./servers.sh start, and then use make test or eval \"$(./servers.sh env)\"\n", name)
			os.Exit(1)
		}
	}
	code := m.Run()
	for _, b := range breaches.texts[:min(20, len(breaches.texts))] {
		fmt.Println("not as openapi.yaml says:", b)
		code = 1
	}
	os.Exit(code)
}

// reportVitals prints how much the program holds whenever SIGUSR1 comes.
func reportVitals() {
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, syscall.SIGUSR1)
	for range asked {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		fmt.Printf(`{"msg":"vitals","goroutines":%d,"heap":%d}`+"\n", runtime.NumGoroutine(), m.HeapAlloc)
	}
}

// world is what one test has for itself on the shared servers: a database in
// Postgres and in ClickHouse, and a namespace in Redis and NATS.
type world struct {
	env        map[string]string // for the service
	namespace  string
	db         *sql.DB
	redis      *redis.Pool
	js         jetstream.JetStream
	clickhouse clickhouse.Conn
}

// newWorld makes a world on the servers that the environment names, changed by
// overrides such as "REDIS_URL=…". It is gone when the test ends.
func newWorld(t testing.TB, overrides ...string) *world {
	t.Helper()
	ctx := context.Background()
	w := &world{env: map[string]string{"HTTP_ADDR": "127.0.0.1:0", "LOG_LEVEL": "debug"}}
	for _, name := range []string{"POSTGRES_URL", "REDIS_URL", "NATS_URL", "CLICKHOUSE_URL"} {
		w.env[name] = os.Getenv(name)
	}
	for _, o := range overrides {
		name, value, _ := strings.Cut(o, "=")
		w.env[name] = value
	}
	w.namespace = "test-" + strings.ToLower(rand.Text()[:12])
	w.env["NAMESPACE"] = w.namespace
	name := strings.ReplaceAll(w.namespace, "-", "_")

	admin, err := sql.Open("postgres", w.env["POSTGRES_URL"])
	must(t, err)
	_, err = admin.Exec("CREATE DATABASE " + name)
	must(t, err)
	w.env["POSTGRES_URL"] = withPath(t, w.env["POSTGRES_URL"], name)
	w.db, err = sql.Open("postgres", w.env["POSTGRES_URL"])
	must(t, err)

	options, err := clickhouse.ParseDSN(w.env["CLICKHOUSE_URL"])
	must(t, err)
	chAdmin, err := clickhouse.Open(options)
	must(t, err)
	must(t, chAdmin.Exec(ctx, "CREATE DATABASE "+name))
	w.env["CLICKHOUSE_URL"] = withPath(t, w.env["CLICKHOUSE_URL"], name)
	options, err = clickhouse.ParseDSN(w.env["CLICKHOUSE_URL"])
	must(t, err)
	w.clickhouse, err = clickhouse.Open(options)
	must(t, err)

	w.redis = &redis.Pool{Dial: func() (redis.Conn, error) { return redis.DialURL(w.env["REDIS_URL"]) }}
	nc, err := nats.Connect(w.env["NATS_URL"], nats.MaxReconnects(-1), nats.ReconnectWait(100*time.Millisecond))
	must(t, err)
	w.js, err = jetstream.New(nc)
	must(t, err)

	t.Cleanup(func() {
		// Servers of a test's own may be gone by now: nothing here can fail it.
		limited, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		_ = w.js.DeleteStream(limited, w.stream())
		nc.Close()
		w.db.Close()
		// A DROP that is cancelled leaves an invalid database, at which Postgres'
		// autovacuum launcher waits for ever: no other database is vacuumed.
		patient, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		_, _ = admin.ExecContext(patient, "DROP DATABASE "+name+" WITH (FORCE)")
		admin.Close()
		w.clickhouse.Close()
		_ = chAdmin.Exec(limited, "DROP DATABASE "+name)
		chAdmin.Close()
		w.redis.Close()
	})
	return w
}

func withPath(t testing.TB, rawURL, path string) string {
	t.Helper()
	u, err := url.Parse(rawURL)
	must(t, err)
	u.Path = "/" + path
	return u.String()
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (w *world) stream() string  { return strings.ToUpper(w.namespace) }
func (w *world) subject() string { return w.namespace + ".events" }

// getenv is the service's environment, with overrides such as "EVENTS_BATCH=2".
func (w *world) getenv(overrides ...string) func(string) string {
	return func(name string) string {
		for _, o := range overrides {
			if value, ok := strings.CutPrefix(o, name+"="); ok {
				return value
			}
		}
		return w.env[name]
	}
}

// app is a service that runs.
type app struct {
	url     string
	log     *logBuffer
	stop    func() error // ends it as SIGTERM does, and returns run's error; may be called again
	process *os.Process  // nil for one inside the test
}

// start runs the service inside the test, until stop or the end of the test.
func (w *world) start(t testing.TB, overrides ...string) *app {
	t.Helper()
	a := &app{log: &logBuffer{}}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx, nil, w.getenv(overrides...), a.log) }()
	a.stop = sync.OnceValue(func() error {
		cancel()
		select {
		case err := <-done:
			return err
		case <-time.After(20 * time.Second):
			return fmt.Errorf("the service does not end")
		}
	})
	a.await(t)
	return a
}

// exec runs the service as a process of its own, until the end of the test.
func (w *world) exec(t testing.TB, overrides ...string) *app {
	t.Helper()
	a := &app{log: &logBuffer{}}
	self, err := os.Executable()
	must(t, err)
	cmd := exec.Command(self)
	cmd.Env = []string{asProgram + "=1"}
	getenv := w.getenv(overrides...)
	for _, v := range variables {
		cmd.Env = append(cmd.Env, v.name+"="+getenv(v.name))
	}
	cmd.Stdout, cmd.Stderr = a.log, a.log
	must(t, cmd.Start())
	a.process = cmd.Process
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	a.stop = sync.OnceValue(func() error {
		_ = cmd.Process.Signal(syscall.SIGTERM) // it may have been killed
		select {
		case err := <-done:
			return err
		case <-time.After(20 * time.Second):
			_ = cmd.Process.Kill()
			return fmt.Errorf("the service does not end")
		}
	})
	a.await(t)
	return a
}

// await waits until the service listens, and learns its address.
func (a *app) await(t testing.TB) {
	t.Helper()
	t.Cleanup(func() {
		_ = a.stop()
		if t.Failed() {
			t.Logf("log of the service:\n%s", a.log.tail(100))
		}
	})
	eventually(t, 30*time.Second, func() error {
		for line := range strings.Lines(a.log.String()) {
			var entry struct{ Msg, Addr string }
			if json.Unmarshal([]byte(line), &entry) == nil && entry.Msg == "listening" {
				a.url = "http://" + entry.Addr
				return nil
			}
		}
		return fmt.Errorf("the service does not listen:\n%s", a.log.String())
	})
}

// logBuffer keeps what a service logs. It may be used concurrently.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// tail returns the last n lines, but for requests that went well.
func (l *logBuffer) tail(n int) string {
	var lines []string
	for line := range strings.SplitSeq(l.String(), "\n") {
		if !strings.Contains(line, `"msg":"request"`) || !strings.Contains(line, `"err":null`) {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// ready returns an error unless the service reports all four servers as up.
func (a *app) ready() error {
	r, err := a.try("GET", "/readyz", "")
	if err != nil {
		return err
	}
	if r.status != 200 || strings.Contains(r.body, "down") {
		return fmt.Errorf("/readyz: %d %s", r.status, r.body)
	}
	return nil
}

// eventually polls f until it returns nil, and fails the test with its last
// error when that takes longer than limit.
func eventually(t testing.TB, limit time.Duration, f func() error) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(limit); ; {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %v: %v", limit, err)
		}
		<-tick.C
	}
}

// reply is what the service answered.
type reply struct {
	status int
	header http.Header
	body   string
}

// call sends one request, and fails the test when there is no answer at all.
func (a *app) call(t testing.TB, method, path, body string) reply {
	t.Helper()
	r, err := a.try(method, path, body)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	return r
}

// client keeps enough connections for every test.
var client = &http.Client{
	Timeout:   30 * time.Second,
	Transport: &http.Transport{MaxIdleConnsPerHost: 256},
}

// try is call for a service that may be gone.
func (a *app) try(method, path, body string) (reply, error) {
	request, err := http.NewRequest(method, a.url+path, strings.NewReader(body))
	if err != nil {
		return reply{}, err
	}
	response, err := client.Do(request)
	if err != nil {
		return reply{}, err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	r := reply{response.StatusCode, response.Header, string(text)}
	if err == nil {
		checkReply(method, path, r)
	}
	return r, err
}

// want calls and checks the status; the reply is decoded into a T.
func want[T any](t testing.TB, a *app, status int, method, path, body string) T {
	t.Helper()
	r := a.call(t, method, path, body)
	if r.status != status {
		t.Fatalf("%s %s %.200s: got %d %s, want %d", method, path, body, r.status, r.body, status)
	}
	var v T
	if err := json.Unmarshal([]byte(r.body), &v); err != nil {
		t.Fatalf("%s %s: %v in %s", method, path, err, r.body)
	}
	return v
}

// listReply is the answer to a list.
type listReply struct {
	Meta  struct{ Total, Removed, Limit, Offset int }
	Goods []good
}

func (a *app) create(t testing.TB, name string) good {
	t.Helper()
	body, err := json.Marshal(map[string]string{"name": name})
	must(t, err)
	return want[good](t, a, http.StatusCreated, "POST", "/goods/create?projectId=1", string(body))
}

// stock creates n goods.
func (a *app) stock(t testing.TB, n int) {
	t.Helper()
	for i := range n {
		a.create(t, fmt.Sprint(i+1))
	}
}

func (a *app) list(t testing.TB, limit, offset int) listReply {
	t.Helper()
	return want[listReply](t, a, http.StatusOK, "GET", fmt.Sprintf("/goods/list?limit=%d&offset=%d", limit, offset), "")
}

// hold runs a statement that locks something, until the transaction that it
// returns, or the test, ends.
func (w *world) hold(t testing.TB, statement string) *sql.Tx {
	t.Helper()
	tx, err := w.db.Begin()
	must(t, err)
	t.Cleanup(func() { _ = tx.Rollback() })
	must(t, errorOf(tx.Exec(statement)))
	return tx
}

// one scans the only column of the only row of a query on Postgres.
func one[T any](t testing.TB, w *world, query string, args ...any) T {
	t.Helper()
	var v T
	if err := w.db.QueryRow(query, args...).Scan(&v); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return v
}

// logged counts the distinct events in ClickHouse.
func (w *world) logged(t testing.TB) int {
	t.Helper()
	var n uint64
	must(t, w.clickhouse.QueryRow(context.Background(), "SELECT count() FROM goods_log FINAL").Scan(&n))
	return int(n)
}
