package bench

import (
	"database/sql"
	"fmt"
	"io"
	"log"
	"maps"
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

// sample is one measurement.
type sample struct {
	rate     float64 // requests a second
	p50, p99 float64 // milliseconds
	used     work
	ratio    float64 // of what a row compares
}

// ask sends requests, each a method, a path and maybe a body, in a loop over so many connections, which it shares out
// over the services of a site. Then it waits until most events are drained, so that what one measurement wrote does
// not slow the next.
func (b *bench) ask(at *site, conns, seconds int, requests ...string) sample {
	b.Helper()
	services, file := "", filepath.Join(b.TempDir(), "requests")
	for _, a := range at.apps {
		services += strings.TrimPrefix(a.URL, "http://") + " "
	}
	harness.Must(b, os.WriteFile(file, []byte(strings.Join(requests, "\n")+"\n"), 0o600))
	cmd := exec.Command("wrk", fmt.Sprint("-t", len(at.apps)), fmt.Sprint("-c", conns), fmt.Sprint("-d", seconds),
		"-s", "wrk.lua", at.apps[0].URL, "--", file)
	cmd.Env = append(os.Environ(), "SERVICES="+services)
	before := cpuTimes(b, at.apps...)
	out, _ := cmd.CombinedOutput() // tells more than the error
	var n, micros, p50, p99, failed float64
	_, result, _ := strings.Cut(string(out), "RESULT ")
	if _, err := fmt.Sscan(result, &n, &micros, &p50, &p99, &failed); err != nil || failed > 0 || n == 0 {
		b.Fatalf("%v, %s: %v; %v requests failed: %s", cmd, requests[0], err, failed, out)
	}
	used := cpuTimes(b, at.apps...).perRequest(before, micros, n)
	b.drained(at.World, 500)
	return sample{rate: n / micros * 1e6, p50: p50 / 1000, p99: p99 / 1000, used: used}
}

// direct runs f in a loop on as many goroutines as wrk has connections. n is different in each call, from 1 on.
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

// work is how long the client, the service and each of the servers have computed, and then how long the cores did
// nothing, or something else; in microseconds.
type work [7]float64

// servers are the programs of the servers, with their places in work.
var servers = map[string]int{"postgres": 2, "redis-server": 3, "nats-server": 4, "clickhouse-serv": 5}

// cpuTimes reads how long the servers have computed by now, the services that are asked, and the client: this process,
// or its children.
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

// referenceVariable makes the test binary serve what the service is compared with.
const referenceVariable = "GOODS_BENCH_REFERENCE"

// reference starts what the service is compared with, in a process of its own: a bare net/http handler that answers
// all with the bytes of the service's list and, except at /bare, first sends the service's own statements. It checks
// nothing, batches nothing and caches nothing.
func (b *bench) reference() *site {
	b.Helper()
	s := b.site(goods)
	page := s.apps[0].Call(b, "GET", "/goods/list", "").Body
	w := &harness.World{Env: s.Env, Program: "/proc/self/exe", Unchecked: true}
	// What the service sets for its own sessions, too: plans depend on it.
	const options = "PGOPTIONS=-c enable_seqscan=off -c jit=off -c plan_cache_mode=force_generic_plan"
	return &site{s.World, []*harness.App{w.Start(b, referenceVariable+"="+page, options)}}
}

// must ends a reference; its log tells why the bench then fails.
func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func serveReference(page []byte) {
	db, err := sql.Open("postgres", os.Getenv("POSTGRES_URL"))
	must(err)
	prepare := func(name string) *sql.Stmt {
		query, err := os.ReadFile("../../sql/queries/" + name + ".sql")
		must(err)
		stmt, err := db.Prepare(string(query))
		must(err)
		return stmt
	}
	versions, create, edit := prepare("versions"), prepare("create"), prepare("edit")
	// write runs a statement in a transaction. Its parameter is the request, with more fields.
	write := func(r *http.Request, change *sql.Stmt, fields string) {
		body, err := io.ReadAll(r.Body)
		must(err)
		tx, err := db.Begin()
		must(err)
		_, err = tx.Stmt(change).Exec(fmt.Sprintf(`[{"project_id":1,%s,%s]`, fields, body[1:]))
		must(err)
		must(tx.Commit())
	}
	handle := func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/goods/list":
			var keys []byte
			must(versions.QueryRow(pq.Int64Array{1}, pq.Int64Array{10}).Scan(new(int), new(int), &keys))
		case "/goods/create":
			write(r, create, `"description":""`)
		case "/goods/update":
			write(r, edit, `"description":null,"removed":false,"id":`+r.FormValue("id"))
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(page)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(err)
	fmt.Printf("{\"msg\":\"listening\",\"addr\":%q}\n", listener.Addr()) // as the service does
	must(http.Serve(listener, http.HandlerFunc(handle)))
}
