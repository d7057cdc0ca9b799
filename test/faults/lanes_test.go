package faults

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"

	"goods/test/harness"
)

// The lanes that take the longest come first.
var lanes = []lane{
	{"postgres frozen", []fault{
		{name: "Postgres frozen for twelve seconds, two services", breaks: "postgres", replicas: 2, during: frozenForLong, postgres: true},
		{name: "first of two Postgres hosts frozen", through: "postgres", twoHosts: true, during: firstHostFrozen, postgres: true},
		{name: "Postgres frozen, one of two services stopped", breaks: "postgres", replicas: 2, during: stoppedWhileFrozen, postgres: true},
	}},
	{"sigterm", []fault{
		{name: "fifty SIGTERMs under new connections", replicas: 3, during: terminated, within: 2 * time.Second},
		{name: "services restarted in turn with SIGTERM", replicas: 2, during: rolled, within: 3 * time.Second},
	}},
	{"wire", []fault{
		{name: "replies of Postgres torn", through: "postgres", during: spoiled(torn(50)), postgres: true},
		{name: "commits of Postgres unheard", through: "postgres", during: spoiled(unheard), postgres: true},
		{name: "replies of Redis torn", through: "redis", during: spoiled(torn(5))},
		{name: "replies of NATS torn", through: "nats", during: spoiled(torn(5))},
		{name: "replies of ClickHouse torn", through: "clickhouse", during: spoiled(torn(5))},
		{name: "replies of Postgres lost", through: "postgres", during: spoiled(lost), postgres: true},
		{name: "replies of Redis lost", through: "redis", during: spoiled(lost)},
		{name: "replies of NATS lost", through: "nats", during: spoiled(lost)},
		{name: "replies of ClickHouse lost", through: "clickhouse", during: spoiled(lost)},
	}},
	{"postgres", []fault{
		{name: "Postgres restarted", breaks: "postgres", during: stopped(0, "postgres"), postgres: true},
		{name: "Postgres stopped", breaks: "postgres", during: stopped(aWhile, "postgres"), postgres: true},
		{name: "Postgres killed", breaks: "postgres", during: killed("postgres"), postgres: true},
		{name: "Postgres frozen", breaks: "postgres", during: frozen("postgres"), postgres: true},
		{name: "Postgres out of connections", breaks: "postgres", during: outOfConnections, postgres: true},
		{name: "Postgres: goods locked for ten seconds", during: goodsLocked, postgres: true},
	}},
	{"clickhouse", []fault{
		{name: "ClickHouse stopped", breaks: "clickhouse", during: stopped(aWhile, "clickhouse")},
		{name: "ClickHouse killed", breaks: "clickhouse", during: killed("clickhouse")},
		{name: "ClickHouse frozen", breaks: "clickhouse", during: frozen("clickhouse")},
		{name: "ClickHouse table renamed away", during: withoutTable(func(testing.TB, *scene) {})},
		{name: "ClickHouse refuses: too many parts", during: tooManyParts},
		{name: "ClickHouse refuses: read only", breaks: "clickhouse", through: "clickhouse", during: readOnly},
	}},
	{"nats", []fault{
		{name: "NATS stopped", breaks: "nats", during: stopped(aWhile, "nats")},
		{name: "NATS killed", breaks: "nats", during: killed("nats")},
		{name: "NATS frozen", breaks: "nats", during: frozen("nats")},
		{name: "NATS restarted", breaks: "nats", during: stopped(0, "nats")},
		{name: "NATS stream full", during: streamFull},
		{name: "NATS without JetStream", breaks: "nats", during: withoutJetStream},
		{name: "NATS back without its data", breaks: "nats", during: withoutTable(natsEmptied), notices: 15 * time.Second},
		{name: "NATS stream deleted with events in it", during: withoutTable(streamDeleted), notices: 15 * time.Second},
	}},
	{"service", []fault{
		{name: "service killed twenty times", during: serviceKilled, kills: true},
		{name: "one of two services killed and restarted", replicas: 2, during: replicaKilled, kills: true},
		{name: "one of three services killed and restarted", replicas: 3, during: replicaKilled, kills: true},
		{name: "messages repeated, out of order, and garbage", during: messagesSpoiled},
	}},
	{"clients", []fault{
		{name: "clients that send a byte a second", during: slowClients},
		{name: "bodies that never end", during: endlessBodies},
		{name: "ten thousand idle connections", during: idleClients, within: 5 * time.Second},
		{name: "clients that leave", during: leavingClients},
	}},
	{"redis", []fault{
		{name: "Redis stopped, back with old data", breaks: "redis", during: stopped(aWhile, "redis")},
		{name: "Redis killed", breaks: "redis", during: killed("redis")},
		{name: "Redis frozen", breaks: "redis", during: frozen("redis")},
		{name: "Redis back empty", breaks: "redis", during: redisEmptied},
		{name: "Redis answers after 100 ms", through: "redis", during: spoiled(late(100 * time.Millisecond)), within: 2 * time.Second},
		{name: "Redis answers after 400 ms", through: "redis", during: spoiled(late(400 * time.Millisecond))},
	}},
	{"together", []fault{
		{name: "NATS and ClickHouse killed", breaks: "nats clickhouse", during: killed("nats", "clickhouse")},
		{name: "Redis and Postgres killed", breaks: "redis postgres", during: killed("redis", "postgres"), postgres: true},
		{name: "Redis frozen, service killed", breaks: "redis", during: frozenAndKilled, kills: true},
		{name: "only Postgres within reach, service killed", breaks: "redis nats clickhouse", during: onlyPostgres, kills: true},
	}},
}

func stopped(d time.Duration, names ...string) func(testing.TB, *scene) {
	return func(t testing.TB, s *scene) {
		s.sh(t, "stop", names...)
		s.last(d)
		s.sh(t, "start", names...)
	}
}

func killed(names ...string) func(testing.TB, *scene) {
	return func(t testing.TB, s *scene) {
		for _, name := range names {
			s.servers.Kill(t, name)
		}
		s.last(aWhile)
		s.sh(t, "start", names...)
	}
}

func frozen(name string) func(testing.TB, *scene) {
	return func(t testing.TB, s *scene) {
		s.sh(t, "pause", name)
		s.last(2 * aWhile)
		s.sh(t, "resume", name)
	}
}

// frozenForLong is longer than any timeout of the service.
func frozenForLong(t testing.TB, s *scene) {
	s.sh(t, "pause", "postgres")
	s.last(12 * time.Second)
	for _, a := range s.apps {
		if r := a.Call(t, "GET", "/readyz", ""); r.Status != 503 || !strings.Contains(r.Body, `"postgres":"down"`) {
			t.Errorf("/readyz with Postgres frozen: %d %s", r.Status, r.Body)
		}
	}
	s.sh(t, "resume", "postgres")
}

// firstHostFrozen leaves the first host frozen until the second serves.
func firstHostFrozen(t testing.TB, s *scene) {
	defer s.proxy.Freeze()()
	s.last(aWhile)
	begin := time.Now()
	harness.Eventually(t, 13*time.Second, func() error { return s.load.works(time.Now().Add(-aWhile)) })
	t.Logf("the second host serves after %v", time.Since(begin))
}

// stoppedWhileFrozen ends a service whose requests cannot end well.
func stoppedWhileFrozen(t testing.TB, s *scene) {
	s.sh(t, "pause", "postgres")
	s.last(aWhile / 2)
	s.load.aim(s.apps[0])
	begin := time.Now()
	if err := s.apps[1].Stop(); err != nil || time.Since(begin) > callWithin+time.Second {
		t.Errorf("the service ended after %v with %v", time.Since(begin), err)
	}
	s.sh(t, "resume", "postgres")
	s.restart(t, 1)
}

func goodsLocked(t testing.TB, s *scene) {
	tx := s.Hold(t, `LOCK TABLE goods IN ACCESS EXCLUSIVE MODE`)
	s.last(10 * time.Second)
	harness.Must(t, tx.Rollback())
}

// outOfConnections takes every connection that the server allows, also those that the service has.
func outOfConnections(t testing.TB, s *scene) {
	ctx := context.Background()
	conn, err := s.DB.Conn(ctx)
	harness.Must(t, err)
	defer conn.Close()
	others, err := sql.Open("postgres", harness.WithPath(t, s.Env["POSTGRES_URL"], "postgres"))
	harness.Must(t, err)
	defer others.Close()
	for full := (time.Time{}); full.IsZero() || time.Since(full) < aWhile; {
		c, err := others.Conn(ctx)
		if err == nil {
			defer c.Close()
			continue
		}
		if full.IsZero() {
			full = time.Now()
		}
		_, err = conn.ExecContext(ctx, `
SELECT pg_terminate_backend(pid)
FROM pg_stat_activity
WHERE datname = current_database()
  AND backend_type = 'client backend'
  AND pid <> pg_backend_pid()`)
		harness.Must(t, err)
	}
}

// spoiled lets the proxy spoil replies for a while.
func spoiled(reply harness.Hook) func(testing.TB, *scene) {
	return func(_ testing.TB, s *scene) {
		s.proxy.Spoil(nil, reply)
		s.last(aWhile)
		s.proxy.Pass()
	}
}

// late is an answer that comes after d.
func late(d time.Duration) harness.Hook {
	return func(to net.Conn, part []byte) error {
		<-time.After(d)
		_, err := to.Write(part)
		return err
	}
}

// torn ends one in n replies in the middle.
func torn(n int) harness.Hook {
	return func(to net.Conn, part []byte) error {
		if rand.N(n) == 0 {
			_, _ = to.Write(part[:rand.N(len(part))])
			return io.ErrClosedPipe
		}
		_, err := to.Write(part)
		return err
	}
}

// lost is an answer that never comes, on a connection that stays.
func lost(net.Conn, []byte) error { return nil }

// unheard ends one in four connections when Postgres has committed and says so.
func unheard(to net.Conn, part []byte) error {
	if bytes.Contains(part, []byte("COMMIT\x00")) && rand.N(4) == 0 {
		return io.ErrClosedPipe
	}
	_, err := to.Write(part)
	return err
}

func redisEmptied(t testing.TB, s *scene) {
	s.sh(t, "stop", "redis")
	_ = os.Remove(filepath.Join(s.servers.Dir, "redis", "dump.rdb")) // there may be none
	s.sh(t, "start", "redis")
}

func withoutJetStream(t testing.TB, s *scene) {
	s.sh(t, "stop", "nats")
	u, err := url.Parse(s.Env["NATS_URL"])
	harness.Must(t, err)
	cmd := exec.Command("nats-server", "-a", u.Hostname(), "-p", u.Port())
	if cmd.Err != nil { // Debian keeps it where only root's PATH looks
		cmd.Path, cmd.Err = "/usr/sbin/nats-server", nil
	}
	harness.Must(t, cmd.Start())
	s.last(2 * aWhile)
	harness.Must(t, cmd.Process.Kill())
	_ = cmd.Wait() // says that it was killed
	s.sh(t, "start", "nats")
}

// withoutTable keeps events out of ClickHouse, so that NATS has some when it fails.
func withoutTable(fail func(testing.TB, *scene)) func(testing.TB, *scene) {
	return func(t testing.TB, s *scene) {
		s.query(t, `RENAME TABLE goods_log TO goods_log_hidden`)
		s.last(aWhile)
		fail(t, s)
		s.query(t, `RENAME TABLE goods_log_hidden TO goods_log`)
	}
}

func (s *scene) query(t testing.TB, statement string) {
	t.Helper()
	harness.Must(t, s.ClickHouse.Exec(context.Background(), statement))
}

func natsEmptied(t testing.TB, s *scene) {
	s.servers.Kill(t, "nats")
	harness.Must(t, os.RemoveAll(filepath.Join(s.servers.Dir, "nats", "jetstream")))
	s.sh(t, "start", "nats")
}

func streamDeleted(t testing.TB, s *scene) {
	harness.Must(t, s.JS.DeleteStream(context.Background(), s.Stream()))
}

func streamFull(t testing.TB, s *scene) {
	ctx := context.Background()
	stream, err := s.JS.Stream(ctx, s.Stream())
	harness.Must(t, err)
	before, small := stream.CachedInfo().Config, stream.CachedInfo().Config
	small.MaxMsgs = 2
	_, err = s.JS.UpdateStream(ctx, small)
	harness.Must(t, err)
	withoutTable(func(testing.TB, *scene) {})(t, s)
	_, err = s.JS.UpdateStream(ctx, before)
	harness.Must(t, err)
}

// tooManyParts puts a table in the place that takes one part and no more.
func tooManyParts(t testing.TB, s *scene) {
	var create string
	harness.Must(t, s.ClickHouse.QueryRow(context.Background(), `SHOW CREATE TABLE goods_log`).Scan(&create))
	s.query(t, `RENAME TABLE goods_log TO goods_log_hidden`)
	s.query(t, create+`, parts_to_delay_insert = 1, parts_to_throw_insert = 1`)
	s.last(aWhile)
	s.query(t, `RENAME TABLE goods_log TO goods_log_full, goods_log_hidden TO goods_log`)
	s.query(t, `INSERT INTO goods_log SELECT * FROM goods_log_full`)
}

// readOnly changes the profile of the user, which holds for new connections.
func readOnly(t testing.TB, s *scene) {
	path := filepath.Join(s.servers.Dir, "clickhouse", "users.xml")
	users, err := os.ReadFile(path)
	harness.Must(t, err)
	options, err := clickhouse.ParseDSN(s.Env["CLICKHOUSE_URL"])
	harness.Must(t, err)
	become := func(text string, refused bool) {
		harness.Must(t, os.WriteFile(path, []byte(text), 0o600))
		harness.Eventually(t, 10*time.Second, func() error { // ClickHouse looks at the file every two seconds
			conn, err := clickhouse.Open(options)
			harness.Must(t, err)
			defer conn.Close()
			if err = conn.Exec(context.Background(), `CREATE TABLE IF NOT EXISTS goods_trial (n UInt8) ENGINE = Memory`); (err != nil) != refused {
				return fmt.Errorf("ClickHouse has not read %s: %v", path, err)
			}
			return nil
		})
		s.proxy.Cut()
	}
	become(strings.Replace(string(users), "<log_queries>", "<readonly>1</readonly><log_queries>", 1), true)
	s.last(aWhile)
	become(string(users), false)
}

func serviceKilled(t testing.TB, s *scene) {
	for range 20 {
		s.last(rand.N(300 * time.Millisecond))
		s.restart(t, 0)
	}
}

// replicaKilled kills the last of several, and starts it again as its supervisor would.
func replicaKilled(t testing.TB, s *scene) {
	dead := len(s.apps) - 1
	harness.Must(t, s.apps[dead].Process.Kill())
	s.load.aim(s.apps[:dead]...)
	s.last(aWhile)
	s.restart(t, dead)
}

// rolled restarts the replicas one after the other, as a balancer sees it: it leaves one that is not ready.
func rolled(t testing.TB, s *scene) {
	for i, a := range s.apps {
		ended := make(chan error, 1)
		go func() { ended <- a.Stop() }()
		harness.Eventually(t, 5*time.Second, func() error {
			if a.Ready() == nil {
				return errors.New("the service is still ready")
			}
			return nil
		})
		s.load.aim(s.apps[1-i])
		if err := <-ended; err != nil {
			t.Errorf("the service ended with %v", err)
		}
		s.restart(t, i)
	}
}

func frozenAndKilled(t testing.TB, s *scene) {
	s.sh(t, "pause", "redis")
	s.last(aWhile / 2)
	s.restart(t, 0)
	s.last(aWhile / 2)
	s.sh(t, "resume", "redis")
}

func onlyPostgres(t testing.TB, s *scene) {
	s.sh(t, "stop", "redis", "nats", "clickhouse")
	s.restart(t, 0)
	s.last(aWhile)
	s.sh(t, "start", "redis", "nats", "clickhouse")
}

// messagesSpoiled publishes what has passed twice more, the newest first, and what is no message of events.
func messagesSpoiled(t testing.TB, s *scene) {
	passing, err := s.JS.Conn().SubscribeSync(s.Subject())
	harness.Must(t, err)
	s.last(aWhile)
	n, _, err := passing.Pending()
	harness.Must(t, err)
	var messages []string
	for range n {
		m, err := passing.NextMsg(time.Second)
		harness.Must(t, err)
		messages = append(messages, string(m.Data), string(m.Data))
	}
	slices.Reverse(messages)
	garbage := []string{"", "null", "{}", "[]", "[null]", "[{}]", "[[]]", "1", `"text"`, "{", "\x00\xff", strings.Repeat("x", 1<<16),
		strings.TrimSuffix(messages[0], "]") + ",{}]", strings.Replace(messages[0], ":", `:"`, 1)}
	for _, m := range append(messages, garbage...) {
		_, err := s.JS.Publish(context.Background(), s.Subject(), []byte(m))
		harness.Must(t, err)
	}
	harness.Eventually(t, 20*time.Second, func() error {
		if r := s.apps[0].Call(t, "GET", "/metrics", ""); !strings.Contains(r.Body, fmt.Sprintf("\ngoods_events_thrown_away_total %d\n", len(garbage))) {
			return fmt.Errorf("want %d messages thrown away", len(garbage))
		}
		return nil
	})
}
