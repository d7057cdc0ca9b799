//go:build faults || soak

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/url"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// fault is something that breaks while clients go on.
type fault struct {
	name     string
	breaks   string // the servers that it breaks: these are the test's own
	through  string // the server that the service reaches through scene.proxy
	replicas int    // of the service; 0 is one

	// during begins and ends the fault.
	during func(t testing.TB, s *scene)

	may    []int         // statuses that clients may see besides 2xx
	within time.Duration // the slowest answer; 0 is a second
	drains time.Duration // until the queues are empty, after the load; 0 is 15 seconds
}

// scene is where a fault happens.
type scene struct {
	*world
	servers *servers
	proxy   *proxy
	apps    []*app
	load    *load
}

const (
	recoversWithin = 5 * time.Second // until every call works, after a fault
	moreGoroutines = 10              // than before the load
	moreHeap       = 16 << 20        // bytes
)

// outcome is what a fault did, for the table in the README.
type outcome struct {
	fault    string
	requests int
	good     float64 // share of 2xx
	slowest  time.Duration
	recovery time.Duration // from the end of the fault until everything works
	drained  time.Duration // from the end of the load until the queues are empty
	events   int
}

func (o outcome) String() string {
	good := fmt.Sprintf("%.1f %%", 100*o.good)
	if o.good == 1 {
		good = "all"
	}
	return fmt.Sprintf("| %s | %d | %s | %.2f s | %.1f s | %.1f s | %d |", o.fault, o.requests, good,
		o.slowest.Seconds(), o.recovery.Seconds(), o.drained.Seconds(), o.events)
}

const outcomeHead = `| fault | requests | 2xx | slowest answer | all works again after | queues empty after | events |
|---|---|---|---|---|---|---|`

// run lets the fault happen under load, and checks what clients saw, what came
// of every write, and that the service is then as it was.
func (f fault) run(t testing.TB, own *servers) outcome {
	t.Helper()
	s := f.scene(t, own)
	first := s.apps[0]
	before := first.vitals(t)
	s.load = s.startLoad(t, s.apps...)
	eventually(t, 10*time.Second, func() error { return s.load.works(time.Time{}) })

	begin := time.Now()
	f.during(t, s)
	end := time.Now()

	o := outcome{fault: f.name}
	eventually(t, 2*recoversWithin, func() error {
		for _, a := range s.apps {
			if err := a.ready(); err != nil {
				o.recovery = time.Since(end)
				return err
			}
		}
		return nil
	})
	failed := end // the last time
	eventually(t, 2*recoversWithin, func() error {
		for _, a := range s.load.since(end, time.Time{}) {
			if !a.good() {
				if a.begin.After(failed) {
					failed = a.begin
				}
				o.recovery = max(o.recovery, a.begin.Add(a.took).Sub(end))
			}
		}
		return s.load.works(failed.Add(1))
	})
	if o.recovery > recoversWithin {
		t.Errorf("everything worked again after %v, want %v", o.recovery, recoversWithin)
	}
	s.load.stop()
	stopped := time.Now()

	good, doubted := 0, time.Time{}
	for _, a := range s.load.since(begin, time.Time{}) {
		o.requests++
		o.slowest = max(o.slowest, a.took)
		if a.good() {
			good++
			continue
		}
		if a.status == 503 {
			doubted = a.begin.Add(a.took)
		}
		if !slices.Contains(f.may, a.status) {
			t.Errorf("%s after %v: got %d", a.call, a.begin.Sub(begin), a.status)
		}
	}
	o.good = float64(good) / float64(o.requests)
	if most := max(f.within, time.Second); o.slowest > most {
		t.Errorf("the slowest answer took %v, want %v", o.slowest, most)
	}
	s.db.SetMaxIdleConns(0) // none may be left over from a server that has gone
	s.db.SetMaxIdleConns(2)
	eventually(t, max(f.drains, 15*time.Second), func() error {
		if n := one[int](t, s.world, `SELECT count(*) FROM outbox`); n > 0 {
			return fmt.Errorf("%d events are still in the outbox", n)
		}
		return nil
	})
	o.drained = time.Since(stopped)
	<-time.After(time.Until(doubted.Add(doubtLife + 2*time.Second))) // what is cached may be old until then
	o.events = s.settled(t, time.Second)
	s.load.verify(t)
	if s.apps[0] == first {
		eventually(t, 10*time.Second, func() error {
			if after := first.vitals(t); after.Goroutines > before.Goroutines+moreGoroutines || after.Heap > before.Heap+moreHeap {
				return fmt.Errorf("the service has not come back to what it was: %+v, before the load %+v", after, before)
			}
			return nil
		})
	}
	t.Log(o)
	return o
}

// scene prepares a world and its service.
func (f fault) scene(t testing.TB, own *servers) *scene {
	t.Helper()
	var overrides []string
	for _, name := range strings.Fields(f.breaks) {
		overrides = append(overrides, own.variable(t, name))
	}
	s := &scene{world: newWorld(t, overrides...), servers: own}
	s.env["EVENTS_BATCH"] = "50" // by fives, the queues would drain for most of the test's time
	if f.through != "" {
		name := strings.ToUpper(f.through) + "_URL"
		u, err := url.Parse(s.env[name])
		must(t, err)
		s.proxy = newProxy(t, s.env[name])
		u.Host = s.proxy.addr
		s.env[name] = u.String()
	}
	for range max(1, f.replicas) {
		s.apps = append(s.apps, s.exec(t))
	}
	for _, a := range s.apps {
		eventually(t, 10*time.Second, a.ready)
	}
	return s
}

// vitals are what must not grow.
type vitals struct {
	Goroutines int
	Heap       int // bytes
}

// vitals asks a service that is a process of its own: see reportVitals.
func (a *app) vitals(t testing.TB) vitals {
	t.Helper()
	const mark = `{"msg":"vitals",`
	seen := strings.Count(a.log.String(), mark)
	must(t, a.process.Signal(syscall.SIGUSR1))
	var v vitals
	eventually(t, 5*time.Second, func() error {
		log := a.log.String()
		if strings.Count(log, mark) == seen {
			return fmt.Errorf("the service does not report its vitals")
		}
		line, _, _ := strings.Cut(log[strings.LastIndex(log, mark):], "\n")
		return json.Unmarshal([]byte(line), &v)
	})
	return v
}

// last is how long a fault lasts.
func (s *scene) last(d time.Duration) { <-time.After(d) }

// The usual length of a fault.
const aWhile = 2 * time.Second

func stopped(names ...string) func(testing.TB, *scene) {
	return func(t testing.TB, s *scene) {
		s.servers.sh(t, append([]string{"stop"}, names...)...)
		s.last(aWhile)
		s.servers.sh(t, append([]string{"start"}, names...)...)
	}
}

func killed(names ...string) func(testing.TB, *scene) {
	return func(t testing.TB, s *scene) {
		for _, name := range names {
			s.servers.kill(t, name)
		}
		s.last(aWhile)
		s.servers.sh(t, append([]string{"start"}, names...)...)
	}
}

func frozen(names ...string) func(testing.TB, *scene) {
	return func(t testing.TB, s *scene) {
		s.servers.sh(t, append([]string{"pause"}, names...)...)
		s.last(2 * aWhile)
		s.servers.sh(t, append([]string{"resume"}, names...)...)
	}
}

func restarted(name string) func(testing.TB, *scene) {
	return func(t testing.TB, s *scene) {
		s.servers.sh(t, "stop", name)
		s.servers.sh(t, "start", name)
	}
}

// spoiled lets the proxy spoil replies for a while.
func spoiled(f func(client io.Writer, part []byte) error) func(testing.TB, *scene) {
	return func(_ testing.TB, s *scene) {
		s.proxy.spoil.Store(&f)
		s.last(aWhile)
		s.proxy.spoil.Store(nil)
	}
}

// late is an answer that comes after d.
func late(d time.Duration) func(io.Writer, []byte) error {
	return func(client io.Writer, part []byte) error {
		<-time.After(d)
		_, err := client.Write(part)
		return err
	}
}

// torn ends one in n replies in the middle.
func torn(n int) func(io.Writer, []byte) error {
	return func(client io.Writer, part []byte) error {
		if rand.N(n) == 0 {
			_, _ = client.Write(part[:rand.N(len(part))])
			return io.ErrClosedPipe
		}
		_, err := client.Write(part)
		return err
	}
}

// lost is an answer that never comes, on a connection that stays.
func lost(io.Writer, []byte) error { return nil }

// unheard ends one in four connections when Postgres has committed and says so.
func unheard(client io.Writer, part []byte) error {
	if bytes.Contains(part, []byte("COMMIT\x00")) && rand.N(4) == 0 {
		return io.ErrClosedPipe
	}
	_, err := client.Write(part)
	return err
}

// lane is faults that happen one after the other, to the same servers.
type lane struct {
	name   string
	faults []fault
}

// TestFaults breaks everything around the service, and the service, under load.
func TestFaults(t *testing.T) {
	var mu sync.Mutex
	outcomes := map[string]outcome{}
	t.Run("lanes", func(t *testing.T) {
		for _, l := range lanes {
			t.Run(l.name, func(t *testing.T) {
				own := newServers(t, l.breaks()...) // before the others run, for they look for free ports, too
				t.Parallel()
				for _, f := range l.faults {
					t.Run(f.name, func(t *testing.T) {
						o := f.run(t, own)
						mu.Lock()
						outcomes[f.name] = o
						mu.Unlock()
					})
				}
			})
		}
	})
	table := outcomeHead
	for _, l := range lanes {
		for _, f := range l.faults {
			if o, ok := outcomes[f.name]; ok {
				table += "\n" + o.String()
			}
		}
	}
	t.Log("\n" + table)
}

// breaks returns the servers that the lane needs for itself.
func (l lane) breaks() []string {
	var names []string
	for _, f := range l.faults {
		names = append(names, strings.Fields(f.breaks)...)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// soon ends before anything in a test is given up.
func soon() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), 10*time.Second)
}
