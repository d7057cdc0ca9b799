package main

import (
	"bytes"
	"context"
	"io/fs"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"
)

// withFiles is the real migrations, changed by files: a text replaces or adds
// one, an empty text deletes it.
func withFiles(t testing.TB, changes map[string]string) fs.FS {
	t.Helper()
	files := fstest.MapFS{}
	must(t, fs.WalkDir(migrations, "sql", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := fs.ReadFile(migrations, path)
		files[path] = &fstest.MapFile{Data: data}
		return err
	}))
	for path, text := range changes {
		if text == "" {
			delete(files, path)
		} else {
			files[path] = &fstest.MapFile{Data: []byte(text)}
		}
	}
	return files
}

func (w *world) postgres(t testing.TB) *database {
	t.Helper()
	db, err := openPostgres(w.env["POSTGRES_URL"], time.Minute)
	must(t, err)
	t.Cleanup(func() { db.Close() })
	return db
}

func TestMigrateFromManyInstances(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	var log logBuffer
	var all sync.WaitGroup
	errs := make([]error, 8)
	for i := range errs {
		db := w.postgres(t)
		all.Go(func() {
			errs[i] = migratePostgres(context.Background(), db, migrations, slog.New(slog.NewTextHandler(&log, nil)))
		})
	}
	all.Wait()
	for _, err := range errs {
		must(t, err)
	}
	files, err := readMigrations(migrations, "sql/postgres")
	must(t, err)
	for _, m := range files {
		if got := strings.Count(log.String(), "file="+m.name); got != 1 {
			t.Errorf("%s was applied %d times, want once", m.name, got)
		}
		if got := one[string](t, w, `SELECT checksum FROM schema_migrations WHERE name = $1`, m.name); got != m.checksum {
			t.Errorf("%s: got checksum %s, want %s", m.name, got, m.checksum)
		}
	}
	if got := one[string](t, w, `SELECT json_agg(name)::text FROM campaigns`); got != `["Первая запись"]` {
		t.Errorf("got campaigns %s", got)
	}
	for index, definition := range map[string]string{
		"goods_pkey":             "UNIQUE INDEX goods_pkey ON public.goods USING btree (id, project_id)",
		"goods_project_id_idx":   "INDEX goods_project_id_idx ON public.goods USING btree (project_id)",
		"goods_name_idx":         "INDEX goods_name_idx ON public.goods USING btree (name)",
		"goods_priority_key":     "UNIQUE INDEX goods_priority_key ON public.goods USING btree (priority)",
		"campaigns_pkey":         "UNIQUE INDEX campaigns_pkey ON public.campaigns USING btree (id)",
		"outbox_unpublished_idx": "INDEX outbox_unpublished_idx ON public.outbox USING btree (id) WHERE (published_at IS NULL)",
	} {
		if got := one[string](t, w, `SELECT indexdef FROM pg_indexes WHERE indexname = $1`, index); got != "CREATE "+definition {
			t.Errorf("got index %s, want %s", got, definition)
		}
	}
}

func TestMigrateRefusals(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	quiet := slog.New(slog.DiscardHandler)
	w := newWorld(t)
	db := w.postgres(t)
	apply := func(changes map[string]string) error {
		return migratePostgres(ctx, db, withFiles(t, changes), quiet)
	}
	const second = "sql/postgres/0099_second.sql"
	for _, test := range []struct{ label, text, want string }{
		{"unknown column", "-- why\nCREATE TABLE extra (id integer);\n\nINSERT INTO extra\n    (id, nope)\nVALUES (1, 2);\n", "0099_second.sql:5: "},
		{"violated constraint", "CREATE TABLE extra (id integer);\nINSERT INTO campaigns (name)\nVALUES (NULL);\n", "0099_second.sql:2: "},
		{"broken function", "CREATE FUNCTION f() RETURNS void LANGUAGE plpgsql AS\n$$\nBEGIN\n    SELEKT 1;\nEND\n$$;\n", "0099_second.sql:4: "},
		{"no last semicolon", "CREATE TABLE extra (id integer);\n\nSELECT nope", "0099_second.sql:3: "},
	} {
		err := apply(map[string]string{second: test.text})
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v, want %s", test.label, err, test.want)
		}
		if n := one[int](t, w, `SELECT count(*) FROM schema_migrations WHERE name = '0099_second.sql'`); n != 0 {
			t.Errorf("%s: the file is recorded", test.label)
		}
		if n := one[int](t, w, `SELECT count(*) FROM pg_class WHERE relname = 'extra'`); n != 0 {
			t.Errorf("%s: half of the file was applied", test.label)
		}
	}
	must(t, apply(map[string]string{second: "CREATE TABLE extra (id integer);\n"}))
	must(t, apply(map[string]string{second: "CREATE TABLE extra (id integer);\n"}))
	if err := apply(map[string]string{second: "CREATE TABLE extra (id bigint);\n"}); err == nil || !strings.Contains(err.Error(), "0099_second.sql was changed") {
		t.Errorf("changed file: got %v", err)
	}
	if err := apply(nil); err == nil || !strings.Contains(err.Error(), "0099_second.sql was applied to this database but is not part of this program") {
		t.Errorf("missing file: got %v", err)
	}
	if _, err := w.db.Exec(`DELETE FROM goods`); err == nil {
		t.Error("a good can be deleted")
	}
}

func TestMigrateClickHouse(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	quiet := slog.New(slog.DiscardHandler)
	w := newWorld(t)
	apply := func(changes map[string]string) error {
		return migrateClickHouse(ctx, w.clickhouse, withFiles(t, changes), quiet)
	}
	var all sync.WaitGroup
	errs := make([]error, 4)
	for i := range errs {
		all.Go(func() { errs[i] = apply(nil) })
	}
	all.Wait()
	for _, err := range errs {
		must(t, err)
	}
	// Each file can be run twice: forget that it was.
	must(t, w.clickhouse.Exec(ctx, "DROP TABLE goods_migrations"))
	must(t, apply(nil))
	const second = "sql/clickhouse/0099_second.sql"
	if err := apply(map[string]string{second: "CREATE TABLE IF NOT EXISTS a (x Int32)\nENGINE = Log;\n\nCREATE TABLE b (x Nope)\nENGINE = Log;\n"}); err == nil || !strings.Contains(err.Error(), "0099_second.sql:4: ") {
		t.Errorf("failing file: got %v", err)
	}
	must(t, apply(map[string]string{second: "CREATE TABLE IF NOT EXISTS a (x Int32)\nENGINE = Log;\n"}))
	if err := apply(map[string]string{second: "SELECT 1;\n"}); err == nil || !strings.Contains(err.Error(), "0099_second.sql was changed") {
		t.Errorf("changed file: got %v", err)
	}
	if err := apply(nil); err == nil || !strings.Contains(err.Error(), "0099_second.sql was applied") {
		t.Errorf("missing file: got %v", err)
	}
}

func TestMigrateCommands(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for _, database := range []string{"postgres", "clickhouse"} {
		for _, want := range []int{1, 0} {
			var out bytes.Buffer
			must(t, run(context.Background(), []string{"migrate", database}, w.getenv(), &out))
			if got := min(1, strings.Count(out.String(), "migration applied")); got != want {
				t.Errorf("migrate %s: got %q, want %d", database, out.String(), want)
			}
		}
	}
	if n := one[int](t, w, `SELECT count(*) FROM goods`) + w.logged(t); n != 0 {
		t.Errorf("got %d rows, want empty tables", n)
	}
}

// What the triggers promise holds for whoever writes, also by hand.
func TestTriggers(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	must(t, migratePostgres(context.Background(), w.postgres(t), migrations, slog.New(slog.DiscardHandler)))
	run := func(query string) {
		t.Helper()
		must(t, errorOf(w.db.Exec(query)))
	}
	state := func() string {
		t.Helper()
		return one[string](t, w, `SELECT concat_ws(' ',
			(SELECT string_agg(concat(id, '@', priority, 'v', version), ' ' ORDER BY id) FROM goods),
			(SELECT concat('total ', total, ' removed ', removed) FROM meta), 'outbox', (SELECT count(*) FROM outbox))`)
	}
	check := func(label, want string) {
		t.Helper()
		if got := state(); got != want {
			t.Errorf("%s: got %s, want %s", label, got, want)
		}
	}
	run(`INSERT INTO goods (project_id, name, priority, version) VALUES (1, 'a', 77, 5), (1, 'b', 77, 5)`)
	check("insert with a priority of one's own", "1@1v1 2@2v1 total 2 removed 0 outbox 2")
	run(`INSERT INTO goods (project_id, name, removed) SELECT 1, 'c', true`)
	check("insert a removed good", "1@1v1 2@2v1 3@3v1 total 3 removed 1 outbox 3")
	run(`UPDATE goods SET name = 'x', version = 40 WHERE id < 3`)
	check("update with a version of one's own", "1@1v2 2@2v2 3@3v1 total 3 removed 1 outbox 5")
	run(`UPDATE goods SET removed = NOT removed`)
	check("remove two and bring one back", "1@1v3 2@2v3 3@3v2 total 3 removed 2 outbox 8")
	run(`UPDATE goods SET name = 'y' WHERE id = 99`)
	run(`INSERT INTO goods (project_id, name) SELECT 1, 'd' WHERE false`)
	check("statements that touch nothing", "1@1v3 2@2v3 3@3v2 total 3 removed 2 outbox 8")
	tx, err := w.db.Begin()
	must(t, err)
	must(t, errorOf(tx.Exec(`INSERT INTO goods (project_id, name) VALUES (1, 'e')`)))
	must(t, tx.Rollback())
	check("rollback", "1@1v3 2@2v3 3@3v2 total 3 removed 2 outbox 8")
	for _, query := range []string{
		`INSERT INTO goods (project_id, name) VALUES (9, 'x')`, `INSERT INTO goods (project_id, name) VALUES (1, '')`,
		`UPDATE goods SET priority = 1 WHERE id = 2`, `UPDATE goods SET priority = 0 WHERE id = 1`, `DELETE FROM goods WHERE id = 1`, `TRUNCATE goods`,
	} {
		if _, err := w.db.Exec(query); err == nil {
			t.Errorf("%s: got no error", query)
		}
	}
	check("refused statements", "1@1v3 2@2v3 3@3v2 total 3 removed 2 outbox 8")
}
