package faults

import (
	"bytes"
	"context"
	"database/sql"
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
	{"postgres frozen", "postgres", []fault{
		{name: "Postgres frozen for twelve seconds, two services", replicas: 2, during: broken("pause", 12*time.Second, "resume", "postgres"), postgres: true},
		{name: "first of two Postgres hosts frozen", through: "postgres", twoHosts: true, during: firstHostFrozen, postgres: true},
		{name: "Postgres frozen, one of two services stopped", replicas: 2, during: stoppedWhileFrozen, postgres: true},
	}},
	{"sigterm", "", []fault{
		{name: "fifty SIGTERMs under new connections", replicas: 3, during: terminated},
		{name: "services restarted in turn with SIGTERM", replicas: 2, during: rolled},
	}},
	{"wire", "", []fault{
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
	{"postgres", "postgres", []fault{
		{name: "Postgres restarted", during: broken("stop", 0, "start", "postgres"), postgres: true},
		{name: "Postgres stopped", during: broken("stop", aWhile, "start", "postgres"), postgres: true},
		{name: "Postgres killed", during: broken("kill", aWhile, "start", "postgres"), postgres: true},
		{name: "Postgres frozen", during: broken("pause", 2*aWhile, "resume", "postgres"), postgres: true},
		{name: "Postgres out of connections", during: outOfConnections, postgres: true},
		{name: "Postgres: goods locked for ten seconds", during: goodsLocked, postgres: true},
	}},
	{"clickhouse", "clickhouse", []fault{
		{name: "ClickHouse stopped", during: broken("stop", aWhile, "start", "clickhouse")},
		{name: "ClickHouse killed", during: broken("kill", aWhile, "start", "clickhouse")},
		{name: "ClickHouse frozen", during: broken("pause", 2*aWhile, "resume", "clickhouse")},
		{name: "ClickHouse table renamed away", during: withoutTable(func(testing.TB, *scene) {})},
		{name: "ClickHouse refuses: too many parts", during: tooManyParts},
		{name: "ClickHouse refuses: read only", through: "clickhouse", during: readOnly},
	}},
	{"nats", "nats", []fault{
		{name: "NATS stopped", during: broken("stop", aWhile, "start", "nats")},
		{name: "NATS killed", during: broken("kill", aWhile, "start", "nats")},
		{name: "NATS frozen", during: broken("pause", 2*aWhile, "resume", "nats")},
		{name: "NATS restarted", during: broken("stop", 0, "start", "nats")},
		{name: "NATS stream full", during: streamFull},
		{name: "NATS without JetStream", during: withoutJetStream},
		{name: "NATS back without its data", during: withoutTable(natsEmptied), recovers: 15 * time.Second},
		{name: "NATS stream deleted with events in it", during: withoutTable(streamDeleted), recovers: 15 * time.Second},
	}},
	{"service", "", []fault{
		{name: "service killed twenty times", during: serviceKilled, kills: true},
		{name: "one of two services killed and restarted", replicas: 2, during: replicaKilled, kills: true},
		{name: "one of three services killed and restarted", replicas: 3, during: replicaKilled, kills: true},
		{name: "messages repeated, out of order, and garbage", during: messagesSpoiled},
	}},
	{"clients", "", []fault{
		{name: "clients that send a byte a second", during: slowClients},
		{name: "bodies that never end", during: endlessBodies},
		{name: "ten thousand idle connections", during: idleClients},
		{name: "clients that leave", during: leavingClients},
	}},
	{"redis", "redis", []fault{
		{name: "Redis stopped, back with old data", during: broken("stop", aWhile, "start", "redis")},
		{name: "Redis killed", during: broken("kill", aWhile, "start", "redis")},
		{name: "Redis frozen", during: broken("pause", 2*aWhile, "resume", "redis")},
		{name: "Redis back empty", during: redisEmptied},
		{name: "Redis answers after 100 ms", through: "redis", during: spoiled(late(100 * time.Millisecond))},
		{name: "Redis answers after 400 ms", through: "redis", during: spoiled(late(400 * time.Millisecond))},
	}},
	{"together", "postgres redis nats clickhouse", []fault{
		{name: "NATS and ClickHouse killed", during: broken("kill", aWhile, "start", "nats", "clickhouse")},
		{name: "Redis and Postgres killed", during: broken("kill", aWhile, "start", "redis", "postgres"), postgres: true},
		{name: "Redis frozen, service killed", during: killedWhile("pause", "resume", "redis"), kills: true},
		{name: "only Postgres within reach, service killed", during: killedWhile("stop", "start", "redis", "nats", "clickhouse"), kills: true},
	}},
}

// broken runs a command on servers, and after d the one that undoes it.
func broken(down string, d time.Duration, up string, names ...string) func(testing.TB, *scene) {
	return func(t testing.TB, s *scene) {
		s.sh(t, down, names...)
		s.last(d)
		s.sh(t, up, names...)
	}
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
		return harness.Forward(to, part)
	}
}

// torn ends one in n replies in the middle.
func torn(n int) harness.Hook {
	return func(to net.Conn, part []byte) error {
		if rand.N(n) == 0 {
			_, _ = to.Write(part[:rand.N(len(part))])
			return io.ErrClosedPipe
		}
		return harness.Forward(to, part)
	}
}

// lost is an answer that never comes, on a connection that stays.
func lost(net.Conn, []byte) error { return nil }

// unheard ends one in four connections when Postgres has committed and says so.
func unheard(to net.Conn, part []byte) error {
	if bytes.Contains(part, []byte("COMMIT\x00")) && rand.N(4) == 0 {
		return io.ErrClosedPipe
	}
	return harness.Forward(to, part)
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
	s.sh(t, "kill", "nats")
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
	garbage := []string{"", "[]", "{", "\x00\xff", strings.TrimSuffix(messages[0], "]") + ",{}]"}
	for _, m := range append(messages, garbage...) {
		_, err := s.JS.Publish(context.Background(), s.Subject(), []byte(m))
		harness.Must(t, err)
	}
}
