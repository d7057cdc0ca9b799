package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"sync/atomic"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"
)

// eventLog is the table goods_log in ClickHouse. All methods may be called concurrently.
type eventLog struct {
	writer, reader clickhouse.Conn // readers have connections of their own, and so never hold up the events
	// knowsAsync says that the server knows asynchronous INSERTs, which have to be switched off: it would
	// acknowledge them before they are stored.
	knowsAsync atomic.Bool
}

// openEventLog returns the log, which connects when it is used.
func openEventLog(options *clickhouse.Options) *eventLog {
	open := func(conns int) clickhouse.Conn {
		o := *options
		o.DialTimeout = 2 * time.Second
		o.ReadTimeout = eventTimeout // the default is five minutes
		o.MaxOpenConns = conns
		o.MaxIdleConns = conns
		conn, err := clickhouse.Open(&o)
		if err != nil {
			panic(err) // happens only without options
		}
		return conn
	}
	return &eventLog{
		writer: open(insertWorkers + 1), // and a ping
		reader: open(historyConns),
	}
}

// ping reports whether the table is there.
func (l *eventLog) ping(ctx context.Context) error {
	var exists uint8
	if err := l.writer.QueryRow(ctx, `EXISTS TABLE goods_log`).Scan(&exists); err != nil {
		return err
	}
	if exists == 0 {
		return errors.New("there is no table goods_log")
	}
	return nil
}

// insert adds events in one INSERT, and returns when they are stored.
func (l *eventLog) insert(events []event) error {
	ctx, cancel := context.WithTimeout(context.Background(), eventTimeout)
	// cancel is called a second later than usual. The driver has a goroutine that closes the connection when
	// ctx ends before Send does. If ctx ended right after Send, that goroutine could miss the end of Send,
	// and close a connection that the next INSERT uses already.
	defer func() { time.AfterFunc(time.Second, cancel) }()
	if l.knowsAsync.Load() {
		ctx = clickhouse.Context(ctx, clickhouse.WithSettings(clickhouse.Settings{
			"async_insert":          0,
			"wait_for_async_insert": 1,
		}))
	}
	batch, err := l.writer.PrepareBatch(ctx, `
INSERT INTO goods_log (Id, ProjectId, Name, Description, Priority, Removed, EventTime, Version)`)
	if err != nil {
		return err
	}
	defer batch.Close()
	for _, e := range events {
		removed := uint8(0) // ClickHouse 18.16 has no Bool
		if e.Removed {
			removed = 1
		}
		err := batch.Append(e.GoodID, e.ProjectID, e.Name, e.Description, e.Priority, removed, e.Time.UTC(),
			uint32(e.Version))
		if err != nil {
			return err
		}
	}
	return batch.Send()
}

// migrate runs the files of sql/clickhouse. For users that may not create tables the operator does that: a
// refusal is no error if the table is there.
func (l *eventLog) migrate() error {
	ctx, cancel := context.WithTimeout(context.Background(), eventTimeout)
	defer cancel()
	err := l.runMigrations(ctx)
	var refusal *clickhouse.Exception
	if errors.As(err, &refusal) && l.ping(ctx) == nil {
		err = nil
	}
	if err != nil {
		return fmt.Errorf("migrate clickhouse: %w", err)
	}
	server, err := l.writer.ServerVersion()
	if err != nil {
		return fmt.Errorf("migrate clickhouse: %w", err)
	}
	const firstWithAsync = 22
	l.knowsAsync.Store(server.Version.Major >= firstWithAsync)
	return nil
}

func (l *eventLog) runMigrations(ctx context.Context) error {
	names, err := fs.Glob(migrations, "sql/clickhouse/*.sql")
	if err != nil {
		return err
	}
	for _, file := range names {
		text, err := fs.ReadFile(migrations, file)
		if err != nil {
			return err
		}
		if err := l.writer.Exec(ctx, string(text)); err != nil {
			return fmt.Errorf("%s: %w", path.Base(file), err)
		}
	}
	return nil
}
