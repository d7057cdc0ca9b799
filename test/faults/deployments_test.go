package faults

import (
	"fmt"
	"net/url"
	"slices"
	"strings"
	"syscall"
	"time"

	"goods/test/harness"
)

// tableGone leaves ClickHouse without the table, until the service has made it again. What the old one held
// is then put into it as from a backup.
func tableGone(s *scene) {
	s.query(`RENAME TABLE goods_log TO goods_log_backup`)
	harness.AwaitEqual(s, 10*time.Second, func() (exists uint8) {
		harness.Must(s, s.ClickHouse.QueryRow(s.Context(), `EXISTS TABLE goods_log`).Scan(&exists))
		return exists
	}, 1, "the table is there")
	s.last(aWhile)
	s.query(`INSERT INTO goods_log SELECT * FROM goods_log_backup`)
}

func redisBehindTLS(s *scene) { s.process = s.UseTLSRedis(s) }

// redisFrozen lets new connections hang in the TLS handshake.
func redisFrozen(s *scene) {
	harness.Must(s, s.process.Signal(syscall.SIGSTOP))
	s.last(2 * aWhile)
	harness.Must(s, s.process.Signal(syscall.SIGCONT))
}

func password(p string) string {
	return fmt.Sprintf("authorization { user: goods, password: %q }\n", p)
}

func natsWithPassword(s *scene) {
	s.nats = harness.NewNATS(s, password("first"))
	s.Env["NATS_URL"] = s.nats.URL("goods:first")
}

// passwordChanged has NATS refuse the service again and again.
func passwordChanged(s *scene) {
	s.nats.Configure(s, password("second"))
	s.last(2 * aWhile)
	s.nats.Configure(s, password("first"))
}

func logIntoPipe(s *scene) { s.PipedLog = true }

// readerGone has the reader of the log frozen, and then end.
func readerGone(s *scene) {
	resume := s.apps[0].FreezeLog()
	s.last(aWhile)
	resume()
	s.apps[0].EndLog()
	s.last(aWhile)
}

func leastPrivilege(s *scene) { s.LeastPrivilege(s, s.servers) }

// standbyNamedFirst leaves it to the service which of the servers it uses.
func standbyNamedFirst(s *scene) {
	u, err := url.Parse(s.Env["POSTGRES_URL"])
	harness.Must(s, err)
	query := u.Query()
	query.Del("target_session_attrs")
	for _, name := range []string{"host", "port"} {
		values := strings.Split(query.Get(name), ",")
		slices.Reverse(values)
		query.Set(name, strings.Join(values, ","))
	}
	u.RawQuery = query.Encode()
	s.Env["POSTGRES_URL"] = u.String()
}

// deadRows leaves a million dead rows in the outbox, which a long transaction such as a backup keeps from
// being vacuumed.
func deadRows(s *scene) {
	backup := s.Hold(s, `SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM goods`)
	s.Exec(s, `
BEGIN; -- so that nobody sees these rows alive
INSERT INTO outbox (good_id, project_id, name, description, priority, removed, version, event_time)
SELECT 1, 1, 'dead', '', 1, false, 1000000 + n, now() FROM generate_series(1, 1000000) AS n;
DELETE FROM outbox WHERE version > 1000000;
COMMIT`)
	for begin := time.Now(); time.Since(begin) < 5*aWhile; s.last(aWhile / 10) {
		if err := s.apps[0].Ready(); err != nil {
			s.Errorf("%v after a million dead rows: %v", time.Since(begin), err)
			break
		}
	}
	harness.Must(s, backup.Rollback())
}
