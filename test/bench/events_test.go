package bench

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"time"

	"goods/test/harness"
)

// events measures the way of the events to ClickHouse, from a full outbox.
func (b *bench) events() {
	const size = 40_000
	worlds := []*harness.World{b.stocked(size, "")}
	if b.before != "" {
		worlds = append(worlds, b.stocked(size, b.before))
	}
	b.memo += " Events a second from a full outbox to ClickHouse:"
	for _, batch := range []struct {
		size, events int
		goal         float64 // events a second
	}{
		{5, 5000, 6000},
		{500, size, 0},
	} {
		r := row{what: fmt.Sprintf("events, %d in one INSERT", batch.size), number: rate, limit: 1 - noise}
		if batch.goal > 0 {
			r.limit = batch.goal
			r.unit = " a second"
		}
		samples := make([][]sample, len(worlds))
		for round := range rounds {
			for i, w := range worlds {
				w.Exec(b, fmt.Sprintf(`UPDATE goods SET name = name WHERE id <= %d`, batch.events))
				a := w.Start(b, "LOG_LEVEL=info", fmt.Sprint("EVENTS_BATCH=", batch.size))
				start := time.Now()
				b.stored(w, 0)
				took := time.Since(start)
				samples[i] = append(samples[i], sample{rate: float64(batch.events) / took.Seconds()})
				harness.Must(b, a.Stop())
			}
			if b.before != "" {
				b.builds = addTo(b.builds, r, samples[0][round], samples[1][round])
			}
		}
		s := spreadOf(samples[0], rate)
		b.memo += fmt.Sprintf(" %.0f (%.0f to %.0f)", s.median, s.low, s.high)
		b.memo += fmt.Sprintf(" with EVENTS_BATCH=%d", batch.size)
		if batch.goal > 0 {
			b.memo += fmt.Sprintf(" (goal: %.0f)", batch.goal)
		}
		b.memo += "."
	}
}

// history shows whether those who read the log slow what is stored there.
func (b *bench) history() {
	const events = 10_000
	r := row{
		what:   "events while 64 clients read histories",
		with:   "the same events without readers",
		number: rate,
		limit:  0.7,
		because: "ClickHouse and the service answer the readers, and store the events, with the same cores. " +
			"Five events are one INSERT, as by default.",
		short: "the readers' queries take the cores that the INSERTs would need.",
	}
	w := b.stocked(events, "")
	s := &site{w, []*harness.App{w.Start(b, "LOG_LEVEL=info")}}
	harness.Eventually(b, 10*time.Second, s.apps[0].Ready)
	store := func() sample {
		before := cpuTimes(b, s.apps...)
		start := time.Now()
		w.Exec(b, `UPDATE goods SET name = name`)
		b.stored(w, 0)
		took := time.Since(start)
		used := cpuTimes(b, s.apps...).perRequest(before, float64(took.Microseconds()), events)
		return sample{rate: events / took.Seconds(), used: used}
	}
	store() // so that there is something to read
	reads := several(10_000, func(int) string {
		return fmt.Sprint("GET /goods/history?projectId=1&id=", 1+rand.IntN(events))
	})
	for range rounds {
		// A merge that begins in one measurement would slow the next.
		harness.Must(b, w.ClickHouse.Exec(context.Background(), `OPTIMIZE TABLE goods_log FINAL`))
		ref := store()
		stop := b.load(s, conns, reads...)
		got := store()
		readers := stop()
		b.add(r, got, ref)
		b.Logf("%.0f histories a second, p50 %.0f ms, p99 %.0f ms; %.0f %% refused",
			readers.rate, readers.p50, readers.p99, 100*readers.refused)
	}
}

// memory tells what a service holds that has only started, and the largest of all that were measured.
func (b *bench) memory() {
	resident := func(a *harness.App) (kb float64) {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", a.Process.Pid))
		harness.Must(b, err)
		_, rest, _ := strings.Cut(string(status), "VmRSS:")
		_, err = fmt.Sscan(rest, &kb)
		harness.Must(b, err)
		return kb
	}
	most := 0.0
	for _, a := range b.apps {
		most = max(most, resident(a))
	}
	rest := resident(b.start(harness.NewWorld(b)))
	b.memo += fmt.Sprintf(" The service holds %.0f MB of memory at rest (goal: 20)", rest/1024)
	b.memo += fmt.Sprintf(", and %.0f MB after all this (goal: 50).", most/1024)
}
