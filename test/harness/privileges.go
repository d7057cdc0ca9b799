package harness

import (
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// LeastPrivilege migrates both databases, and then lets the service have a role in Postgres and a user in
// the ClickHouse of servers with no rights but those that deploy/ grants.
func (w *World) LeastPrivilege(t testing.TB, servers *Servers) {
	t.Helper()
	for _, database := range []string{"postgres", "clickhouse"} {
		if out, err := w.Command([]string{"migrate", database}).CombinedOutput(); err != nil {
			t.Fatalf("migrate %s: %v: %s", database, err, out)
		}
	}
	const name = "goods_service" // in deploy/
	password := rand.Text()
	limited := func(variable, user string) {
		t.Helper()
		u, err := url.Parse(w.Env[variable])
		Must(t, err)
		u.User = url.UserPassword(user, password)
		w.Env[variable] = u.String()
	}

	role := strings.ReplaceAll(w.Namespace, "-", "_")
	w.Exec(t, fmt.Sprintf(`
CREATE ROLE %s LOGIN PASSWORD '%s';
REVOKE ALL ON SCHEMA public FROM PUBLIC;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA public FROM PUBLIC`, role, password))
	t.Cleanup(func() { w.Exec(t, fmt.Sprintf(`DROP OWNED BY %s; DROP ROLE %[1]s`, role)) })
	w.Exec(t, strings.ReplaceAll(string(File(t, "deploy/grants-postgres.sql")), name, role))
	limited("POSTGRES_URL", role)

	u, err := url.Parse(w.Env["CLICKHOUSE_URL"])
	Must(t, err)
	user := strings.NewReplacer(
		"<password_sha256_hex>", fmt.Sprintf("<password_sha256_hex>%x", sha256.Sum256([]byte(password))),
		"<database>goods<", "<database>"+strings.TrimPrefix(u.Path, "/")+"<",
	).Replace(string(File(t, "deploy/clickhouse-user.xml")))
	users := filepath.Join(servers.Dir, "clickhouse", "users.d")
	Must(t, os.MkdirAll(users, 0o755))
	Must(t, os.WriteFile(filepath.Join(users, "goods.xml"), []byte(user), 0o644))
	Must(t, w.ClickHouse.Exec(t.Context(), `SYSTEM RELOAD CONFIG`))
	limited("CLICKHOUSE_URL", name)
}
