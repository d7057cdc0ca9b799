package test

import (
	"testing"

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
			'outbox', (SELECT count(*) FROM outbox))`)
		harness.Equal(t, got, want, "after %s", statement)
	}
	check(`INSERT INTO goods (project_id, name, version) VALUES (1, 'a', 5), (1, 'b', 5)`,
		"1@1v1 2@2v1 total 2 removed 0 outbox 2")
	check(`INSERT INTO goods (project_id, name, removed) SELECT 1, 'c', true`,
		"1@1v1 2@2v1 3@3v1 total 3 removed 1 outbox 3")
	check(`UPDATE goods SET name = 'x', version = 40 WHERE id < 3`,
		"1@1v2 2@2v2 3@3v1 total 3 removed 1 outbox 5")
	const last = "1@1v3 2@2v3 3@3v2 total 3 removed 2 outbox 8"
	check(`UPDATE goods SET removed = NOT removed`, last)
	check(`UPDATE goods SET name = 'y' WHERE id = 99`, last)
	check(`INSERT INTO goods (project_id, name) SELECT 1, 'd' WHERE false`, last)
	check(`BEGIN; INSERT INTO goods (project_id, name) VALUES (1, 'e'); ROLLBACK`, last)
	for _, statement := range []string{
		`INSERT INTO goods (project_id, name) VALUES (9, 'x')`,
		`INSERT INTO goods (project_id, name) VALUES (1, '')`,
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
