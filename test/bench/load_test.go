package bench

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"goods/test/harness"
)

// sample is one measurement.
type sample struct {
	rate      float64 // requests a second that were not refused
	refused   float64 // requests, of all
	p50, p99  float64 // milliseconds
	used      work
	ratio     float64 // of what a row compares
	rateRatio float64
	p99Ratio  float64
}

// ask sends requests, each a method, a path and maybe a body, in a loop over so many connections, which it
// shares out over the services of a site; none may be refused. Then it waits until most events are stored, so
// that what one measurement wrote does not slow the next.
func (b *bench) ask(at *site, conns, seconds int, requests ...string) sample {
	b.Helper()
	s := b.send(at, conns, seconds, requests...)
	if s.refused > 0 {
		b.Fatalf("%s and others: %v of the requests were refused", requests[0], s.refused)
	}
	b.stored(at.World, 500)
	return s
}

// send is ask without the wait; requests may be refused.
func (b *bench) send(at *site, conns, seconds int, requests ...string) sample {
	b.Helper()
	stop := b.load(at, conns, requests...)
	<-time.After(time.Duration(seconds) * time.Second)
	return stop()
}

// load sends requests until it is stopped.
func (b *bench) load(at *site, conns int, requests ...string) (stop func() sample) {
	b.Helper()
	services, file := "", filepath.Join(b.TempDir(), "requests")
	for _, a := range at.apps {
		services += a.Host() + " "
	}
	harness.Must(b, os.WriteFile(file, []byte(strings.Join(requests, "\n")+"\n"), 0o600))
	const forever, patience = "600", "10" // seconds
	cmd := exec.Command("wrk", "-t", fmt.Sprint(len(at.apps)), "-c", fmt.Sprint(conns), "-d", forever,
		"--timeout", patience, "-s", "wrk.lua", at.apps[0].URL, "--", file)
	cmd.Env = append(os.Environ(), "SERVICES="+services)
	var out bytes.Buffer
	cmd.Stdout = &out
	cmd.Stderr = &out
	before := cpuTimes(b, at.apps...)
	harness.Must(b, cmd.Start())
	b.Cleanup(func() { _ = cmd.Process.Kill() }) // unless it has ended
	return func() sample {
		b.Helper()
		_ = cmd.Process.Signal(os.Interrupt)
		_ = cmd.Wait() // the output tells more
		var n, micros, p50, p99, refused, failed float64
		_, result, _ := strings.Cut(out.String(), "RESULT ")
		_, err := fmt.Sscan(result, &n, &micros, &p50, &p99, &refused, &failed)
		if err != nil || failed > 0 || n == refused {
			b.Fatalf("%v, %s: %v; %v requests failed: %s", cmd, requests[0], err, failed, &out)
		}
		return sample{
			rate:    (n - refused) / micros * 1e6,
			refused: refused / n,
			p50:     p50 / 1000,
			p99:     p99 / 1000,
			used:    cpuTimes(b, at.apps...).perRequest(before, micros, n),
		}
	}
}

// direct runs f in a loop on as many goroutines as wrk has connections. n is different in each call, from 1
// on.
func (b *bench) direct(seconds int, f func(n int)) sample {
	b.Helper()
	own := make([][]float64, conns) // milliseconds, of each goroutine
	before, start := cpuTimes(b), time.Now()
	harness.Together(conns, func(g int) {
		for now := start; now.Before(start.Add(time.Duration(seconds) * time.Second)); {
			f(len(own[g])*conns + g + 1)
			own[g] = append(own[g], time.Since(now).Seconds()*1000)
			now = time.Now()
		}
	})
	took := time.Since(start)
	all := slices.Sorted(slices.Values(slices.Concat(own...)))
	n := len(all)
	if n == 0 {
		b.FailNow() // f has failed, which ends only its goroutine
	}
	used := cpuTimes(b).perRequest(before, float64(took.Microseconds()), float64(n))
	return sample{rate: float64(n) / took.Seconds(), p50: all[n/2], p99: all[n*99/100], used: used}
}

// work is how long the client, the service and each of the servers have computed, and then how long the cores
// did nothing, or something else; in microseconds.
type work [7]float64

// servers are the programs of the servers, with their places in work.
var servers = map[string]int{"postgres": 2, "redis-server": 3, "nats-server": 4, "clickhouse-serv": 5}

// cpuTimes reads how long the servers have computed by now, the services that are asked, and the client: this
// process, or its children.
func cpuTimes(t testing.TB, asked ...*harness.App) (now work) {
	t.Helper()
	users := maps.Clone(servers) // by the program or by the process
	users[strconv.Itoa(os.Getpid())] = 0
	for _, a := range asked {
		users[strconv.Itoa(a.Process.Pid)] = 1
	}
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	harness.Must(t, err)
	for _, file := range files {
		stat, err := os.ReadFile(file)
		if err != nil {
			continue // it has just ended
		}
		pid, rest, _ := strings.Cut(string(stat), " (")
		name, rest, _ := strings.Cut(rest, ") ")
		for _, key := range []string{pid, name} {
			if user, ok := users[key]; ok {
				// Of the process, and of its children that have ended: as user and as system.
				for _, field := range strings.Fields(rest)[11:15] {
					ticks, _ := strconv.ParseFloat(field, 64) // the kernel writes numbers
					now[user] += ticks * 1e6 / 100
				}
			}
		}
	}
	return now
}

// perRequest is what was used since before.
func (u work) perRequest(before work, micros, requests float64) work {
	others := len(u) - 1
	u[others] = micros * float64(runtime.NumCPU())
	for i := range others {
		u[i] -= before[i]
		u[others] -= u[i]
	}
	for i := range u {
		u[i] /= requests
	}
	return u
}
