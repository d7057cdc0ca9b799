package harness

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

// Settled waits until nothing is on its way to ClickHouse, and then checks what
// must hold whatever has happened: see the queries. It returns the number of
// events.
func (w *World) Settled(t testing.TB, limit time.Duration) int {
	t.Helper()
	Eventually(t, limit, func() error {
		var rows int
		err := w.DB.QueryRow(`SELECT count(*) FROM outbox`).Scan(&rows)
		if err == nil && rows > 0 {
			err = fmt.Errorf("%d events are still in the outbox", rows)
		}
		return err
	})
	for claim, query := range map[string]string{
		"priorities are 1..N":     `SELECT count(*) FROM (SELECT priority, row_number() OVER (ORDER BY priority) AS n FROM goods) AS g WHERE priority <> n`,
		"meta total is exact":     `SELECT abs(total - (SELECT count(*) FROM goods)) FROM meta`,
		"meta removed is exact":   `SELECT abs(removed - (SELECT count(*) FROM goods WHERE removed)) FROM meta`,
		"versions begin at one":   `SELECT count(*) FROM goods WHERE version < 1`,
		"meta is exactly one row": `SELECT count(*) - 1 FROM meta`,
	} {
		if n := One[int](t, w, query); n != 0 {
			t.Errorf("%s: %d exceptions", claim, n)
		}
	}
	events := w.checkLog(t)
	w.checkCache(t, events)
	return len(events)
}

// version names one version of one good.
type version struct{ id, version int }

// checkLog compares the log with Postgres: the distinct events are exactly
// 1..version for every good, and the latest equals the row.
func (w *World) checkLog(t testing.TB) map[version]Good {
	t.Helper()
	stored := map[version]Good{} // the latest versions
	rows, err := w.DB.Query(`SELECT id, project_id, name, description, priority, removed, version FROM goods`)
	Must(t, err)
	defer rows.Close()
	expected := 0
	for rows.Next() {
		var g Good
		var v int
		Must(t, rows.Scan(&g.ID, &g.ProjectID, &g.Name, &g.Description, &g.Priority, &g.Removed, &v))
		stored[version{g.ID, v}] = g
		expected += v
	}
	Must(t, rows.Err())

	logged := map[version]Good{}
	events, err := w.ClickHouse.Query(context.Background(), `
SELECT toInt64(Id), toInt64(ProjectId), Name, Description, toInt64(Priority), Removed, toInt64(Version)
FROM goods_log FINAL`)
	Must(t, err)
	defer events.Close()
	for events.Next() {
		var id, project, priority, v int64
		var g Good
		var removed uint8
		Must(t, events.Scan(&id, &project, &g.Name, &g.Description, &priority, &removed, &v))
		g.ID, g.ProjectID, g.Priority, g.Removed = int(id), int(project), int(priority), removed == 1
		logged[version{g.ID, int(v)}] = g
	}
	Must(t, events.Err())
	// As many as there should be, none of them twice, and none beyond the latest.
	if len(logged) != expected {
		t.Errorf("ClickHouse has %d distinct events, want %d", len(logged), expected)
	}
	for v, g := range stored {
		for n := 1; n <= v.version; n++ {
			if _, ok := logged[version{v.id, n}]; !ok {
				t.Errorf("ClickHouse has no version %d of good %d", n, v.id)
			}
		}
		if last := logged[v]; last != g {
			t.Errorf("the last event is %+v, Postgres has %+v", last, g)
		}
	}
	return logged
}

// checkCache compares every good in Redis with the event of its version.
func (w *World) checkCache(t testing.TB, events map[version]Good) {
	t.Helper()
	conn := w.Redis.Get()
	defer conn.Close()
	keys, err := redis.Strings(conn.Do("KEYS", w.Namespace+":*"))
	Must(t, err)
	for _, key := range keys {
		cached, err := redis.Bytes(conn.Do("GET", key))
		if err == redis.ErrNil {
			continue // it has just expired
		}
		Must(t, err)
		parts := strings.Split(key, ":")
		if len(parts) != 4 {
			continue
		}
		id, _ := strconv.Atoi(parts[2])
		v, _ := strconv.Atoi(parts[3])
		var g Good
		Must(t, json.Unmarshal(cached, &g))
		created := g.CreatedAt
		g.CreatedAt = time.Time{}
		if event, ok := events[version{id, v}]; !ok || g != event {
			t.Errorf("%s: Redis has %s, the event was %+v", key, cached, event)
		}
		if want := One[time.Time](t, w, `SELECT created_at FROM goods WHERE id = $1`, id); !created.Equal(want) {
			t.Errorf("%s: Redis has createdAt %v, Postgres has %v", key, created, want)
		}
	}
}
