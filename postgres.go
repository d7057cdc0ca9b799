package main

import (
	"cmp"
	"context"
	"database/sql"
	"database/sql/driver"
	"fmt"
	"maps"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lib/pq"
)

const (
	// A second host of the URL has to get its turn within a request's time.
	defaultConnectTimeout = 1500 * time.Millisecond
	// Past so many commits that wait for a lost synchronous standby no transaction begins: see inTx.
	maxHangingCommits = 8
)

// database is a pool that prepares each query once per connection, so that running it is one round trip.
// Queries take no context: to end one, lib/pq would dial a second connection, which a frozen server holds
// up as well. Each exchange has a limit instead: the server's own, and a little later the connection's. All
// methods may be called concurrently.
type database struct {
	*sql.DB
	prepared sync.Map // query -> *sql.Stmt

	// serverID identifies one run of the server that the newest connection leads to, and the table goods in
	// it. Only together with it does (id, version) name one content forever: after a failover that
	// lost commits, or a restore, the same version number is given again, to other content. Connections to
	// two servers at once exist only while there are two primaries, which fencing forbids. A restore into a
	// database that is in use would go unnoticed by the connections that are open: stop the replicas for it.
	serverID atomic.Value // string
	// commitsHang says that the last COMMIT got no answer.
	commitsHang atomic.Bool
}

// id returns the serverID, "" before the first connection.
func (db *database) id() string { return db.serverID.Load().(string) }

// openPostgres returns a pool of at most conns connections, on which a statement ends after limit, and the
// wait for a lock earlier. settings, each a SQL expression, apply to its sessions. It does not connect.
func openPostgres(url string, conns int, limit time.Duration, settings map[string]string) (*database, error) {
	cfg, err := pq.NewConfig(url)
	if err != nil {
		return nil, err
	}
	cfg.ConnectTimeout = cmp.Or(cfg.ConnectTimeout, defaultConnectTimeout)
	// A standby would serve stale lists.
	cfg.TargetSessionAttrs = cmp.Or(cfg.TargetSessionAttrs, pq.TargetSessionAttrsReadWrite)
	inner, err := pq.NewConnectorConfig(cfg)
	if err != nil {
		return nil, err
	}
	inner.Dialer(limitedDialer{limit: limit + limit/8}) // the server's own limit comes first

	db := &database{}
	db.serverID.Store("")
	db.DB = sql.OpenDB(&connector{
		Connector: inner,
		setUp:     setUpStatement(limit, settings, cfg.Runtime),
		serverID:  &db.serverID,
	})
	db.SetMaxOpenConns(conns)
	db.SetMaxIdleConns(conns) // the default of 2 would reconnect all the time
	db.SetConnMaxIdleTime(5 * time.Minute)
	return db, nil
}

// setUpStatement returns the statement that sets up a session: it applies all settings, as SQL expressions,
// that the URL does not have, and its first column is the serverID. The table's oid is part of that, as a
// restore makes a new table.
func setUpStatement(limit time.Duration, settings, given map[string]string) string {
	milliseconds := func(d time.Duration) string { return strconv.FormatInt(d.Milliseconds(), 10) }
	all := map[string]string{
		"TimeZone":                      `'UTC'`,
		"default_transaction_isolation": `'read committed'`,
		// An answered write is on the disk, even where the server or the user has other defaults.
		"synchronous_commit": `replace(current_setting('synchronous_commit'), 'off', 'on')`,
		// Every query of the service finds its rows by an index. One plan each is enough, and one that was
		// made while the tables were small must not scan them when they have grown.
		"enable_seqscan":                      `'off'`,
		"jit":                                 `'off'`,
		"plan_cache_mode":                     `'force_generic_plan'`,
		"statement_timeout":                   `'` + milliseconds(limit) + `'`,
		"idle_in_transaction_session_timeout": `'` + milliseconds(limit) + `'`,
		"lock_timeout":                        `'` + milliseconds(limit*3/4) + `'`,
	}
	maps.Copy(all, settings)
	var b strings.Builder
	b.WriteString("SELECT concat_ws('-', extract(epoch FROM pg_postmaster_start_time()), " +
		"(SELECT oid FROM pg_database WHERE datname = current_database()), to_regclass('goods')::oid)")
	for name, expression := range all {
		if _, ok := given[name]; !ok {
			fmt.Fprintf(&b, ", set_config('%s', %s, false)", name, expression)
		}
	}
	return b.String()
}

// connector makes connections and sets up their sessions. It does so by a statement, not by start-up
// parameters: PgBouncer refuses those that it does not know.
type connector struct {
	driver.Connector
	setUp    string
	serverID *atomic.Value
}

func (c *connector) Connect(ctx context.Context) (driver.Conn, error) {
	conn, err := c.Connector.Connect(ctx)
	if err != nil {
		return nil, err
	}
	id, err := firstValue(conn, c.setUp)
	if err != nil {
		conn.Close()
		return nil, err
	}
	c.serverID.Store(id)
	return conn, nil
}

// firstValue returns the first column of the only row of a query, as text. It takes no context: see database.
func firstValue(conn driver.Conn, query string) (string, error) {
	rows, err := conn.(driver.QueryerContext).QueryContext(context.Background(), query, nil)
	if err != nil {
		return "", err
	}
	defer rows.Close()
	values := make([]driver.Value, len(rows.Columns()))
	if err := rows.Next(values); err != nil {
		return "", err
	}
	return fmt.Sprintf("%s", values[0]), nil
}

// limitedDialer makes connections on which an exchange fails after limit.
type limitedDialer struct {
	limit time.Duration
}

func (d limitedDialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return &limitedConn{Conn: conn, limit: d.limit}, nil
}

// Dial and DialTimeout are here only because pq.Dialer asks for them: lib/pq calls DialContext.
func (d limitedDialer) Dial(network, address string) (net.Conn, error) {
	return d.DialContext(context.Background(), network, address)
}

func (d limitedDialer) DialTimeout(network, address string, _ time.Duration) (net.Conn, error) {
	return d.Dial(network, address)
}

type limitedConn struct {
	net.Conn
	limit time.Duration
	until time.Time // lib/pq's own deadline: the end of connect_timeout while it connects, then zero
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

// transaction runs queries in a transaction of db.
type transaction struct {
	db *database
	tx *sql.Tx
}

// inTx runs f in one transaction. When the connection breaks during COMMIT, the error is errOutcomeUnknown;
// after any other error nothing was written. All writes of requests are made here: outside a transaction,
// database/sql would repeat one by itself when the connection breaks.
//
// While a synchronous standby is lost, a COMMIT waits forever, even when its client has gone. It must not
// be cancelled: other clients would then see what no standby has. So that such commits do not take every
// connection of the server, transactions that follow an unanswered COMMIT first count those that wait, and
// do not begin if there are maxHangingCommits. Those that count at the same time may make it a few more.
func (db *database) inTx(f func(tx transaction) error) error {
	tx, err := db.Begin()
	if err != nil {
		return markConnectionError(err)
	}
	defer tx.Rollback() // does nothing after a commit
	if db.commitsHang.Load() {
		var waiting int
		const query = `SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'`
		if err := tx.QueryRow(query).Scan(&waiting); err != nil {
			return markConnectionError(err)
		}
		if waiting >= maxHangingCommits {
			return fmt.Errorf("%w: %d commits wait for a synchronous standby", errUnavailable, waiting)
		}
	}
	if err := f(transaction{db: db, tx: tx}); err != nil {
		return err
	}
	err = tx.Commit()
	if err != nil && pq.As(err) == nil { // it is not the server that has refused it
		db.commitsHang.Store(true)
		return fmt.Errorf("commit: %w: %w", errOutcomeUnknown, markConnectionError(err))
	}
	db.commitsHang.Store(false)
	return err
}

// query runs one of this program's constant queries, and calls scan for each row.
func (t transaction) query(query string, args []any, scan func(rows *sql.Rows) error) error {
	stmt, err := t.db.statement(query)
	if err != nil {
		return err
	}
	return scanAll(t.tx.Stmt(stmt), args, scan)
}

// query is transaction.query outside of a transaction. When its connection breaks, it may run twice.
func (db *database) query(query string, args []any, scan func(rows *sql.Rows) error) error {
	stmt, err := db.statement(query)
	if err != nil {
		return err
	}
	return scanAll(stmt, args, scan)
}

// exec runs one of this program's constant statements by itself, and returns how many rows it changed. When
// its connection breaks, it may run twice.
func (db *database) exec(statement string, args ...any) (int64, error) {
	stmt, err := db.statement(statement)
	if err != nil {
		return 0, err
	}
	done, err := stmt.Exec(args...)
	if err != nil {
		return 0, markConnectionError(err)
	}
	return done.RowsAffected()
}

// statement returns the prepared query.
func (db *database) statement(query string) (*sql.Stmt, error) {
	if known, ok := db.prepared.Load(query); ok {
		return known.(*sql.Stmt), nil
	}
	stmt, err := db.Prepare(query)
	if err != nil {
		return nil, markConnectionError(err)
	}
	known, loaded := db.prepared.LoadOrStore(query, stmt)
	if loaded { // another goroutine was faster
		stmt.Close()
	}
	return known.(*sql.Stmt), nil
}

func scanAll(stmt *sql.Stmt, args []any, scan func(rows *sql.Rows) error) error {
	rows, err := stmt.Query(args...)
	if err != nil {
		return markConnectionError(err)
	}
	defer rows.Close()
	for rows.Next() {
		if err := scan(rows); err != nil {
			return err
		}
	}
	return markConnectionError(rows.Err())
}

// markConnectionError marks an error that is not the server's own answer as driver.ErrBadConn, which
// unavailable knows: lib/pq returns some of them as plain texts.
func markConnectionError(err error) error {
	if err == nil || pq.As(err) != nil {
		return err
	}
	return fmt.Errorf("%w: %w", driver.ErrBadConn, err)
}

// pingPostgres reports whether Postgres answers. It ignores ctx: see database.
func (db *database) pingPostgres(context.Context) error {
	return db.query(`SELECT 1`, nil, ignoreRow)
}

// ignoreRow is for queries of which only the effect, or the error, is of interest.
func ignoreRow(*sql.Rows) error { return nil }
