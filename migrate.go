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

// A migration is a file NNNN_name.sql. A file that has been applied anywhere
// is never changed or deleted: the next one corrects it.
//
//go:embed sql
var migrations embed.FS

type migration struct {
	name       string // of its file
	checksum   string // SHA-256 of its text, in hex
	statements []statement
}

// statement is one SQL statement and the line of its file where it begins.
type statement struct {
	line int
	text string
}

// readMigrations returns the files of dir in the order of their names.
func readMigrations(files fs.FS, dir string) ([]migration, error) {
	names, err := fs.Glob(files, path.Join(dir, "[0-9][0-9][0-9][0-9]_*.sql"))
	if err != nil {
		return nil, err
	}
	var all []migration
	for _, name := range names {
		text, err := fs.ReadFile(files, name)
		if err != nil {
			return nil, err
		}
		sum := sha256.Sum256(text)
		all = append(all, migration{path.Base(name), hex.EncodeToString(sum[:]), split(string(text))})
	}
	return all, nil
}

// split cuts a file into statements. A statement ends with a semicolon at the
// end of a line, outside of a body that is quoted with $$.
func split(text string) []statement {
	var all []statement
	var current strings.Builder
	start, quoted := 0, false
	for i, line := range strings.Split(text, "\n") {
		code, _, _ := strings.Cut(line, "--")
		if strings.TrimSpace(code) == "" && current.Len() == 0 {
			continue
		}
		if current.Len() == 0 {
			start = i + 1
		}
		current.WriteString(line + "\n")
		if strings.Count(code, "$$")%2 == 1 {
			quoted = !quoted
		}
		if !quoted && strings.HasSuffix(strings.TrimSpace(code), ";") {
			all = append(all, statement{start, strings.TrimSuffix(strings.TrimSpace(current.String()), ";")})
			current.Reset()
		}
	}
	if current.Len() > 0 {
		all = append(all, statement{start, current.String()})
	}
	return all
}

// pending compares the files with what is recorded, checksums by name, and
// returns those still to be applied.
func pending(all []migration, recorded map[string]string) ([]migration, error) {
	var missing []migration
	for _, m := range all {
		sum, ok := recorded[m.name]
		switch {
		case !ok:
			missing = append(missing, m)
		case sum != m.checksum:
			return nil, fmt.Errorf("%s was changed after it had been applied: restore it, and put the change into a new file", m.name)
		}
		delete(recorded, m.name)
	}
	for _, name := range slices.Sorted(maps.Keys(recorded)) {
		return nil, fmt.Errorf("%s was applied to this database but is not part of this program: is the program older than the database?", name)
	}
	return missing, nil
}

// migratePostgres applies the files of sql/postgres that are not yet recorded,
// each in one transaction. Any number of processes may do so at once.
func migratePostgres(ctx context.Context, db *database, files fs.FS, log *slog.Logger) error {
	all, err := readMigrations(files, "sql/postgres")
	for done := false; err == nil && !done; {
		err = inTx(ctx, db, func(tx *sql.Tx) error {
			// Bound to the transaction: a session's lock would stay with a
			// connection of the pool.
			if _, err := tx.ExecContext(ctx, `SELECT pg_advisory_xact_lock(hashtext('goods.migrations'))`); err != nil {
				return err
			}
			recorded, err := recordedInPostgres(ctx, tx)
			if err != nil {
				return fmt.Errorf("schema_migrations: %w", err)
			}
			missing, err := pending(all, recorded)
			if done = len(missing) == 0; err != nil || done {
				return err
			}
			return applyToPostgres(ctx, tx, missing[0], log)
		})
	}
	if err != nil {
		return fmt.Errorf("migrate postgres: %w", err)
	}
	return nil
}

func recordedInPostgres(ctx context.Context, tx *sql.Tx) (map[string]string, error) {
	const create = `
CREATE TABLE IF NOT EXISTS schema_migrations (
    name       text        NOT NULL CONSTRAINT schema_migrations_pkey PRIMARY KEY,
    checksum   text        NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
)`
	if _, err := tx.ExecContext(ctx, create); err != nil {
		return nil, err
	}
	rows, err := tx.QueryContext(ctx, `SELECT name, checksum FROM schema_migrations`)
	if err != nil {
		return nil, err
	}
	return scanRecorded(rows)
}

// scanRecorded reads and closes rows of a name and a checksum.
func scanRecorded(rows interface {
	Next() bool
	Scan(...any) error
	Err() error
	Close() error
}) (map[string]string, error) {
	defer rows.Close()
	recorded := map[string]string{}
	for rows.Next() {
		var name, checksum string
		if err := rows.Scan(&name, &checksum); err != nil {
			return nil, err
		}
		recorded[name] = checksum
	}
	return recorded, rows.Err()
}

func applyToPostgres(ctx context.Context, tx *sql.Tx, m migration, log *slog.Logger) error {
	for _, s := range m.statements {
		if _, err := tx.ExecContext(ctx, s.text); err != nil {
			return fmt.Errorf("%s:%d: %w", m.name, s.line+linesBefore(err, s.text), err)
		}
	}
	const record = `
INSERT INTO schema_migrations (name, checksum)
VALUES ($1, $2)`
	if _, err := tx.ExecContext(ctx, record, m.name, m.checksum); err != nil {
		return fmt.Errorf("record %s: %w", m.name, err)
	}
	log.Info("migration applied", "database", "postgres", "file", m.name)
	return nil
}

// linesBefore counts the lines of text before the place that err names, if it
// names one.
func linesBefore(err error, text string) int {
	e := pq.As(err)
	if e == nil {
		return 0
	}
	at, _ := strconv.Atoi(e.Position) // in characters, from 1
	runes := []rune(text)
	return strings.Count(string(runes[:max(0, min(at-1, len(runes)))]), "\n")
}

// migrateClickHouse applies the files of sql/clickhouse that are not yet
// recorded. ClickHouse has no transactions: each file can be run twice, and
// processes that migrate at once do no harm.
func migrateClickHouse(ctx context.Context, conn clickhouse.Conn, files fs.FS, log *slog.Logger) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("migrate clickhouse: %w", err)
		}
	}()
	const create = `
CREATE TABLE IF NOT EXISTS goods_migrations (
    Name      String,
    Checksum  String,
    AppliedAt DateTime('UTC')
)
ENGINE = ReplacingMergeTree
ORDER BY (Name, Checksum)`
	if err := conn.Exec(ctx, create); err != nil {
		return err
	}
	rows, err := conn.Query(ctx, `SELECT Name, Checksum FROM goods_migrations`)
	if err != nil {
		return err
	}
	recorded, err := scanRecorded(rows)
	if err != nil {
		return err
	}
	all, err := readMigrations(files, "sql/clickhouse")
	if err != nil {
		return err
	}
	missing, err := pending(all, recorded)
	if err != nil {
		return err
	}
	for _, m := range missing {
		for _, s := range m.statements {
			if err := conn.Exec(ctx, s.text); err != nil {
				return fmt.Errorf("%s:%d: %w", m.name, s.line, err)
			}
		}
		const record = `INSERT INTO goods_migrations (Name, Checksum, AppliedAt) SELECT ?, ?, now()`
		if err := conn.Exec(ctx, record, m.name, m.checksum); err != nil {
			return fmt.Errorf("record %s: %w", m.name, err)
		}
		log.Info("migration applied", "database", "clickhouse", "file", m.name)
	}
	return nil
}
