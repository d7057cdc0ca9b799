package main

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"
)

const (
	// historyTimeout is for all queries of a page.
	historyTimeout = requestTimeout - 200*time.Millisecond
	// historyConns are for a history, and for a large one beside it: the same ClickHouse stores the events.
	historyConns = 2
)

// eventLog is the table goods_log in ClickHouse. All methods may be called concurrently.
type eventLog struct {
	writer, reader clickhouse.Conn // readers have connections of their own, and so never hold up the events
	// syncInserts says that the server has to be told not to acknowledge an INSERT before it is stored.
	syncInserts atomic.Bool
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
	// Not at once: the driver may take that for the end of an INSERT, and close a connection that the next
	// one has.
	defer time.AfterFunc(time.Second, cancel)
	if l.syncInserts.Load() {
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

// historyRequest asks for limit versions of a good, from the offset on, which is counted from 1.
type historyRequest struct {
	id, projectID int32
	limit, offset int32
	maxBytes      int // of the page: a larger one is an errReplyTooLarge
}

func (q historyRequest) conflictKey() any { return nil }

// pastVersion is a version of a good that ClickHouse holds.
type pastVersion struct {
	Version     uint32    `json:"version"`
	Name        string    `json:"name"`
	Description string    `json:"description"`
	Priority    int32     `json:"priority"`
	Removed     bool      `json:"removed"`
	Time        time.Time `json:"time"`
}

// History returns the versions of a good that ClickHouse holds, the newest first, as JSON. A good that it
// does not know has none. It is the log, a little behind the list. The caller must call release when the
// page has been sent. Failures: errUnavailable without ClickHouse.
func (s *service) History(ctx context.Context, q historyRequest) (page []byte, release func(), err error) {
	page, release, err = s.replies.build(ctx, func(ctx context.Context, maxBytes int, reserved bool) ([]byte, error) {
		q.maxBytes = maxBytes
		if reserved {
			return s.largeHistories.do(ctx, q)
		}
		return s.histories.do(ctx, q)
	})
	if err != nil {
		return nil, nil, fmt.Errorf("history: %w: %w", errUnavailable, err)
	}
	return page, release, nil
}

// readHistory answers the first request, and those that are equal.
func (s *service) readHistory(requests []historyRequest, results []result[[]byte], _ bool) error {
	page, err := s.log.history(requests[0])
	for i, q := range requests {
		results[i] = result[[]byte]{page, err}
		if q != requests[0] {
			results[i] = result[[]byte]{err: errNextBatch}
		}
	}
	return nil
}

const (
	// A page's size is asked for first, so that a large one is not read before there is memory for it.
	sizeOfVersions = `
SELECT sum(length(Name) + length(Description) + 120)
FROM (
    SELECT Name, Description
    FROM goods_log FINAL
    WHERE ProjectId = ? AND Id = ?
    ORDER BY Version DESC
    LIMIT ?, ?
)`

	countVersions = `
SELECT count()
FROM goods_log FINAL
WHERE ProjectId = ? AND Id = ?`

	selectVersions = `
SELECT Version, Name, Description, Priority, Removed, EventTime
FROM goods_log FINAL
WHERE ProjectId = ? AND Id = ?
ORDER BY Version DESC
LIMIT ?, ?`
)

// history returns a page.
func (l *eventLog) history(q historyRequest) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), historyTimeout)
	defer cancel()
	if q.maxBytes == smallReply { // else there is memory for what this query has returned before
		var bytes uint64
		row := l.reader.QueryRow(ctx, sizeOfVersions, q.projectID, q.id, q.offset-1, q.limit)
		if err := row.Scan(&bytes); err != nil {
			return nil, err
		}
		if bytes > smallReply {
			return nil, errReplyTooLarge(bytes)
		}
	}
	var total uint64
	if err := l.reader.QueryRow(ctx, countVersions, q.projectID, q.id).Scan(&total); err != nil {
		return nil, err
	}
	rows, err := l.reader.Query(ctx, selectVersions, q.projectID, q.id, q.offset-1, q.limit)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	page := fmt.Appendf(nil, `{"meta":{"total":%d,"limit":%d,"offset":%d},"versions":[`,
		total, q.limit, q.offset)
	separator := ""
	size := len(page)
	for rows.Next() {
		var v pastVersion
		var removed uint8
		if err := rows.Scan(&v.Version, &v.Name, &v.Description, &v.Priority, &removed, &v.Time); err != nil {
			return nil, err
		}
		v.Removed = removed != 0
		v.Time = v.Time.UTC()
		text := encodeJSON(v)
		size += len(text) + 1
		if size <= q.maxBytes { // else only the size is of interest
			page = append(page, separator...)
			page = append(page, text...)
			separator = ","
		}
	}
	if err := rows.Err(); err != nil {
		return nil, err
	}
	if size > q.maxBytes {
		return nil, errReplyTooLarge(size + 16)
	}
	return append(page, "]}\n"...), nil
}
