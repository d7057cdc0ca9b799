package main

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

const postgresConns = 16

// openPostgres returns a pool whose statements, and waits for the server, end
// after limit; waits for a lock after a quarter of it. Settings such as
// "synchronous_commit=off" apply to its sessions. It does not connect.
func openPostgres(url string, limit time.Duration, settings ...string) (*database, error) {
	cfg, err := pq.NewConfig(url)
	if err != nil {
		return nil, err
	}
	if cfg.Runtime == nil {
		cfg.Runtime = map[string]string{}
	}
	if cfg.ConnectTimeout == 0 {
		cfg.ConnectTimeout = 3 * time.Second
	}
	cfg.Runtime["statement_timeout"] = strconv.FormatInt(limit.Milliseconds(), 10)
	cfg.Runtime["lock_timeout"] = strconv.FormatInt((limit / 4).Milliseconds(), 10)
	cfg.Runtime["idle_in_transaction_session_timeout"] = cfg.Runtime["statement_timeout"]
	cfg.Runtime["TimeZone"] = "UTC"
	for _, s := range settings {
		name, value, _ := strings.Cut(s, "=")
		cfg.Runtime[name] = value
	}
	connector, err := pq.NewConnectorConfig(cfg)
	if err != nil {
		return nil, err
	}
	connector.Dialer(limitedDialer{limit: limit + limit/8})
	db := sql.OpenDB(connector)
	db.SetMaxOpenConns(postgresConns)
	db.SetMaxIdleConns(postgresConns) // the default of 2 would reconnect all the time
	db.SetConnMaxIdleTime(5 * time.Minute)
	return &database{DB: db}, nil
}

// limitedDialer makes connections that give a silent server up. lib/pq leaves
// a read to wait for ever, even when its context ends: a frozen server, which
// still accepts connections, would hold every caller.
type limitedDialer struct {
	limit time.Duration
}

func (d limitedDialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	c, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return &limitedConn{Conn: c, limit: d.limit}, nil
}

func (d limitedDialer) Dial(network, address string) (net.Conn, error) {
	return d.DialContext(context.Background(), network, address)
}

func (d limitedDialer) DialTimeout(network, address string, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return d.DialContext(ctx, network, address)
}

type limitedConn struct {
	net.Conn
	limit time.Duration
}

func (c *limitedConn) Read(b []byte) (int, error) {
	if err := c.SetReadDeadline(time.Now().Add(c.limit)); err != nil {
		return 0, err
	}
	return c.Conn.Read(b)
}

func (c *limitedConn) Write(b []byte) (int, error) {
	if err := c.SetWriteDeadline(time.Now().Add(c.limit)); err != nil {
		return 0, err
	}
	return c.Conn.Write(b)
}

// inTx runs f in one transaction. When the connection breaks during COMMIT the
// error is errOutcomeUnknown; after any other error nothing was written.
func inTx(ctx context.Context, db *database, f func(tx *sql.Tx) error) error {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	defer tx.Rollback() // does nothing after a commit
	if err := f(tx); err != nil {
		return err
	}
	err = tx.Commit()
	switch {
	case err == nil:
		return nil
	case pq.As(err) != nil, errors.Is(err, sql.ErrTxDone):
		return fmt.Errorf("commit: %w", err) // refused, or rolled back because ctx ended before it
	default:
		return fmt.Errorf("commit: %w: %w", errOutcomeUnknown, err)
	}
}

// database is a pool that prepares each query once, so that running it is one
// round trip.
type database struct {
	*sql.DB
	prepared sync.Map // from a query to its *sql.Stmt
}

func (db *database) statement(ctx context.Context, tx *sql.Tx, query string) (*sql.Stmt, error) {
	stmt, ok := db.prepared.Load(query)
	if !ok {
		own, err := db.PrepareContext(ctx, query)
		if err != nil {
			return nil, err
		}
		if stmt, ok = db.prepared.LoadOrStore(query, own); ok {
			own.Close() // another goroutine was faster
		}
	}
	if tx != nil {
		return tx.StmtContext(ctx, stmt.(*sql.Stmt)), nil
	}
	return stmt.(*sql.Stmt), nil
}

// query runs one of this program's constant queries, in tx if that is not nil.
func (db *database) query(ctx context.Context, tx *sql.Tx, query string, args ...any) (*sql.Rows, error) {
	stmt, err := db.statement(ctx, tx, query)
	if err != nil {
		return nil, err
	}
	return stmt.QueryContext(ctx, args...)
}

// queryRow is query for one row, which it scans into dest. Without a row the
// error is sql.ErrNoRows.
func (db *database) queryRow(ctx context.Context, tx *sql.Tx, query string, args []any, dest ...any) error {
	stmt, err := db.statement(ctx, tx, query)
	if err != nil {
		return err
	}
	return stmt.QueryRowContext(ctx, args...).Scan(dest...)
}

// unavailable tells "Postgres can not serve this now" from every other error.
func unavailable(err error) bool {
	if e := pq.As(err); e != nil {
		switch e.Code.Class() {
		case pqerror.ClassConnectionException, pqerror.ClassInsufficientResources, pqerror.ClassOperatorIntervention,
			pqerror.ClassTransactionRollback:
			return true
		}
		return e.Code == pqerror.LockNotAvailable || e.Code == pqerror.ReadOnlySQLTransaction
	}
	var netErr net.Error
	return errors.As(err, &netErr) || errors.Is(err, driver.ErrBadConn) || errors.Is(err, sql.ErrConnDone) ||
		errors.Is(err, sql.ErrTxDone) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) || errors.Is(err, errStopped)
}

// awaitPostgres waits until the server answers, for about patience. A server
// that answers with a refusal (wrong password, no such database) is an error
// at once.
func awaitPostgres(ctx context.Context, db *database, patience time.Duration, log *slog.Logger) error {
	said := false
	for start := time.Now(); ; pause(ctx, 250*time.Millisecond) {
		err := ping(ctx, db)
		if err == nil {
			return nil
		}
		if e := pq.As(err); e != nil && (e.Code.Class() == pqerror.ClassInvalidAuthorizationSpecification || e.Code == pqerror.InvalidCatalogName) {
			return err
		}
		if took := time.Since(start); took >= patience || ctx.Err() != nil {
			return fmt.Errorf("no answer in %v: %w", took.Round(100*time.Millisecond), err)
		}
		if !said {
			said = true
			log.Warn("waiting for postgres", "patience", patience.String(), "err", err)
		}
	}
}

// ping asks the server a question, on a connection of the pool.
func ping(ctx context.Context, db *database) error {
	var one int
	return db.QueryRowContext(ctx, `SELECT 1`).Scan(&one)
}
