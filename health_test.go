package main

import (
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// An outage with successes in it is two lines in the log: its begin with the first cause, and its end.
func TestOutageInLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b strings.Builder
		s := &stateLog{log: slog.New(slog.NewTextHandler(&b, nil)), name: "requests", quiet: quietEnd}
		lines := func(want string, when string) {
			t.Helper()
			var got []string
			for line := range strings.Lines(b.String()) {
				_, rest, _ := strings.Cut(line, "level=")
				got = append(got, strings.TrimSpace(rest))
			}
			if all := strings.Join(got, "; "); all != want {
				t.Errorf("%s: got %q, want %q", when, all, want)
			}
			b.Reset()
		}
		s.report(nil)
		lines("", "before any failure")
		for range 2 {
			s.report(errors.New("first"))
			lines(`WARN msg=failing name=requests err=first`, "at the first failure")
			for range 10 { // for longer than quietEnd
				time.Sleep(quietEnd * 3 / 4)
				s.report(nil)
				s.report(errors.New("other"))
			}
			time.Sleep(quietEnd - time.Millisecond)
			s.report(nil)
			lines("", "while it goes on")
			time.Sleep(time.Millisecond)
			s.report(nil)
			s.report(nil)
			lines(`INFO msg=recovered name=requests`, "at its end")
		}
	})
}
