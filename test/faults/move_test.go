package faults

import (
	"fmt"
	"regexp"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"goods/test/harness"
)

// TestMoveAcrossMany moves a good as far as it may go in one step, which must be done within a call's time, and
// farther, which must be refused.
func TestMoveAcrossMany(t *testing.T) {
	const goods = 60_000
	w := harness.NewWorld(t, "EVENTS_BATCH=1000")
	a := w.Start(t)
	w.Exec(t, fmt.Sprintf(`INSERT INTO goods (project_id, name, priority) SELECT 1, 'good', n FROM generate_series(1, %d) AS n`, goods))
	first := a.List(t, 1, 1).Goods[0].ID
	type reply struct {
		Details    map[string]string
		Priorities []place
	}
	move := func(status, to int) reply {
		return harness.Want[reply](t, a, status, "PATCH", fmt.Sprintf("/goods/reprioritize?id=%d&projectId=1", first), fmt.Sprintf(`{"newPriority":%d}`, to))
	}
	details := move(400, goods).Details
	found := regexp.MustCompile(`at most (\d+)`).FindStringSubmatch(details["newPriority"])
	if found == nil {
		t.Fatalf("a move across %d goods: details are %v, want newPriority and the limit", goods, details)
	}
	most, err := strconv.Atoi(found[1])
	harness.Must(t, err)

	var moved atomic.Bool
	calls := []func(n int){
		func(int) {
			defer moved.Store(true)
			if got := len(move(200, 1+most).Priorities); got != most+1 {
				t.Errorf("a move across %d goods: got %d places", most, got)
			}
		},
		func(n int) { a.Create(t, fmt.Sprint(n)) },
		func(int) { a.List(t, 10, goods/2) },
	}
	harness.Together(len(calls), func(i int) {
		for n := 0; n == 0 || !moved.Load(); n++ {
			begin := time.Now()
			calls[i](n)
			if took := time.Since(begin); took > callWithin {
				t.Errorf("%s took %v, want %v", []string{"the move", "a create", "a list"}[i], took, callWithin)
			}
		}
	})
	if g := a.List(t, 1, 1+most).Goods[0]; g.ID != first {
		t.Errorf("at %d stands %+v, want good %d", 1+most, g, first)
	}
	w.Settled(t, time.Minute)
}
