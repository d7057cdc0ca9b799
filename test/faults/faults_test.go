// Package faults breaks everything around the service, and the service, while
// clients go on, and then holds every answer against what is stored.
package faults

import (
	"fmt"
	"math/rand/v2"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"goods/test/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

// fault is something that breaks under load.
type fault struct {
	name     string
	breaks   string // the servers that it breaks: these are the test's own
	through  string // the server that the service reaches through scene.proxy
	twoHosts bool   // that server is also there without the proxy, as the second host of its URL
	replicas int    // of the service; 0 is one

	// during begins and ends the fault.
	during func(t testing.TB, s *scene)

	postgres bool          // is away: clients may see 503, and wait for up to callWithin
	kills    bool          // the service: requests may stay unanswered
	within   time.Duration // the slowest answer; 0 is a second
	drains   time.Duration // until the queues are empty, after the load; 0 is 15 seconds
}

// scene is where a fault happens.
type scene struct {
	*harness.World
	servers *harness.Servers
	proxy   *harness.Proxy
	apps    []*harness.App
	load    *load
}

const (
	callWithin     = 5 * time.Second // every call, whatever happens to Postgres
	recoversWithin = 5 * time.Second // until every call works, after a fault
	moreGoroutines = 10              // than before the load
	moreHeap       = 16 << 20        // bytes
	lanesAtOnce    = 5
)

// outcome is what a fault did, for the table in docs/faults.md.
type outcome struct {
	fault    string
	requests int
	good     int // of the requests: those with a 2xx
	slowest  time.Duration
	recovery time.Duration // from the end of the fault until everything works
	drained  time.Duration // from the end of the load until the queues are empty
	events   int
}

func (o outcome) String() string {
	share := fmt.Sprintf("%.1f %%", 100*float64(o.good)/float64(o.requests))
	if o.good == o.requests {
		share = "all"
	}
	return fmt.Sprintf("| %s | %d | %s | %.2f s | %.1f s | %.1f s | %d |", o.fault, o.requests, share,
		o.slowest.Seconds(), o.recovery.Seconds(), o.drained.Seconds(), o.events)
}

const outcomeHead = `| fault | requests | 2xx | slowest answer | recovered after | queues empty after | events |
|---|---:|---:|---:|---:|---:|---:|
`

// run lets the fault happen under load, and checks what clients saw, what came
// of every write, and that the service is then as it was.
func (f fault) run(t testing.TB, own *harness.Servers) outcome {
	t.Helper()
	s := f.scene(t, own)
	first := s.apps[0]
	before := vitalsOf(t, first)
	s.load = startLoad(t, s.World, s.apps...)
	harness.Eventually(t, 10*time.Second, func() error { return s.load.works(time.Time{}) })

	begin := time.Now()
	f.during(t, s)
	end := time.Now()

	o := outcome{fault: f.name}
	harness.Eventually(t, 2*recoversWithin, func() error {
		for _, a := range s.apps {
			if err := a.Ready(); err != nil {
				o.recovery = time.Since(end)
				return err
			}
		}
		return nil
	})
	failed := end // the last time
	harness.Eventually(t, 2*recoversWithin, func() error {
		for _, a := range s.load.since(end) {
			if !good(a.status) {
				failed = a.begin
				o.recovery = max(o.recovery, a.begin.Add(a.took).Sub(end))
			}
		}
		return s.load.works(failed)
	})
	if o.recovery > recoversWithin {
		t.Errorf("everything worked again after %v, want %v", o.recovery, recoversWithin)
	}
	s.load.stop()
	stopped := time.Now()

	for _, a := range s.load.since(begin) {
		o.requests++
		o.slowest = max(o.slowest, a.took)
		if good(a.status) {
			o.good++
		} else if !(a.status == 503 && f.postgres || a.status == unanswered && f.kills) {
			t.Errorf("%s after %v: got %d after %v", a.call, a.begin.Sub(begin), a.status, a.took)
		}
	}
	most := max(f.within, time.Second)
	if f.postgres {
		most = callWithin
	}
	if o.slowest > most {
		t.Errorf("the slowest answer took %v, want %v", o.slowest, most)
	}
	s.DB.SetMaxIdleConns(0) // none may be left over from a server that has gone
	s.DB.SetMaxIdleConns(2)
	harness.Eventually(t, max(f.drains, 15*time.Second), func() error {
		if n := harness.One[int](t, s.World, `SELECT count(*) FROM outbox`); n > 0 {
			return fmt.Errorf("%d events are still in the outbox", n)
		}
		return nil
	})
	o.drained = time.Since(stopped)
	o.events = s.Settled(t, time.Second)
	s.load.verify(t)
	if s.apps[0] == first {
		harness.Client.CloseIdleConnections()
		harness.Eventually(t, 10*time.Second, func() error {
			if after := vitalsOf(t, first); after.goroutines > before.goroutines+moreGoroutines || after.heap > before.heap+moreHeap {
				return fmt.Errorf("the service has not come back to what it was: %+v, before the load %+v", after, before)
			}
			return nil
		})
	}
	t.Log(o)
	return o
}

// scene prepares a world and its service.
func (f fault) scene(t testing.TB, own *harness.Servers) *scene {
	t.Helper()
	var overrides []string
	for _, name := range strings.Fields(f.breaks) {
		overrides = append(overrides, own.Variable(t, name))
	}
	s := &scene{World: harness.NewWorld(t, overrides...), servers: own}
	s.Env["EVENTS_BATCH"] = "50" // by fives, the queues would drain for most of the test's time
	s.Env["GOGC"] = "50"         // so that garbage does not pass for a leak
	if f.through != "" {
		name := strings.ToUpper(f.through) + "_URL"
		direct, err := url.Parse(s.Env[name])
		harness.Must(t, err)
		s.proxy = s.NewProxy(t, name)
		if f.twoHosts {
			u, err := url.Parse(s.Env[name])
			harness.Must(t, err)
			u.Host += "," + direct.Host
			s.Env[name] = u.String()
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
type vitals struct{ goroutines, heap int }

func vitalsOf(t testing.TB, a *harness.App) (v vitals) {
	t.Helper()
	metrics := a.Call(t, "GET", "/metrics", "").Body
	for name, field := range map[string]*int{"go_goroutines": &v.goroutines, "go_memstats_heap_alloc_bytes": &v.heap} {
		_, rest, _ := strings.Cut(metrics, "\n"+name+" ")
		value, _, _ := strings.Cut(rest, "\n")
		n, err := strconv.ParseFloat(value, 64)
		harness.Must(t, err)
		*field = int(n)
	}
	return v
}

// last is how long a fault lasts.
func (s *scene) last(d time.Duration) { <-time.After(d) }

// restart replaces a replica that has ended.
func (s *scene) restart(t testing.TB, i int) {
	t.Helper()
	s.apps[i] = s.Start(t)
	s.load.aim(s.apps...)
}

// lane is faults that happen one after the other, to the same servers.
type lane struct {
	name   string
	faults []fault
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

// TestFaults runs every fault, or faults at random for the MINUTES that the
// environment says.
func TestFaults(t *testing.T) {
	if text := os.Getenv("MINUTES"); text != "" {
		minutes, err := strconv.Atoi(text)
		harness.Must(t, err)
		soak(t, time.Duration(minutes)*time.Minute)
		return
	}
	var starting, writing sync.Mutex // servers look for free ports
	outcomes := map[string]outcome{}
	slots := make(chan struct{}, lanesAtOnce)
	harness.Together(len(lanes), func(i int) {
		l := lanes[i]
		slots <- struct{}{}
		defer func() { <-slots }()
		t.Run(l.name, func(t *testing.T) {
			starting.Lock()
			own := harness.NewServers(t, l.breaks()...)
			starting.Unlock()
			for _, f := range l.faults {
				t.Run(f.name, func(t *testing.T) {
					o := f.run(t, own)
					writing.Lock()
					defer writing.Unlock()
					outcomes[f.name] = o
				})
			}
		})
	})
	var table strings.Builder
	for _, l := range lanes {
		for _, f := range l.faults {
			if o, ok := outcomes[f.name]; ok {
				fmt.Fprintln(&table, o)
			}
		}
	}
	t.Logf("\n%s%s", outcomeHead, table.String())
}

// soak repeats faults at random, and sums up what they did.
func soak(t *testing.T, lasts time.Duration) {
	own := harness.NewServers(t, "postgres", "redis", "nats", "clickhouse")
	var faults []fault
	for _, l := range lanes {
		faults = append(faults, l.faults...)
	}
	total, runs := outcome{requests: 0}, 0
	for begin := time.Now(); time.Since(begin) < lasts && !t.Failed(); runs++ {
		f := faults[rand.N(len(faults))]
		t.Run(f.name, func(t *testing.T) {
			o := f.run(t, own)
			total.good += o.good
			total.requests += o.requests
			total.events += o.events
			total.slowest = max(total.slowest, o.slowest)
			total.recovery = max(total.recovery, o.recovery)
			total.drained = max(total.drained, o.drained)
		})
	}
	total.fault = fmt.Sprintf("%d faults, the longest times", runs)
	t.Logf("\n%s%s", outcomeHead, total)
}
