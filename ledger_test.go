//go:build faults || soak

package main

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"slices"
	"testing"
	"time"
)

// since returns the answers to requests that began at or after from, and
// before to unless that is zero.
func (l *load) since(from, to time.Time) []answer {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Collect(func(yield func(answer) bool) {
		for _, a := range l.answers {
			if !a.begin.Before(from) && (to.IsZero() || a.begin.Before(to)) && !yield(a) {
				return
			}
		}
	})
}

// works reports whether every call succeeded since then, and none failed.
func (l *load) works(then time.Time) error {
	seen := map[string]bool{}
	for _, a := range l.since(then, time.Time{}) {
		if !a.good() {
			return fmt.Errorf("%s got %d", a.call, a.status)
		}
		seen[a.call] = true
	}
	for _, call := range []string{"create", "update", "reprioritize", "remove", "list"} {
		if !seen[call] {
			return fmt.Errorf("no %s was answered", call)
		}
	}
	return nil
}

// verify compares every answer with what Postgres and ClickHouse hold now. The
// load must have stopped, and the queues be empty.
func (l *load) verify(t testing.TB) {
	t.Helper()
	names := map[string]int{}
	stored, err := scanGoods(l.w.db.Query(`SELECT ` + goodColumns + ` FROM goods ORDER BY priority`))
	must(t, err)
	byID := map[int32]bool{}
	for _, g := range stored {
		byID[g.ID] = true
		names[g.Name]++
		if g.Name != g.Description {
			l.wrongf("good %d was written in part: %+v", g.ID, g)
		}
	}
	for _, w := range l.workers {
		w.check(stored, 1)
		for id := range w.goods {
			if !byID[id] {
				l.wrongf("good %d was answered and is not in Postgres", id)
			}
		}
	}
	for _, name := range l.doubted {
		if names[name] > 1 {
			l.wrongf("create of %s, answered with an error, was done %d times", name, names[name])
		}
	}
	if got, most := len(stored), int(l.created.Load())+len(l.doubted); got > most {
		l.wrongf("Postgres has %d goods, no more than %d were asked for", got, most)
	}
	logged := map[int32][]event{}
	rows, err := l.w.clickhouse.Query(context.Background(), `SELECT Id, Name, Description, Priority, Removed, Version FROM goods_log FINAL`)
	must(t, err)
	defer rows.Close()
	for rows.Next() {
		var e event
		var removed uint8
		var version uint32
		must(t, rows.Scan(&e.ID, &e.Name, &e.Description, &e.Priority, &removed, &version))
		e.Removed, e.Version = removed == 1, int32(version)
		logged[e.ID] = append(logged[e.ID], e)
	}
	must(t, rows.Err())
	for _, e := range l.events {
		same := func(x event) bool {
			return cmp.Or(e.Name, x.Name) == x.Name && cmp.Or(e.Description, x.Description) == x.Description &&
				cmp.Or(e.Priority, x.Priority) == x.Priority && cmp.Or(e.Version, x.Version) == x.Version && (x.Removed || !e.Removed)
		}
		if !slices.ContainsFunc(logged[e.ID], same) {
			l.wrongf("answered, and not in the log: %+v", e)
		}
	}
	for i, text := range l.wrong {
		if i == 10 {
			t.Errorf("and %d more like these", len(l.wrong)-i)
			break
		}
		t.Error(text)
	}
	client.Transport.(*http.Transport).CloseIdleConnections()
}
