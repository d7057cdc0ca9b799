package main

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// database is a pool that prepares each query once, so that running it is one round trip. Queries take no context:
// lib/pq ends one by dialing a second connection, which a frozen server holds, too.
type database struct {
	*sql.DB
	prepared sync.Map // query -> *sql.Stmt
}

// openPostgres returns a pool of at most conns connections, on which a statement, or the wait for the server, ends
// after limit, and the wait for a lock earlier. The settings apply to its sessions. It does not connect.
func openPostgres(url string, conns int, limit time.Duration, settings map[string]string) (*database, error) {
	cfg, err := pq.NewConfig(url)
	if err != nil {
		return nil, err
	}
	if cfg.ConnectTimeout == 0 {
		cfg.ConnectTimeout = 1500 * time.Millisecond // so that a second host gets its turn within a request's time
	}
	timeout := strconv.FormatInt(limit.Milliseconds(), 10)
	// Every query of the service finds its rows by an index. One plan each is enough, and one that was made while the
	// tables were small must not scan them when they have grown.
	runtime := map[string]string{"TimeZone": "UTC", "default_transaction_isolation": "read committed",
		"enable_seqscan": "off", "jit": "off", "plan_cache_mode": "force_generic_plan", "statement_timeout": timeout,
		"idle_in_transaction_session_timeout": timeout, "lock_timeout": strconv.FormatInt(limit.Milliseconds()*3/4, 10)}
	maps.Copy(runtime, cfg.Runtime)
	maps.Copy(runtime, settings)
	cfg.Runtime = runtime
	connector, err := pq.NewConnectorConfig(cfg)
	if err != nil {
		return nil, err
	}
	connector.Dialer(limitedDialer{limit: limit + limit/8}) // the server's own limit comes first
	db := sql.OpenDB(connector)
	db.SetMaxOpenConns(conns)
	db.SetMaxIdleConns(conns) // the default of 2 would reconnect all the time
	db.SetConnMaxIdleTime(5 * time.Minute)
	return &database{DB: db}, nil
}

// limitedDialer makes connections on which an exchange fails after limit.
type limitedDialer struct {
	pq.Dialer // is never called: lib/pq prefers DialContext
	limit     time.Duration
}

func (d limitedDialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	c, err := new(net.Dialer).DialContext(ctx, network, address)
	return &limitedConn{Conn: c, limit: d.limit}, err
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

// Write begins an exchange: what is read next has to come within its limit.
func (c *limitedConn) Write(b []byte) (int, error) {
	end := time.Now().Add(c.limit)
	if !c.until.IsZero() && c.until.Before(end) {
		end = c.until
	}
	if err := c.Conn.SetDeadline(end); err != nil {
		return 0, err
	}
	return c.Conn.Write(b)
}

// errOutcomeUnknown marks an error after which a write may or may not stand: the service never repeats it.
var errOutcomeUnknown = errors.New("outcome unknown")

// inTx runs f in one transaction. When the connection breaks during COMMIT the error is errOutcomeUnknown; after any
// other error nothing was written. Outside a transaction, database/sql would repeat a write by itself.
func (db *database) inTx(f func(tx *sql.Tx) error) error {
	tx, err := db.Begin()
	if err != nil {
		return gone(err)
	}
	defer tx.Rollback() // does nothing after a commit
	if err := f(tx); err != nil {
		return err
	}
	if err = tx.Commit(); err != nil && pq.As(err) == nil { // the server has not refused it
		err = fmt.Errorf("commit: %w: %w", errOutcomeUnknown, gone(err))
	}
	return err
}

// query runs one of this program's constant queries, in tx if that is not nil, and calls scan for each row.
func (db *database) query(tx *sql.Tx, query string, args []any, scan func(rows *sql.Rows) error) error {
	prepared, ok := db.prepared.Load(query)
	if !ok {
		own, err := db.Prepare(query)
		if err != nil {
			return gone(err)
		}
		if prepared, ok = db.prepared.LoadOrStore(query, own); ok {
			own.Close() // another goroutine was faster
		}
	}
	stmt := prepared.(*sql.Stmt)
	if tx != nil {
		stmt = tx.Stmt(stmt)
	}
	rows, err := stmt.Query(args...)
	if err != nil {
		return gone(err)
	}
	defer rows.Close()
	for rows.Next() {
		if err := scan(rows); err != nil {
			return err
		}
	}
	return gone(rows.Err())
}

// gone marks an error that is not the server's own answer: lib/pq hides what some of them are.
func gone(err error) error {
	if err != nil && pq.As(err) == nil {
		err = fmt.Errorf("%w: %w", driver.ErrBadConn, err)
	}
	return err
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
	return errors.Is(err, driver.ErrBadConn) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)
}

// awaitPostgres waits until the server answers, for about patience. A server that answers with a refusal (wrong
// password, no such database) is an error at once.
func awaitPostgres(ctx context.Context, db *database, patience time.Duration, log *slog.Logger) error {
	for n, start := 0, time.Now(); ; n++ {
		_, err := db.Exec(`SELECT 1`)
		if e := pq.As(err); err == nil || e != nil && (e.Code.Class() == pqerror.ClassInvalidAuthorizationSpecification || e.Code == pqerror.InvalidCatalogName) {
			return err
		}
		if took := time.Since(start); took >= patience || ctx.Err() != nil {
			return fmt.Errorf("no answer in %v: %w", took.Round(100*time.Millisecond), err)
		}
		if n == 0 {
			log.Warn("waiting for postgres", "patience", patience.String(), "err", err)
		}
		time.Sleep(250 * time.Millisecond)
	}
}
