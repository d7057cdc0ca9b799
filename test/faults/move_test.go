package faults

import (
	"encoding/json"
	"fmt"
	"regexp"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"goods/test/harness"
)

// TestMoveAcrossMany moves a good as far as it may go in one step, which must
// be done within a call's time, and farther, which must be refused.
func TestMoveAcrossMany(t *testing.T) {
	const goods = 60_000
	w := harness.NewWorld(t)
	w.Env["EVENTS_BATCH"] = "1000"
	a := w.Start(t)
	w.Exec(t, fmt.Sprintf(`INSERT INTO goods (project_id, name, priority) SELECT 1, 'good', n FROM generate_series(1, %d) AS n`, goods))
	first := a.List(t, 1, 1).Goods[0].ID
	reprioritize := fmt.Sprintf("/goods/reprioritize?id=%d&projectId=1", first)

	refused := harness.Want[struct {
		Details map[string]string
	}](t, a, 400, "PATCH", reprioritize, fmt.Sprintf(`{"newPriority":%d}`, goods))
	found := regexp.MustCompile(`at most (\d+)`).FindStringSubmatch(refused.Details["newPriority"])
	if found == nil {
		t.Fatalf("a move across %d goods: details are %v, want newPriority with the limit", goods, refused.Details)
	}
	most, err := strconv.Atoi(found[1])
	harness.Must(t, err)

	var moved atomic.Bool
	harness.Together(4, func(i int) {
		if i == 0 {
			defer moved.Store(true)
			begin := time.Now()
			r := a.Call(t, "PATCH", reprioritize, fmt.Sprintf(`{"newPriority":%d}`, 1+most))
			var reply struct{ Priorities []place }
			if err := json.Unmarshal([]byte(r.Body), &reply); r.Status != 200 || err != nil || len(reply.Priorities) != most+1 {
				t.Errorf("a move across %d goods: got %d %.200s, %d places", most, r.Status, r.Body, len(reply.Priorities))
			}
			if took := time.Since(begin); took > callWithin {
				t.Errorf("a move across %d goods took %v", most, took)
			} else {
				t.Logf("a move across %d goods took %v", most, took)
			}
			return
		}
		for n := 0; !moved.Load(); n++ {
			begin := time.Now()
			if i == 1 {
				a.Create(t, fmt.Sprint("new ", n))
			} else {
				a.List(t, 10, goods/2)
			}
			if took := time.Since(begin); took > callWithin {
				t.Errorf("client %d waited %v", i, took)
			}
		}
	})
	if g := a.List(t, 1, 1+most).Goods[0]; g.ID != first {
		t.Errorf("at %d stands %+v, want good %d", 1+most, g, first)
	}
	w.Settled(t, time.Minute)
}
