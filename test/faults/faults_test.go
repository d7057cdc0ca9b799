// Package faults breaks everything around the service, and the service, while clients go on, and then compares every
// answer with what is stored.
package faults

import (
	"fmt"
	"math/rand/v2"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"goods/test/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

const (
	aWhile         = 2 * time.Second // the usual length of a fault
	answerWithin   = 2 * time.Second // every call, whatever happens but to Postgres
	callWithin     = 5 * time.Second // every call, whatever happens to Postgres
	recoversWithin = 5 * time.Second // until every call works, after a fault
	moreGoroutines = 10              // than before the load
	moreHeap       = 16 << 20        // bytes
	lanesAtOnce    = 5
)

// fault is something that breaks under load.
type fault struct {
	name     string
	through  string                       // the server that the service reaches through scene.proxy
	twoHosts bool                         // that server is also there directly, as the second host of its URL
	replicas int                          // of the service; 0 is one
	during   func(t testing.TB, s *scene) // begins and ends the fault
	postgres bool                         // is away: clients may see 503, and wait for up to callWithin
	kills    bool                         // the service: requests may stay unanswered
	recovers time.Duration                // until the service works again; 0 is recoversWithin
}

// scene is where a fault happens.
type scene struct {
	*harness.World
	servers *harness.Servers
	proxy   *harness.Proxy
	apps    []*harness.App
	load    *load
}

// outcome is what a fault did, for the table in docs/faults.md.
type outcome struct {
	fault                      string
	requests, good, events     int
	slowest, recovery, drained time.Duration
}

const outcomeHead = `
| fault | requests | 2xx | slowest answer | recovered after | queues empty after | events |
|---|---:|---:|---:|---:|---:|---:|
`

func (o outcome) String() string {
	share := fmt.Sprintf("%.1f %%", 100*float64(o.good)/float64(o.requests))
	if o.good == o.requests {
		share = "all"
	}
	return fmt.Sprintf("| %s | %d | %s | %.2f s | %.1f s | %.1f s | %d |", o.fault, o.requests, share,
		o.slowest.Seconds(), o.recovery.Seconds(), o.drained.Seconds(), o.events)
}

// run lets the fault happen under load, and checks what clients saw, what came of every write, and that the service
// is then as it was.
func (f fault) run(t testing.TB, own *harness.Servers, breaks string) outcome {
	t.Helper()
	s := f.scene(t, own, breaks)
	first := s.apps[0]
	before := vitalsOf(t, first)
	s.load = startLoad(t, s.World, s.apps)
	harness.Eventually(t, 10*time.Second, func() error { return s.load.works(time.Time{}) })

	begin := time.Now()
	f.during(t, s)
	end := time.Now()

	o := outcome{fault: f.name}
	limit := max(f.recovers, recoversWithin)
	failed := end // the last time
	harness.Eventually(t, limit+recoversWithin, func() error {
		for _, a := range s.apps {
			if err := a.Ready(); err != nil {
				o.recovery = time.Since(end)
				return err
			}
		}
		for _, a := range s.load.since(end) {
			if !good(a.status) {
				failed, o.recovery = a.begin, max(o.recovery, a.end.Sub(end))
			}
		}
		return s.load.works(failed)
	})
	if o.recovery > limit {
		t.Errorf("everything worked again after %v, want %v", o.recovery, limit)
	}
	s.load.stop()
	stopped := time.Now()

	for _, a := range s.load.answers {
		if a.end.Before(begin) {
			continue
		}
		o.requests++
		o.slowest = max(o.slowest, a.end.Sub(a.begin))
		if good(a.status) {
			o.good++
		} else if !(a.status == 503 && f.postgres || a.status == unanswered && f.kills) {
			t.Errorf("%s after %v: got %d after %v", a.call, a.begin.Sub(begin), a.status, a.end.Sub(a.begin))
		}
	}
	most := map[bool]time.Duration{false: answerWithin, true: callWithin}[f.postgres]
	if o.slowest > most {
		t.Errorf("the slowest answer took %v, want %v", o.slowest, most)
	}
	s.DB.SetMaxIdleConns(0) // none may be left over from a server that has gone
	s.DB.SetMaxIdleConns(2)
	o.events = s.Settled(t, time.Minute)
	o.drained = time.Since(stopped)
	s.load.verify(t, s.World)
	if s.apps[0] == first {
		harness.Eventually(t, 10*time.Second, func() error {
			harness.Client.CloseIdleConnections()
			var after vitals
			for range 50 { // so that there is garbage, and its collection
				after = vitalsOf(t, first)
			}
			if after.goroutines > before.goroutines+moreGoroutines || after.heap > before.heap+moreHeap {
				return fmt.Errorf("the service has not come back to what it was: %+v, before the load %+v", after, before)
			}
			return nil
		})
	}
	t.Log(o)
	return o
}

// scene prepares a world and its service.
func (f fault) scene(t testing.TB, own *harness.Servers, breaks string) *scene {
	t.Helper()
	var overrides []string
	for _, name := range strings.Fields(breaks) {
		overrides = append(overrides, own.Variable(t, name))
	}
	s := &scene{World: harness.NewWorld(t, overrides...), servers: own}
	s.Env["EVENTS_BATCH"] = "50" // by fives, the queues would drain for most of the test's time
	s.Env["GOGC"] = "50"         // so that garbage does not pass for a leak
	if f.through != "" {
		name := strings.ToUpper(f.through) + "_URL"
		direct, _ := url.Parse(s.Env[name])
		s.proxy = s.NewProxy(t, name)
		if u, _ := url.Parse(s.Env[name]); f.twoHosts {
			s.Env[name] += "&host=" + u.Hostname() + "," + direct.Hostname() + "&port=" + u.Port() + "," + direct.Port()
		}
	}
	for range max(1, f.replicas) {
		s.apps = append(s.apps, s.Start(t))
	}
	for _, a := range s.apps {
		harness.Eventually(t, 10*time.Second, a.Ready)
	}
	return s
}

// vitals are what must not grow.
type vitals struct{ goroutines, heap float64 }

func vitalsOf(t testing.TB, a *harness.App) (v vitals) {
	t.Helper()
	for line := range strings.Lines(a.Call(t, "GET", "/metrics", "").Body) {
		_, _ = fmt.Sscanf(line, "go_goroutines %g", &v.goroutines)
		_, _ = fmt.Sscanf(line, "go_memstats_heap_alloc_bytes %g", &v.heap)
	}
	return v
}

// last is how long a fault lasts.
func (s *scene) last(d time.Duration) { <-time.After(d) }

// sh kills servers, or runs a command of servers.sh on them.
func (s *scene) sh(t testing.TB, command string, names ...string) {
	t.Helper()
	if command != "kill" {
		s.servers.Sh(t, append([]string{command}, names...)...)
		return
	}
	for _, name := range names {
		s.servers.Kill(t, name)
	}
}

// restart replaces a replica that has ended, or kills it first.
func (s *scene) restart(t testing.TB, i int) {
	t.Helper()
	_ = s.apps[i].Process.Kill() // it may have ended
	s.apps[i] = s.Start(t)
	s.load.aim(s.apps...)
}

// lane is faults that happen one after the other, to servers of its own.
type lane struct {
	name, breaks string
	faults       []fault
}

// TestFaults runs every fault, or faults at random for the MINUTES that the environment says.
func TestFaults(t *testing.T) {
	if minutes, err := strconv.Atoi(os.Getenv("MINUTES")); err == nil {
		soak(t, time.Duration(minutes)*time.Minute)
		return
	}
	var starting sync.Mutex // while servers look for free ports
	rows := make([]string, len(lanes))
	slots := make(chan struct{}, lanesAtOnce)
	harness.Together(len(lanes), func(i int) {
		slots <- struct{}{}
		defer func() { <-slots }()
		l := lanes[i]
		t.Run(l.name, func(t *testing.T) {
			own := func() *harness.Servers {
				starting.Lock()
				defer starting.Unlock()
				return harness.NewServers(t, strings.Fields(l.breaks)...)
			}()
			for _, f := range l.faults {
				t.Run(f.name, func(t *testing.T) { rows[i] += f.run(t, own, l.breaks).String() + "\n" })
			}
		})
	})
	t.Log(outcomeHead + strings.Join(rows, ""))
}

// soak repeats faults at random.
func soak(t *testing.T, lasts time.Duration) {
	own := harness.NewServers(t, "postgres", "redis", "nats", "clickhouse")
	table := outcomeHead
	for begin := time.Now(); time.Since(begin) < lasts && !t.Failed(); {
		l := lanes[rand.N(len(lanes))]
		f := l.faults[rand.N(len(l.faults))]
		t.Run(f.name, func(t *testing.T) { table += f.run(t, own, l.breaks).String() + "\n" })
	}
	t.Log(table)
}
