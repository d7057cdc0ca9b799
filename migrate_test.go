package main

import (
	"bytes"
	"crypto/rand"
	"database/sql"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"
)

// testDatabase makes an empty database, which is gone when the test ends.
func testDatabase(t *testing.T) *database {
	t.Helper()
	base := os.Getenv("POSTGRES_URL")
	if base == "" {
		t.Fatal(`POSTGRES_URL is not set: use make test, or start the servers with scripts/servers.sh start and then eval "$(scripts/servers.sh env)"`)
	}
	admin, err := sql.Open("postgres", base)
	if err != nil {
		t.Fatal(err)
	}
	name := "test_" + strings.ToLower(rand.Text()[:12])
	if _, err := admin.Exec("CREATE DATABASE " + name); err != nil {
		t.Fatal(err)
	}
	u, _ := url.Parse(base)
	u.Path = "/" + name
	db, err := openPostgres(u.String(), 8, time.Minute, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		db.Close()
		if _, err := admin.Exec("DROP DATABASE " + name + " WITH (FORCE)"); err != nil {
			t.Error(err)
		}
		admin.Close()
	})
	return db
}

func testLog() (*slog.Logger, *bytes.Buffer) {
	var b bytes.Buffer
	return slog.New(slog.NewTextHandler(&b, nil)), &b
}

func TestMigrateFromManyProcesses(t *testing.T) {
	db := testDatabase(t)
	log, out := testLog()
	var all sync.WaitGroup
	for range 5 {
		all.Go(func() {
			if err := migratePostgres(db, migrations, log); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	files, _ := fs.Glob(migrations, "sql/postgres/*.sql")
	if n := strings.Count(out.String(), "migrating"); n != len(files) || n == 0 {
		t.Errorf("applied %d files, want each of %d once:\n%s", n, len(files), out)
	}
	var name string
	if err := db.QueryRow(`SELECT string_agg(name, ',') FROM campaigns`).Scan(&name); err != nil || name != "Первая запись" {
		t.Errorf("campaigns: got %q, %v", name, err)
	}
}

func TestMigrateRefusals(t *testing.T) {
	file := func(text string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(text)} }
	const one, two = "sql/postgres/0001_one.sql", "sql/postgres/0002_two.sql"
	applied := fstest.MapFS{one: file("CREATE TABLE one ()"), two: file("CREATE TABLE two (); INSERT INTO two DEFAULT VALUES;")}
	for want, files := range map[string]fstest.MapFS{
		"0001_one.sql was changed after it had been applied":   {one: file("CREATE TABLE other ()"), two: applied[two]},
		"0002_two.sql was applied to this database but is not": {one: applied[one]},
		"0003_bad.sql: pq: syntax error":                       {one: applied[one], two: applied[two], "sql/postgres/0003_bad.sql": file("CREATE TABLE three (); CREATE;")},
	} {
		db := testDatabase(t)
		log, _ := testLog()
		if err := migratePostgres(db, applied, log); err != nil {
			t.Fatal(err)
		}
		if err := migratePostgres(db, files, log); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
		var tables int
		if err := db.QueryRow(`SELECT count(*) FROM pg_tables WHERE schemaname = 'public'`).Scan(&tables); err != nil || tables != 3 {
			t.Errorf("%s: got %d tables, %v, want one, two and schema_migrations", want, tables, err)
		}
	}
}
