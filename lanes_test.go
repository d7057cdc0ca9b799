//go:build faults || soak

package main

import (
	"context"
	"encoding/json"
	"fmt"
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
)

// What clients may see while Postgres is away.
var unserved = []int{503}

// Lost events are looked for only after half a minute: see pipeline.find.
const afterLoss = lostAfter + lostAfter/3 + 15*time.Second

var lanes = []lane{
	{"loss", []fault{
		{name: "NATS back without its data", breaks: "nats", during: natsEmptied, drains: afterLoss},
		{name: "NATS stream deleted with events in it", during: streamDeleted, drains: afterLoss},
	}},
	{"nats", []fault{
		{name: "NATS stopped", breaks: "nats", during: stopped("nats")},
		{name: "NATS killed", breaks: "nats", during: killed("nats")},
		{name: "NATS frozen", breaks: "nats", during: frozen("nats")},
		{name: "NATS restarted", breaks: "nats", during: restarted("nats")},
		{name: "NATS stream full", during: streamFull},
		{name: "NATS without JetStream", breaks: "nats", during: withoutJetStream},
	}},
	{"redis", []fault{
		{name: "Redis stopped, back with old data", breaks: "redis", during: stopped("redis")},
		{name: "Redis killed", breaks: "redis", during: killed("redis")},
		{name: "Redis frozen", breaks: "redis", during: frozen("redis")},
		{name: "Redis back empty", breaks: "redis", during: redisEmptied},
		{name: "Redis answers after 100 ms", through: "redis", during: spoiled(late(100 * time.Millisecond)), within: 2 * time.Second},
		{name: "Redis answers after 400 ms", through: "redis", during: spoiled(late(400 * time.Millisecond))},
	}},
	{"clickhouse", []fault{
		{name: "ClickHouse stopped", breaks: "clickhouse", during: stopped("clickhouse")},
		{name: "ClickHouse killed", breaks: "clickhouse", during: killed("clickhouse")},
		{name: "ClickHouse frozen", breaks: "clickhouse", during: frozen("clickhouse")},
		{name: "ClickHouse table renamed away", during: tableAway},
		{name: "ClickHouse refuses: too many parts", during: tooManyParts},
		{name: "ClickHouse refuses: read only", breaks: "clickhouse", through: "clickhouse", during: readOnly},
	}},
	{"postgres", []fault{
		{name: "Postgres restarted", breaks: "postgres", during: restarted("postgres"), may: unserved, within: 5 * time.Second},
		{name: "Postgres stopped", breaks: "postgres", during: stopped("postgres"), may: unserved, within: 5 * time.Second},
		{name: "Postgres killed", breaks: "postgres", during: killed("postgres"), may: unserved, within: 5 * time.Second},
		{name: "Postgres frozen", breaks: "postgres", during: frozen("postgres"), may: unserved, within: 5 * time.Second},
		{name: "Postgres out of connections", breaks: "postgres", during: outOfConnections, may: unserved, within: 5 * time.Second},
		{name: "Postgres: goods locked for ten seconds", during: goodsLocked, may: unserved, within: 5 * time.Second},
	}},
	{"service", []fault{
		{name: "service killed twenty times", during: serviceKilled, may: []int{unanswered}},
		{name: "one of two services killed and restarted", replicas: 2, during: replicaKilled, may: []int{unanswered}},
		{name: "one of three services killed and restarted", replicas: 3, during: replicaKilled, may: []int{unanswered}},
		{name: "services restarted in turn with SIGTERM", replicas: 2, during: rolled, within: 3 * time.Second},
		{name: "messages repeated, out of order, and garbage", during: messagesSpoiled},
	}},
	{"wire", []fault{
		{name: "replies of Postgres torn", through: "postgres", during: spoiled(torn(50)), may: unserved, within: 5 * time.Second},
		{name: "commits of Postgres unheard", through: "postgres", during: spoiled(unheard), may: unserved, within: 5 * time.Second},
		{name: "replies of Redis torn", through: "redis", during: spoiled(torn(5))},
		{name: "replies of NATS torn", through: "nats", during: spoiled(torn(5))},
		{name: "replies of ClickHouse torn", through: "clickhouse", during: spoiled(torn(5))},
		{name: "replies of Postgres lost", through: "postgres", during: spoiled(lost), may: unserved, within: 5 * time.Second},
		{name: "replies of Redis lost", through: "redis", during: spoiled(lost)},
		{name: "replies of NATS lost", through: "nats", during: spoiled(lost)},
		{name: "replies of ClickHouse lost", through: "clickhouse", during: spoiled(lost)},
	}},
	{"clients", []fault{
		{name: "clients that send a byte a second", during: slowClients},
		{name: "bodies that never end", during: endlessBodies},
		{name: "ten thousand idle connections", during: idleClients, within: 5 * time.Second},
		{name: "clients that leave", during: leavingClients},
	}},
	{"together", []fault{
		{name: "NATS and ClickHouse killed", breaks: "nats clickhouse", during: killed("nats", "clickhouse")},
		{name: "Redis and Postgres killed", breaks: "redis postgres", during: killed("redis", "postgres"), may: unserved, within: 5 * time.Second},
		{name: "Redis frozen, service killed", breaks: "redis", during: frozenAndKilled, may: []int{unanswered}},
		{name: "only Postgres within reach, service restarted", breaks: "redis nats clickhouse", during: onlyPostgres, may: []int{unanswered}},
	}},
}

func redisEmptied(t testing.TB, s *scene) {
	s.servers.sh(t, "stop", "redis")
	_ = os.Remove(filepath.Join(s.servers.dir, "redis", "dump.rdb")) // there may be none
	s.last(aWhile)
	s.servers.sh(t, "start", "redis")
}

func natsEmptied(t testing.TB, s *scene) {
	s.hideTable(t) // so that there are events to lose
	s.last(aWhile)
	s.servers.kill(t, "nats")
	must(t, os.RemoveAll(filepath.Join(s.servers.dir, "nats", "jetstream")))
	s.servers.sh(t, "start", "nats")
	s.showTable(t)
}

func streamDeleted(t testing.TB, s *scene) {
	ctx, cancel := soon()
	defer cancel()
	s.hideTable(t)
	s.last(aWhile)
	must(t, s.js.DeleteStream(ctx, s.stream()))
	s.showTable(t)
}

func streamFull(t testing.TB, s *scene) {
	s.limitStream(t, 10)
	s.hideTable(t)
	s.last(aWhile)
	s.showTable(t)
	s.limitStream(t, streamLimit)
}

func (s *scene) limitStream(t testing.TB, messages int64) {
	t.Helper()
	ctx, cancel := soon()
	defer cancel()
	stream, err := s.js.Stream(ctx, s.stream())
	must(t, err)
	cfg := stream.CachedInfo().Config
	cfg.MaxMsgs = messages
	_, err = s.js.UpdateStream(ctx, cfg)
	must(t, err)
}

func withoutJetStream(t testing.TB, s *scene) {
	s.servers.sh(t, "stop", "nats")
	u, err := url.Parse(s.env["NATS_URL"])
	must(t, err)
	cmd := exec.Command("nats-server", "-a", u.Hostname(), "-p", u.Port())
	cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin")
	if cmd.Err != nil {
		cmd.Path, cmd.Err = "/usr/sbin/nats-server", nil
	}
	must(t, cmd.Start())
	s.last(2 * aWhile)
	must(t, cmd.Process.Kill())
	_ = cmd.Wait() // says that it was killed
	s.servers.sh(t, "start", "nats")
}

func tableAway(t testing.TB, s *scene) {
	s.hideTable(t)
	s.last(aWhile)
	s.showTable(t)
}

func (s *scene) hideTable(t testing.TB) {
	t.Helper()
	must(t, s.clickhouse.Exec(context.Background(), `RENAME TABLE goods_log TO goods_log_hidden`))
}

func (s *scene) showTable(t testing.TB) {
	t.Helper()
	must(t, s.clickhouse.Exec(context.Background(), `RENAME TABLE goods_log_hidden TO goods_log`))
}

// tooManyParts puts a table in the place that takes one part and no more.
func tooManyParts(t testing.TB, s *scene) {
	ctx := context.Background()
	text, err := migrations.ReadFile("sql/clickhouse/0001_goods_log.sql")
	must(t, err)
	create := strings.TrimSuffix(strings.TrimSpace(string(text)), ";")
	s.hideTable(t)
	must(t, s.clickhouse.Exec(ctx, create+" SETTINGS parts_to_delay_insert = 1, parts_to_throw_insert = 1"))
	s.last(aWhile)
	must(t, s.clickhouse.Exec(ctx, `RENAME TABLE goods_log TO goods_log_full, goods_log_hidden TO goods_log`))
	must(t, s.clickhouse.Exec(ctx, `INSERT INTO goods_log SELECT * FROM goods_log_full`))
}

// readOnly changes the profile of the user, which holds for new connections.
func readOnly(t testing.TB, s *scene) {
	path := filepath.Join(s.servers.dir, "clickhouse", "users.xml")
	users, err := os.ReadFile(path)
	must(t, err)
	options, err := clickhouse.ParseDSN(s.env["CLICKHOUSE_URL"])
	must(t, err)
	refused := func() bool {
		conn, err := clickhouse.Open(options)
		must(t, err)
		defer conn.Close()
		return conn.Exec(context.Background(), `CREATE TABLE IF NOT EXISTS goods_trial (n UInt8) ENGINE = Memory`) != nil
	}
	become := func(text string, want bool) {
		must(t, os.WriteFile(path, []byte(text), 0o600))
		eventually(t, 10*time.Second, func() error { // ClickHouse looks at the file every two seconds
			if refused() != want {
				return fmt.Errorf("ClickHouse has not read %s", path)
			}
			return nil
		})
		s.proxy.cut()
	}
	become(strings.Replace(string(users), "<log_queries>", "<readonly>1</readonly><log_queries>", 1), true)
	s.last(aWhile)
	become(string(users), false)
}

// outOfConnections fills every slot of the server with clients that do not
// log in, and cuts the connections that the service has.
func outOfConnections(t testing.TB, s *scene) {
	conn, err := s.db.Conn(context.Background())
	must(t, err)
	defer conn.Close()
	u, err := url.Parse(s.env["POSTGRES_URL"])
	must(t, err)
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
			must(t, err)
			taken = append(taken, c)
			_, err = c.Write([]byte("\x00\x00\x00\x26\x00\x03\x00\x00user\x00goods\x00database\x00postgres\x00\x00"))
			must(t, err)
		}
		_, err = conn.ExecContext(context.Background(), `
SELECT pg_terminate_backend(pid)
FROM pg_stat_activity
WHERE datname = current_database()
  AND backend_type = 'client backend'
  AND pid <> pg_backend_pid()`)
		must(t, err)
		<-tick.C
	}
}

func goodsLocked(t testing.TB, s *scene) {
	tx, err := s.db.Begin()
	must(t, err)
	defer tx.Rollback()
	_, err = tx.Exec(`LOCK TABLE goods IN ACCESS EXCLUSIVE MODE`)
	must(t, err)
	s.last(10 * time.Second)
}

func serviceKilled(t testing.TB, s *scene) {
	for range 20 {
		s.last(rand.N(300 * time.Millisecond))
		must(t, s.apps[0].process.Kill())
		s.apps[0] = s.exec(t)
		s.load.aim(s.apps...)
	}
}

// replicaKilled kills one of several, and starts it again as its supervisor
// would: the start also ends what the others may still cache of writes that
// the dead one could not answer.
func replicaKilled(t testing.TB, s *scene) {
	s.last(aWhile / 2)
	dead := len(s.apps) - 1
	must(t, s.apps[dead].process.Kill())
	s.load.aim(s.apps[:dead]...)
	s.last(aWhile / 2)
	s.apps[dead] = s.exec(t)
	s.load.aim(s.apps...)
}

// rolled restarts the replicas one after the other, as a balancer sees it: it
// leaves a replica once that is no longer ready. At the first one's end, a
// request is in flight that waits for a lock.
func rolled(t testing.TB, s *scene) {
	slow := s.apps[0].create(t, "slow")
	s.load.created.Add(1)
	for i, a := range s.apps {
		tx, err := s.db.Begin()
		must(t, err)
		_, err = tx.Exec(`SELECT FROM goods WHERE id = $1 FOR UPDATE`, slow.ID)
		must(t, err)
		inFlight := make(chan error, 1)
		go func() {
			r, err := a.try("PATCH", fmt.Sprintf("/goods/update?id=%d&projectId=1", slow.ID), `{"name":"slow","description":"slow"}`)
			if err == nil && r.status != 200 {
				err = fmt.Errorf("got %d %s", r.status, r.body)
			}
			inFlight <- err
		}()
		eventually(t, 5*time.Second, func() error {
			const waiting = `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`
			if one[int](t, s.world, waiting) == 0 {
				return fmt.Errorf("no request waits")
			}
			return nil
		})
		begin := time.Now()
		ended := make(chan error, 1)
		go func() { ended <- a.stop() }()
		eventually(t, 5*time.Second, func() error {
			if a.ready() == nil {
				return fmt.Errorf("the service is still ready")
			}
			return nil
		})
		s.load.aim(s.apps[1-i])
		s.last(600 * time.Millisecond) // it no longer listens by then
		must(t, tx.Rollback())
		if err := <-inFlight; err != nil {
			t.Errorf("a request in flight at SIGTERM: %v", err)
		}
		if err := <-ended; err != nil {
			t.Errorf("the service ended with %v", err)
		}
		if took := time.Since(begin); took > 10*time.Second {
			t.Errorf("the service ended after %v", took)
		}
		s.apps[i] = s.exec(t)
		s.load.aim(s.apps...)
	}
}

func frozenAndKilled(t testing.TB, s *scene) {
	s.servers.sh(t, "pause", "redis")
	s.last(aWhile / 2)
	must(t, s.apps[0].process.Kill())
	s.apps[0] = s.exec(t)
	s.load.aim(s.apps...)
	s.last(aWhile / 2)
	s.servers.sh(t, "resume", "redis")
}

func onlyPostgres(t testing.TB, s *scene) {
	others := []string{"redis", "nats", "clickhouse"}
	s.servers.sh(t, append([]string{"stop"}, others...)...)
	must(t, s.apps[0].process.Kill())
	s.apps[0] = s.exec(t)
	s.load.aim(s.apps...)
	s.last(aWhile)
	s.servers.sh(t, append([]string{"start"}, others...)...)
}

// messagesSpoiled publishes everything once more, the newest first, and what
// is no event at all.
func messagesSpoiled(t testing.TB, s *scene) {
	ctx, cancel := soon()
	defer cancel()
	s.last(aWhile)
	rows, err := s.clickhouse.Query(ctx, `
SELECT Id, ProjectId, Name, Description, Priority, Removed, EventTime, Version
FROM goods_log FINAL
ORDER BY Version DESC`)
	must(t, err)
	defer rows.Close()
	messages := garbage
	for rows.Next() {
		e := event{Outbox: 1}
		var removed uint8
		var version uint32
		must(t, rows.Scan(&e.ID, &e.ProjectID, &e.Name, &e.Description, &e.Priority, &removed, &e.Time, &version))
		e.Removed, e.Version = removed == 1, int32(version)
		text, err := json.Marshal(e)
		must(t, err)
		messages = append(messages, string(text), string(text))
	}
	must(t, rows.Err())
	for _, m := range messages {
		_, err := s.js.PublishAsync(s.subject(), []byte(m), jetstream.WithMsgID(fmt.Sprint(rand.Int64())))
		must(t, err)
	}
	select {
	case <-s.js.PublishAsyncComplete():
	case <-ctx.Done():
		t.Fatal("the messages were not published")
	}
	thrownAway := fmt.Sprintf("\ngoods_events_thrown_away_total %d\n", len(garbage))
	eventually(t, 20*time.Second, func() error {
		if r, err := s.apps[0].try("GET", "/metrics", ""); err != nil || !strings.Contains(r.body, thrownAway) {
			return fmt.Errorf("want %d messages thrown away: %v", len(garbage), err)
		}
		return nil
	})
}

var garbage = []string{
	"", "null", "{}", "[]", "1", `"text"`, "{", "\x00\xff", strings.Repeat("x", 1<<16),
	`{"outbox":1,"id":1,"projectId":1,"version":1}`,
	`{"outbox":1,"id":1,"projectId":1,"version":-1,"time":"2026-01-02T15:04:05Z"}`,
	`{"outbox":1,"id":"1","projectId":1,"version":1,"time":"2026-01-02T15:04:05Z"}`,
	`{"outbox":1,"id":99999999999,"projectId":1,"version":1,"time":"2026-01-02T15:04:05Z"}`,
	`{"outbox":1,"id":1,"projectId":1,"version":1,"time":"1906-01-02T15:04:05Z"}`,
	`{"outbox":1,"id":1,"projectId":1,"version":1,"time":"2206-01-02T15:04:05Z"}`,
	`{"outbox":1,"id":1,"projectId":1,"version":1,"time":"yesterday"}`,
}
