//go:build bench

package main

import (
	"bufio"
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

const (
	benchConns  = 64
	benchRounds = 3
	// Events are drained by the hundred where writes are measured, so that the
	// drain of one row is done before the next.
	benchEvents = "EVENTS_BATCH=500"
	benchBare   = "GOODS_BENCH_BARE"
)

// The test binary is also the reference for lists: a bare handler that writes
// the same bytes, in a process of its own.
func init() {
	path := os.Getenv(benchBare)
	if path == "" {
		return
	}
	body, err := os.ReadFile(path)
	if err != nil {
		panic(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	fmt.Println(listener.Addr())
	panic(http.Serve(listener, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(body)
	})))
}

// sample is one measurement.
type sample struct {
	rate     float64 // requests a second
	p50, p99 float64 // milliseconds
	used     work
}

// work is how long each of usersOfCPU has computed, and then how long the
// cores did nothing, or something else; in microseconds a request.
type work [7]float64

var usersOfCPU = [...]string{"client", "asked", "postgres", "redis-server", "nats-server", "clickhouse-serv"}

// cpuTimes reads how long the servers have computed by now, and the process
// that is asked.
func cpuTimes(t testing.TB, asked int) (now work) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	must(t, err)
	for _, file := range files {
		stat, err := os.ReadFile(file)
		if err != nil {
			continue // it has just ended
		}
		open, end := bytes.IndexByte(stat, '('), bytes.LastIndexByte(stat, ')')
		user := slices.Index(usersOfCPU[:], string(stat[open+1:end]))
		if filepath.Base(filepath.Dir(file)) == strconv.Itoa(asked) {
			user = 1
		}
		if user < 0 {
			continue
		}
		// Of the process, and of its children that have ended: as user and as system.
		for _, field := range strings.Fields(string(stat[end+1:]))[11:15] {
			ticks, err := strconv.Atoi(field)
			must(t, err)
			now[user] += float64(ticks) * 1e6 / 100
		}
	}
	return now
}

// perRequest is what was used since before, and by the client.
func (u work) perRequest(before work, client, took time.Duration, requests float64) work {
	idle := took.Seconds() * 1e6 * float64(runtime.NumCPU())
	for i := range u {
		u[i] -= before[i]
	}
	u[0] = client.Seconds() * 1e6
	for i := range usersOfCPU {
		idle -= u[i]
	}
	u[len(usersOfCPU)] = idle
	for i := range u {
		u[i] /= requests
	}
	return u
}

// row is one line of the table: the service and its reference, by round.
type row struct {
	what, reference string
	got, ref        []sample
	compare         func(got, ref sample) float64
	limit           float64
	atMost          bool   // the limit is an upper one
	text            string // the line of a row that has a value, but no reference
	value           float64
}

func rates(got, ref sample) float64   { return got.rate / ref.rate }
func medians(got, ref sample) float64 { return got.p50 / ref.p50 }

// median of f over the rounds.
func median[T any](rounds []T, f func(T) float64) float64 {
	var values []float64
	for _, r := range rounds {
		values = append(values, f(r))
	}
	slices.Sort(values)
	return values[len(values)/2]
}

func (r *row) ratio() float64 {
	if r.text != "" {
		return r.value
	}
	rounds := make([]int, len(r.got))
	for i := range rounds {
		rounds[i] = i
	}
	return median(rounds, func(i int) float64 { return r.compare(r.got[i], r.ref[i]) })
}

func describe(rounds []sample) string {
	f := func(pick func(sample) float64) float64 { return median(rounds, pick) }
	return fmt.Sprintf("%.0f/s, %.2f, %.2f", f(func(s sample) float64 { return s.rate }),
		f(func(s sample) float64 { return s.p50 }), f(func(s sample) float64 { return s.p99 }))
}

type bench struct {
	*testing.T
	rows []*row
	cpu  []string
	apps []*app // their memory is looked at in the end
}

func (b *bench) row(what, reference string, limit float64) *row {
	r := &row{what: what, reference: reference, compare: rates, limit: limit}
	b.rows = append(b.rows, r)
	return r
}

// told adds a line that has no reference.
func (b *bench) told(what, text string, value, most float64) {
	b.rows = append(b.rows, &row{what: what, text: text, value: value, limit: most, atMost: true})
}

// request is what wrk sends: a method, a path and, maybe, a body.
type request struct{ method, path, body string }

func get(path string) request { return request{"GET", path, ""} }

func pageAt(offset int) request { return get(fmt.Sprintf("/goods/list?limit=10&offset=%d", offset)) }

// Requests are prepared before the load begins; a single one costs wrk no Lua.
const wrkScript = `
local requests, next = {}, 0
function init(args)
	for line in io.lines(args[1]) do
		local method, path, body = line:match("^(%S+) (%S+) ?(.*)$")
		if body == "" then body = nil end
		requests[#requests + 1] = { method, path, body }
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

// wrk asks url in a loop, by turns for each of the requests.
func (b *bench) wrk(url string, process, conns, seconds int, requests ...request) sample {
	b.Helper()
	dir := b.TempDir()
	script, list := filepath.Join(dir, "wrk.lua"), filepath.Join(dir, "requests")
	must(b, os.WriteFile(script, []byte(wrkScript), 0o600))
	var lines bytes.Buffer
	for _, r := range requests {
		fmt.Fprintln(&lines, r.method, r.path, r.body)
	}
	must(b, os.WriteFile(list, lines.Bytes(), 0o600))
	cmd := exec.Command("wrk", "-t1", "-c"+strconv.Itoa(conns), "-d"+strconv.Itoa(seconds), "-s", script, url, "--", list)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	before := cpuTimes(b, process)
	if err := cmd.Run(); err != nil {
		b.Fatalf("%v: %s", err, out.String())
	}
	after := cpuTimes(b, process)
	var count, micros, p50, p99, errs float64
	_, result, _ := strings.Cut(out.String(), "RESULT ")
	if _, err := fmt.Sscan(result, &count, &micros, &p50, &p99, &errs); err != nil || errs > 0 || count == 0 {
		b.Fatalf("wrk %s %v: %v %s", url, requests[0], err, out.String())
	}
	took := time.Duration(micros) * time.Microsecond
	client := cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	return sample{count / took.Seconds(), p50 / 1000, p99 / 1000, after.perRequest(before, client, took, count)}
}

func (b *bench) ask(a *app, seconds int, requests ...request) sample {
	b.Helper()
	return b.wrk(a.url, a.process.Pid, benchConns, seconds, requests...)
}

// memory is what a process holds, in MB.
func memory(t testing.TB, pid int) float64 {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	must(t, err)
	_, rest, _ := strings.Cut(string(status), "VmRSS:")
	kb, err := strconv.Atoi(strings.Fields(rest)[0])
	must(t, err)
	return float64(kb) / 1024
}

// bare starts the reference for lists, which writes body.
func (b *bench) bare(body string) *app {
	b.Helper()
	path := filepath.Join(b.TempDir(), "body")
	must(b, os.WriteFile(path, []byte(body), 0o600))
	self, err := os.Executable()
	must(b, err)
	cmd := exec.Command(self)
	cmd.Env = []string{benchBare + "=" + path}
	out, err := cmd.StdoutPipe()
	must(b, err)
	must(b, cmd.Start())
	b.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	address, err := bufio.NewReader(out).ReadString('\n')
	must(b, err)
	return &app{url: "http://" + strings.TrimSpace(address), process: cmd.Process}
}

// stocked starts the service in a world with n goods.
func (b *bench) stocked(n int) (*world, *app) {
	b.Helper()
	w := newWorld(b)
	a := w.exec(b, "LOG_LEVEL=info", benchEvents)
	b.apps = append(b.apps, a)
	// Without triggers, so that a million are no million events; by hand what they keep.
	must(b, errorOf(w.db.Exec(fmt.Sprintf(`
BEGIN;
SET LOCAL session_replication_role = replica;
INSERT INTO goods (id, project_id, name, description, priority) OVERRIDING SYSTEM VALUE
SELECT n, 1, 'good ' || n, 'the description of good ' || n, n FROM generate_series(1, %d) AS n;
SELECT setval(pg_get_serial_sequence('goods', 'id'), %[1]d);
UPDATE meta SET total = %[1]d;
COMMIT`, n))))
	must(b, errorOf(w.db.Exec(`VACUUM ANALYZE goods`)))
	must(b, errorOf(w.db.Exec(`CHECKPOINT`)))
	return w, a
}

// drained waits until the log holds every event, so that what one measurement
// wrote does not slow the next.
func (b *bench) drained(w *world) {
	b.Helper()
	eventually(b, time.Minute, func() error {
		if n := one[int](b, w, `SELECT count(*) FROM outbox`); n > 0 {
			return fmt.Errorf("%d events in the outbox", n)
		}
		return nil
	})
}

// copied is a database like that of w, with nothing but its triggers at work:
// the reference for writes.
func (b *bench) copied(w *world) *sql.DB {
	b.Helper()
	name := strings.ReplaceAll(w.namespace, "-", "_")
	admin, err := sql.Open("postgres", os.Getenv("POSTGRES_URL"))
	must(b, err)
	var sources int
	must(b, admin.QueryRow(`SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = $1`, name).Scan(&sources))
	must(b, errorOf(admin.Exec("CREATE DATABASE "+name+"_copy TEMPLATE "+name+" STRATEGY file_copy")))
	db, err := sql.Open("postgres", withPath(b, w.env["POSTGRES_URL"], name+"_copy"))
	must(b, err)
	db.SetMaxOpenConns(benchConns)
	db.SetMaxIdleConns(benchConns)
	b.Cleanup(func() {
		db.Close()
		_, _ = admin.Exec("DROP DATABASE " + name + "_copy WITH (FORCE)")
		admin.Close()
	})
	return db
}

// direct runs f in a loop on benchConns connections to Postgres.
func (b *bench) direct(seconds int, f func(n int) error) sample {
	b.Helper()
	var next atomic.Int64
	var mu sync.Mutex
	var all []time.Duration
	var failed error
	self := os.Getpid()
	before, start := cpuTimes(b, self), time.Now()
	end := start.Add(time.Duration(seconds) * time.Second)
	together(benchConns, func(int) {
		var own []time.Duration
		var err error
		for begin := time.Now(); err == nil && begin.Before(end); {
			err = f(int(next.Add(1)))
			now := time.Now()
			own, begin = append(own, now.Sub(begin)), now
		}
		mu.Lock()
		all, failed = append(all, own...), errors.Join(failed, err)
		mu.Unlock()
	})
	must(b, failed)
	took := time.Since(start)
	after := cpuTimes(b, self)
	client := time.Duration(after[1]-before[1]) * time.Microsecond
	after[1] = before[1] // nobody is in between
	count := float64(len(all))
	slices.Sort(all)
	at := func(share float64) float64 { return all[int(share*float64(len(all)-1))].Seconds() * 1000 }
	return sample{count / took.Seconds(), at(.5), at(.99), after.perRequest(before, client, took, count)}
}

// TestBench measures the service as its clients meet it: over HTTP, with wrk,
// against the real servers. References are measured in the same run, by turns.
func TestBench(t *testing.T) {
	b := &bench{T: t}
	start := time.Now()
	parts := []struct {
		name string
		f    func()
	}{{"lists", b.lists}, {"large", b.large}, {"writes", b.writes}, {"alone", b.alone}, {"events", b.events}, {"memory", b.memory}}
	only := os.Getenv("BENCH")
	for _, part := range parts {
		if only == "" || strings.Contains(only, part.name) {
			part.f()
		}
	}
	if strings.Contains(only, "sustained") { // takes its time: only when asked for
		b.sustained()
	}
	b.print(time.Since(start))
}

func (b *bench) round(f func(round int)) {
	for round := range benchRounds {
		f(round)
	}
}

func (b *bench) print(took time.Duration) {
	cpu := "unknown"
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		_, rest, _ := strings.Cut(string(info), "model name\t: ")
		cpu, _, _ = strings.Cut(rest, "\n")
	}
	fmt.Printf("\n%s; %d cores, %s; %s; in %.0f s\n\n", time.Now().UTC().Format(time.DateOnly), runtime.NumCPU(), cpu, runtime.Version(), took.Seconds())
	fmt.Println("| what | service: rate, p50, p99 ms | reference | its rate, p50, p99 ms | ratio | wanted | |")
	fmt.Println("|---|---|---|---|---|---|---|")
	for _, r := range b.rows {
		got, ref, ratio := r.text, "", ""
		if r.text == "" {
			got, ref, ratio = describe(r.got), describe(r.ref), fmt.Sprintf("%.2f", r.ratio())
		}
		wanted, verdict := "told", ""
		if r.limit > 0 {
			wanted, verdict = fmt.Sprintf("≥ %g", r.limit), "pass"
			missed := r.ratio() < r.limit
			if r.atMost {
				wanted, missed = fmt.Sprintf("≤ %g", r.limit), r.ratio() > r.limit
			}
			if missed {
				verdict = "**miss**"
				b.Errorf("%s: got %.2f, want %s", r.what, r.ratio(), wanted)
			}
		}
		fmt.Printf("| %s | %s | %s | %s | %s | %s | %s |\n", r.what, got, r.reference, ref, ratio, wanted, verdict)
	}
	if len(b.cpu) == 0 {
		return
	}
	fmt.Printf("\nThe load comes from wrk on the same machine. Where its %d cores spend their time, in µs a request:\n\n", runtime.NumCPU())
	fmt.Println("| | client | service | Postgres | Redis | NATS | ClickHouse | idle, others | in all |")
	fmt.Println("|---|---|---|---|---|---|---|---|---|")
	for _, line := range b.cpu {
		fmt.Println(line)
	}
}

// profile adds a line on who computes how long.
func (b *bench) profile(what string, rounds []sample) {
	line, all := "| "+what, 0.0
	for i := range len(work{}) {
		used := median(rounds, func(s sample) float64 { return s.used[i] })
		line, all = fmt.Sprintf("%s | %.0f", line, used), all+used
	}
	b.cpu = append(b.cpu, fmt.Sprintf("%s | %.0f |", line, all))
}

func (b *bench) lists() {
	const goods = 100_000
	w, a := b.stocked(goods)
	hot := pageAt(1)
	bare := b.bare(a.call(b, hot.method, hot.path, "").body)
	var random, mixed []request
	for range 10_000 {
		random = append(random, pageAt(1+rand.IntN(goods-10)))
	}
	for i := range 1000 {
		if i%10 == 9 {
			mixed = append(mixed, updateOf(1+rand.IntN(goods)))
		} else {
			mixed = append(mixed, hot)
		}
	}
	rowHot := b.row("list, one hot page of 10, 100,000 goods", "a bare net/http handler that writes the same bytes", 0.65)
	rowRandom := b.row("list, random pages of 10, cache warm", "the same", 0.4)
	rowMixed := b.row("90 % hot list and 10 % updates", "the hot list alone", 0.6)
	b.ask(bare, 1, hot)
	b.ask(a, 1, hot)
	b.round(func(int) {
		for offset := 1; offset <= goods; offset += maxLimit { // whatever has left the cache meanwhile
			a.list(b, maxLimit, offset)
		}
		ref := b.ask(bare, 2, hot)
		got := b.ask(a, 2, hot)
		rowHot.ref, rowRandom.ref, rowMixed.ref = append(rowHot.ref, ref), append(rowRandom.ref, ref), append(rowMixed.ref, got)
		rowHot.got = append(rowHot.got, got)
		rowRandom.got = append(rowRandom.got, b.ask(a, 2, random...))
		rowMixed.got = append(rowMixed.got, b.ask(a, 2, mixed...))
		b.drained(w)
	})
	b.profile("bare handler", rowHot.ref)
	b.profile("hot list", rowHot.got)
	b.profile("random lists", rowRandom.got)
	b.profile("hot list and updates", rowMixed.got)
}

func updateOf(id int) request {
	return request{"PATCH", fmt.Sprintf("/goods/update?id=%d&projectId=1", id), `{"name":"updated good"}`}
}

// large compares a million goods with a thousand, and their end with their begin.
func (b *bench) large() {
	w, a := b.stocked(1_000_000)
	small, few := b.stocked(1000)
	warm := b.row("list, 10 at 900,000 of 1,000,000, warm", "the page at position 1", 0.8)
	cold := b.row("list, 10 at 900,000 of 1,000,000, cold", "the same, at position 1", 0.8)
	size := b.row("list hot, 1,000,000 goods", "list hot, 1,000 goods", 0.9)
	move := b.row("reprioritize by 1 place in 1,000,000 goods, p50", "the same in 1,000 goods", 1.5)
	move.compare, move.atMost = medians, true
	// Pages side by side, each asked for once while nothing of them is cached.
	pages := func(first int) []request {
		var all []request
		for offset := first; offset < first+90_000; offset += 10 {
			all = append(all, pageAt(offset))
		}
		return all
	}
	coldly := func(first int) sample {
		must(b, errorOf(w.db.Exec(raiseEpoch)))
		a.call(b, "GET", "/goods/list?limit=1&offset=500000", "") // learns the epoch
		s := b.ask(a, 1, pages(first)...)
		if s.rate > 9000 {
			b.Errorf("%.0f pages a second: not all of them can have been cold", s.rate)
		}
		return s
	}
	swap := []request{
		{"PATCH", "/goods/reprioritize?id=500&projectId=1", `{"newPriority":501}`},
		{"PATCH", "/goods/reprioritize?id=500&projectId=1", `{"newPriority":500}`},
	}
	b.ask(a, 1, pageAt(1), pageAt(900_000))
	b.ask(few, 1, pageAt(1))
	b.round(func(int) {
		first := b.ask(a, 1, pageAt(1))
		warm.ref, size.got = append(warm.ref, first), append(size.got, first)
		warm.got = append(warm.got, b.ask(a, 1, pageAt(900_000)))
		size.ref = append(size.ref, b.ask(few, 1, pageAt(1)))
		cold.ref = append(cold.ref, coldly(1))
		cold.got = append(cold.got, coldly(900_000))
		move.ref = append(move.ref, b.wrk(few.url, few.process.Pid, 1, 1, swap...))
		b.drained(small)
		move.got = append(move.got, b.wrk(a.url, a.process.Pid, 1, 1, swap...))
		b.drained(w)
	})
	b.profile("cold lists", cold.got)
}

// writes compares the service with clients that go straight to Postgres.
func (b *bench) writes() {
	const goods = 100_000
	w, a := b.stocked(goods)
	db := b.copied(w)
	prepare := func(query string) *sql.Stmt {
		stmt, err := db.Prepare(query)
		must(b, err)
		return stmt
	}
	insert := prepare(`INSERT INTO goods (project_id, name, description) VALUES ($1, $2, $3)`)
	lock := prepare(`SELECT id FROM goods WHERE id = $1 AND project_id = 1 AND NOT removed FOR UPDATE`)
	rename := prepare(`UPDATE goods SET name = $2 WHERE id = $1`)
	remove := prepare(`UPDATE goods SET removed = true WHERE id = $1`)
	locked := func(id int, change func(tx *sql.Tx) error) error {
		tx, err := db.Begin()
		if err != nil {
			return err
		}
		defer tx.Rollback()
		if err := tx.Stmt(lock).QueryRow(id).Scan(&id); err != nil {
			return fmt.Errorf("good %d: %w", id, err)
		}
		if err := change(tx); err != nil {
			return err
		}
		return tx.Commit()
	}
	var updates []request
	for range 10_000 {
		updates = append(updates, updateOf(1+rand.IntN(goods)))
	}
	creates := b.row("create", "one INSERT per transaction, same triggers, straight to Postgres", 10)
	edits := b.row("update", "BEGIN; SELECT … FOR UPDATE; UPDATE …; COMMIT, straight to Postgres", 2)
	removes := b.row("remove", "the same, for removed", 2)
	const share = goods / benchRounds // of the goods, for one round of removes
	// Removes come last: the updates need goods that are there.
	b.round(func(int) {
		creates.ref = append(creates.ref, b.direct(2, func(int) error { return errorOf(insert.Exec(1, "created good", "")) }))
		creates.got = append(creates.got, b.ask(a, 2, request{"POST", "/goods/create?projectId=1", `{"name":"created good"}`}))
		b.drained(w)
	})
	b.round(func(int) {
		edits.ref = append(edits.ref, b.direct(2, func(int) error {
			id := 1 + rand.IntN(goods)
			return locked(id, func(tx *sql.Tx) error { return errorOf(tx.Stmt(rename).Exec(id, "updated good")) })
		}))
		edits.got = append(edits.got, b.ask(a, 2, updates...))
		b.drained(w)
	})
	b.round(func(round int) {
		removes.ref = append(removes.ref, b.direct(2, func(n int) error {
			id := round*share + n
			return locked(id, func(tx *sql.Tx) error { return errorOf(tx.Stmt(remove).Exec(id)) })
		}))
		var all []request
		for n := range share {
			all = append(all, request{"DELETE", fmt.Sprintf("/goods/remove?id=%d&projectId=1", round*share+n+1), ""})
		}
		removes.got = append(removes.got, b.ask(a, 2, all...))
		b.drained(w)
	})
	b.profile("creates, straight to Postgres", creates.ref)
	b.profile("creates", creates.got)
	b.profile("updates, straight to Postgres", edits.ref)
	b.profile("updates", edits.got)
	b.profile("removes", removes.got)
}

// alone compares the service with itself without batchers, for one client.
func (b *bench) alone() {
	w, _ := b.stocked(100_000)
	s := newService(b, w.getenv("LOG_LEVEL=info"))
	unbatched := s.routes()
	for i, r := range unbatched {
		switch r.path {
		case "/goods/list":
			unbatched[i].handler = func(w http.ResponseWriter, r *http.Request) error {
				in, err := readInput(w, r)
				if err != nil {
					return err
				}
				q := listRequest{in.numberOr("limit", 10, maxLimit), in.numberOr("offset", 1, maxInt32)}
				return alone(r, s.readPages, q, func(page []byte) error {
					writeBody(w, http.StatusOK, page)
					return nil
				})
			}
		case "/goods/create":
			unbatched[i].handler = func(w http.ResponseWriter, r *http.Request) error {
				in, err := readInput(w, r, "name", "description")
				if err != nil {
					return err
				}
				q := createRequest{projectID: int32(in.number("projectId", maxInt32)), name: in.name()}
				return alone(r, s.insertGoods, q, func(g good) error { return writeJSON(w, http.StatusCreated, g) })
			}
		case "/goods/update":
			unbatched[i].handler = func(w http.ResponseWriter, r *http.Request) error {
				in, err := readInput(w, r, "name", "description")
				if err != nil {
					return err
				}
				q := updateRequest{in.target(), in.name(), in.text("description", maxDescription)}
				return alone(r, s.updateGoods, q, func(g good) error { return writeJSON(w, http.StatusOK, g) })
			}
		}
	}
	with := httptest.NewServer(s.newHandler(s.routes()))
	defer with.Close()
	without := httptest.NewServer(s.newHandler(unbatched))
	defer without.Close()
	for _, one := range []struct {
		what    string
		request request
	}{
		{"list", pageAt(1)}, {"create", request{"POST", "/goods/create?projectId=1", `{"name":"created good"}`}}, {"update", updateOf(50_000)},
	} {
		r := b.row("one "+one.what+" alone, p50", "the same without the batch", 1.05)
		r.compare, r.atMost = medians, true
		b.wrk(with.URL, os.Getpid(), 1, 1, one.request)
		// More and shorter rounds, each beginning with the other: the difference is small.
		for round := range 2*benchRounds + 1 {
			for turn := range 2 {
				if (round+turn)%2 == 0 {
					r.ref = append(r.ref, b.wrk(without.URL, os.Getpid(), 1, 1, one.request))
				} else {
					r.got = append(r.got, b.wrk(with.URL, os.Getpid(), 1, 1, one.request))
				}
			}
		}
	}
}

// alone answers one request without a batcher.
func alone[Q, A any](r *http.Request, run func(context.Context, []Q) ([]result[A], error), request Q, reply func(A) error) error {
	ctx, cancel := context.WithTimeout(r.Context(), answerWithin)
	defer cancel()
	results, err := run(ctx, []Q{request})
	if err == nil {
		err = results[0].err
	}
	if err != nil {
		return err
	}
	return reply(results[0].answer)
}

// events measures the way of the events to ClickHouse, from a full outbox.
func (b *bench) events() {
	w, a := b.stocked(100_000)
	must(b, a.stop())
	b.apps = b.apps[:len(b.apps)-1]
	for _, batch := range []struct{ size, events int }{{5, 4000}, {500, 40_000}} {
		must(b, errorOf(w.db.Exec(`UPDATE goods SET name = name WHERE id <= $1`, batch.events)))
		a := w.exec(b, "LOG_LEVEL=info", fmt.Sprintf("EVENTS_BATCH=%d", batch.size))
		start := time.Now()
		b.drained(w)
		rate := float64(batch.events) / time.Since(start).Seconds()
		b.told(fmt.Sprintf("events drained to ClickHouse, EVENTS_BATCH=%d", batch.size), fmt.Sprintf("%.0f/s", rate), rate, 0)
		must(b, a.stop())
	}
}

// sustained writes without a pause, for some minutes, and looks whether the
// outbox stays small and its events young: its dead rows must not slow the relay.
func (b *bench) sustained() {
	minutes, err := strconv.Atoi(os.Getenv("MINUTES"))
	must(b, err)
	w, a := b.stocked(1000)
	var updates []request
	for id := range 1000 {
		updates = append(updates, updateOf(id+1))
	}
	const state = `
SELECT (SELECT count(*) FROM outbox),
       (SELECT coalesce(extract(epoch FROM now() - min(event_time)), 0) FROM outbox),
       pg_total_relation_size('outbox') / 1e6, n_dead_tup, autovacuum_count
FROM pg_stat_user_tables
WHERE relname = 'outbox'`
	rate := b.row(fmt.Sprintf("updates, the last of %d minutes without a pause", minutes), "the first of them", 0.8)
	oldest := 0.0
	fmt.Println("| minute | updates | most events in the outbox | the oldest, s | outbox, MB | its dead rows | its vacuums |")
	fmt.Println("|---|---|---|---|---|---|---|")
	for minute := range minutes {
		var most, rows, dead, vacuums int
		var late, age, size float64
		ctx, stop := context.WithCancel(b.Context())
		var watch sync.WaitGroup
		watch.Go(func() {
			every(ctx, time.Second, func(context.Context) {
				if err := w.db.QueryRow(state).Scan(&rows, &age, &size, &dead, &vacuums); err != nil {
					b.Error(err)
				}
				most, late = max(most, rows), max(late, age)
			})
		})
		s := b.ask(a, 60, updates...)
		stop()
		watch.Wait()
		fmt.Printf("| %d | %.0f/s | %d | %.2f | %.0f | %d | %d |\n", minute+1, s.rate, most, late, size, dead, vacuums)
		oldest = max(oldest, late)
		if minute == 0 {
			rate.ref = append(rate.ref, s)
		}
		rate.got = []sample{s}
	}
	b.told("the oldest event in the outbox meanwhile", fmt.Sprintf("%.2f s", oldest), oldest, 1)
	b.drained(w)
}

func (b *bench) memory() {
	most := 0.0
	for _, a := range b.apps {
		most = max(most, memory(b, a.process.Pid))
	}
	w := newWorld(b)
	a := w.exec(b, "LOG_LEVEL=info")
	eventually(b, 10*time.Second, a.ready)
	rest := memory(b, a.process.Pid)
	b.told("memory after all this", fmt.Sprintf("%.0f MB, the largest of %d services", most, len(b.apps)), most, 60)
	b.told("memory at rest", fmt.Sprintf("%.0f MB", rest), rest, 25)
}
