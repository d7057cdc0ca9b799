package main

import (
	"crypto/rand"
	"log/slog"
	"os"
	"strings"
	"testing"
	"testing/fstest"
	"time"
)

func TestMigrateRefusals(t *testing.T) {
	url := os.Getenv("POSTGRES_URL")
	if url == "" {
		t.Fatal("POSTGRES_URL is not set: use make test, or " +
			`scripts/servers.sh start and then eval "$(scripts/servers.sh env)"`)
	}
	schema := "test_" + strings.ToLower(rand.Text()[:12])
	db, err := openPostgres(url, 8, time.Minute, map[string]string{"search_path": schema})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.Exec("CREATE SCHEMA " + schema); err != nil {
		t.Fatal(err)
	}
	defer db.Exec("DROP SCHEMA " + schema + " CASCADE")

	file := func(text string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(text)} }
	const one, two = "sql/postgres/0001_one.sql", "sql/postgres/0002_two.sql"
	applied := fstest.MapFS{
		one: file("CREATE TABLE one ()"),
		two: file("CREATE TABLE two (); INSERT INTO two DEFAULT VALUES;"),
	}
	log := slog.New(slog.DiscardHandler)
	if err := migratePostgres(db, applied, log); err != nil {
		t.Fatal(err)
	}
	// What a newer release has applied is left alone.
	if err := migratePostgres(db, fstest.MapFS{one: applied[one]}, log); err != nil {
		t.Fatal(err)
	}
	bad := file("CREATE TABLE three (); CREATE;")
	for want, files := range map[string]fstest.MapFS{
		"0001_one.sql was changed after it had been applied": {
			one: file("CREATE TABLE other ()"),
			two: applied[two],
		},
		"0003_bad.sql: pq: syntax error": {
			one:                         applied[one],
			two:                         applied[two],
			"sql/postgres/0003_bad.sql": bad,
		},
	} {
		if err := migratePostgres(db, files, log); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
		var tables int
		err := db.QueryRow(`SELECT count(*) FROM pg_tables WHERE schemaname = current_schema()`).Scan(&tables)
		if err != nil || tables != 3 {
			t.Errorf("%s: got %d tables, %v, want one, two and schema_migrations", want, tables, err)
		}
	}
}
