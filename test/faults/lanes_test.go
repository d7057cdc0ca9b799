package faults

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"
	"github.com/nats-io/nats.go/jetstream"

	"goods/test/harness"
)

const (
	aWhile    = 2 * time.Second  // the usual length of a fault
	afterLoss = 55 * time.Second // lost events are looked for only after half a minute
)

// The lanes that take the longest come first.
var lanes = []lane{
	{"sigterm", []fault{
		{name: "fifty SIGTERMs under new connections", replicas: 3, during: terminated, within: 2 * time.Second},
		{name: "services restarted in turn with SIGTERM", replicas: 2, during: rolled, within: 3 * time.Second},
	}},
	{"postgres frozen", []fault{
		{name: "Postgres frozen for twelve seconds, two services", breaks: "postgres", replicas: 2, during: frozenForLong, postgres: true},
		{name: "first of two Postgres hosts frozen", through: "postgres", twoHosts: true, during: firstHostFrozen, postgres: true},
		{name: "Postgres frozen, a service told to stop", breaks: "postgres", replicas: 2, during: stoppedWhileFrozen, postgres: true},
		{name: "Postgres stopped, service restarted meanwhile", breaks: "postgres", during: startedWithoutPostgres, postgres: true, kills: true},
	}},
	{"stream lost", []fault{{name: "NATS stream deleted with events in it", during: streamDeleted, drains: afterLoss}}},
	{"nats lost", []fault{{name: "NATS back without its data", breaks: "nats", during: natsEmptied, drains: afterLoss}}},
	{"postgres", []fault{
		{name: "Postgres restarted", breaks: "postgres", during: restarted("postgres"), postgres: true},
		{name: "Postgres stopped", breaks: "postgres", during: stopped("postgres"), postgres: true},
		{name: "Postgres killed", breaks: "postgres", during: killed("postgres"), postgres: true},
		{name: "Postgres frozen", breaks: "postgres", during: frozen("postgres"), postgres: true},
		{name: "Postgres out of connections", breaks: "postgres", during: outOfConnections, postgres: true},
		{name: "Postgres: goods locked for ten seconds", during: goodsLocked, postgres: true},
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
	{"clickhouse", []fault{
		{name: "ClickHouse stopped", breaks: "clickhouse", during: stopped("clickhouse")},
		{name: "ClickHouse killed", breaks: "clickhouse", during: killed("clickhouse")},
		{name: "ClickHouse frozen", breaks: "clickhouse", during: frozen("clickhouse")},
		{name: "ClickHouse table renamed away", during: tableAway},
		{name: "ClickHouse refuses: too many parts", during: tooManyParts},
		{name: "ClickHouse refuses: read only", breaks: "clickhouse", through: "clickhouse", during: readOnly},
	}},
	{"clients", []fault{
		{name: "clients that send a byte a second", during: slowClients},
		{name: "bodies that never end", during: endlessBodies},
		{name: "ten thousand idle connections", during: idleClients, within: 5 * time.Second},
		{name: "clients that leave", during: leavingClients},
	}},
	{"service", []fault{
		{name: "service killed twenty times", during: serviceKilled, kills: true},
		{name: "one of two services killed and restarted", replicas: 2, during: replicaKilled, kills: true},
		{name: "one of three services killed and restarted", replicas: 3, during: replicaKilled, kills: true},
		{name: "messages repeated, out of order, and garbage", during: messagesSpoiled},
	}},
	{"nats", []fault{
		{name: "NATS stopped", breaks: "nats", during: stopped("nats")},
		{name: "NATS killed", breaks: "nats", during: killed("nats")},
		{name: "NATS frozen", breaks: "nats", during: frozen("nats")},
		{name: "NATS restarted", breaks: "nats", during: restarted("nats")},
		{name: "NATS stream full", during: streamFull},
		{name: "NATS without JetStream", breaks: "nats", during: withoutJetStream},
	}},
	{"together", []fault{
		{name: "NATS and ClickHouse killed", breaks: "nats clickhouse", during: killed("nats", "clickhouse")},
		{name: "Redis and Postgres killed", breaks: "redis postgres", during: killed("redis", "postgres"), postgres: true},
		{name: "Redis frozen, service killed", breaks: "redis", during: frozenAndKilled, kills: true},
		{name: "only Postgres within reach, service restarted", breaks: "redis nats clickhouse", during: onlyPostgres, kills: true},
	}},
	{"redis", []fault{
		{name: "Redis stopped, back with old data", breaks: "redis", during: stopped("redis")},
		{name: "Redis killed", breaks: "redis", during: killed("redis")},
		{name: "Redis frozen", breaks: "redis", during: frozen("redis")},
		{name: "Redis back empty", breaks: "redis", during: redisEmptied},
		{name: "Redis answers after 100 ms", through: "redis", during: spoiled(late(100 * time.Millisecond)), within: 2 * time.Second},
		{name: "Redis answers after 400 ms", through: "redis", during: spoiled(late(400 * time.Millisecond))},
	}},
}

func stopped(names ...string) func(testing.TB, *scene) {
	return func(t testing.TB, s *scene) {
		s.servers.Sh(t, append([]string{"stop"}, names...)...)
		s.last(aWhile)
		s.servers.Sh(t, append([]string{"start"}, names...)...)
	}
}

func killed(names ...string) func(testing.TB, *scene) {
	return func(t testing.TB, s *scene) {
		for _, name := range names {
			s.servers.Kill(t, name)
		}
		s.last(aWhile)
		s.servers.Sh(t, append([]string{"start"}, names...)...)
	}
}

func frozen(name string) func(testing.TB, *scene) {
	return func(t testing.TB, s *scene) {
		s.servers.Sh(t, "pause", name)
		s.last(2 * aWhile)
		s.servers.Sh(t, "resume", name)
	}
}

func restarted(name string) func(testing.TB, *scene) {
	return func(t testing.TB, s *scene) {
		s.servers.Sh(t, "stop", name)
		s.servers.Sh(t, "start", name)
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

// frozenForLong is longer than any timeout of the service.
func frozenForLong(t testing.TB, s *scene) {
	s.servers.Sh(t, "pause", "postgres")
	s.last(12 * time.Second)
	for _, a := range s.apps {
		if r := a.Call(t, "GET", "/readyz", ""); r.Status != 503 || !strings.Contains(r.Body, `"postgres":"down"`) {
			t.Errorf("/readyz with Postgres frozen: %d %s", r.Status, r.Body)
		}
	}
	s.servers.Sh(t, "resume", "postgres")
}

// firstHostFrozen leaves the first host frozen: the second must serve.
func firstHostFrozen(t testing.TB, s *scene) {
	resume := s.proxy.Freeze()
	defer resume()
	begin := time.Now()
	harness.Eventually(t, 15*time.Second, func() error { return s.load.works(time.Now().Add(-aWhile)) })
	t.Logf("the second host serves after %v", time.Since(begin)-aWhile)
}

// stoppedWhileFrozen ends a service whose requests cannot end well.
func stoppedWhileFrozen(t testing.TB, s *scene) {
	s.servers.Sh(t, "pause", "postgres")
	s.last(aWhile / 2)
	s.load.aim(s.apps[0])
	begin := time.Now()
	if err := s.apps[1].Stop(); err != nil {
		t.Errorf("the service ended with %v", err)
	}
	if took := time.Since(begin); took > callWithin+time.Second {
		t.Errorf("the service ended after %v", took)
	}
	s.servers.Sh(t, "resume", "postgres")
	s.restart(t, 1)
}

// startedWithoutPostgres starts the service, which waits, and refuses
// connections rather than have clients wait with it.
func startedWithoutPostgres(t testing.TB, s *scene) {
	s.servers.Sh(t, "stop", "postgres")
	harness.Must(t, s.apps[0].Process.Kill())
	a := s.Launch(t)
	s.last(aWhile)
	if len(a.Log.Lines("listening")) > 0 {
		t.Error("the service listens before Postgres is there")
	}
	s.servers.Sh(t, "start", "postgres")
	a.Await(t)
	s.apps[0] = a
	s.load.aim(a)
}

func redisEmptied(t testing.TB, s *scene) {
	s.servers.Sh(t, "stop", "redis")
	_ = os.Remove(filepath.Join(s.servers.Dir, "redis", "dump.rdb")) // there may be none
	s.last(aWhile)
	s.servers.Sh(t, "start", "redis")
}

func natsEmptied(t testing.TB, s *scene) {
	s.hideTable(t) // so that there are events to lose
	s.last(aWhile)
	s.servers.Kill(t, "nats")
	harness.Must(t, os.RemoveAll(filepath.Join(s.servers.Dir, "nats", "jetstream")))
	s.servers.Sh(t, "start", "nats")
	s.showTable(t)
}

func streamDeleted(t testing.TB, s *scene) {
	ctx, cancel := soon()
	defer cancel()
	s.hideTable(t)
	s.last(aWhile)
	harness.Must(t, s.JS.DeleteStream(ctx, s.Stream()))
	s.showTable(t)
}

func streamFull(t testing.TB, s *scene) {
	most := s.limitStream(t, 10)
	s.hideTable(t)
	s.last(aWhile)
	s.showTable(t)
	s.limitStream(t, most)
}

// limitStream returns the limit before.
func (s *scene) limitStream(t testing.TB, messages int64) int64 {
	t.Helper()
	ctx, cancel := soon()
	defer cancel()
	stream, err := s.JS.Stream(ctx, s.Stream())
	harness.Must(t, err)
	cfg := stream.CachedInfo().Config
	before := cfg.MaxMsgs
	cfg.MaxMsgs = messages
	_, err = s.JS.UpdateStream(ctx, cfg)
	harness.Must(t, err)
	return before
}

func withoutJetStream(t testing.TB, s *scene) {
	s.servers.Sh(t, "stop", "nats")
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
	s.servers.Sh(t, "start", "nats")
}

func tableAway(t testing.TB, s *scene) {
	s.hideTable(t)
	s.last(aWhile)
	s.showTable(t)
}

func (s *scene) hideTable(t testing.TB) {
	t.Helper()
	harness.Must(t, s.ClickHouse.Exec(context.Background(), `RENAME TABLE goods_log TO goods_log_hidden`))
}

func (s *scene) showTable(t testing.TB) {
	t.Helper()
	harness.Must(t, s.ClickHouse.Exec(context.Background(), `RENAME TABLE goods_log_hidden TO goods_log`))
}

// tooManyParts puts a table in the place that takes one part and no more.
func tooManyParts(t testing.TB, s *scene) {
	ctx := context.Background()
	var create string
	harness.Must(t, s.ClickHouse.QueryRow(ctx, `SHOW CREATE TABLE goods_log`).Scan(&create))
	s.hideTable(t)
	harness.Must(t, s.ClickHouse.Exec(ctx, create+", parts_to_delay_insert = 1, parts_to_throw_insert = 1"))
	s.last(aWhile)
	harness.Must(t, s.ClickHouse.Exec(ctx, `RENAME TABLE goods_log TO goods_log_full, goods_log_hidden TO goods_log`))
	harness.Must(t, s.ClickHouse.Exec(ctx, `INSERT INTO goods_log SELECT * FROM goods_log_full`))
}

// readOnly changes the profile of the user, which holds for new connections.
func readOnly(t testing.TB, s *scene) {
	path := filepath.Join(s.servers.Dir, "clickhouse", "users.xml")
	users, err := os.ReadFile(path)
	harness.Must(t, err)
	options, err := clickhouse.ParseDSN(s.Env["CLICKHOUSE_URL"])
	harness.Must(t, err)
	refused := func() bool {
		conn, err := clickhouse.Open(options)
		harness.Must(t, err)
		defer conn.Close()
		return conn.Exec(context.Background(), `CREATE TABLE IF NOT EXISTS goods_trial (n UInt8) ENGINE = Memory`) != nil
	}
	become := func(text string, want bool) {
		harness.Must(t, os.WriteFile(path, []byte(text), 0o600))
		harness.Eventually(t, 10*time.Second, func() error { // ClickHouse looks at the file every two seconds
			if refused() != want {
				return fmt.Errorf("ClickHouse has not read %s", path)
			}
			return nil
		})
		s.proxy.Cut()
	}
	become(strings.Replace(string(users), "<log_queries>", "<readonly>1</readonly><log_queries>", 1), true)
	s.last(aWhile)
	become(string(users), false)
}

// outOfConnections fills every slot of the server with clients that do not
// log in, and cuts the connections that the service has.
func outOfConnections(t testing.TB, s *scene) {
	conn, err := s.DB.Conn(context.Background())
	harness.Must(t, err)
	defer conn.Close()
	u, err := url.Parse(s.Env["POSTGRES_URL"])
	harness.Must(t, err)
	var taken []net.Conn
	defer func() {
		for _, c := range taken {
			c.Close()
		}
	}()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for begin, more := time.Now(), 200; time.Since(begin) < aWhile; more = 20 {
		for range more {
			c, err := net.Dial("tcp", u.Host)
			harness.Must(t, err)
			taken = append(taken, c)
			_, err = c.Write([]byte("\x00\x00\x00\x26\x00\x03\x00\x00user\x00goods\x00database\x00postgres\x00\x00"))
			harness.Must(t, err)
		}
		_, err = conn.ExecContext(context.Background(), `
SELECT pg_terminate_backend(pid)
FROM pg_stat_activity
WHERE datname = current_database()
  AND backend_type = 'client backend'
  AND pid <> pg_backend_pid()`)
		harness.Must(t, err)
		<-tick.C
	}
}

func goodsLocked(t testing.TB, s *scene) {
	tx := s.Hold(t, `LOCK TABLE goods IN ACCESS EXCLUSIVE MODE`)
	s.last(10 * time.Second)
	harness.Must(t, tx.Rollback())
}

func serviceKilled(t testing.TB, s *scene) {
	for range 20 {
		s.last(rand.N(300 * time.Millisecond))
		harness.Must(t, s.apps[0].Process.Kill())
		s.restart(t, 0)
	}
}

// replicaKilled kills one of several, and starts it again as its supervisor
// would.
func replicaKilled(t testing.TB, s *scene) {
	s.last(aWhile / 2)
	dead := len(s.apps) - 1
	harness.Must(t, s.apps[dead].Process.Kill())
	s.load.aim(s.apps[:dead]...)
	s.last(aWhile / 2)
	s.restart(t, dead)
}

// rolled restarts the replicas one after the other, as a balancer sees it: it
// leaves a replica once that is no longer ready. At the end of each, a request
// is in flight that waits for a lock.
func rolled(t testing.TB, s *scene) {
	s.load.asked.Add(1)
	slow, _, _ := s.load.once("slow")
	for i, a := range s.apps {
		tx := s.Hold(t, fmt.Sprintf(`SELECT FROM goods WHERE id = %d FOR UPDATE`, slow.ID))
		inFlight := make(chan error, 1)
		go func() {
			r, err := a.Try("PATCH", fmt.Sprintf("/goods/update?id=%d&projectId=1", slow.ID), `{"name":"slow","description":"slow"}`)
			if err == nil && r.Status != 200 {
				err = fmt.Errorf("got %d %s", r.Status, r.Body)
			}
			inFlight <- err
		}()
		harness.Eventually(t, 5*time.Second, func() error {
			const waiting = `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`
			if harness.One[int](t, s.World, waiting) == 0 {
				return fmt.Errorf("no request waits")
			}
			return nil
		})
		begin := time.Now()
		ended := make(chan error, 1)
		go func() { ended <- a.Stop() }()
		harness.Eventually(t, 5*time.Second, func() error {
			if a.Ready() == nil {
				return fmt.Errorf("the service is still ready")
			}
			return nil
		})
		s.load.aim(s.apps[1-i])
		harness.Eventually(t, 5*time.Second, func() error {
			c, err := dial(a)
			if err == nil {
				c.Close()
				return fmt.Errorf("the service still listens")
			}
			return nil
		})
		harness.Must(t, tx.Rollback())
		if err := <-inFlight; err != nil {
			t.Errorf("a request in flight at SIGTERM: %v", err)
		}
		if err := <-ended; err != nil {
			t.Errorf("the service ended with %v", err)
		}
		if took := time.Since(begin); took > 10*time.Second {
			t.Errorf("the service ended after %v", took)
		}
		s.restart(t, i)
	}
}

func frozenAndKilled(t testing.TB, s *scene) {
	s.servers.Sh(t, "pause", "redis")
	s.last(aWhile / 2)
	harness.Must(t, s.apps[0].Process.Kill())
	s.restart(t, 0)
	s.last(aWhile / 2)
	s.servers.Sh(t, "resume", "redis")
}

func onlyPostgres(t testing.TB, s *scene) {
	others := []string{"redis", "nats", "clickhouse"}
	s.servers.Sh(t, append([]string{"stop"}, others...)...)
	harness.Must(t, s.apps[0].Process.Kill())
	s.restart(t, 0)
	s.last(aWhile)
	s.servers.Sh(t, append([]string{"start"}, others...)...)
}

// messagesSpoiled publishes everything once more, the newest first, and what
// is no event at all.
func messagesSpoiled(t testing.TB, s *scene) {
	ctx, cancel := soon()
	defer cancel()
	s.last(aWhile)
	rows, err := s.ClickHouse.Query(ctx, `
SELECT Id, ProjectId, Name, Description, Priority, Removed, EventTime, Version
FROM goods_log FINAL
ORDER BY Version DESC`)
	harness.Must(t, err)
	defer rows.Close()
	messages := garbage
	for rows.Next() {
		e := struct {
			Outbox, ID, ProjectID int32
			Name, Description     string
			Priority              int32
			Removed               bool
			Time                  time.Time
			Version               uint32
		}{Outbox: 1}
		var removed uint8
		harness.Must(t, rows.Scan(&e.ID, &e.ProjectID, &e.Name, &e.Description, &e.Priority, &removed, &e.Time, &e.Version))
		e.Removed = removed == 1
		text, err := json.Marshal([]any{e, e}) // its field names differ in case only
		harness.Must(t, err)
		messages = append(messages, string(text))
	}
	harness.Must(t, rows.Err())
	for _, m := range messages {
		_, err := s.JS.PublishAsync(s.Subject(), []byte(m), jetstream.WithMsgID(fmt.Sprint(rand.Int64())))
		harness.Must(t, err)
	}
	select {
	case <-s.JS.PublishAsyncComplete():
	case <-ctx.Done():
		t.Fatal("the messages were not published")
	}
	thrownAway := fmt.Sprintf("\ngoods_events_thrown_away_total %d\n", len(garbage))
	harness.Eventually(t, 20*time.Second, func() error {
		if r, err := s.apps[0].Try("GET", "/metrics", ""); err != nil || !strings.Contains(r.Body, thrownAway) {
			return fmt.Errorf("want %d messages thrown away: %v", len(garbage), err)
		}
		return nil
	})
}

var garbage = []string{
	"", "null", "{}", "[]", "[null]", "[[]]", "1", `"text"`, "{", "\x00\xff", strings.Repeat("x", 1<<16),
	`{"outbox":1,"id":1,"projectId":1,"version":1,"time":"2026-01-02T15:04:05Z"}`,
	`[{"outbox":1,"id":1,"projectId":1,"version":1}]`,
	`[{"outbox":1,"id":1,"projectId":1,"version":-1,"time":"2026-01-02T15:04:05Z"}]`,
	`[{"outbox":1,"id":"1","projectId":1,"version":1,"time":"2026-01-02T15:04:05Z"}]`,
	`[{"outbox":1,"id":99999999999,"projectId":1,"version":1,"time":"2026-01-02T15:04:05Z"}]`,
	`[{"outbox":1,"id":1,"projectId":1,"version":1,"time":"1906-01-02T15:04:05Z"}]`,
	`[{"outbox":1,"id":1,"projectId":1,"version":1,"time":"2206-01-02T15:04:05Z"}]`,
	`[{"outbox":1,"id":1,"projectId":1,"version":1,"time":"2026-01-02T15:04:05Z"},{}]`,
}

// soon ends before anything in a test is given up.
func soon() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), 10*time.Second)
}
