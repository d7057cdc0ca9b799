package test

import (
	"bytes"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
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
		} else {
			for line := range strings.Lines(out) {
				harness.Equal(t, len(line) <= 101, true, "whether %q fits 100 columns", line)
			}
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
	other := httptest.NewServer(http.NotFoundHandler()) // of another program
	defer other.Close()
	otherAddress := other.Listener.Addr().String()
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
		{"healthcheck", "HTTP_ADDR=" + otherAddress, otherAddress + " 404"},
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
