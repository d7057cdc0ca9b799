package harness

import (
	"encoding/json"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

// Settled waits until nothing is on its way to ClickHouse, and then checks what must hold whatever has happened:
// priorities are 1..N, the counts of meta are exact, the distinct events in ClickHouse are exactly the versions of
// every good, the latest of them is what Postgres has, and what Redis holds is right. It returns the number of
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
	const priorities = `SELECT count(*) FROM (SELECT priority, row_number() OVER (ORDER BY priority) AS n FROM goods) AS g WHERE priority <> n`
	Equal(t, One[int](t, w, priorities), 0, "priorities that are not their position")
	const counts = `SELECT concat(count(*), ' ', count(*) FILTER (WHERE removed)) FROM goods`
	Equal(t, One[string](t, w, `SELECT string_agg(concat(total, ' ', removed), ', ') FROM meta`), One[string](t, w, counts), "meta")

	stored, versions := map[string]string{}, map[string]int{}
	rows, err := w.DB.Query(`SELECT id, version, concat_ws('|', project_id, name, description, priority, removed::int) FROM goods`)
	Must(t, err)
	defer rows.Close()
	expected := 0
	for rows.Next() {
		var id, text string
		var version int
		Must(t, rows.Scan(&id, &version, &text))
		stored[id], versions[id] = text, version
		expected += version
	}
	Must(t, rows.Err())

	events := map[string]string{} // "id:version" -> the good
	logged, err := w.ClickHouse.Query(t.Context(), `
SELECT concat(toString(Id), ':', toString(Version)),
       concat(toString(ProjectId), '|', Name, '|', Description, '|', toString(Priority), '|', toString(Removed))
FROM goods_log FINAL`)
	Must(t, err)
	defer logged.Close()
	for logged.Next() {
		var version, text string
		Must(t, logged.Scan(&version, &text))
		events[version] = text
	}
	Must(t, logged.Err())
	latest := map[string]string{}
	for id, version := range versions {
		for n := 1; n <= version; n++ {
			if text, ok := events[fmt.Sprint(id, ":", n)]; !ok {
				t.Errorf("ClickHouse has no version %d of good %s", n, id)
			} else if n == version {
				latest[id] = text
			}
		}
	}
	Equal(t, len(events), expected, "distinct events in ClickHouse")
	if !maps.Equal(latest, stored) {
		t.Errorf("the latest events are %v, Postgres has %v", latest, stored)
	}
	w.checkCache(t, events)
	return len(events)
}

// checkCache compares every good in Redis with the event of its version.
func (w *World) checkCache(t testing.TB, events map[string]string) {
	t.Helper()
	conn := w.Redis.Get()
	defer conn.Close()
	keys, err := redis.Strings(conn.Do("KEYS", w.Namespace+":*:*:*"))
	Must(t, err)
	for _, key := range keys {
		cached, err := redis.Bytes(conn.Do("GET", key))
		if err == redis.ErrNil {
			continue // it has just expired
		}
		var g Good
		Must(t, json.Unmarshal(cached, &g))
		removed := map[bool]int{true: 1}[g.Removed]
		Equal(t, fmt.Sprintf("%d|%s|%s|%d|%d", g.ProjectID, g.Name, g.Description, g.Priority, removed), events[strings.SplitN(key, ":", 3)[2]], "%s in Redis", key)
		Equal(t, g.CreatedAt, One[time.Time](t, w, `SELECT created_at FROM goods WHERE id = $1`, g.ID).UTC(), "%s in Redis", key)
	}
}
