package faults

import (
	"bytes"
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
	"time"

	"github.com/nats-io/nats.go"

	"goods/test/harness"
)

// lanes are faults that happen one after the other, each lane to servers of its own. The longest lanes come
// first.
var lanes = []struct {
	name, breaks string
	faults       []fault
}{
	{"postgres frozen", "postgres", []fault{
		{name: "Postgres frozen for twelve seconds, two services", replicas: 2,
			during: broken("pause", 12*time.Second, "resume", "postgres"), postgres: true},
		{name: "first of two Postgres hosts frozen", through: "postgres", twoHosts: true,
			during: firstHostFrozen, postgres: true},
		{name: "Postgres frozen, one of two services stopped", replicas: 2,
			during: stoppedWhileFrozen, postgres: true},
	}},
	{"failover", "postgres", []fault{
		{name: "Postgres killed, synchronous standby promoted", standby: "synchronous", replicas: 2,
			during: promoted, postgres: true},
	}},
	{"switch-over", "postgres", []fault{
		{name: "Postgres stopped, asynchronous standby promoted", standby: "asynchronous", replicas: 2,
			during: switchedOver, postgres: true},
	}},
	{"commits lost", "postgres clickhouse", []fault{
		{name: "Postgres killed, standby without its last commits promoted", standby: "asynchronous", replicas: 2,
			during: commitsLost, postgres: true, loses: true, leaves: true},
	}},
	{"standby lost", "postgres", []fault{
		{name: "synchronous standby killed", standby: "synchronous", replicas: 2,
			during: standbyLost, postgres: true},
	}},
	{"sigterm", "", []fault{
		{name: "fifty SIGTERMs under new connections", replicas: 2, during: terminated},
		{name: "services restarted in turn with SIGTERM", replicas: 2, during: rolled},
	}},
	{"restore", "clickhouse", []fault{
		{name: "restored to an earlier moment", replicas: 2,
			during: restored, kills: true, postgres: true, loses: true},
	}},
	{"balancers", "", []fault{
		{name: "services behind nginx restarted in turn", replicas: 2,
			during: rolledBehind("nginx"), gateway: true},
		{name: "services behind HAProxy restarted in turn", replicas: 2, during: rolledBehind("haproxy")},
	}},
	{"wire", "", []fault{
		{name: "replies of Postgres torn", through: "postgres", during: spoiled(torn(50, "")), postgres: true},
		{name: "commits of Postgres unheard", through: "postgres",
			during: spoiled(torn(4, "COMMIT\x00")), postgres: true},
		{name: "replies of Redis torn", through: "redis", during: spoiled(torn(5, ""))},
		{name: "replies of NATS torn", through: "nats", during: spoiled(torn(5, ""))},
		{name: "replies of ClickHouse torn", through: "clickhouse", during: spoiled(torn(5, ""))},
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
		{name: "ClickHouse with another table in its place", during: withoutTable(func(*scene) {})},
		{name: "ClickHouse table gone", during: tableGone},
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
		{name: "NATS back without its data",
			during: withoutTable(emptied("kill", "nats", "jetstream")), recovers: 15 * time.Second},
		{name: "NATS stream deleted with events in it",
			during: withoutTable(streamDeleted), recovers: 15 * time.Second},
	}},
	{"nats away for long", "nats", []fault{
		{name: "NATS stopped for forty seconds", during: broken("stop", 40*time.Second, "start", "nats")},
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
		{name: "Redis back empty", during: emptied("stop", "redis", "dump.rdb")},
		{name: "Redis answers after 100 ms", through: "redis", during: spoiled(late(100 * time.Millisecond))},
		{name: "Redis answers after 400 ms", through: "redis", during: spoiled(late(400 * time.Millisecond))},
	}},
	{"deployments", "postgres clickhouse", []fault{
		{name: "Redis behind TLS frozen", prepare: redisBehindTLS, during: redisFrozen},
		{name: "NATS password changed, and back", prepare: natsWithPassword, during: passwordChanged},
		{name: "reader of the log gone", prepare: logIntoPipe, during: readerGone},
		{name: "no right but those of deploy/, ClickHouse killed", prepare: leastPrivilege,
			during: broken("kill", aWhile, "start", "clickhouse")},
	}},
	{"standby first", "postgres", []fault{
		{name: "standby named first, primary restarted", standby: "asynchronous", prepare: standbyNamedFirst,
			during: broken("stop", aWhile, "start", "postgres"), postgres: true},
	}},
	{"dead rows", "postgres", []fault{
		{name: "long transaction, and a million dead rows in the outbox", during: deadRows},
	}},
	{"together", "postgres redis nats clickhouse", []fault{
		{name: "NATS and ClickHouse killed", during: broken("kill", aWhile, "start", "nats", "clickhouse")},
		{name: "Redis and Postgres killed",
			during: broken("kill", aWhile, "start", "redis", "postgres"), postgres: true},
		{name: "Redis frozen, service killed", during: killedWhile("pause", "resume", "redis"), kills: true},
		{name: "only Postgres within reach, service killed",
			during: killedWhile("stop", "start", "redis", "nats", "clickhouse"), kills: true},
	}},
}

// broken runs a command on servers, and after d the one that undoes it.
func broken(down string, d time.Duration, up string, names ...string) func(*scene) {
	return func(s *scene) {
		s.sh(down, names...)
		s.last(d)
		s.sh(up, names...)
	}
}

// firstHostFrozen leaves the first host frozen until the second serves.
func firstHostFrozen(s *scene) {
	defer s.proxy.Freeze()()
	s.last(aWhile)
	harness.Eventually(s, 13*time.Second, func() error {
		failed, err := s.load.works(time.Now().Add(-aWhile))
		if err == nil && !failed.IsZero() {
			err = fmt.Errorf("a call failed at %v", failed)
		}
		return err
	})
}

// stoppedWhileFrozen ends a service whose requests cannot end well.
func stoppedWhileFrozen(s *scene) {
	s.sh("pause", "postgres")
	s.last(aWhile / 2)
	s.load.aim(s.apps[0])
	begin := time.Now()
	if err := s.apps[1].Stop(); err != nil || time.Since(begin) > callWithin+time.Second {
		s.Errorf("the service ended after %v with %v", time.Since(begin), err)
	}
	s.sh("resume", "postgres")
	s.restart(1)
}

func goodsLocked(s *scene) {
	tx := s.Hold(s, `LOCK TABLE goods IN ACCESS EXCLUSIVE MODE`)
	s.last(10 * time.Second)
	harness.Must(s, tx.Rollback())
}

// outOfConnections takes every connection that the server allows, also those that the service has.
func outOfConnections(s *scene) {
	own, err := s.DB.Conn(s.Context())
	harness.Must(s, err)
	defer own.Close()
	others, err := sql.Open("postgres", harness.WithPath(s, s.Env["POSTGRES_URL"], "postgres"))
	harness.Must(s, err)
	defer others.Close()
	for full := (time.Time{}); full.IsZero() || time.Since(full) < aWhile; {
		if c, err := others.Conn(s.Context()); err == nil {
			defer c.Close()
			continue
		}
		if full.IsZero() {
			full = time.Now()
		}
		_, err = own.ExecContext(s.Context(), `
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()`)
		harness.Must(s, err)
	}
}

// spoiled lets the proxy spoil replies for a while.
func spoiled(reply harness.Hook) func(*scene) {
	return func(s *scene) {
		s.proxy.Spoil(harness.Forward, reply)
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

// torn ends one in n connections in the middle of a reply that contains text.
func torn(n int, text string) harness.Hook {
	return func(to net.Conn, part []byte) error {
		if bytes.Contains(part, []byte(text)) && rand.N(n) == 0 {
			_, _ = to.Write(part[:rand.N(len(part))])
			return io.ErrClosedPipe
		}
		return harness.Forward(to, part)
	}
}

// lost is an answer that never comes, on a connection that stays.
func lost(net.Conn, []byte) error { return nil }

// emptied stops a server or kills it, deletes what it keeps, and starts it again.
func emptied(down, server, data string) func(*scene) {
	return func(s *scene) {
		s.sh(down, server)
		harness.Must(s, os.RemoveAll(filepath.Join(s.servers.Dir, server, data))) // Redis may have kept nothing
		s.sh("start", server)
	}
}

func withoutJetStream(s *scene) {
	s.sh("stop", "nats")
	u, err := url.Parse(s.Env["NATS_URL"])
	harness.Must(s, err)
	// Debian keeps it where only root's PATH looks.
	cmd := exec.Command("bash", "-c", "PATH=$PATH:/usr/sbin exec nats-server -a "+u.Hostname()+" -p "+u.Port())
	harness.Must(s, cmd.Start())
	s.last(2 * aWhile)
	harness.Must(s, cmd.Process.Kill())
	_ = cmd.Wait() // says that it was killed
	s.sh("start", "nats")
}

// withoutTable keeps events out of ClickHouse, so that NATS has some when it fails.
func withoutTable(fail func(*scene)) func(*scene) {
	return func(s *scene) {
		show := s.HideLog(s)
		s.last(aWhile)
		fail(s)
		show()
	}
}

func (s *scene) query(statement string) {
	harness.Must(s, s.ClickHouse.Exec(s.Context(), statement))
}

func streamDeleted(s *scene) {
	harness.Must(s, s.JS.DeleteStream(s.Context(), s.Stream()))
}

func streamFull(s *scene) {
	stream, err := s.JS.Stream(s.Context(), s.Stream())
	harness.Must(s, err)
	before, small := stream.CachedInfo().Config, stream.CachedInfo().Config
	small.MaxMsgs = 2
	_, err = s.JS.UpdateStream(s.Context(), small)
	harness.Must(s, err)
	withoutTable(func(*scene) {})(s)
	_, err = s.JS.UpdateStream(s.Context(), before)
	harness.Must(s, err)
}

// tooManyParts puts a table in the place that takes one part and no more.
func tooManyParts(s *scene) {
	var create string
	harness.Must(s, s.ClickHouse.QueryRow(s.Context(), `SHOW CREATE TABLE goods_log`).Scan(&create))
	create = strings.Replace(create, "goods_log", "goods_log_full", 1)
	s.query(create + `, parts_to_delay_insert = 1, parts_to_throw_insert = 1`)
	s.query(`RENAME TABLE goods_log TO goods_log_hidden, goods_log_full TO goods_log`)
	s.last(aWhile)
	s.query(`RENAME TABLE goods_log TO goods_log_full, goods_log_hidden TO goods_log`)
	s.query(`INSERT INTO goods_log SELECT * FROM goods_log_full`)
}

// readOnly changes the profile of the user, which holds for new connections.
func readOnly(s *scene) {
	path := filepath.Join(s.servers.Dir, "clickhouse", "users.xml")
	users, err := os.ReadFile(path)
	harness.Must(s, err)
	become := func(profile string) {
		text := strings.Replace(string(users), "<log_queries>", profile+"<log_queries>", 1)
		harness.Must(s, os.WriteFile(path, []byte(text), 0o600))
		s.query(`SYSTEM RELOAD CONFIG`) // on a connection of before, which may still do so
		s.proxy.Cut()
	}
	become("<readonly>1</readonly>")
	s.last(aWhile)
	become("")
}

// messagesSpoiled publishes what has passed twice more, the newest first, and what is no message of events.
func messagesSpoiled(s *scene) {
	passing := make(chan *nats.Msg, 10_000)
	_, err := s.JS.Conn().ChanSubscribe(s.Subject(), passing)
	harness.Must(s, err)
	s.last(aWhile)
	var messages []string
	for range len(passing) {
		m := string((<-passing).Data)
		messages = append(messages, m, m)
	}
	slices.Reverse(messages)
	garbage := []string{"", "[]", "{", "\x00\xff", strings.TrimSuffix(messages[0], "]") + ",{}]"}
	for _, m := range append(messages, garbage...) {
		_, err := s.JS.Publish(s.Context(), s.Subject(), []byte(m))
		harness.Must(s, err)
	}
}
