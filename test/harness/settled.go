package harness

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

// Settled waits until nothing is on its way to ClickHouse, and then checks what must hold whatever has
// happened: priorities are 1..N, the counts of meta and project_meta are exact, the distinct events in
// ClickHouse are exactly the versions of every good, the latest of them is what Postgres has, and what
// Redis holds is right. It returns the number of events.
func (w *World) Settled(t testing.TB, limit time.Duration) int {
	t.Helper()
	events, known := w.settledEvents(t, limit)
	Equal(t, len(events), known, "distinct events in ClickHouse")
	w.checkRedis(t, events)
	return len(events)
}

// SettledAfterLoss is Settled for a Postgres that has lost commits. ClickHouse may also have events that
// Postgres knows nothing of, and Redis goods of theirs. It returns the number of events, and how many of
// them are such.
func (w *World) SettledAfterLoss(t testing.TB, limit time.Duration) (events, lost int) {
	t.Helper()
	all, known := w.settledEvents(t, limit)
	return len(all), len(all) - known
}

// settledEvents waits until the outbox is empty, and checks what must hold then of Postgres and ClickHouse.
// It returns the distinct events in ClickHouse, as the text of the good by "id:version", and how many
// versions Postgres knows of.
func (w *World) settledEvents(t testing.TB, limit time.Duration) (events map[string]string, known int) {
	t.Helper()
	outbox := func() int { return One[int](t, w, `SELECT count(*) FROM outbox`) }
	AwaitEqual(t, limit, outbox, 0, "events in the outbox")
	const counted = `
SELECT concat_ws(' ', count(*), count(*) FILTER (WHERE removed), count(*) FILTER (WHERE priority <> position))
FROM (SELECT *, row_number() OVER (ORDER BY priority) AS position FROM goods) AS g`
	meta := One[string](t, w, `SELECT string_agg(concat_ws(' ', total, removed, 0), ', ') FROM meta`)
	Equal(t, One[string](t, w, counted), meta, "goods, removed goods, and priorities that are not the position")
	const projects = `
SELECT string_agg(concat_ws(' ', project_id, total, removed), ', ' ORDER BY project_id)
FROM project_meta`
	const countedProjects = `
SELECT string_agg(concat_ws(' ', id, total, removed), ', ' ORDER BY id)
FROM (
    SELECT c.id, count(g.id) AS total, count(g.id) FILTER (WHERE g.removed) AS removed
    FROM campaigns AS c
    LEFT JOIN goods AS g ON g.project_id = c.id
    GROUP BY c.id
) AS project`
	Equal(t, One[string](t, w, projects), One[string](t, w, countedProjects),
		"projects with their goods and removed goods")

	events = w.Events(t)
	for latest, text := range w.Goods(t) {
		Equal(t, events[latest], text, "the event %s", latest)
		id, version, _ := strings.Cut(latest, ":")
		last, _ := strconv.Atoi(version)
		known += last
		for n := range last {
			if _, ok := events[fmt.Sprint(id, ":", n+1)]; !ok {
				t.Errorf("ClickHouse has no version %d of good %s", n+1, id)
			}
		}
	}
	return events, known
}

// Goods returns the goods in Postgres, as text by "id:version".
func (w *World) Goods(t testing.TB) map[string]string {
	t.Helper()
	goods := map[string]string{}
	const rows = `
SELECT coalesce(json_object_agg(concat(id, ':', version),
    concat_ws('|', project_id, name, description, priority, removed::int)), '{}')
FROM goods`
	Must(t, json.Unmarshal(One[[]byte](t, w, rows), &goods))
	return goods
}

// Events returns the distinct events in ClickHouse, as the text of the good by "id:version".
func (w *World) Events(t testing.TB) map[string]string {
	t.Helper()
	var rows []string
	Must(t, w.ClickHouse.QueryRow(t.Context(), `
SELECT groupArray(concat(toString(Id), ':', toString(Version), '|',
    toString(ProjectId), '|', Name, '|', Description, '|', toString(Priority), '|', toString(Removed)))
FROM goods_log FINAL`).Scan(&rows))
	events := map[string]string{}
	for _, row := range rows {
		version, text, _ := strings.Cut(row, "|")
		events[version] = text
	}
	return events
}

// checkRedis compares every good in Redis with the event of its version.
func (w *World) checkRedis(t testing.TB, events map[string]string) {
	t.Helper()
	keys, err := redis.Strings(w.Redis(t, "KEYS", w.Namespace+":*:*:*"), nil)
	Must(t, err)
	for _, key := range keys {
		cached, err := redis.Bytes(w.Redis(t, "GET", key), nil)
		if err == redis.ErrNil {
			continue // it has just expired
		}
		var g Good
		Must(t, json.Unmarshal(cached, &g))
		text := fmt.Sprintf(
			"%d|%s|%s|%d|%d",
			g.ProjectID,
			g.Name,
			g.Description,
			g.Priority,
			map[bool]int{true: 1}[g.Removed],
		)
		Equal(t, text, events[strings.SplitN(key, ":", 3)[2]], "%s in Redis", key)
		made := One[time.Time](t, w, fmt.Sprint(`SELECT created_at FROM goods WHERE id = `, g.ID))
		Equal(t, g.CreatedAt.Equal(made), true, "%s in Redis is as old as in Postgres", key)
	}
}
