package main

import (
	"context"
	"fmt"
	"time"
)

const (
	maxHistories   = 1                                     // that are read at a time, as the same ClickHouse stores the events
	historyTimeout = requestTimeout - 200*time.Millisecond // for both queries
)

// historyRequest asks for limit versions of a good, from the offset on, which is counted from 1.
type historyRequest struct {
	id, projectID int32
	limit, offset int32
}

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
	page, release, err = s.replies.build(ctx, func(ctx context.Context, maxBytes int, _ bool) ([]byte, error) {
		return s.log.history(ctx, q, maxBytes)
	})
	if err != nil {
		return nil, nil, fmt.Errorf("history: %w: %w", errUnavailable, err)
	}
	return page, release, nil
}

const (
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

// history returns a page of at most maxBytes.
func (l *eventLog) history(ctx context.Context, q historyRequest, maxBytes int) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, historyTimeout)
	defer cancel()
	select {
	case l.reading <- struct{}{}:
		defer func() { <-l.reading }()
	case <-ctx.Done():
		return nil, ctx.Err()
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
	page := fmt.Appendf(nil, `{"meta":{"total":%d,"limit":%d,"offset":%d},"versions":[`, total, q.limit, q.offset)
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
		if size <= maxBytes { // else only the size is of interest
			page = append(page, separator...)
			page = append(page, text...)
			separator = ","
		}
	}
	if err := rows.Err(); err != nil {
		return nil, err
	}
	if size > maxBytes {
		return nil, errReplyTooLarge(size + 16)
	}
	return append(page, "]}\n"...), nil
}
