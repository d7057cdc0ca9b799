//go:build soak

package main

import (
	"math/rand/v2"
	"os"
	"testing"
	"time"
)

// TestSoak repeats the faults of TestFaults at random for as long as SOAK
// says, and prints the same counts.
func TestSoak(t *testing.T) {
	lasts, err := time.ParseDuration(os.Getenv("SOAK"))
	if err != nil {
		t.Fatalf("SOAK must be a duration such as 5m: %v", err)
	}
	own := newServers(t, "postgres", "redis", "nats", "clickhouse")
	var faults []fault
	for _, l := range lanes {
		faults = append(faults, l.faults...)
	}
	runs, total := 0, outcome{fault: "all of them"}
	for begin := time.Now(); time.Since(begin) < lasts && !t.Failed(); runs++ {
		f := faults[rand.N(len(faults))]
		t.Run(f.name, func(t *testing.T) {
			o := f.run(t, own)
			total.good = (total.good*float64(total.requests) + o.good*float64(o.requests)) / float64(total.requests+o.requests)
			total.requests += o.requests
			total.events += o.events
			total.slowest = max(total.slowest, o.slowest)
			total.recovery = max(total.recovery, o.recovery)
			total.drained = max(total.drained, o.drained)
		})
	}
	t.Logf("%d faults; the times are the longest\n%s\n%v", runs, outcomeHead, total)
}
