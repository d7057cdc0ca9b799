package test

import (
	"database/sql"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"

	"goods/test/harness"
)

// everything makes every call once and waits for their events.
func everything(t *testing.T, w *harness.World, a *harness.App) {
	t.Helper()
	a.Stock(t, 3)
	ok(t, a, "PATCH", "/goods/update"+target(2), someName)
	ok(t, a, "PATCH", "/goods/reprioritize"+target(3), somePlace)
	ok(t, a, "DELETE", "/goods/remove"+target(2), "")
	ok(t, a, "GET", "/goods/list?projectId=1", "")
	harness.Want[harness.Good](t, a, 201, "POST", create, someName, keyHeader+"once")
	harness.Want[harness.Good](t, a, 200, "POST", create, someName, keyHeader+"once")
	harness.Equal(t, a.List(t, 10, 1).Meta.Total, 4, "goods")
	harness.Equal(t, w.Settled(t, 30*time.Second), 4+1+3+1, "events")
	ok(t, a, "GET", "/goods/history"+target(2), "")
	ready(t, a)
	for line := range strings.Lines(a.Log()) {
		if strings.Contains(line, `"level":"WARN"`) || strings.Contains(line, `"level":"ERROR"`) {
			t.Errorf("got a line %s", line)
		}
	}
}

// What deploy/ grants suffices for a service that finds its tables, and is no more than it needs to serve.
func TestLeastPrivilege(t *testing.T) {
	t.Parallel()
	own := harness.NewServers(t, "clickhouse")
	w := harness.NewWorld(t, own.URLs...)
	w.LeastPrivilege(t, own)
	role, err := sql.Open("postgres", w.Env["POSTGRES_URL"])
	harness.Must(t, err)
	defer role.Close()
	_, err = role.Exec(`CREATE TABLE mine ()`)
	harness.Equal(t, err != nil, true, "the role may not create tables")
	options, err := clickhouse.ParseDSN(w.Env["CLICKHOUSE_URL"])
	harness.Must(t, err)
	user, err := clickhouse.Open(options)
	harness.Must(t, err)
	defer user.Close()
	err = user.Exec(t.Context(), `CREATE TABLE mine (Id UInt8) ENGINE = Memory`)
	harness.Equal(t, err != nil, true, "the user may not create tables")
	everything(t, w, w.Start(t))

	// Without its tables it says so.
	harness.Must(t, w.ClickHouse.Exec(t.Context(), `DROP TABLE goods_log`))
	_, stderr, success := goods(t, w, "migrate clickhouse")
	if success || !has(stderr, "migrate clickhouse 0001_goods_log.sql") {
		t.Errorf("migrate clickhouse without the right to: got success %v and %q", success, stderr)
	}
}

// PgBouncer works in session mode, without any other setting.
func TestPgBouncer(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	u, err := url.Parse(w.Env["POSTGRES_URL"])
	harness.Must(t, err)
	address := harness.FreeAddress(t)
	host, port, err := net.SplitHostPort(address)
	harness.Must(t, err)
	path := filepath.Join(t.TempDir(), "pgbouncer.ini")
	harness.Must(t, os.WriteFile(path, fmt.Appendf(nil, `
[databases]
* = host=%s port=%s user=goods password=goods
[pgbouncer]
listen_addr = %s
listen_port = %s
unix_socket_dir =
auth_type = any
pool_mode = session
`, u.Hostname(), u.Port(), host, port), 0o644))
	args := []string{"pgbouncer", path}
	if os.Geteuid() == 0 {
		args = append(args, "-u", "postgres") // it refuses to be root
	}
	harness.Run(t, address, args...)
	u.Host = address
	w.Env["POSTGRES_URL"] = u.String()
	everything(t, w, w.Start(t))
}
