package test

import (
	"bytes"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"goods/test/harness"
)

// goods runs a command to its end. It returns what it prints, and whether it ended with status 0.
func goods(t testing.TB, w *harness.World, args string, variables ...string) (stdout, stderr string, success bool) {
	t.Helper()
	var out, problem bytes.Buffer
	cmd := w.Command(strings.Fields(args), variables...)
	cmd.Stdout, cmd.Stderr = &out, &problem
	harness.Must(t, cmd.Start())
	kill := time.AfterFunc(30*time.Second, func() { _ = cmd.Process.Kill() })
	defer kill.Stop()
	success = cmd.Wait() == nil
	return out.String(), problem.String(), success
}

func TestCommands(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	for command, want := range map[string]string{
		"-h": "goods healthcheck", "--help": "goods migrate postgres", "help": "NAMESPACE", "version": "test", "-version": "test", "--version": "test",
	} {
		if out, stderr, success := goods(t, w, command, "HTTP_ADDR=nonsense"); !success || !strings.Contains(out, want) {
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
		if _, stderr, success := goods(t, w, "healthcheck", "HTTP_ADDR="+host+":"+port); !success {
			t.Errorf("healthcheck of %s:%s: %s", host, port, stderr)
		}
	}
}

// Whatever keeps goods from working is one line that says what to change.
func TestFailuresAtStart(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	taken, err := net.Listen("tcp", "127.0.0.1:0") // accepts, and says nothing
	harness.Must(t, err)
	defer taken.Close()
	address := taken.Addr().String()
	u, err := url.Parse(w.Env["POSTGRES_URL"])
	harness.Must(t, err)
	u.User = url.UserPassword("nobody", "s3cret")
	const role = `password authentication failed for user "nobody"`
	for _, test := range []struct{ args, variables, want string }{
		{"serve", "", `unknown command "serve"`},
		{"migrate", "", `unknown command "migrate"`},
		{"migrate redis", "", `unknown command "migrate redis"`},
		{"healthcheck now", "", `unknown command "healthcheck now"`},
		{"", "HTTP_ADDR=x POSTGRES_URL=x REDIS_URL=x NATS_URL=x CLICKHOUSE_URL=x EVENTS_BATCH=x NATS_REPLICAS=x NAMESPACE=X LOG_LEVEL=x",
			"HTTP_ADDR POSTGRES_URL REDIS_URL NATS_URL CLICKHOUSE_URL EVENTS_BATCH NATS_REPLICAS NAMESPACE LOG_LEVEL"},
		{"migrate postgres", "HTTP_ADDR=x NAMESPACE=X", "HTTP_ADDR NAMESPACE"},
		{"", "HTTP_ADDR=" + address, "HTTP_ADDR: " + address + " address already in use"},
		{"", "POSTGRES_URL=" + u.String(), role},
		{"migrate postgres", "POSTGRES_URL=" + u.String(), role},
		{"", "POSTGRES_URL=" + harness.WithPath(t, w.Env["POSTGRES_URL"], "nowhere"), `POSTGRES_URL: "nowhere" does not exist`},
		{"healthcheck", "HTTP_ADDR=127.0.0.1:1", "127.0.0.1:1 connection refused"},
		{"healthcheck", "HTTP_ADDR=" + address, address},
	} {
		_, stderr, success := goods(t, w, test.args, strings.Fields(test.variables)...)
		if success || !strings.HasPrefix(stderr, "goods: ") || strings.Count(stderr, "\n") != 1 || strings.Contains(stderr, "s3cret") {
			t.Errorf("goods %s with %s: got success %v and %q, want one line of failure", test.args, test.variables, success, stderr)
		}
		for _, part := range strings.Fields(test.want) {
			if !strings.Contains(stderr, part) {
				t.Errorf("goods %s with %s: got %q, want %s in it", test.args, test.variables, stderr, part)
			}
		}
	}
}

func TestStartWithOnlyPostgres(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	a := w.Start(t, nowhere, "REDIS_URL=redis://127.0.0.1:1", "NATS_URL=nats://127.0.0.1:1")
	a.Stock(t, 3)
	harness.Equal(t, a.List(t, 10, 1).Meta.Total, 3, "goods")
	ready(t, a, "redis", "nats", "clickhouse")
	harness.Must(t, a.Stop())
	w.Start(t)
	harness.Equal(t, w.Settled(t, 15*time.Second), 3, "events")
}

// The service listens only once Postgres is there, and migrated: until then a balancer is refused rather than kept
// waiting. Two processes may migrate.
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

// What the triggers promise holds for whoever writes, also by hand.
func TestWritesByHand(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	goods(t, w, "migrate postgres")
	check := func(statement, want string) {
		t.Helper()
		w.Exec(t, statement)
		harness.Equal(t, harness.One[string](t, w, `SELECT concat_ws(' ',
			(SELECT string_agg(concat(id, '@', priority, 'v', version), ' ' ORDER BY id) FROM goods),
			(SELECT concat('total ', total, ' removed ', removed) FROM meta), 'outbox', (SELECT count(*) FROM outbox))`), want, "after %s", statement)
	}
	check(`INSERT INTO goods (project_id, name, version) VALUES (1, 'a', 5), (1, 'b', 5)`, "1@1v1 2@2v1 total 2 removed 0 outbox 2")
	check(`INSERT INTO goods (project_id, name, removed) SELECT 1, 'c', true`, "1@1v1 2@2v1 3@3v1 total 3 removed 1 outbox 3")
	check(`UPDATE goods SET name = 'x', version = 40 WHERE id < 3`, "1@1v2 2@2v2 3@3v1 total 3 removed 1 outbox 5")
	const last = "1@1v3 2@2v3 3@3v2 total 3 removed 2 outbox 8"
	check(`UPDATE goods SET removed = NOT removed`, last)
	check(`UPDATE goods SET name = 'y' WHERE id = 99; INSERT INTO goods (project_id, name) SELECT 1, 'd' WHERE false`, last)
	check(`BEGIN; INSERT INTO goods (project_id, name) VALUES (1, 'e'); ROLLBACK`, last)
	for _, statement := range []string{
		`INSERT INTO goods (project_id, name) VALUES (9, 'x')`, `INSERT INTO goods (project_id, name) VALUES (1, '')`,
		`INSERT INTO goods (project_id, name, priority) VALUES (1, 'x', 77)`, `INSERT INTO goods (project_id, name, priority) VALUES (1, 'x', 1)`,
		`UPDATE goods SET priority = 1 WHERE id = 2`, `UPDATE goods SET priority = 0 WHERE id = 1`, `UPDATE goods SET priority = 9 WHERE id = 3`,
		`DELETE FROM goods WHERE id = 1`, `TRUNCATE goods`,
	} {
		if _, err := w.DB.Exec(statement); err == nil {
			t.Errorf("%s: got no error", statement)
		}
	}
	check(`SELECT`, last)
}
