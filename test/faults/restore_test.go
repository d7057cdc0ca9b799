package faults

import (
	"io"
	"net"
	"net/http"
	"net/url"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"goods/test/harness"
)

// restored backs everything up while clients go on, restores it into new databases, and then has the
// service's own databases return to the moment of the backup, with the commands of docs/operations.md.
func restored(s *scene) {
	s.last(aWhile / 2)
	dump := filepath.Join(s.TempDir(), "goods.dump")
	s.run("pg_dump", "--format=custom", "--file="+dump, s.Env["POSTGRES_URL"])
	copied := clickHouse(s, s.World, `SELECT * FROM goods_log FINAL FORMAT Native`, "")
	// What comes now is in no backup. NATS still has some of it when the replicas end.
	s.last(aWhile)
	s.sh("pause", "clickhouse")
	s.last(aWhile)
	s.load.void.Store(true)
	s.load.stop()
	for _, a := range s.apps {
		harness.Equal(s, a.Stop(), nil, "how the service ended")
	}
	s.sh("resume", "clickhouse")

	other := harness.NewWorld(s, s.servers.URLs...)
	s.run("pg_restore", "--exit-on-error", "--no-owner", "--dbname="+other.Env["POSTGRES_URL"], dump)
	if out, err := other.Command([]string{"migrate", "clickhouse"}).CombinedOutput(); err != nil {
		s.Fatalf("goods migrate clickhouse: %v\n%s", err, out)
	}
	clickHouse(s, other, copied, "INSERT INTO goods_log FORMAT Native")
	removeFuture(s, other)
	compareHistory(s, other, s.World)
	app := other.Start(s)
	harness.Eventually(s, recoversWithin, app.Ready)
	other.Settled(s, settlesWithin)
	harness.Equal(s, app.Stop(), nil, "how the service ended")

	s.Exec(s, `DROP SCHEMA public CASCADE; CREATE SCHEMA public`)
	s.run("pg_restore", "--exit-on-error", "--no-owner", "--dbname="+s.Env["POSTGRES_URL"], dump)
	harness.Must(s, s.JS.DeleteStream(s.Context(), s.Stream()))
	removeFuture(s, s.World)
	for i := range s.apps {
		s.apps[i] = s.Start(s)
		harness.Eventually(s, recoversWithin, s.apps[i].Ready)
	}
	s.load.aim(s.apps...)
	s.load.forget(s)
	s.last(aWhile)
}

// run runs a program of Postgres' clients.
func (s *scene) run(name string, args ...string) {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		s.Fatalf("%s: %v\n%s", name, err, out)
	}
}

// clickHouse posts body to the HTTP port of w's ClickHouse, as data of query if there is one, and returns
// the answer.
func clickHouse(s *scene, w *harness.World, body, query string) string {
	u, err := url.Parse(w.Env["CLICKHOUSE_URL"])
	harness.Must(s, err)
	port, err := strconv.Atoi(u.Port())
	harness.Must(s, err)
	parameters := url.Values{"database": {strings.TrimPrefix(u.Path, "/")}}
	if query != "" {
		parameters.Set("query", query)
	}
	address := net.JoinHostPort(u.Hostname(), strconv.Itoa(port+1)) // as servers.sh has them
	response, err := http.Post("http://"+address+"/?"+parameters.Encode(), "", strings.NewReader(body))
	harness.Must(s, err)
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	harness.Must(s, err)
	if response.StatusCode != http.StatusOK {
		s.Fatalf("%s %.200s: %s", query, body, answer)
	}
	return string(answer)
}

// removeFuture deletes from goods_log every version that w's Postgres has not.
func removeFuture(s *scene, w *harness.World) {
	versions := harness.One[string](s, w, `
SELECT coalesce(string_agg(id || E'\t' || version || E'\n', ''), '') FROM goods`)
	clickHouse(s, w, `CREATE TABLE restored (Id Int32, Version UInt32) ENGINE = Log`, "")
	clickHouse(s, w, versions, "INSERT INTO restored FORMAT TabSeparated")
	clickHouse(s, w, `
CREATE TABLE future ENGINE = Log AS
SELECT Id, Version
FROM goods_log
ANY LEFT JOIN (SELECT Id, Version AS Latest FROM restored) USING Id
WHERE Version > Latest
GROUP BY Id, Version`, "")
	s.Logf("the future has %s versions", strings.TrimSpace(clickHouse(s, w, `SELECT count() FROM future`, "")))
	clickHouse(s, w, `ALTER TABLE goods_log DELETE WHERE (Id, Version) IN (SELECT Id, Version FROM future)`, "")
	const pending = `SELECT count() FROM system.mutations WHERE database = currentDatabase() AND NOT is_done`
	count := func() string { return clickHouse(s, w, pending, "") }
	harness.AwaitEqual(s, time.Minute, count, "0\n", "mutations that go on")
	clickHouse(s, w, `DROP TABLE restored`, "")
	clickHouse(s, w, `DROP TABLE future`, "")
}

// compareHistory compares what was restored, row by row, with the log of the service that it was backed up
// from: each good and each event is what that log has as its version.
func compareHistory(s *scene, restored, original *harness.World) {
	log := original.Events(s)
	goods, events := restored.Goods(s), restored.Events(s)
	for version, text := range goods {
		harness.Equal(s, text, log[version], "the good restored in version %s", version)
	}
	for version, text := range events {
		harness.Equal(s, text, log[version], "the event %s restored", version)
	}
	s.Logf("%d goods and %d events were restored", len(goods), len(events))
}
