package harness

import (
	"database/sql"
	"net/url"
	"strings"
	"testing"
	"time"

	_ "github.com/lib/pq"
)

// Standby is a hot standby that streams from the Postgres of the same Servers. Servers.Sh breaks either of
// the two, by the names "postgres" and "standby".
type Standby struct {
	URL     string // of the standby alone, which only reads until Promote
	BothURL string // of the primary, then the standby, whichever of them takes writes

	db, primary *sql.DB
}

// NewStandby starts a standby of the Postgres that servers have, and waits until it streams. If it is
// synchronous, the primary answers no COMMIT before the standby has it.
func NewStandby(t testing.TB, servers *Servers, synchronous bool) *Standby {
	t.Helper()
	servers.Sh(t, "start", "standby")
	primary, err := url.Parse(servers.url(t, "postgres"))
	Must(t, err)
	standby, err := url.Parse(servers.url(t, "standby"))
	Must(t, err)
	both := *primary
	query := both.Query()
	query.Set("host", primary.Hostname()+","+standby.Hostname())
	query.Set("port", primary.Port()+","+standby.Port())
	query.Set("target_session_attrs", "read-write")
	both.RawQuery = query.Encode()
	s := &Standby{URL: standby.String(), BothURL: both.String()}
	s.db, err = sql.Open("postgres", s.URL)
	Must(t, err)
	s.primary, err = sql.Open("postgres", primary.String())
	Must(t, err)
	t.Cleanup(func() {
		s.db.Close()
		s.primary.Close()
	})

	state := "async"
	if synchronous {
		state = "sync"
		for _, statement := range []string{
			`ALTER SYSTEM SET synchronous_standby_names = standby`,
			`SELECT pg_reload_conf()`,
		} {
			_, err = s.primary.Exec(statement)
			Must(t, err)
		}
	}
	AwaitEqual(t, 10*time.Second, func() string {
		var now string
		_ = s.primary.QueryRow(`SELECT concat_ws(' ', state, sync_state) FROM pg_stat_replication`).Scan(&now)
		return now
	}, "streaming "+state, "state of the standby")
	return s
}

// CatchUp waits until the standby shows everything that the primary has committed by now.
func (s *Standby) CatchUp(t testing.TB) {
	t.Helper()
	var committed string
	Must(t, s.primary.QueryRow(`SELECT pg_current_wal_lsn()`).Scan(&committed))
	AwaitEqual(t, 10*time.Second, func() (shown bool) {
		_ = s.db.QueryRow(`SELECT pg_last_wal_replay_lsn() >= $1`, committed).Scan(&shown)
		return shown
	}, true, "standby shows what was committed up to %s", committed)
}

// Promote makes the standby a primary. It does not stop the old one.
func (s *Standby) Promote(t testing.TB) {
	t.Helper()
	_, err := s.db.Exec(`SELECT pg_promote()`)
	Must(t, err)
}

// StopReceiving lets the standby receive nothing any more: what the primary commits from now on, it does
// not have.
func (s *Standby) StopReceiving(t testing.TB) {
	t.Helper()
	for _, statement := range []string{`ALTER SYSTEM SET primary_conninfo = ''`, `SELECT pg_reload_conf()`} {
		_, err := s.db.Exec(statement)
		Must(t, err)
	}
	AwaitEqual(t, 10*time.Second, func() int {
		receivers := -1
		_ = s.db.QueryRow(`SELECT count(*) FROM pg_stat_wal_receiver`).Scan(&receivers)
		return receivers
	}, 0, "receivers of the standby")
}

// url returns the URL of one of the servers, whether it runs or not.
func (s *Servers) url(t testing.TB, name string) string {
	t.Helper()
	_, value, _ := strings.Cut(s.Sh(t, "env", name), "=")
	return strings.Trim(value, "'\n")
}
