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
	"sync"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// database is a pool that prepares each query once, so that running it is one
// round trip. Queries take no context: lib/pq ends one by dialing a second
// connection, and a frozen server would hold that, too. What bounds a query is
// the server's statement_timeout, and the connection's deadlines when the
// server is silent.
type database struct {
	*sql.DB
	prepared sync.Map // query -> *sql.Stmt
}

// openPostgres returns a pool of at most conns connections, on which a
// statement, or the wait for the server, ends after limit. Settings such as
// "synchronous_commit=off" apply to its sessions. It does not connect.
func openPostgres(url string, conns int, limit time.Duration, settings ...string) (*database, error) {
	cfg, err := pq.NewConfig(url)
	if err != nil {
		return nil, err
	}
	if cfg.ConnectTimeout == 0 {
		cfg.ConnectTimeout = 1500 * time.Millisecond // so that a second host gets its turn within a request's time
	}
	millis := func(d time.Duration) string { return strconv.FormatInt(d.Milliseconds(), 10) }
	runtime := map[string]string{
		"statement_timeout":                   millis(limit),
		"lock_timeout":                        millis(limit * 3 / 4),
		"idle_in_transaction_session_timeout": millis(limit),
		"TimeZone":                            "UTC",
	}
	for name, value := range cfg.Runtime {
		runtime[name] = value
	}
	for i := 0; i < len(settings); i += 2 {
		runtime[settings[i]] = settings[i+1]
	}
	cfg.Runtime = runtime
	connector, err := pq.NewConnectorConfig(cfg)
	if err != nil {
		return nil, err
	}
	connector.Dialer(limitedDialer(limit + limit/8)) // the server's own limit comes first
	db := sql.OpenDB(connector)
	db.SetMaxOpenConns(conns)
	db.SetMaxIdleConns(conns) // the default of 2 would reconnect all the time
	db.SetConnMaxIdleTime(5 * time.Minute)
	return &database{DB: db}, nil
}

// limitedDialer makes connections whose reads and writes fail after that time.
type limitedDialer time.Duration

func (d limitedDialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	c, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return &limitedConn{Conn: c, limit: time.Duration(d)}, nil
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
	until time.Time // what SetDeadline said: the end of connect_timeout, while connecting
}

func (c *limitedConn) SetDeadline(t time.Time) error {
	c.until = t
	return c.Conn.SetDeadline(t)
}

// deadline is the earlier of the two limits.
func (c *limitedConn) deadline() time.Time {
	t := time.Now().Add(c.limit)
	if !c.until.IsZero() && c.until.Before(t) {
		return c.until
	}
	return t
}

func (c *limitedConn) Read(b []byte) (int, error) {
	if err := c.SetReadDeadline(c.deadline()); err != nil {
		return 0, err
	}
	return c.Conn.Read(b)
}

func (c *limitedConn) Write(b []byte) (int, error) {
	if err := c.SetWriteDeadline(c.deadline()); err != nil {
		return 0, err
	}
	return c.Conn.Write(b)
}

// errOutcomeUnknown marks an error after which a write may or may not stand:
// the service never repeats it.
var errOutcomeUnknown = errors.New("outcome unknown")

// inTx runs f in one transaction. When the connection breaks during COMMIT the
// error is errOutcomeUnknown; after any other error nothing was written.
// Writes are always in transactions: outside one, database/sql repeats a
// statement by itself when its connection breaks.
func (db *database) inTx(f func(tx *sql.Tx) error) error {
	tx, err := db.Begin()
	if err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	defer tx.Rollback() // does nothing after a commit
	if err := f(tx); err != nil {
		return err
	}
	switch err := tx.Commit(); {
	case err == nil:
		return nil
	case pq.As(err) != nil:
		return fmt.Errorf("commit: %w", err) // refused by the server
	default:
		return fmt.Errorf("commit: %w: %w", errOutcomeUnknown, err)
	}
}

// query runs one of this program's constant queries, in tx if that is not nil.
func (db *database) query(tx *sql.Tx, query string, args ...any) (*sql.Rows, error) {
	stmt, ok := db.prepared.Load(query)
	if !ok {
		own, err := db.Prepare(query)
		if err != nil {
			return nil, err
		}
		if stmt, ok = db.prepared.LoadOrStore(query, own); ok {
			own.Close() // another goroutine was faster
		}
	}
	if tx != nil {
		return tx.Stmt(stmt.(*sql.Stmt)).Query(args...)
	}
	return stmt.(*sql.Stmt).Query(args...)
}

// queryRow is query for one row, which it scans into dest. Without a row the
// error is sql.ErrNoRows.
func (db *database) queryRow(tx *sql.Tx, query string, args []any, dest ...any) error {
	rows, err := db.query(tx, query, args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	if !rows.Next() {
		if err := rows.Err(); err != nil {
			return err
		}
		return sql.ErrNoRows
	}
	if err := rows.Scan(dest...); err != nil {
		return err
	}
	return rows.Close()
}

// unavailable tells "Postgres cannot serve this now" from every other error.
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
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)
}

// awaitPostgres waits until the server answers, for about patience. A server
// that answers with a refusal (wrong password, no such database) is an error
// at once.
func awaitPostgres(ctx context.Context, db *database, patience time.Duration, log *slog.Logger) error {
	said := false
	for start := time.Now(); ; pause(ctx, 250*time.Millisecond) {
		_, err := db.Exec(`SELECT 1`)
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

// pause waits for d, or less when ctx ends.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
