package bench

import (
	"bufio"
	"bytes"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/lib/pq"

	"goods/test/harness"
)

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
func (b *bench) ask(at target, seconds int, requests ...string) sample {
	b.Helper()
	return b.wrk([]target{at}, conns, seconds, requests...)
}

// wrk sends requests, each a method, a path and maybe a body, in a loop over so
// many connections, which it shares out over processes, with a wrk for each.
func (b *bench) wrk(at []target, conns, seconds int, requests ...string) (s sample) {
	b.Helper()
	dir := b.TempDir()
	harness.Must(b, os.WriteFile(dir+"/wrk.lua", []byte(wrkScript), 0o600))
	harness.Must(b, os.WriteFile(dir+"/requests", []byte(strings.Join(requests, "\n")+"\n"), 0o600))
	cmds, outs := make([]*exec.Cmd, len(at)), make([]bytes.Buffer, len(at))
	before := cpuTimes(b, at...)
	for i, a := range at {
		cmds[i] = exec.Command("wrk", "-t1", fmt.Sprint("-c", (conns+i)/len(at)), fmt.Sprint("-d", seconds), "-s", dir+"/wrk.lua", a.url, "--", dir+"/requests")
		cmds[i].Stdout = &outs[i]
		harness.Must(b, cmds[i].Start())
	}
	var count, longest float64
	for i, cmd := range cmds {
		_ = cmd.Wait() // what it prints tells more
		var n, micros, p50, p99, failed float64
		_, result, _ := strings.Cut(outs[i].String(), "RESULT ")
		if _, err := fmt.Sscan(result, &n, &micros, &p50, &p99, &failed); err != nil || failed > 0 || n == 0 {
			b.Fatalf("wrk %s %s: %v; %v requests failed: %s", at[i].url, requests[0], err, failed, outs[i].String())
		}
		s.rate, s.p50, s.p99 = s.rate+n/micros*1e6, max(s.p50, p50/1000), max(s.p99, p99/1000)
		count, longest = count+n, max(longest, micros)
	}
	s.used = cpuTimes(b, at...).perRequest(before, longest, count)
	return s
}

// direct runs f in a loop on as many goroutines as wrk has connections. n is
// different in each call, from 1 on.
func (b *bench) direct(seconds int, f func(n int) error) sample {
	b.Helper()
	own := make([][]float64, conns) // milliseconds, of each goroutine
	failed := make([]error, conns)
	before, start := cpuTimes(b), time.Now()
	harness.Together(conns, func(g int) {
		for now := start; failed[g] == nil && now.Before(start.Add(time.Duration(seconds)*time.Second)); {
			failed[g] = f(len(own[g])*conns + g + 1)
			own[g] = append(own[g], time.Since(now).Seconds()*1000)
			now = time.Now()
		}
	})
	harness.Must(b, errors.Join(failed...))
	took := time.Since(start)
	all := slices.Sorted(slices.Values(slices.Concat(own...)))
	n := len(all)
	return sample{float64(n) / took.Seconds(), all[n/2], all[n*99/100], cpuTimes(b).perRequest(before, float64(took.Microseconds()), float64(n))}
}

// work is how long each of usersOfCPU has computed, and then how long the
// cores did nothing, or something else; in microseconds.
type work [7]float64

var usersOfCPU = [...]string{"client", "service", "postgres", "redis-server", "nats-server", "clickhouse-serv"}

// cpuTimes reads how long the servers have computed by now, the processes that
// are asked, and the client: this process, or its children.
func cpuTimes(t testing.TB, asked ...target) (now work) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	harness.Must(t, err)
	for _, file := range files {
		stat, err := os.ReadFile(file)
		if err != nil {
			continue // it has just ended
		}
		pid, rest, _ := strings.Cut(string(stat), " (")
		name, rest, _ := strings.Cut(rest, ") ")
		user := slices.Index(usersOfCPU[2:], name) + 2
		if slices.ContainsFunc(asked, func(a target) bool { return strconv.Itoa(a.pid) == pid }) {
			user = 1
		} else if pid == strconv.Itoa(os.Getpid()) {
			user = 0
		} else if user == 1 {
			continue
		}
		// Of the process, and of its children that have ended: as user and as system.
		for _, field := range strings.Fields(rest)[11:15] {
			ticks, err := strconv.ParseFloat(field, 64)
			harness.Must(t, err)
			now[user] += ticks * 1e6 / 100
		}
	}
	return now
}

// perRequest is what was used since before.
func (u work) perRequest(before work, micros, requests float64) work {
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

// referenceVariable makes the test binary serve what the service is compared
// with, in a process of its own.
const referenceVariable = "GOODS_BENCH_REFERENCE"

// reference is a bare net/http handler that writes the same bytes as the
// service and, where it has a database, first sends the service's own
// statements. It checks nothing, batches nothing and caches nothing.
type reference struct {
	Body                       []byte // of the reply to a list
	Postgres                   string
	List, Lock, Create, Update string // the service's statements
}

// serve runs a reference until the test ends.
func (b *bench) serve(r reference) target {
	b.Helper()
	reply, err := harness.Client.Get(b.site(goods).app.url + "/goods/list")
	harness.Must(b, err)
	defer reply.Body.Close()
	r.Body, err = io.ReadAll(reply.Body)
	harness.Must(b, err)
	config, err := json.Marshal(r)
	harness.Must(b, err)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env, cmd.Stderr = []string{referenceVariable + "=" + string(config)}, os.Stderr
	out, err := cmd.StdoutPipe()
	harness.Must(b, err)
	harness.Must(b, cmd.Start())
	b.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	address, err := bufio.NewReader(out).ReadString('\n')
	harness.Must(b, err)
	return target{"http://" + strings.TrimSpace(address), cmd.Process.Pid}
}

// must ends a reference; its stderr tells why the bench then fails.
func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func serveReference(config string) {
	var ref reference
	must(json.Unmarshal([]byte(config), &ref))
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(err)
	fmt.Println(listener.Addr())
	list := func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(ref.Body)
	}
	if ref.Postgres == "" {
		must(http.Serve(listener, http.HandlerFunc(list)))
	}
	db, err := sql.Open("postgres", ref.Postgres)
	must(err)
	prepare := func(query string) *sql.Stmt {
		stmt, err := db.Prepare(query)
		must(err)
		return stmt
	}
	versions, insert, edit := prepare(ref.List), prepare(ref.Create), prepare(ref.Update)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /goods/list", func(w http.ResponseWriter, r *http.Request) {
		var total, removed int64
		var keys []byte
		must(versions.QueryRow(pq.Int32Array{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}).Scan(&total, &removed, &keys))
		list(w, r)
	})
	// write answers with the good that a statement in a transaction returns
	// after these columns. Its parameter is the request with the fields of each.
	write := func(w http.ResponseWriter, r *http.Request, each string, lock string, change *sql.Stmt, columns ...any) {
		var body struct{ Name string }
		must(json.NewDecoder(r.Body).Decode(&body))
		name, err := json.Marshal(body.Name)
		must(err)
		tx, err := db.Begin()
		must(err)
		if lock != "" {
			_, err = tx.Exec(lock)
			must(err)
		}
		var g harness.Good
		row := tx.Stmt(change).QueryRow(fmt.Sprintf(`[{"project_id":1,"name":%s,%s}]`, name, each))
		must(row.Scan(append(columns, &g.ID, &g.ProjectID, &g.Name, &g.Description, &g.Priority, &g.Removed, &g.CreatedAt, new(int))...))
		must(tx.Commit())
		w.Header().Set("Content-Type", "application/json")
		must(json.NewEncoder(w).Encode(g))
	}
	mux.HandleFunc("POST /goods/create", func(w http.ResponseWriter, r *http.Request) {
		write(w, r, `"description":""`, ref.Lock, insert, new(int), new(bool))
	})
	mux.HandleFunc("PATCH /goods/update", func(w http.ResponseWriter, r *http.Request) {
		write(w, r, `"description":null,"removed":false,"id":`+r.FormValue("id"), "", edit)
	})
	must(http.Serve(listener, mux))
}
