package main

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

// settled waits until nothing is on its way, and then checks what must hold
// whatever has happened: see the queries. It returns the number of events.
func (w *world) settled(t testing.TB, limit time.Duration) int {
	t.Helper()
	eventually(t, limit, func() error {
		var rows int
		if err := w.db.QueryRow(`SELECT count(*) FROM outbox`).Scan(&rows); err != nil {
			return err
		}
		if rows > 0 {
			return fmt.Errorf("%d events are still in the outbox", rows)
		}
		return nil
	})
	for claim, query := range map[string]string{
		"priorities are 1..N":     `SELECT count(*) FROM (SELECT priority, row_number() OVER (ORDER BY priority) AS n FROM goods) AS g WHERE priority <> n`,
		"meta total is exact":     `SELECT abs(total - (SELECT count(*) FROM goods)) FROM meta`,
		"meta removed is exact":   `SELECT abs(removed - (SELECT count(*) FROM goods WHERE removed)) FROM meta`,
		"versions begin at one":   `SELECT count(*) FROM goods WHERE version < 1`,
		"meta is exactly one row": `SELECT count(*) - 1 FROM meta`,
	} {
		if n := one[int](t, w, query); n != 0 {
			t.Errorf("%s: %d exceptions", claim, n)
		}
	}
	w.checkCache(t)
	return w.checkLog(t)
}

// checkCache compares every good in Redis that a list could reach with Postgres.
func (w *world) checkCache(t testing.TB) {
	t.Helper()
	conn := w.redis.Get()
	defer conn.Close()
	prefix := fmt.Sprintf("%s:%d:", w.namespace, one[int64](t, w, `SELECT cache_epoch FROM meta`))
	keys, err := redis.Strings(conn.Do("KEYS", prefix+"*"))
	must(t, err)
	for _, key := range keys {
		cached, err := redis.Bytes(conn.Do("GET", key))
		if err == redis.ErrNil || err == nil && !isGood(cached) {
			continue // it has just ended, or is a lease
		}
		must(t, err)
		goods, err := scanGoods(w.db.Query(`SELECT `+goodColumns+` FROM goods WHERE priority = $1`, strings.TrimPrefix(key, prefix)))
		must(t, err)
		if len(goods) != 1 {
			t.Errorf("%s is cached, and Postgres has %d goods there", key, len(goods))
			continue
		}
		stored, err := encodeJSON(goods[0])
		must(t, err)
		if string(cached) != string(stored) {
			t.Errorf("%s: Redis has %s, Postgres has %s", key, cached, stored)
		}
	}
}

// checkLog holds the log against Postgres: the distinct events are exactly
// 1..version for every good, and the latest equals the row.
func (w *world) checkLog(t testing.TB) int {
	t.Helper()
	type state struct {
		project           int32
		name, description string
		priority          int32
		removed           bool
		version           int32
	}
	stored := map[int32]state{}
	rows, err := w.db.Query(`SELECT id, project_id, name, description, priority, removed, version FROM goods`)
	must(t, err)
	defer rows.Close()
	expected := 0
	for rows.Next() {
		var id int32
		var s state
		must(t, rows.Scan(&id, &s.project, &s.name, &s.description, &s.priority, &s.removed, &s.version))
		stored[id] = s
		expected += int(s.version)
	}
	must(t, rows.Err())

	events, err := w.clickhouse.Query(context.Background(),
		`SELECT Id, ProjectId, Name, Description, Priority, Removed, Version FROM goods_log FINAL ORDER BY Id, Version`)
	must(t, err)
	defer events.Close()
	count, last := 0, map[int32]state{}
	for events.Next() {
		var id int32
		var s state
		var removed uint8
		var version uint32
		must(t, events.Scan(&id, &s.project, &s.name, &s.description, &s.priority, &removed, &version))
		s.removed, s.version = removed == 1, int32(version)
		if want := last[id].version + 1; s.version != want {
			t.Errorf("good %d: version %d follows version %d in ClickHouse", id, s.version, want-1)
		}
		last[id] = s
		count++
	}
	must(t, events.Err())
	for id, want := range stored {
		if got := last[id]; got != want {
			t.Errorf("good %d: ClickHouse ends with %+v, Postgres has %+v", id, got, want)
		}
	}
	if count != expected {
		t.Errorf("ClickHouse has %d distinct events, Postgres has made %d", count, expected)
	}
	return count
}
