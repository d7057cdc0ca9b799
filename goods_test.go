package main

import (
	"log/slog"
	"testing"
	"time"
)

// A lone edit waits for a good that is locked. A good that is made and locked only after that gets 503, too.
func TestLoneEditOfNewGood(t *testing.T) {
	t.Parallel()
	db, other := openSchema(t, statementTimeout)
	if err := migratePostgres(other, migrations, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	if _, err := db.statement(lockGoodSQL); err != nil {
		t.Fatal(err)
	}
	// The edit gets one of two connections, and for its second query waits for the other, to prepare it.
	second, err := db.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s := newService(db, localCache(), nil, func() {}, newMetrics(db), slog.New(slog.DiscardHandler))
	edit := []editRequest{{ID: 1, ProjectID: 1, Removed: true}}
	results := make([]result[good], 1)
	edited := make(chan error, 1)
	go func() { edited <- s.editGoods(edit, results, true) }()
	for db.Stats().WaitCount == 0 {
		select {
		case err := <-edited:
			t.Fatalf("got %v, want an edit that waits for a connection", err)
		case <-time.After(time.Millisecond):
		}
	}
	if _, err := other.Exec(`INSERT INTO goods (project_id, name) VALUES (1, 'new')`); err != nil {
		t.Fatal(err)
	}
	lock, err := other.Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Rollback()
	if _, err := lock.Exec(`SELECT FROM goods FOR UPDATE`); err != nil {
		t.Fatal(err)
	}
	second.Close()
	if err := <-edited; err != nil {
		t.Fatal(err)
	}
	if err := results[0].err; !unavailable(err) {
		t.Errorf("got %v, want an error for which the reply is 503", err)
	}
}
