package main

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"embed"
	"encoding/hex"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/ClickHouse/clickhouse-go/v2"
	"github.com/lib/pq"
)

// A migration is a file NNNN_name.sql: for Postgres any number of statements,
// for ClickHouse one. A file that has been released is never changed or
// deleted: the next one corrects it.
//
//go:embed sql
var migrations embed.FS

type migration struct {
	name     string // of its file
	text     string
	checksum string // SHA-256 of text, in hex
}

// pendingMigrations returns the files of dir, in the order of their names,
// that rows of names and checksums, which it closes, do not record.
func pendingMigrations(files fs.FS, dir string, rows interface {
	Next() bool
	Scan(...any) error
	Err() error
	Close() error
}) ([]migration, error) {
	defer rows.Close()
	recorded := map[string]string{}
	for rows.Next() {
		var name, checksum string
		if err := rows.Scan(&name, &checksum); err != nil {
			return nil, err
		}
		recorded[name] = checksum
	}
	if err := rows.Err(); err != nil {
		return nil, err
	}
	names, err := fs.Glob(files, path.Join(dir, "[0-9][0-9][0-9][0-9]_*.sql"))
	if err != nil {
		return nil, err
	}
	var pending []migration
	for _, file := range names {
		text, err := fs.ReadFile(files, file)
		if err != nil {
			return nil, err
		}
		sum := sha256.Sum256(text)
		m := migration{path.Base(file), string(text), hex.EncodeToString(sum[:])}
		switch checksum, ok := recorded[m.name]; {
		case !ok:
			pending = append(pending, m)
		case checksum != m.checksum:
			return nil, fmt.Errorf("%s was changed after it had been applied: restore it, and put the change into a new file", m.name)
		}
		delete(recorded, m.name)
	}
	for _, name := range slices.Sorted(maps.Keys(recorded)) {
		return nil, fmt.Errorf("%s was applied to this database but is not part of this program: is the program older than the database?", name)
	}
	return pending, nil
}

// migratePostgres applies the files of sql/postgres that are not yet recorded,
// all in one transaction. Any number of processes may do so at once.
func migratePostgres(db *database, files fs.FS, log *slog.Logger) error {
	// Bound to the transaction: a session's lock would stay with its connection.
	const prepare = `
SELECT pg_advisory_xact_lock(hashtext('goods.migrations'));
CREATE TABLE IF NOT EXISTS schema_migrations (
    name       text        NOT NULL CONSTRAINT schema_migrations_pkey PRIMARY KEY,
    checksum   text        NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
)`
	var pending []migration
	err := db.inTx(func(tx *sql.Tx) error {
		if _, err := tx.Exec(prepare); err != nil {
			return err
		}
		rows, err := tx.Query(`SELECT name, checksum FROM schema_migrations`)
		if err != nil {
			return err
		}
		if pending, err = pendingMigrations(files, "sql/postgres", rows); err != nil {
			return err
		}
		for _, m := range pending {
			if _, err := tx.Exec(m.text); err != nil {
				return fmt.Errorf("%s:%d: %w", m.name, lineOf(err, m.text), err)
			}
			if _, err := tx.Exec(`INSERT INTO schema_migrations (name, checksum) VALUES ($1, $2)`, m.name, m.checksum); err != nil {
				return fmt.Errorf("record %s: %w", m.name, err)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("migrate postgres: %w", err)
	}
	for _, m := range pending {
		log.Info("migration applied", "database", "postgres", "file", m.name)
	}
	return nil
}

// lineOf is the line of text that err names, 1 if it names none.
func lineOf(err error, text string) int {
	at := 0
	if e := pq.As(err); e != nil {
		at, _ = strconv.Atoi(e.Position) // in characters, from 1
	}
	runes := []rune(text)
	return 1 + strings.Count(string(runes[:max(0, min(at-1, len(runes)))]), "\n")
}

// migrateClickHouse applies the files of sql/clickhouse that are not yet
// recorded. ClickHouse has no transactions: each file can be run twice, and
// processes that migrate at once do no harm.
func migrateClickHouse(ctx context.Context, conn clickhouse.Conn, files fs.FS, log *slog.Logger) error {
	const prepare = `
CREATE TABLE IF NOT EXISTS goods_migrations (
    Name      String,
    Checksum  String,
    AppliedAt DateTime('UTC')
)
ENGINE = ReplacingMergeTree
ORDER BY (Name, Checksum)`
	if err := conn.Exec(ctx, prepare); err != nil {
		return fmt.Errorf("migrate clickhouse: %w", err)
	}
	rows, err := conn.Query(ctx, `SELECT Name, Checksum FROM goods_migrations`)
	if err != nil {
		return fmt.Errorf("migrate clickhouse: %w", err)
	}
	pending, err := pendingMigrations(files, "sql/clickhouse", rows)
	if err != nil {
		return fmt.Errorf("migrate clickhouse: %w", err)
	}
	for _, m := range pending {
		if err := conn.Exec(ctx, m.text); err != nil {
			return fmt.Errorf("migrate clickhouse: %s: %w", m.name, err)
		}
		const record = `INSERT INTO goods_migrations (Name, Checksum, AppliedAt) SELECT ?, ?, now()`
		if err := conn.Exec(ctx, record, m.name, m.checksum); err != nil {
			return fmt.Errorf("migrate clickhouse: record %s: %w", m.name, err)
		}
		log.Info("migration applied", "database", "clickhouse", "file", m.name)
	}
	return nil
}
