package test

import (
	"strings"
	"testing"
	"time"

	"goods/test/harness"
)

// What the triggers promise holds for whoever writes, also by hand.
func TestWritesByHand(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	goods(t, w, "migrate postgres")
	projects := harness.One[string](t, w, `SELECT string_agg(name, ',') FROM campaigns`)
	harness.Equal(t, projects, "Первая запись", "campaigns")
	check := func(statement, want string) {
		t.Helper()
		w.Exec(t, statement)
		got := harness.One[string](t, w, `SELECT concat_ws(' ',
			(SELECT string_agg(concat(id, '@', priority, 'v', version), ' ' ORDER BY id) FROM goods),
			(SELECT concat('total ', total, ' removed ', removed) FROM meta),
			(SELECT concat('project ', total, ' ', removed) FROM project_meta),
			'outbox', (SELECT count(*) FROM outbox))`)
		harness.Equal(t, got, want, "after %s", statement)
	}
	check(`INSERT INTO goods (project_id, name, version) VALUES (1, 'a', 5), (1, 'b', 5)`,
		"1@1v1 2@2v1 total 2 removed 0 project 2 0 outbox 2")
	check(`INSERT INTO goods (project_id, name, removed) SELECT 1, 'c', true`,
		"1@1v1 2@2v1 3@3v1 total 3 removed 1 project 3 1 outbox 3")
	check(`UPDATE goods SET name = 'x', version = 40 WHERE id < 3`,
		"1@1v2 2@2v2 3@3v1 total 3 removed 1 project 3 1 outbox 5")
	check(`UPDATE goods SET removed = NOT removed`,
		"1@1v3 2@2v3 3@3v2 total 3 removed 2 project 3 2 outbox 8")
	const last = "1@1v4 2@2v4 3@3v2 total 3 removed 0 project 3 0 outbox 10"
	check(`UPDATE goods SET removed = false WHERE removed`, last) // which no call of the service does
	check(`UPDATE goods SET name = 'y' WHERE id = 99`, last)
	check(`INSERT INTO goods (project_id, name) SELECT 1, 'd' WHERE false`, last)
	check(`BEGIN; INSERT INTO goods (project_id, name) VALUES (1, 'e'); ROLLBACK`, last)
	for _, statement := range []string{
		`INSERT INTO goods (project_id, name) VALUES (9, 'x')`,
		`INSERT INTO goods (project_id, name) VALUES (1, '')`,
		`INSERT INTO goods (project_id, name) VALUES (1, repeat('é', 256))`,
		`UPDATE goods SET description = repeat('é', 10001) WHERE id = 1`,
		`INSERT INTO goods (project_id, name, priority) VALUES (1, 'x', 77)`,
		`INSERT INTO goods (project_id, name, priority) VALUES (1, 'x', 1)`,
		`UPDATE goods SET priority = 1 WHERE id = 2`,
		`UPDATE goods SET priority = 0 WHERE id = 1`,
		`UPDATE goods SET priority = 9 WHERE id = 3`,
		`DELETE FROM goods WHERE id = 1`, `TRUNCATE goods`,
	} {
		if _, err := w.DB.Exec(statement); err == nil {
			t.Errorf("%s: got no error", statement)
		}
	}
	check(`SELECT`, last)
}

// By hand, too, a statement that gives goods other positions waits for others that do; one that does not
// waits for nobody.
func TestLocksByHand(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	goods(t, w, "migrate postgres")
	makeGoods(t, w, 3)
	holder := w.Hold(t, `SELECT lock_priorities()`)
	for statement, waits := range map[string]bool{
		`INSERT INTO goods (project_id, name) VALUES (1, 'x')`: true,
		`UPDATE goods SET priority = 4 - priority`:             true,
		`UPDATE goods SET name = 'x' WHERE id = 1`:             false,
		`UPDATE goods SET removed = true WHERE id = 2`:         false,
	} {
		_, err := w.DB.Exec(`SET lock_timeout = '200ms'; ` + statement)
		waited := err != nil && strings.Contains(err.Error(), "lock timeout")
		harness.Equal(t, waited, waits, "%s waits (%v)", statement, err)
	}
	harness.Must(t, holder.Rollback())
}

// Goods are found without reading all of them, by what the service and whoever writes SQL look for.
func TestIndexes(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	goods(t, w, "migrate postgres")
	w.Exec(t, `
CREATE FUNCTION plan(query text) RETURNS json LANGUAGE plpgsql AS
$$
DECLARE
    plan json;
BEGIN
    SET LOCAL enable_seqscan = off; -- the tables are empty
    EXECUTE 'EXPLAIN (FORMAT JSON) ' || query INTO plan;
    RETURN plan;
END
$$`)
	for query, want := range map[string]string{
		`SELECT FROM goods WHERE name = ''x''`:              "goods_name_idx",
		`SELECT FROM goods WHERE project_id = 2`:            "goods_project_id_idx",
		`SELECT FROM goods WHERE priority = 1`:              "goods_priority_key",
		`SELECT FROM goods WHERE id = 1 AND project_id = 2`: "goods_pkey",
		`SELECT FROM outbox WHERE published_at < now()`:     "outbox_published_idx",
	} {
		plan := harness.One[string](t, w, `SELECT plan('`+query+`')::text`)
		used := strings.Contains(plan, want)
		harness.Equal(t, used, true, "%s uses %s: %s", query, want, plan)
	}
}

// Counts are locked in the order of the projects, and that of all goods last, so that transactions which
// change several wait for each other in one direction only.
func TestCountsAreLockedInOrder(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	goods(t, w, "migrate postgres")
	w.Exec(t, `
INSERT INTO campaigns (name) SELECT n::text FROM generate_series(2, 8) AS n;
INSERT INTO goods (project_id, name) SELECT 1 + n % 8, n::text FROM generate_series(1, 16) AS n`)
	for _, statement := range []string{
		`INSERT INTO goods (project_id, name) SELECT 9 - n, n::text FROM generate_series(1, 8) AS n`,
		`UPDATE goods SET removed = NOT removed`,
	} {
		holder := w.Hold(t, `UPDATE project_meta SET total = total WHERE project_id = 1`)
		done := make(chan error)
		go func() {
			_, err := w.DB.Exec(statement)
			done <- err
		}()
		awaitRowLock(t, w, 1)
		free := harness.One[int](t, w, `
SELECT (SELECT count(*) FROM (SELECT FROM project_meta FOR UPDATE SKIP LOCKED) AS p) +
    (SELECT count(*) FROM (SELECT FROM meta FOR UPDATE SKIP LOCKED) AS m)`)
		harness.Equal(t, free, 7+1, "counts that are free while %s waits for the first", statement)
		harness.Must(t, holder.Rollback())
		harness.Must(t, <-done)
	}
}

// awaitRowLock waits until n sessions wait for rows that others have locked.
func awaitRowLock(t testing.TB, w *harness.World, n int) {
	t.Helper()
	harness.AwaitEqual(t, 15*time.Second, func() int {
		return harness.One[int](t, w, `
SELECT count(*)
FROM pg_stat_activity
WHERE datname = current_database() AND wait_event IN ('transactionid', 'tuple')`)
	}, n, "sessions that wait for rows")
}

// A move waits for the goods that it would renumber, as far as a move may go, and for no others. It locks
// them in the order of their ids, so that transactions wait for each other in one direction only.
func TestRangeIsLocked(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	goods(t, w, "migrate postgres")
	// Good 12 comes first, in the list and in the table.
	w.Exec(t, `
INSERT INTO goods (id, project_id, name) OVERRIDING SYSTEM VALUE
SELECT 13 - n, 1, n::text FROM generate_series(1, 12) AS n`)
	locked := func() string {
		return harness.One[string](t, w, `
SELECT coalesce(string_agg(id::text, ' ' ORDER BY id), '')
FROM goods
WHERE id NOT IN (SELECT id FROM (SELECT id FROM goods FOR UPDATE SKIP LOCKED) AS free)`)
	}
	for call, want := range map[string]string{ // good, project, position, the most that a move may go
		`lock_range(12, 1, 12, 3)`:         "9 10 11 12",
		`lock_range(1, 1, 1, 3)`:           "1 2 3 4",
		`lock_range(6, 1, 2147483647, 2)`:  "4 5 6",
		`lock_range(6, 1, 5, 10000)`:       "6 7 8",
		`lock_range(6, 1, 9, 10000)`:       "4 5 6",
		`lock_range(6, 1, 7, 10000)`:       "6",
		`lock_range(6, 2, 12, 10000)`:      "", // of another project
		`lock_range(13, 1, 1, 2147483647)`: "", // there is none
	} {
		tx := w.Hold(t, `SELECT `+call)
		harness.Equal(t, locked(), want, "goods that %s locks", call)
		harness.Must(t, tx.Rollback())
	}
	holder := w.Hold(t, `SELECT FROM goods WHERE id = 2 FOR UPDATE`)
	done := make(chan error)
	go func() {
		_, err := w.DB.Exec(`SELECT lock_range(12, 1, 12, 11)`)
		done <- err
	}()
	awaitRowLock(t, w, 1)
	harness.Equal(t, locked(), "1 2", "goods that are locked while a range waits for good 2")
	harness.Must(t, holder.Rollback())
	harness.Must(t, <-done)
}
