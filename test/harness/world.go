// Package harness runs the built program against real Postgres, Redis, NATS and ClickHouse, and looks into
// them.
//
// Its helpers end the test when they fail. They may be called from several goroutines of one test.
package harness

import (
	"context"
	"crypto/rand"
	"database/sql"
	"flag"
	"fmt"
	"log"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"runtime/debug"
	"slices"
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

// Main builds the program, with the race detector if the tests have it, runs the tests and exits. It is
// what TestMain calls.
func Main(m *testing.M) {
	for _, name := range serverVariables {
		if os.Getenv(name) == "" {
			log.Fatalf("%s is not set: use make test, or "+
				`scripts/servers.sh start and then eval "$(scripts/servers.sh env)"`, name)
		}
	}
	dir, err := os.MkdirTemp("", "goods-test-")
	if err != nil {
		log.Fatal(err)
	}
	program = filepath.Join(dir, "goods")
	build := exec.Command("go", "build", "-buildvcs=false", "-o", program)
	race := debug.BuildSetting{Key: "-race", Value: "true"}
	if info, ok := debug.ReadBuildInfo(); ok && slices.Contains(info.Settings, race) {
		build.Args = append(build.Args, "-race")
	}
	build.Dir = root()
	if out, err := build.CombinedOutput(); err != nil {
		log.Fatalf("go build: %v\n%s", err, out)
	}
	_ = flag.Set("test.parallel", "10") // tests wait more than they compute; what the command line says wins
	contract()                          // is read now, not while a test measures time
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// root returns the folder of the service's module.
func root() string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Join(filepath.Dir(file), "..", "..")
}

// File returns a file of the service's module.
func File(t testing.TB, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root(), name))
	Must(t, err)
	return text
}

// World is what one test has for itself on the servers: a database in Postgres and in ClickHouse, and a
// namespace in Redis and NATS.
type World struct {
	Env        map[string]string // of the service
	Namespace  string
	DB         *sql.DB
	JS         jetstream.JetStream
	ClickHouse clickhouse.Conn
	Unchecked  bool   // replies are not compared with openapi.yaml
	Program    string // another build than the one under test, if not empty
	PipedLog   bool   // the service logs into a pipe: see App.EndLog and App.FreezeLog
	redisURL   string // without a proxy
}

// NewWorld makes a world on the servers that the environment names, changed by overrides such as
// "REDIS_URL=…". It is gone when the test ends.
func NewWorld(t testing.TB, overrides ...string) *World {
	t.Helper()
	ctx := context.Background()
	id := strings.ToLower(rand.Text()[:12])
	w := &World{Namespace: "test-" + id}
	w.Env = map[string]string{"HTTP_ADDR": "127.0.0.1:0", "LOG_LEVEL": "debug", "NAMESPACE": w.Namespace}
	for _, name := range serverVariables {
		w.Env[name] = os.Getenv(name)
	}
	for _, o := range overrides {
		name, value, _ := strings.Cut(o, "=")
		w.Env[name] = value
	}
	w.redisURL = w.Env["REDIS_URL"]
	name := "test_" + id

	admin, err := sql.Open("postgres", w.Env["POSTGRES_URL"])
	Must(t, err)
	_, err = admin.Exec("CREATE DATABASE " + name)
	Must(t, err)
	w.Env["POSTGRES_URL"] = WithPath(t, w.Env["POSTGRES_URL"], name)
	w.DB, err = sql.Open("postgres", w.Env["POSTGRES_URL"])
	Must(t, err)

	options, err := clickhouse.ParseDSN(w.Env["CLICKHOUSE_URL"])
	Must(t, err)
	creator, err := clickhouse.Open(options)
	Must(t, err)
	Must(t, creator.Exec(ctx, "CREATE DATABASE "+name))
	Must(t, creator.Close())
	w.Env["CLICKHOUSE_URL"] = WithPath(t, w.Env["CLICKHOUSE_URL"], name)
	options.Auth.Database = name
	w.ClickHouse, err = clickhouse.Open(options)
	Must(t, err)

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
		// A DROP that is cancelled leaves an invalid database, at which Postgres' autovacuum launcher waits
		// forever: no other database is vacuumed.
		patient, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		_, _ = admin.ExecContext(patient, "DROP DATABASE "+name+" WITH (FORCE)")
		admin.Close()
		_ = w.ClickHouse.Exec(limited, "DROP DATABASE "+name)
		w.ClickHouse.Close()
	})
	return w
}

// WithPath returns rawURL with another path.
func WithPath(t testing.TB, rawURL, path string) string {
	t.Helper()
	u, err := url.Parse(rawURL)
	Must(t, err)
	u.Path = "/" + path
	return u.String()
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
	_, err := w.DB.Exec(statements)
	Must(t, err)
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
func One[T any](t testing.TB, w *World, query string) T {
	t.Helper()
	var v T
	if err := w.DB.QueryRow(query).Scan(&v); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return v
}

// HideLog puts another table in the place of goods_log, which refuses every event, until the function that
// it returns is called.
func (w *World) HideLog(t testing.TB) (show func()) {
	t.Helper()
	exec := func(statement string) {
		t.Helper()
		Must(t, w.ClickHouse.Exec(context.Background(), statement))
	}
	exec(`CREATE TABLE goods_log_other (Nothing UInt8) ENGINE = Memory`)
	exec(`RENAME TABLE goods_log TO goods_log_hidden, goods_log_other TO goods_log`)
	return func() {
		t.Helper()
		exec(`RENAME TABLE goods_log TO goods_log_other, goods_log_hidden TO goods_log`)
		exec(`DROP TABLE goods_log_other`)
	}
}

// Redis runs a command on Redis.
func (w *World) Redis(t testing.TB, command string, args ...any) any {
	t.Helper()
	conn, err := redis.DialURL(w.redisURL)
	Must(t, err)
	defer conn.Close()
	reply, err := conn.Do(command, args...)
	Must(t, err)
	return reply
}

// Eventually polls f until it returns nil, and fails the test with its last error when that takes longer
// than limit.
func Eventually(t testing.TB, limit time.Duration, f func() error) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for tick := time.Tick(20 * time.Millisecond); ; <-tick {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %v: %v", limit, err)
		}
	}
}

// AwaitEqual polls get until it returns want. The rest of the message says what that is.
func AwaitEqual[T any](t testing.TB, limit time.Duration, get func() T, want T, format string, args ...any) {
	t.Helper()
	Eventually(t, limit, func() error {
		if got := get(); !reflect.DeepEqual(got, want) {
			return fmt.Errorf("%s: got %+v, want %+v", fmt.Sprintf(format, args...), got, want)
		}
		return nil
	})
}

// Together runs f in n goroutines at once and waits for them.
func Together(n int, f func(i int)) {
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { f(i) })
	}
	all.Wait()
}
