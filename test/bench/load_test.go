package bench

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"goods/test/harness"
)

// request is what wrk sends: a method, a path and, maybe, a body.
type request struct{ method, path, body string }

func pageAt(offset int) request {
	return request{"GET", fmt.Sprintf("/goods/list?limit=10&offset=%d", offset), ""}
}

func updateOf(id int) request {
	return request{"PATCH", fmt.Sprintf("/goods/update?id=%d&projectId=1", id), `{"name":"updated good"}`}
}

func moveOf(id, place int) request {
	return request{"PATCH", fmt.Sprintf("/goods/reprioritize?id=%d&projectId=1", id), fmt.Sprintf(`{"newPriority":%d}`, place)}
}

var create = request{"POST", "/goods/create?projectId=1", `{"name":"created good"}`}

func several(n int, f func(i int) request) []request {
	all := make([]request, n)
	for i := range all {
		all[i] = f(i)
	}
	return all
}

// Requests are prepared before the load begins; a single one costs wrk no Lua.
const wrkScript = `
local requests, next = {}, 0
function init(args)
	for line in io.lines(args[1]) do
		local method, path, body = line:match("^(%S+) (%S+) ?(.*)$")
		requests[#requests + 1] = { method, path, body ~= "" and body or nil }
	end
	if #requests == 1 then
		wrk.method, wrk.path, wrk.body = unpack(requests[1], 1, 3)
		return
	end
	for i, r in ipairs(requests) do requests[i] = wrk.format(r[1], r[2], nil, r[3]) end
	function request()
		next = next % #requests + 1
		return requests[next]
	end
end
function done(summary, latency)
	local e = summary.errors
	io.write(string.format("RESULT %d %d %d %d %d\n", summary.requests, summary.duration,
		latency:percentile(50), latency:percentile(99), e.connect + e.read + e.write + e.status + e.timeout))
end`

// target is a process that answers.
type target struct {
	url string
	pid int
}

// sample is one measurement.
type sample struct {
	rate     float64 // requests a second
	p50, p99 float64 // milliseconds
	used     work
}

// ask loads one process with the usual number of connections.
func (b *bench) ask(at target, seconds int, requests ...request) sample {
	b.Helper()
	return b.wrk([]target{at}, conns, seconds, requests...)
}

// wrk sends requests in a loop over so many connections, which it shares out
// over processes, with a wrk for each.
func (b *bench) wrk(at []target, conns, seconds int, requests ...request) (s sample) {
	b.Helper()
	script, list := filepath.Join(b.dir, "wrk.lua"), filepath.Join(b.dir, "requests")
	var lines bytes.Buffer
	for _, r := range requests {
		fmt.Fprintln(&lines, r.method, r.path, r.body)
	}
	harness.Must(b, errors.Join(os.WriteFile(script, []byte(wrkScript), 0o600), os.WriteFile(list, lines.Bytes(), 0o600)))
	var pids []int
	for _, a := range at {
		pids = append(pids, a.pid)
	}
	before := cpuTimes(b, pids...)
	var mu sync.Mutex // guards what follows
	var count, longest float64
	var client time.Duration
	harness.Together(len(at), func(i int) {
		cmd := exec.Command("wrk", "-t1", fmt.Sprint("-c", (conns+i)/len(at)), fmt.Sprint("-d", seconds), "-s", script, at[i].url, "--", list)
		out, err := cmd.CombinedOutput()
		mu.Lock()
		defer mu.Unlock()
		var n, micros, p50, p99, failed float64
		_, result, _ := strings.Cut(string(out), "RESULT ")
		if _, bad := fmt.Sscan(result, &n, &micros, &p50, &p99, &failed); bad != nil || failed > 0 || n == 0 {
			b.Errorf("wrk %s %v: %v; %v requests failed: %s", at[i].url, requests[0], err, failed, out)
			return
		}
		s.rate, s.p50, s.p99 = s.rate+n/micros*1e6, max(s.p50, p50/1000), max(s.p99, p99/1000)
		count, longest = count+n, max(longest, micros)
		client += cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	})
	if b.Failed() {
		b.FailNow()
	}
	s.used = cpuTimes(b, pids...).perRequest(before, client, longest, count)
	return s
}

// direct runs f in a loop on as many goroutines as wrk has connections. n is
// different in each call, from 1 on.
func (b *bench) direct(seconds int, f func(n int) error) sample {
	b.Helper()
	own := make([][]float64, conns) // microseconds, of each goroutine
	failed := make([]error, conns)
	before, start := cpuTimes(b, os.Getpid()), time.Now()
	harness.Together(conns, func(g int) {
		for now := start; failed[g] == nil && now.Before(start.Add(time.Duration(seconds)*time.Second)); {
			failed[g] = f(len(own[g])*conns + g + 1)
			own[g] = append(own[g], float64(time.Since(now).Microseconds()))
			now = time.Now()
		}
	})
	harness.Must(b, errors.Join(failed...))
	micros, after := float64(time.Since(start).Microseconds()), cpuTimes(b, os.Getpid())
	client := time.Duration(after[1]-before[1]) * time.Microsecond
	after[1] = before[1] // nobody is in between
	all := slices.Concat(own...)
	slices.Sort(all)
	count := float64(len(all))
	return sample{count / micros * 1e6, all[len(all)/2] / 1000, all[len(all)*99/100] / 1000, after.perRequest(before, client, micros, count)}
}

// work is how long each of usersOfCPU has computed, and then how long the
// cores did nothing, or something else; in microseconds.
type work [7]float64

var usersOfCPU = [...]string{"client", "asked", "postgres", "redis-server", "nats-server", "clickhouse-serv"}

// cpuTimes reads how long the servers have computed by now, and the processes
// that are asked.
func cpuTimes(t testing.TB, asked ...int) (now work) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	harness.Must(t, err)
	for _, file := range files {
		stat, err := os.ReadFile(file)
		if err != nil {
			continue // it has just ended
		}
		open, end := bytes.IndexByte(stat, '('), bytes.LastIndexByte(stat, ')')
		user := slices.Index(usersOfCPU[:], string(stat[open+1:end]))
		if pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(file))); slices.Contains(asked, pid) {
			user = 1
		}
		if user < 0 {
			continue
		}
		// Of the process, and of its children that have ended: as user and as system.
		for _, field := range strings.Fields(string(stat[end+1:]))[11:15] {
			ticks, err := strconv.Atoi(field)
			harness.Must(t, err)
			now[user] += float64(ticks) * 1e6 / 100
		}
	}
	return now
}

// perRequest is what was used since before, and by the client.
func (u work) perRequest(before work, client time.Duration, micros, requests float64) work {
	u[0] = float64(client.Microseconds())
	u[len(usersOfCPU)] = micros * float64(runtime.NumCPU())
	for i := range usersOfCPU {
		u[i] -= before[i]
		u[len(usersOfCPU)] -= u[i]
	}
	for i := range u {
		u[i] /= requests
	}
	return u
}
