package main

import (
	"context"
	"fmt"
	"time"
)

const (
	// historyTimeout is for all queries of a page.
	historyTimeout = requestTimeout - 200*time.Millisecond
	// historyConns are for a history, and for a large one beside it: the same ClickHouse stores the events.
	historyConns = 2
)

// historyRequest asks for limit versions of a good, from the offset on, which is counted from 1.
type historyRequest struct {
	id, projectID int32
	limit, offset int32
	maxBytes      int  // of the page: a larger one is a replyTooLargeError
	reserved      bool // there is memory for it
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

// History returns the versions of a good that ClickHouse holds, the newest first, as JSON; none for a good
// that ClickHouse does not know. They come from the log, which is a little behind the list. The caller must
// call release when the page has been sent. Any error is errUnavailable: without ClickHouse, without memory,
// or too late.
func (s *service) History(ctx context.Context, q historyRequest) (page []byte, release func(), err error) {
	read := func(ctx context.Context, maxBytes int, reserved bool) ([]byte, error) {
		q.maxBytes = maxBytes
		q.reserved = reserved
		if reserved {
			return s.largeHistories.do(ctx, q)
		}
		return s.histories.do(ctx, q)
	}
	page, release, err = s.replies.build(ctx, read)
	if err != nil {
		return nil, nil, fmt.Errorf("history: %w: %w", errUnavailable, err)
	}
	return page, release, nil
}

// readHistory answers the first request, and those that are equal. A failure is a result of its own, so it is
// not retried: there is no time for a second historyTimeout. So no batcher reads two histories at a time.
func (s *service) readHistory(requests []historyRequest, results []result[[]byte], _ bool) error {
	page, err := s.events.history(requests[0])
	answerEqual(requests, results, result[[]byte]{answer: page, err: err})
	return nil
}

const (
	// A page's size is asked for first, so that a large one is not read before there is memory for it.
	sizeOfVersionsSQL = `
SELECT sum(length(Name) + length(Description) + 120)
FROM (
    SELECT Name, Description
    FROM goods_log FINAL
    WHERE ProjectId = ? AND Id = ?
    ORDER BY Version DESC
    LIMIT ?, ?
)`

	countVersionsSQL = `
SELECT count()
FROM goods_log FINAL
WHERE ProjectId = ? AND Id = ?`

	selectVersionsSQL = `
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
	if !q.reserved {
		var bytes uint64
		row := l.reader.QueryRow(ctx, sizeOfVersionsSQL, q.projectID, q.id, q.offset-1, q.limit)
		if err := row.Scan(&bytes); err != nil {
			return nil, err
		}
		if bytes > uint64(q.maxBytes) {
			return nil, replyTooLargeError(bytes)
		}
	}
	var total uint64
	if err := l.reader.QueryRow(ctx, countVersionsSQL, q.projectID, q.id).Scan(&total); err != nil {
		return nil, err
	}
	rows, err := l.reader.Query(ctx, selectVersionsSQL, q.projectID, q.id, q.offset-1, q.limit)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	page := fmt.Appendf(nil, `{"meta":{"total":%d,"limit":%d,"offset":%d},"versions":[`,
		total, q.limit, q.offset)
	separator := ""
	const closing = "]}\n"
	size := len(page) + len(closing)
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
		if size <= q.maxBytes { // a page that is too large is only measured
			page = append(page, separator...)
			page = append(page, text...)
			separator = ","
		}
	}
	if err := rows.Err(); err != nil {
		return nil, err
	}
	if size > q.maxBytes {
		return nil, replyTooLargeError(size)
	}
	return append(page, closing...), nil
}
