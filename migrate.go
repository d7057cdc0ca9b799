package main

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"embed"
	"fmt"
	"io/fs"
	"log/slog"
	"path"
	"slices"
	"strings"

	"github.com/ClickHouse/clickhouse-go/v2"
)

// Migrations are files NNNN_name.sql, applied in the order of their names. Those of Postgres have any number of
// statements and are applied once: one that has been released is never changed or deleted, the next one corrects it.
// ClickHouse has no transactions: its files have one statement each, which can be run again, and is at every start.
//
//go:embed sql
var migrations embed.FS

// migratePostgres applies the files of sql/postgres that are not yet recorded, all in one transaction. Any number of
// processes may do so at once.
func migratePostgres(db *database, files fs.FS, log *slog.Logger) error {
	names, _ := fs.Glob(files, "sql/postgres/*.sql")
	err := db.inTx(func(tx *sql.Tx) error {
		// Bound to the transaction: a session's lock would stay with its connection.
		const prepare = `
SELECT pg_advisory_xact_lock(hashtext('goods.migrations'));
CREATE TABLE IF NOT EXISTS schema_migrations (
    name       text        NOT NULL CONSTRAINT schema_migrations_pkey PRIMARY KEY,
    checksum   text        NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
)`
		if _, err := tx.Exec(prepare); err != nil {
			return err
		}
		var list string
		if err := tx.QueryRow(`SELECT coalesce(string_agg(name || ' ' || checksum, ' '), '') FROM schema_migrations`).Scan(&list); err != nil {
			return err
		}
		recorded := map[string]string{} // name -> checksum
		for pair := range slices.Chunk(strings.Fields(list), 2) {
			recorded[pair[0]] = pair[1]
		}
		for _, file := range names {
			name := path.Base(file)
			text, err := fs.ReadFile(files, file)
			if err != nil {
				return err
			}
			checksum := fmt.Sprintf("%x", sha256.Sum256(text))
			was := recorded[name]
			delete(recorded, name)
			if was == checksum {
				continue
			}
			if was != "" {
				return fmt.Errorf("%s was changed after it had been applied: restore it, and put the change into a new file", name)
			}
			if _, err := tx.Exec(string(text)); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			if _, err := tx.Exec(`INSERT INTO schema_migrations (name, checksum) VALUES ($1, $2)`, name, checksum); err != nil {
				return err
			}
			log.Info("migrating", "database", "postgres", "file", name)
		}
		for name := range recorded {
			return fmt.Errorf("%s was applied to this database but is not part of this program: is the program older than the database?", name)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("migrate postgres: %w", err)
	}
	return nil
}

// migrateClickHouse runs the files of sql/clickhouse.
func migrateClickHouse(ctx context.Context, conn clickhouse.Conn) error {
	names, _ := fs.Glob(migrations, "sql/clickhouse/*.sql")
	for _, file := range names {
		text, err := fs.ReadFile(migrations, file)
		if err == nil {
			err = conn.Exec(ctx, string(text))
		}
		if err != nil {
			return fmt.Errorf("migrate clickhouse: %s: %w", path.Base(file), err)
		}
	}
	return nil
}
