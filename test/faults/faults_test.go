// Package faults breaks everything around the service, and the service, while clients go on, and then
// compares every answer with what is stored.
package faults

import (
	"encoding/json"
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

const (
	aWhile         = 2 * time.Second // the usual length of a fault
	answerWithin   = 2 * time.Second // every call, whatever happens but to Postgres
	callWithin     = 5 * time.Second // every call, whatever happens to Postgres
	recoversWithin = 5 * time.Second // until every call works, after a fault
	// settlesWithin is for the last events to get from the outbox into ClickHouse. A message of a service
	// that was killed comes to another one after 15 s.
	settlesWithin  = 20 * time.Second
	moreGoroutines = 10       // than before the load
	moreHeap       = 16 << 20 // bytes
	lanesAtOnce    = 5
)

// fault is something that breaks under load.
type fault struct {
	name     string
	through  string         // the server that the service reaches through scene.proxy
	standby  string         // "synchronous" or "asynchronous": the fault takes servers of its own
	prepare  func(s *scene) // changes the environment of the service, before it starts; may be nil
	twoHosts bool           // that server is also there directly, as the second host of its URL
	replicas int            // of the service; 0 is one
	during   func(s *scene) // begins and ends the fault
	gateway  bool           // may answer one call in a thousand with 502
	postgres bool           // is away: clients may see 503, and wait for up to callWithin
	kills    bool           // the service: requests may stay unanswered
	loses    bool           // answered writes: Postgres is then the truth, whatever clients were told
	leaves   bool           // events of what was lost in ClickHouse
	recovers time.Duration  // until the service works again; 0 is recoversWithin
}

// scene is where a fault happens.
type scene struct {
	testing.TB
	*harness.World
	servers *harness.Servers
	standby *harness.Standby
	proxy   *harness.Proxy
	nats    *harness.NATS // of the fault's own
	process *os.Process   // of a server of the fault's own
	apps    []*harness.App
	load    *load
}

const tableHead = `
| fault | requests | 2xx | slowest answer | recovered after | queues empty after | events |
|---|---:|---:|---:|---:|---:|---:|
`

// run lets the fault happen under load, and checks what clients saw, what came of every write, and that the
// service is then as it was. It returns a row of the table in docs/faults.md.
func (f fault) run(t testing.TB, own *harness.Servers) string {
	t.Helper()
	s := f.scene(t, own)
	first := s.apps[0]
	goroutines, heap := s.vitals()
	s.load = startLoad(s)
	harness.Eventually(t, 10*time.Second, func() error {
		_, err := s.load.works(time.Time{})
		return err
	})

	begin := time.Now()
	f.during(s)
	recovery := s.recovery(max(f.recovers, recoversWithin))
	s.load.stop()
	stopped := time.Now()

	var requests, successes, badGateway int
	var slowest time.Duration
	for _, a := range s.load.answers {
		took, fine := a.end.Sub(a.begin), good(a.status)
		if a.end.After(begin) {
			requests++
			if fine {
				successes++
			}
			slowest = max(slowest, took)
			fine = fine || a.status == 503 && f.postgres || a.status == unanswered && f.kills
			if a.status == 502 && f.gateway {
				badGateway++
				fine = true
			}
		}
		if !fine {
			t.Errorf("%s after %v: got %d after %v, %v", a.call, a.begin.Sub(begin), a.status, took, a.err)
		}
	}
	if badGateway*1000 > requests {
		t.Errorf("%d of %d calls got 502, want one in a thousand at most", badGateway, requests)
	}
	if most := map[bool]time.Duration{false: answerWithin, true: callWithin}[f.postgres]; slowest > most {
		t.Errorf("the slowest answer took %v, want %v", slowest, most)
	}
	s.DB.SetMaxIdleConns(0) // none may be left over from a server that has gone
	s.DB.SetMaxIdleConns(2)
	var events int
	if f.loses {
		var lost int
		events, lost = s.SettledAfterLoss(t, settlesWithin)
		t.Logf("ClickHouse has %d events of what Postgres has lost", lost)
		if lost > 0 && !f.leaves {
			t.Errorf("ClickHouse has %d events of what Postgres has lost, want none", lost)
		}
	} else {
		events = s.Settled(t, settlesWithin)
	}
	drained := time.Since(stopped)
	s.load.verify(s)
	if s.apps[0] == first {
		harness.Eventually(t, 10*time.Second, func() error {
			harness.Client.CloseIdleConnections()
			for range 50 { // so that there is garbage, and its collection
				s.vitals()
			}
			if g, h := s.vitals(); g > goroutines+moreGoroutines || h > heap+moreHeap {
				return fmt.Errorf(
					"the service has %g goroutines and %g bytes, before the load %g and %g",
					g,
					h,
					goroutines,
					heap,
				)
			}
			return nil
		})
	}

	share := "all"
	if successes < requests {
		share = fmt.Sprintf("%.1f %%", 100*float64(successes)/float64(requests))
	}
	row := fmt.Sprintf("| %s | %d | %s | %.2f s | %.1f s | %.1f s | %d |\n", f.name, requests, share,
		slowest.Seconds(), recovery.Seconds(), drained.Seconds(), events)
	t.Log(row)
	return row
}

// recovery waits until the service works again, and returns how long that took from now on.
func (s *scene) recovery(limit time.Duration) (took time.Duration) {
	end := time.Now()
	harness.Eventually(s, limit+recoversWithin, func() error {
		for _, a := range s.apps {
			if err := a.Ready(); err != nil {
				took = time.Since(end)
				return err
			}
		}
		failed, err := s.load.works(end)
		took = max(took, failed.Sub(end))
		return err
	})
	if took > limit {
		s.Errorf("everything worked again after %v, want %v", took, limit)
	}
	return took
}

// scene prepares a world and its service.
func (f fault) scene(t testing.TB, own *harness.Servers) *scene {
	t.Helper()
	s := &scene{TB: t, servers: own}
	urls := own.URLs
	if f.standby != "" {
		s.standby = harness.NewStandby(t, own, f.standby == "synchronous")
		urls = append(slices.Clone(urls), "POSTGRES_URL="+s.standby.BothURL)
	}
	s.World = harness.NewWorld(t, urls...)
	s.Env["EVENTS_BATCH"] = "50" // by fives, the queues would drain for most of the test's time
	s.Env["GOGC"] = "50"         // so that garbage does not pass for a leak
	if f.through != "" {
		name := strings.ToUpper(f.through) + "_URL"
		direct, _ := url.Parse(s.Env[name])
		s.proxy = s.NewProxy(t, name)
		if u, _ := url.Parse(s.Env[name]); f.twoHosts {
			s.Env[name] += "&host=" + u.Hostname() + "," + direct.Hostname() +
				"&port=" + u.Port() + "," + direct.Port()
		}
	}
	if f.prepare != nil {
		f.prepare(s)
	}
	for i := range max(1, f.replicas) {
		s.apps = append(s.apps, s.Start(t))
		harness.Eventually(t, 10*time.Second, s.apps[i].Ready)
	}
	return s
}

// vitals are what must not grow: how many goroutines the service has, and how many bytes.
func (s *scene) vitals() (goroutines, heap float64) {
	for line := range strings.Lines(s.apps[0].Call(s, "GET", "/metrics", "").Body) {
		_, _ = fmt.Sscanf(line, "go_goroutines %g", &goroutines)
		_, _ = fmt.Sscanf(line, "go_memstats_heap_alloc_bytes %g", &heap)
	}
	return goroutines, heap
}

// last is how long a fault lasts.
func (s *scene) last(d time.Duration) { <-time.After(d) }

// sh runs a command of servers.sh on each server.
func (s *scene) sh(command string, names ...string) {
	for _, name := range names {
		s.servers.Sh(s, command, name)
	}
}

// restart replaces a replica that has ended, or kills it first.
func (s *scene) restart(i int) {
	_ = s.apps[i].Process.Kill() // it may have ended
	s.apps[i] = s.Start(s)
	s.load.aim(s.apps...)
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
	var running sync.WaitGroup
	for i, l := range lanes {
		slots <- struct{}{}
		running.Go(func() {
			defer func() { <-slots }()
			t.Run(l.name, func(t *testing.T) {
				own := func() *harness.Servers {
					starting.Lock()
					defer starting.Unlock()
					return harness.NewServers(t, strings.Fields(l.breaks)...)
				}()
				for _, f := range l.faults {
					t.Run(f.name, func(t *testing.T) { rows[i] += f.run(t, own) })
				}
			})
		})
	}
	running.Wait()
	t.Log(tableHead + strings.Join(rows, ""))
}

// soak repeats faults at random.
func soak(t *testing.T, lasts time.Duration) {
	own := harness.NewServers(t, "postgres", "redis", "nats", "clickhouse")
	table := tableHead
	for begin := time.Now(); time.Since(begin) < lasts && !t.Failed(); {
		l := lanes[rand.N(len(lanes))]
		f := l.faults[rand.N(len(l.faults))]
		t.Run(f.name, func(t *testing.T) {
			servers := own
			if f.standby != "" {
				servers = harness.NewServers(t, strings.Fields(l.breaks)...)
			}
			table += f.run(t, servers)
		})
	}
	t.Log(table)
}

// stored returns the goods that Postgres holds, in order, and the ids by their keys.
func (s *scene) stored() (goods []harness.Good, keys map[string]int) {
	harness.Must(s, json.Unmarshal(harness.One[[]byte](s, s.World, `
SELECT json_agg(json_build_object('id', id, 'projectId', project_id, 'name', name, 'description', description,
	'priority', priority, 'removed', removed,
	'createdAt', to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')) ORDER BY priority)
FROM goods`), &goods))
	harness.Must(s, json.Unmarshal(harness.One[[]byte](s, s.World, `
SELECT coalesce(json_object_agg(idempotency_key, id), '{}')
FROM goods
WHERE idempotency_key IS NOT NULL`), &keys))
	return goods, keys
}
