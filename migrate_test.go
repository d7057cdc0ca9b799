package main

import (
	"bytes"
	"crypto/rand"
	"errors"
	"log/slog"
	"net"
	"os"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// openSchema returns two pools, the first of two connections, on a new and empty schema, which is dropped
// when the test ends. A statement of either ends after limit.
func openSchema(t *testing.T, limit time.Duration) (db, other *database) {
	t.Helper()
	url := os.Getenv("POSTGRES_URL")
	if url == "" {
		t.Fatal("POSTGRES_URL is not set: use make test, or " +
			`scripts/servers.sh start and then eval "$(scripts/servers.sh env)"`)
	}
	schema := "test_" + strings.ToLower(rand.Text()[:12])
	open := func(conns int) *database {
		db, err := openPostgres(url, conns, limit, map[string]string{"search_path": pq.QuoteLiteral(schema)})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { db.Close() })
		return db
	}
	db = open(2)
	other = open(8)
	if _, err := other.Exec("CREATE SCHEMA " + schema); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { other.Exec("DROP SCHEMA " + schema + " CASCADE") })
	return db, other
}

func TestMigrateRefusals(t *testing.T) {
	_, db := openSchema(t, time.Minute)
	file := func(text string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(text)} }
	const one, two = "sql/postgres/0001_one.sql", "sql/postgres/0002_two.sql"
	applied := fstest.MapFS{
		one: file("CREATE TABLE one ()"),
		two: file("CREATE TABLE two (); INSERT INTO two DEFAULT VALUES;"),
	}
	var told bytes.Buffer
	log := slog.New(slog.NewTextHandler(&told, nil))
	if err := migratePostgres(db, applied, log); err != nil {
		t.Fatal(err)
	}
	// What a newer release has applied is left alone, and told.
	told.Reset()
	if err := migratePostgres(db, fstest.MapFS{one: applied[one]}, log); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(told.String(), "level=WARN") || !strings.Contains(told.String(), "0002_two.sql") {
		t.Errorf("got log %q, want a warning of 0002_two.sql", told.String())
	}
	for want, files := range map[string]fstest.MapFS{
		"0001_one.sql was changed after it had been applied": {
			one: file("CREATE TABLE other ()"),
			two: applied[two],
		},
		"0004_bad.sql: pq: syntax error": {
			one:                          applied[one],
			two:                          applied[two],
			"sql/postgres/0003_good.sql": file("CREATE TABLE three ()"),
			"sql/postgres/0004_bad.sql":  file("CREATE TABLE four (); CREATE;"),
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

// The start waits for a server that is not there for as long as it is told.
func TestAwaitPostgres(t *testing.T) {
	unused, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := unused.Addr().String()
	unused.Close()
	db, err := openPostgres("postgres://goods@"+address+"/goods?sslmode=disable", 1, time.Minute, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	log := slog.New(slog.DiscardHandler)
	const limit = 400 * time.Millisecond
	begin := time.Now()
	err = awaitPostgres(db, limit, log)
	took := time.Since(begin)
	inTime := took >= limit && took < 20*limit
	if err == nil || !strings.Contains(err.Error(), "cannot be used after") || !inTime {
		t.Errorf("got %v after %v, want an error after %v", err, took, limit)
	}
}

// A start does not wait for what only a person can change.
func TestPermanentRefusals(t *testing.T) {
	for code, want := range map[pqerror.Code]bool{
		pqerror.InvalidPassword:                         true,
		pqerror.InvalidCatalogName:                      true,  // of the database
		pqerror.ProtocolViolation:                       true,  // PgBouncer: an unsupported parameter
		pqerror.TooManyConnections:                      false, // others will end
		pqerror.CannotConnectNow:                        false, // it is starting
		pqerror.AdminShutdown:                           false,
		pqerror.ConnectionFailure:                       false,
		pqerror.SQLClientUnableToEstablishSQLConnection: false,
	} {
		if got := permanent(&pq.Error{Code: code}); got != want {
			t.Errorf("%s is permanent: got %v, want %v", code, got, want)
		}
	}
	if permanent(&net.OpError{Op: "dial", Err: errors.New("connection refused")}) {
		t.Error("a refused connection is permanent")
	}
}
