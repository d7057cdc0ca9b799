package test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"goods/test/harness"
)

// startIntoPipe starts a service that logs into a pipe, a line for each request.
func startIntoPipe(t *testing.T) *harness.App {
	t.Helper()
	t.Parallel()
	w := harness.NewWorld(t)
	w.PipedLog = true
	return w.Start(t)
}

// quick makes n calls, each of which must be answered soon.
func quick(t *testing.T, a *harness.App, n int) {
	t.Helper()
	for i := range n {
		begin := time.Now()
		ok(t, a, "GET", "/goods/list", "")
		if took := time.Since(begin); took > 2*time.Second {
			t.Fatalf("call %d took %v", i, took)
		}
	}
}

// Serving does not depend on who reads the log: a reader may end.
func TestReaderOfTheLogEnds(t *testing.T) {
	a := startIntoPipe(t)
	a.EndLog()
	quick(t, a, 50)
	a.Create(t, "one")
	harness.Equal(t, a.Stop(), nil, "how the service ended")
}

// A reader may also stop reading. The lines of meanwhile may be lost; later ones are not.
func TestReaderOfTheLogIsFrozen(t *testing.T) {
	a := startIntoPipe(t)
	const enough = 1500 // lines for a pipe, which holds 64 KiB
	resume := a.FreezeLog()
	quick(t, a, enough)
	a.Create(t, "one")
	resume()
	harness.Eventually(t, 15*time.Second, func() error {
		a.Call(t, "GET", "/healthz", "", "X-Request-Id: the-last")
		if !strings.Contains(a.Log(), "the-last") {
			return errors.New("the line of the last request is not in the log")
		}
		return nil
	})
	defer a.FreezeLog()()
	quick(t, a, enough)
	begin := time.Now()
	harness.Equal(t, a.Stop(), nil, "how the service ended")
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("the service ended after %v", took)
	}
}

// notices returns the lines of the log at INFO and above, after the first n.
func notices(a *harness.App, n int) (lines []string) {
	for line := range strings.Lines(a.Log()) {
		if !strings.Contains(line, `"level":"DEBUG"`) {
			lines = append(lines, line)
		}
	}
	return lines[min(n, len(lines)):]
}

// The first 503 of a run is logged, with its cause, and the end of the run: a call that is served, seconds
// after the last 503. What supervisors and Prometheus ask says nothing of it.
func TestUnavailableInLog(t *testing.T) {
	w, a := started(t, "LOG_LEVEL=info")
	a.Stock(t, 2) // the first may be removed: a call that got 503 may have been made
	w.Settled(t, 15*time.Second)
	for range 2 {
		before := len(notices(a, 0))
		tx := w.Hold(t, `SELECT FROM goods WHERE id = 1 FOR UPDATE`) // nothing is wrong with Postgres itself
		for range 2 {
			harness.Together(4, func(int) { refused(t, a, 8, "PATCH", calls[1].path, someName) })
		}
		harness.AwaitEqual(t, 10*time.Second, func() int { return len(notices(a, before)) }, 1, "lines in the log")
		line := notices(a, before)[0]
		if !strings.Contains(line, `"level":"WARN"`) || !strings.Contains(line, "lock") {
			t.Errorf("got a line %s, want a warning with the cause, a lock", line)
		}
		harness.Must(t, tx.Rollback())
		for begin := time.Now(); time.Since(begin) < 6*time.Second; <-time.After(100 * time.Millisecond) {
			for _, path := range []string{"/healthz", "/readyz", "/metrics", "/"} {
				a.Call(t, "GET", path, "")
			}
		}
		harness.Equal(t, len(notices(a, before)), 1, "lines in the log before a call is served")
		harness.AwaitEqual(t, 15*time.Second, func() int {
			ok(t, a, "PATCH", "/goods/update"+target(2), someName)
			a.List(t, 1, 1)
			return len(notices(a, before))
		}, 2, "lines in the log after the end")
		line = notices(a, before)[1]
		harness.Equal(t, strings.Contains(line, `"level":"INFO"`), true, "the line %s tells the end", line)
	}
}
