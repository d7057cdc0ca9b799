package test

import (
	"bytes"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"

	"goods/test/harness"
)

const everyVariable = "HTTP_ADDR POSTGRES_URL REDIS_URL NATS_URL CLICKHOUSE_URL " +
	"EVENTS_BATCH NATS_REPLICAS NAMESPACE LOG_LEVEL"

// has tells whether text has every word of words.
func has(text, words string) bool {
	missing := func(word string) bool { return !strings.Contains(text, word) }
	return !slices.ContainsFunc(strings.Fields(words), missing)
}

// goods runs a command to its end. It returns what it prints, and whether it ended with status 0.
func goods(
	t testing.TB, w *harness.World, args string, variables ...string,
) (stdout, stderr string, success bool) {
	t.Helper()
	var out, problem bytes.Buffer
	cmd := w.Command(strings.Fields(args), variables...)
	cmd.Stdout, cmd.Stderr = &out, &problem
	harness.Must(t, cmd.Start())
	defer time.AfterFunc(15*time.Second, func() { _ = cmd.Process.Kill() }).Stop()
	success = cmd.Wait() == nil
	return out.String(), problem.String(), success
}

func TestCommands(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	for command, want := range map[string]string{
		"-h": everyVariable, "--help": everyVariable,
		"help":     everyVariable + " 127.0.0.1:8080 localhost:5432 localhost:6379 localhost:4222 localhost:9000",
		"version":  "goods (devel) unknown",
		"-version": "goods (devel) unknown", "--version": "goods (devel) unknown",
	} {
		if out, stderr, success := goods(t, w, command, "HTTP_ADDR=nonsense"); !success || !has(out, want) {
			t.Errorf("%s: got %q and %q, want %q", command, out, stderr, want)
		}
	}
	for range 2 {
		for _, database := range []string{"postgres", "clickhouse"} {
			out, stderr, success := goods(t, w, "migrate "+database)
			if !success || !strings.HasSuffix(out, database+" is up to date\n") {
				t.Errorf("migrate %s: got %q and %q", database, out, stderr)
			}
		}
	}
	a := w.Start(t)
	_, port, err := net.SplitHostPort(strings.TrimPrefix(a.URL, "http://"))
	harness.Must(t, err)
	for _, host := range []string{"127.0.0.1", "localhost", "", "0.0.0.0", "[::]"} {
		// It asks no proxy, which could only tell of another machine.
		_, stderr, success := goods(t, w, "healthcheck", "HTTP_ADDR="+host+":"+port,
			"HTTP_PROXY=http://127.0.0.1:1", "http_proxy=http://127.0.0.1:1")
		if !success {
			t.Errorf("healthcheck of %s:%s: %s", host, port, stderr)
		}
	}
}

// The service trusts every caller, so only this machine's can reach it unless it is told otherwise.
func TestDefaultAddress(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	a := w.Launch(t, "HTTP_ADDR=")
	harness.Eventually(t, 30*time.Second, func() error {
		log := a.Log() // the second one where another program has the port
		if has(log, `"msg":"listening","addr":"127.0.0.1:8080"`) ||
			has(log, "HTTP_ADDR 127.0.0.1:8080 already in use") {
			return nil
		}
		return fmt.Errorf("got %s, want it to listen on 127.0.0.1:8080", log)
	})
}

// URLs that are right are used as they say.
func TestURLs(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	https, err := net.Listen("tcp", "127.0.0.1:0")
	harness.Must(t, err)
	defer https.Close()
	first := make(chan byte, 1)
	go func() {
		c, err := https.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		b := make([]byte, 1)
		_, _ = c.Read(b)
		first <- b[0]
	}()
	a := w.Start(t, "CLICKHOUSE_URL=https://"+https.Addr().String()+"/db")
	select {
	case b := <-first:
		harness.Equal(t, b, 0x16, "the first byte that https:// sends, which begins a TLS handshake")
	case <-time.After(15 * time.Second):
		t.Error("https:// does not connect")
	}
	harness.Must(t, a.Stop())

	for _, value := range []string{
		"clickhouse://[::1]:9000/db", "http://[::1]:8123/db",
		"https://user:a%2Fb@clickhouse.invalid:8443/db?secure=true",
		"clickhouse://[::1]:9000,clickhouse.invalid:9000/db?dial_timeout=1s",
	} {
		harness.Must(t, w.Start(t, "CLICKHOUSE_URL="+value).Stop())
	}

	// A number of a database in the query is used, or refused: another application has number 0.
	value := strings.TrimSuffix(w.Env["REDIS_URL"], "/0") + "?db=2"
	if _, stderr, success := goods(t, w, "migrate postgres", "REDIS_URL="+value); !success {
		harness.Equal(t, has(stderr, "REDIS_URL"), true, "%s names the variable", stderr)
		return
	}
	a = w.Start(t, "REDIS_URL="+value)
	a.Create(t, "one")
	a.List(t, 1, 1)
	conn, err := redis.DialURL(w.Env["REDIS_URL"], redis.DialDatabase(2))
	harness.Must(t, err)
	defer conn.Close()
	harness.AwaitEqual(t, 15*time.Second, func() int {
		keys, _ := redis.Strings(conn.Do("KEYS", w.Namespace+":*"))
		return len(keys)
	}, 1, "keys in database 2")
}

// Whatever keeps goods from working is one line that says what to change.
func TestFailuresAtStart(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	taken, err := net.Listen("tcp", "127.0.0.1:0") // accepts, and says nothing
	harness.Must(t, err)
	defer taken.Close()
	address := taken.Addr().String()
	stranger := "POSTGRES_URL=" + withUser(t, w.Env["POSTGRES_URL"], "nobody")
	const role = `password authentication failed for user "nobody"`
	ascii := strings.ReplaceAll(w.Namespace, "-", "_") + "_ascii"
	w.Exec(t, `CREATE DATABASE `+ascii+` TEMPLATE template0 ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C'`)
	t.Cleanup(func() { w.Exec(t, `DROP DATABASE `+ascii+` WITH (FORCE)`) })
	asciiURL := harness.WithPath(t, w.Env["POSTGRES_URL"], ascii)
	nowhereURL := "POSTGRES_URL=" + harness.WithPath(t, w.Env["POSTGRES_URL"], "nowhere")
	withoutQuery, _, _ := strings.Cut(w.Env["POSTGRES_URL"], "?")
	postgres := "POSTGRES_URL=" + withoutQuery + "?sslmode="
	for _, test := range []struct{ args, variables, want string }{
		{"serve", "", `unknown command "serve": see goods -h`},
		{"migrate", "", `unknown command "migrate"`},
		{"migrate redis", "", `unknown command "migrate redis"`},
		{"healthcheck now", "", `unknown command "healthcheck now"`},
		{"", strings.ReplaceAll(everyVariable, " ", "=X ") + "=X", everyVariable},
		{"migrate postgres", "HTTP_ADDR=x NAMESPACE=X", "HTTP_ADDR NAMESPACE"},
		{"", "HTTP_ADDR=" + address, "HTTP_ADDR: " + address + " address already in use"},
		{"", stranger, role},
		{"migrate postgres", stranger, role},
		{"", nowhereURL, `POSTGRES_URL: "nowhere" does not exist`},
		{"healthcheck", "HTTP_ADDR=127.0.0.1:1", "127.0.0.1:1 connection refused"},
		{"healthcheck", "HTTP_ADDR=" + address, address},
		// What Postgres or its driver refuses will not change by waiting.
		{"", "POSTGRES_URL=" + asciiURL, "POSTGRES_URL UTF8"},
		{"migrate postgres", "POSTGRES_URL=" + asciiURL, "POSTGRES_URL UTF8"},
		{"", postgres + "disable&nonsense=1", `POSTGRES_URL unrecognized configuration parameter "nonsense"`},
		{"", postgres + "disable&TimeZone=Nowhere/Land", `POSTGRES_URL invalid value "TimeZone" "Nowhere/Land"`},
		{"", postgres + "verify-full&sslrootcert=/nowhere.pem", "POSTGRES_URL /nowhere.pem"},
		{"", postgres + "require", "POSTGRES_URL SSL"},
		{"", "PGSSLMODE=bogus POSTGRES_URL=" + withoutQuery, "PGSSLMODE"},
		{"", "PGCONNECT_TIMEOUT=bogus", "PGCONNECT_TIMEOUT"},
		{"migrate postgres", "PGTARGETSESSIONATTRS=bogus", "PGTARGETSESSIONATTRS"},
		{"", "PGSSLROOTCERT=/nowhere.pem POSTGRES_URL=" + withoutQuery + "?sslmode=verify-ca", "/nowhere.pem"},
	} {
		begin := time.Now()
		_, stderr, success := goods(t, w, test.args, strings.Fields(test.variables)...)
		if took := time.Since(begin); took > 10*time.Second {
			t.Errorf("goods %s with %s ended after %v", test.args, test.variables, took)
		}
		oneLine := strings.HasPrefix(stderr, "goods: ") && strings.Count(stderr, "\n") == 1
		if success || !oneLine || !has(stderr, test.want) || strings.Contains(stderr, secret) {
			t.Errorf("goods %s with %s: got success %v and %q, want one line with %s",
				test.args, test.variables, success, stderr, test.want)
		}
	}
}

// The service does without what else is not within reach. Passwords that are refused are not logged.
func TestStartWithOnlyPostgres(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	a := w.Start(t, "NATS_URL=nats://127.0.0.1:1",
		"CLICKHOUSE_URL="+withUser(t, w.Env["CLICKHOUSE_URL"], "nobody"),
		"REDIS_URL="+withUser(t, w.Env["REDIS_URL"], "nobody"))
	a.Stock(t, 3)
	harness.Equal(t, a.List(t, 10, 1).Meta.Total, 3, "goods")
	ready(t, a, "redis", "nats", "clickhouse")
	for _, name := range []string{"clickhouse", "redis"} {
		failures := func() int { return inLog(a, "failing", name) }
		harness.AwaitEqual(t, 15*time.Second, failures, 1, "failures of %s in the log", name)
	}
	harness.Equal(t, strings.Contains(a.Log(), secret), false, "a password is in the log")
}

// awaitLock waits until a session waits for an advisory lock.
func awaitLock(t testing.TB, w *harness.World) {
	t.Helper()
	waits := func() bool {
		return harness.One[bool](t, w, `
SELECT count(*) > 0
FROM pg_stat_activity
WHERE datname = current_database() AND wait_event = 'advisory'`)
	}
	harness.AwaitEqual(t, 15*time.Second, waits, true, "a session waits for the lock")
}

// The service listens only once Postgres is there, and migrated: until then a balancer is refused rather
// than kept waiting. Two processes may migrate.
func TestStartWaitsForPostgres(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	p := w.NewProxy(t, "POSTGRES_URL")
	p.Shut()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	harness.Must(t, err)
	address := free.Addr().String()
	free.Close()
	refusedYet := func() {
		t.Helper()
		if c, err := net.Dial("tcp", address); err == nil {
			c.Close()
			t.Error("the service listens without Postgres")
		}
	}
	a, b := w.Launch(t, "HTTP_ADDR="+address), w.Launch(t)
	a.AwaitLines(t, "waiting for postgres", 1)
	refusedYet()
	migrations := w.Hold(t, `SELECT pg_advisory_xact_lock(hashtext('goods.migrations'))`)
	p.Pass()
	awaitLock(t, w)
	refusedYet()
	harness.Must(t, migrations.Rollback())
	a.Await(t)
	b.Await(t)
	a.Create(t, "first")
	harness.Equal(t, b.List(t, 10, 1).Meta.Total, 1, "goods on the other replica")
}

// Shutting down, the service says so before it stops listening, and answers what is in flight.
func TestShutdown(t *testing.T) {
	w, a := started(t)
	tx := w.Hold(t, `SELECT lock_priorities()`)
	var running sync.WaitGroup
	running.Go(func() { a.Create(t, "in flight") })
	awaitLock(t, w)
	running.Go(func() { harness.Must(t, a.Stop()) })
	saidSo := false
	harness.AwaitEqual(t, 10*time.Second, func() bool {
		r, err := a.Try("GET", "/readyz", "")
		saidSo = saidSo || r.Status == 503
		return err == nil
	}, false, "the service listens")
	harness.Equal(t, saidSo, true, "503 from /readyz before it stopped listening")
	harness.Must(t, tx.Rollback())
	running.Wait()
	w.Start(t)
	harness.Equal(t, w.Settled(t, 15*time.Second), 1, "events")
}

// Connections that ask nothing hold nobody up, and neither does what the start waits for.
func TestShutdownWaitsForNobody(t *testing.T) {
	_, a := started(t)
	for i := range 20 {
		c, err := net.Dial("tcp", strings.TrimPrefix(a.URL, "http://"))
		harness.Must(t, err)
		defer c.Close()
		if i%2 == 0 { // keeps its connection after a reply; the others have never said anything
			_, err = c.Write([]byte("GET /healthz HTTP/1.1\r\nHost: goods\r\n\r\n"))
			harness.Must(t, err)
			_, err = c.Read(make([]byte, 1))
			harness.Must(t, err)
		}
	}
	ends := func(a *harness.App, limit time.Duration, how string) {
		t.Helper()
		begin := time.Now()
		_ = a.Stop() // one that has not yet listened may call it an error
		if took := time.Since(begin); took > limit {
			t.Errorf("%s: ended after %v, want %v", how, took, limit)
		}
	}
	ends(a, 3*time.Second, "with silent and idle connections")

	w := harness.NewWorld(t) // where migrations are to be applied
	tx := w.Hold(t, `SELECT pg_advisory_xact_lock(hashtext('goods.migrations'))`)
	b := w.Launch(t)
	awaitLock(t, w)
	ends(b, 3*time.Second, "waiting for another's migrations")
	harness.Must(t, tx.Rollback())

	p := w.NewProxy(t, "POSTGRES_URL")
	for how, fail := range map[string]func(){"shut": p.Shut, "frozen": func() { t.Cleanup(p.Freeze()) }} {
		fail()
		c := w.Launch(t)
		c.AwaitLines(t, "waiting for postgres", 1)
		ends(c, 3*time.Second, "waiting for a Postgres that is "+how)
	}
}
