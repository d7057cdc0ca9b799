// Package harness runs the built program against real Postgres, Redis, NATS and ClickHouse, and looks into them.
//
// Its helpers end the test when they fail. They may be called from several goroutines of one test.
package harness

import (
	"context"
	"crypto/rand"
	"database/sql"
	"flag"
	"fmt"
	"maps"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"
	"github.com/gomodule/redigo/redis"
	_ "github.com/lib/pq"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

var serverVariables = []string{"POSTGRES_URL", "REDIS_URL", "NATS_URL", "CLICKHOUSE_URL"}

// program is the path of the program under test.
var program string

// Main builds the program, with the race detector if the tests have it, runs the tests and exits. It is what TestMain
// calls.
func Main(m *testing.M) {
	for _, name := range serverVariables {
		if os.Getenv(name) == "" {
			fatalf(`%s is not set: use make test, or start the servers with scripts/servers.sh start and set the variables with eval "$(scripts/servers.sh env)"`, name)
		}
	}
	dir, err := os.MkdirTemp("", "goods-test-")
	if err != nil {
		fatalf("%v", err)
	}
	program = filepath.Join(dir, "goods")
	args := []string{"build", "-buildvcs=false", "-ldflags", "-X main.version=test", "-o", program}
	if info, ok := debug.ReadBuildInfo(); ok && strings.Contains(info.String(), "\t-race=true") {
		args = append(args, "-race")
	}
	build := exec.Command("go", append(args, ".")...)
	build.Dir = root()
	if out, err := build.CombinedOutput(); err != nil {
		fatalf("go build: %v\n%s", err, out)
	}
	// Tests wait more than they compute.
	flag.Parse()
	if cores := strconv.Itoa(runtime.GOMAXPROCS(0)); flag.Lookup("test.parallel").Value.String() == cores {
		_ = flag.Set("test.parallel", "6")
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

func fatalf(format string, args ...any) {
	fmt.Fprintf(os.Stderr, format+"\n", args...)
	os.Exit(1)
}

// root returns the folder of the service's module.
var root = sync.OnceValue(func() string {
	for dir, err := os.Getwd(); err == nil && dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "openapi.yaml")); err == nil {
			return dir
		}
	}
	panic("the tests do not run in a folder below the service's")
})

// File returns a file of the service's module.
func File(t testing.TB, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root(), name))
	Must(t, err)
	return text
}

// World is what one test has for itself on the servers: a database in Postgres and in ClickHouse, and a namespace in
// Redis and NATS.
type World struct {
	Env        map[string]string // of the service
	Namespace  string
	DB         *sql.DB
	Redis      *redis.Pool
	JS         jetstream.JetStream
	ClickHouse clickhouse.Conn
	Unchecked  bool   // replies are not compared with openapi.yaml
	Program    string // another build than the one under test, if not empty
}

// NewWorld makes a world on the servers that the environment names, changed by overrides such as "REDIS_URL=…". It is
// gone when the test ends.
func NewWorld(t testing.TB, overrides ...string) *World {
	t.Helper()
	ctx := context.Background()
	namespace := "test-" + strings.ToLower(rand.Text()[:12])
	w := &World{Namespace: namespace, Env: map[string]string{"HTTP_ADDR": "127.0.0.1:0", "LOG_LEVEL": "debug", "NAMESPACE": namespace}}
	for _, name := range serverVariables {
		w.Env[name] = os.Getenv(name)
	}
	w.Env = w.with(overrides)
	name := strings.ReplaceAll(namespace, "-", "_")

	admin, err := sql.Open("postgres", w.Env["POSTGRES_URL"])
	Must(t, err)
	_, err = admin.Exec("CREATE DATABASE " + name)
	Must(t, err)
	w.Env["POSTGRES_URL"] = WithPath(t, w.Env["POSTGRES_URL"], name)
	w.DB, err = sql.Open("postgres", w.Env["POSTGRES_URL"])
	Must(t, err)

	chAdmin := openClickHouse(t, w.Env["CLICKHOUSE_URL"])
	Must(t, chAdmin.Exec(ctx, "CREATE DATABASE "+name))
	w.Env["CLICKHOUSE_URL"] = WithPath(t, w.Env["CLICKHOUSE_URL"], name)
	w.ClickHouse = openClickHouse(t, w.Env["CLICKHOUSE_URL"])

	redisURL := w.Env["REDIS_URL"]
	w.Redis = &redis.Pool{MaxIdle: 4, Dial: func() (redis.Conn, error) { return redis.DialURL(redisURL) }}
	nc, err := nats.Connect(w.Env["NATS_URL"], nats.MaxReconnects(-1), nats.ReconnectWait(100*time.Millisecond))
	Must(t, err)
	w.JS, err = jetstream.New(nc)
	Must(t, err)

	t.Cleanup(func() {
		// A test's own servers may be gone by now: nothing here can fail it.
		limited, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		_ = w.JS.DeleteStream(limited, w.Stream())
		nc.Close()
		w.DB.Close()
		// A DROP that is cancelled leaves an invalid database, at which Postgres' autovacuum launcher waits forever:
		// no other database is vacuumed.
		patient, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		_, _ = admin.ExecContext(patient, "DROP DATABASE "+name+" WITH (FORCE)")
		admin.Close()
		w.ClickHouse.Close()
		_ = chAdmin.Exec(limited, "DROP DATABASE "+name)
		chAdmin.Close()
		w.Redis.Close()
	})
	return w
}

func openClickHouse(t testing.TB, url string) clickhouse.Conn {
	t.Helper()
	options, err := clickhouse.ParseDSN(url)
	Must(t, err)
	conn, err := clickhouse.Open(options)
	Must(t, err)
	return conn
}

// WithPath returns rawURL with another path.
func WithPath(t testing.TB, rawURL, path string) string {
	t.Helper()
	u, err := url.Parse(rawURL)
	Must(t, err)
	u.Path = "/" + path
	return u.String()
}

// with returns the service's environment, changed by overrides.
func (w *World) with(overrides []string) map[string]string {
	env := maps.Clone(w.Env)
	for _, o := range overrides {
		name, value, _ := strings.Cut(o, "=")
		env[name] = value
	}
	return env
}

// Stream and Subject are where the service's events travel.
func (w *World) Stream() string  { return strings.ToUpper(w.Namespace) }
func (w *World) Subject() string { return w.Namespace + ".events" }

// Must fails the test when there is an error.
func Must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Equal fails the test unless got is want. The rest of the message says what they are.
func Equal[T any](t testing.TB, got, want T, format string, args ...any) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s: got %+v, want %+v", fmt.Sprintf(format, args...), got, want)
	}
}

// Exec runs statements on Postgres.
func (w *World) Exec(t testing.TB, statements string) {
	t.Helper()
	if _, err := w.DB.Exec(statements); err != nil {
		t.Fatalf("%s: %v", statements, err)
	}
}

// Hold runs a statement that locks something, until the transaction that it returns, or the test, ends.
func (w *World) Hold(t testing.TB, statement string) *sql.Tx {
	t.Helper()
	tx, err := w.DB.Begin()
	Must(t, err)
	t.Cleanup(func() { _ = tx.Rollback() })
	_, err = tx.Exec(statement)
	Must(t, err)
	return tx
}

// One scans the only column of the only row of a query on Postgres.
func One[T any](t testing.TB, w *World, query string, args ...any) T {
	t.Helper()
	var v T
	if err := w.DB.QueryRow(query, args...).Scan(&v); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return v
}

// Eventually polls f until it returns nil, and fails the test with its last error when that takes longer than limit.
func Eventually(t testing.TB, limit time.Duration, f func() error) {
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

// Together runs f in n goroutines at once and waits for them.
func Together(n int, f func(i int)) {
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { f(i) })
	}
	all.Wait()
}
