package main

import (
	"crypto/sha256"
	"crypto/tls"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// Migrations are files NNNN_name.sql, applied in the order of their names. Those of Postgres have any
// number of statements and are applied once: one that has been released is never changed or deleted, the
// next one corrects it. ClickHouse has no transactions: its files have one statement each, which can be run
// again, and is at every start.
//
//go:embed sql
var migrations embed.FS

// migratePostgres applies the files of sql/postgres that are not yet recorded, all in one transaction. Any
// number of processes may do so at once. A database that a newer release has migrated is left as it is: its
// migrations do not break the release before.
func migratePostgres(db *database, files fs.FS, log *slog.Logger) error {
	var done []string
	err := db.inTx(func(tx transaction) error {
		// Bound to the transaction: a session's lock would stay with its connection.
		if _, err := tx.tx.Exec(`SELECT pg_advisory_xact_lock(hashtext('goods.migrations'))`); err != nil {
			return err
		}
		recorded, err := recordedMigrations(tx.tx)
		if err != nil {
			return err
		}
		names, err := fs.Glob(files, "sql/postgres/*.sql")
		if err != nil {
			return err
		}
		for _, file := range names {
			applied, err := applyMigration(tx.tx, files, file, recorded)
			if err != nil {
				return err
			}
			if applied {
				done = append(done, path.Base(file))
			}
			delete(recorded, path.Base(file))
		}
		for name := range recorded {
			log.Warn("the database was migrated by a newer release", "file", name)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("migrate postgres: %w", err)
	}
	for _, name := range done {
		log.Info("migrated", "database", "postgres", "file", name)
	}
	return nil
}

// recordedMigrations returns the checksums of the files that were applied, by name. It creates their table
// only if that is missing: even IF NOT EXISTS needs the right to create it.
func recordedMigrations(tx *sql.Tx) (map[string]string, error) {
	var exists bool
	err := tx.QueryRow(`SELECT to_regclass('schema_migrations') IS NOT NULL`).Scan(&exists)
	if err != nil {
		return nil, err
	}
	if !exists {
		_, err := tx.Exec(`
CREATE TABLE schema_migrations (
    name       text        NOT NULL CONSTRAINT schema_migrations_pkey PRIMARY KEY,
    checksum   text        NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
)`)
		return map[string]string{}, err
	}
	rows, err := tx.Query(`SELECT name, checksum FROM schema_migrations`)
	if err != nil {
		return nil, err
	}
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

// applyMigration applies a file, and records it, unless it is recorded already. It reports whether it did.
func applyMigration(tx *sql.Tx, files fs.FS, file string, recorded map[string]string) (bool, error) {
	name := path.Base(file)
	text, err := fs.ReadFile(files, file)
	if err != nil {
		return false, err
	}
	checksum := fmt.Sprintf("%x", sha256.Sum256(text))
	switch recorded[name] {
	case checksum:
		return false, nil
	case "": // it has not been applied
	default:
		return false, fmt.Errorf("%s was changed after it had been applied: "+
			"restore it, and put the change into a new file", name)
	}
	if _, err := tx.Exec(string(text)); err != nil {
		return false, fmt.Errorf("%s: %w", name, err)
	}
	_, err = tx.Exec(`INSERT INTO schema_migrations (name, checksum) VALUES ($1, $2)`, name, checksum)
	return err == nil, err
}

// awaitPostgres waits until the server answers, for about limit. What waiting cannot cure is an error at
// once.
func awaitPostgres(db *database, limit time.Duration, log *slog.Logger) error {
	start := time.Now()
	for attempt := 0; ; attempt++ {
		_, err := db.Exec(`SELECT 1`) // Ping would hide the server's words
		if err == nil || permanent(err) {
			return err
		}
		if took := time.Since(start); took >= limit {
			return fmt.Errorf("cannot be used after %v: %w", took.Round(100*time.Millisecond), err)
		}
		if attempt == 0 {
			log.Warn("waiting for postgres", "limit", limit.String(), "err", err)
		}
		time.Sleep(250 * time.Millisecond)
	}
}

// permanent reports whether an error of connecting stays until somebody changes something: a refusal of the
// server, such as a wrong password or an unknown parameter, or a failure of TLS: the server has none, or a
// certificate is missing or not valid.
func permanent(err error) bool {
	if e := pq.As(err); e != nil {
		switch e.Code.Class() {
		case pqerror.ClassConnectionException:
			return e.Code == pqerror.ProtocolViolation // PgBouncer: unsupported startup parameter
		case pqerror.ClassInsufficientResources, pqerror.ClassOperatorIntervention:
			return false // full, or just starting
		}
		return true
	}
	var certificate *tls.CertificateVerificationError
	var file *fs.PathError
	return errors.As(err, &certificate) || errors.As(err, &file) || errors.Is(err, pq.ErrSSLNotSupported)
}

// checkEncoding returns an error unless the database can hold every text.
func checkEncoding(db *database) error {
	var encoding string
	if err := db.QueryRow(`SELECT current_setting('server_encoding')`).Scan(&encoding); err != nil {
		return err
	}
	if encoding != "UTF8" {
		return fmt.Errorf("the encoding of the database is %s, but has to be UTF8", encoding)
	}
	return nil
}
