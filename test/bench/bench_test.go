// Package bench measures the built program as its clients meet it: over HTTP,
// with wrk, on real servers. What it is compared with is measured by turns in
// the same run, so a ratio says more than a rate. make bench runs it.
package bench

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"goods/test/harness"
)

const (
	conns  = 64
	rounds = 3
	goods  = 100_000
	docs   = "../../docs/"
	begin  = "<!-- make bench DOCS=1 writes all below -->\n"
)

func TestMain(m *testing.M) {
	if config := os.Getenv(referenceVariable); config != "" {
		panic(serveReference(config))
	}
	harness.Main(m)
}

// TestBench prints its tables as Markdown. In the environment, BENCH picks
// parts by name, BEFORE is another build of the service to compare with, and
// DOCS=1 has the tables written to docs/benchmarks.md, and the plot beside it.
func TestBench(t *testing.T) {
	b := &bench{T: t, dir: t.TempDir(), sites: map[int]*site{}}
	start := time.Now()
	if program := os.Getenv("BEFORE"); program != "" {
		b.before = b.open(goods, program)
	}
	for _, part := range []struct {
		name string
		run  func()
	}{
		{"lists", b.lists}, {"growth", b.growth}, {"writes", b.writes}, {"alone", b.alone}, {"events", b.events}, {"memory", b.memory},
	} {
		if only := os.Getenv("BENCH"); only == "" || strings.Contains(only, part.name) {
			part.run()
		}
	}
	text := b.report(time.Since(start))
	fmt.Print("\n", text)
	if os.Getenv("DOCS") == "1" {
		page, _, _ := strings.Cut(string(harness.File(b, "docs/benchmarks.md")), begin)
		harness.Must(b, os.WriteFile(docs+"benchmarks.md", []byte(page+begin+"\n"+text), 0o644))
		harness.Must(b, os.WriteFile(docs+"growth.svg", []byte(plot(b.figures)), 0o644))
	}
}

type bench struct {
	*testing.T
	dir     string
	sites   map[int]*site // by the number of goods; parts share them
	before  *site         // of the build to compare with, or nil
	apps    []*harness.App
	rows    []*row
	figures []*figure
	memo    string
}

// site is a world with goods, and the service there.
type site struct {
	*harness.World
	app *harness.App
}

func (s *site) target() target { return target{s.app.URL, s.app.Process.Pid} }

func (b *bench) site(n int) *site {
	b.Helper()
	if b.sites[n] == nil {
		b.sites[n] = b.open(n, "")
	}
	return b.sites[n]
}

func (b *bench) open(n int, program string) *site {
	b.Helper()
	w := b.stocked(n, program)
	s := &site{w, b.start(w)}
	if program != "" {
		b.apps = nil // it is the first, and not what is measured
	}
	return s
}

// start runs a service that drains events by the hundred, so that the drain of
// one measurement is done before the next.
func (b *bench) start(w *harness.World) *harness.App {
	b.Helper()
	a := w.Start(b, "LOG_LEVEL=info", "EVENTS_BATCH=500")
	b.apps = append(b.apps, a)
	harness.Eventually(b, 10*time.Second, a.Ready)
	return a
}

// stocked makes a world with n goods and no service yet. Triggers are off
// meanwhile, so that a million goods are no million events.
func (b *bench) stocked(n int, program string) *harness.World {
	b.Helper()
	w := harness.NewWorld(b)
	w.Program = program
	if out, err := w.Command([]string{"migrate", "postgres"}).CombinedOutput(); err != nil {
		b.Fatalf("migrate: %v: %s", err, out)
	}
	w.Exec(b, fmt.Sprintf(`
BEGIN;
SET LOCAL session_replication_role = replica;
INSERT INTO goods (id, project_id, name, description, priority) OVERRIDING SYSTEM VALUE
SELECT n, 1, 'good ' || n, 'the description of good ' || n, n FROM generate_series(1, %d) AS n;
SELECT setval(pg_get_serial_sequence('goods', 'id'), %[1]d);
UPDATE meta SET total = %[1]d;
COMMIT`, n))
	w.Exec(b, `VACUUM ANALYZE goods`)
	w.Exec(b, `CHECKPOINT`)
	return w
}

// drained waits until no more than most events are on their way, so that what
// one measurement wrote does not slow the next.
func (b *bench) drained(w *harness.World, most int) {
	b.Helper()
	harness.Eventually(b, time.Minute, func() error {
		if n := harness.One[int](b, w, `SELECT count(*) FROM outbox`); n > most {
			return fmt.Errorf("%d events in the outbox", n)
		}
		return nil
	})
}

// row compares the service with something else, round by round.
type row struct {
	what, with string
	because    string // why that is the right comparison
	limit      float64
	atMost     bool   // the limit is an upper one
	short      string // why the goal may be missed
	compare    func(got, ref sample) float64
	got, ref   []sample
}

func rates(got, ref sample) float64 { return got.rate / ref.rate }
func p50s(got, ref sample) float64  { return got.p50 / ref.p50 }
func p99s(got, ref sample) float64  { return got.p99 / ref.p99 }

// add adds a round to a row, and the row with its first.
func (b *bench) add(r row, got, ref sample) {
	i := slices.IndexFunc(b.rows, func(other *row) bool { return other.what == r.what })
	if i < 0 {
		i, b.rows = len(b.rows), append(b.rows, &r)
	}
	b.rows[i].got, b.rows[i].ref = append(b.rows[i].got, got), append(b.rows[i].ref, ref)
}

const theBuildBefore = "the build before"

// earlier compares a round with the build before, if there is one.
func (b *bench) earlier(what string, got sample, requests ...request) {
	b.Helper()
	if b.before != nil {
		b.add(row{what: what + ", p99", with: theBuildBefore, limit: 1, atMost: true, compare: p99s,
			because: "a build's price shows only against the one before in the same run",
			short:   "this build is slower here, unless the spread is on both sides of 1"}, got, b.ask(b.before.target(), 2, requests...))
		b.drained(b.before.World, 500)
	}
}

// spread is the lowest value, the median and the highest.
type spread struct{ low, median, high float64 }

func spreadOf[T any](rounds []T, f func(i int, of T) float64) spread {
	values := make([]float64, len(rounds))
	for i, r := range rounds {
		values[i] = f(i, r)
	}
	slices.Sort(values)
	return spread{values[0], values[len(values)/2], values[len(values)-1]}
}

func rateOf(_ int, s sample) float64 { return s.rate }
func p50Of(_ int, s sample) float64  { return s.p50 }
func p99Of(_ int, s sample) float64  { return s.p99 }

func describe(rounds []sample) string {
	text := fmt.Sprintf("%.0f", spreadOf(rounds, rateOf).median)
	if p99 := spreadOf(rounds, p99Of).median; p99 > 0 {
		text += fmt.Sprintf(", %.2f, %.2f", spreadOf(rounds, p50Of).median, p99)
	}
	return text
}

// verdict is the goal of a row, and whether its ratio reaches it.
func (r *row) verdict(s spread) (goal, met string) {
	sign, median, best := "≥", s.median >= r.limit, s.high >= r.limit
	if r.atMost {
		sign, median, best = "≤", s.median <= r.limit, s.low <= r.limit
	}
	switch {
	case r.limit == 0:
		return "", "" // only told
	case median:
		met = "yes"
	case best:
		met = "in some rounds"
	default:
		met = "no"
	}
	return fmt.Sprint(sign, " ", r.limit), met
}

// report is all that was measured, as Markdown.
func (b *bench) report(took time.Duration) string {
	var text, reasons, used strings.Builder
	add := func(to *strings.Builder, format string, args ...any) { fmt.Fprintf(to, format+"\n", args...) }
	info, _ := os.ReadFile("/proc/cpuinfo")
	_, cpu, _ := strings.Cut(string(info), "model name\t: ")
	cpu, _, _ = strings.Cut(cpu, "\n")
	add(&text, "Measured on %s with %s, on %d cores (%s) that the load shares, in %.0f s.%s\n",
		time.Now().UTC().Format(time.DateOnly), runtime.Version(), runtime.NumCPU(), cpu, took.Seconds(), b.memo)
	add(&text, "| what | requests/s, p50, p99 ms | compared with | requests/s, p50, p99 ms | ratio | spread | goal | met |\n|---|---|---|---|---|---|---|---|")
	add(&used, "| µs a request | client | service | Postgres | Redis | NATS | ClickHouse | idle, others | in all |\n|---|---|---|---|---|---|---|---|---|")
	for _, r := range b.rows {
		ratio := spreadOf(r.got, func(i int, got sample) float64 { return r.compare(got, r.ref[i]) })
		goal, met := r.verdict(ratio)
		add(&text, "| %s | %s | %s | %s | %.2f | %.2f to %.2f | %s | %s |",
			r.what, describe(r.got), r.with, describe(r.ref), ratio.median, ratio.low, ratio.high, goal, met)
		if r.because != "" {
			add(&reasons, "- **%s**: %s.", r.what, r.because)
		}
		if met == "no" || met == "in some rounds" {
			add(&reasons, "  The goal is missed: %s.", r.short)
		}
		if r.with != theBuildBefore {
			add(&used, "| %s | %s", r.what, usedBy(r.got))
			if line := "| " + r.with + " | " + usedBy(r.ref); r.because != "" {
				add(&used, "%s", line)
			}
		}
	}
	add(&text, "\nWhy this is compared:\n\n%s\nWhere the cores spend their time:\n\n%s", reasons.String(), used.String())
	for _, f := range b.figures {
		add(&text, "| %s | %s |\n|---%s|", f.title, strings.Join(f.x, " | "), strings.Repeat("|---", len(f.x)))
		for _, l := range f.lines {
			line := "| " + l.name
			for _, rounds := range l.samples {
				rate := spreadOf(rounds, rateOf)
				line += fmt.Sprintf(" | %s (%.0f to %.0f)", describe(rounds), rate.low, rate.high)
			}
			add(&text, "%s |", line)
		}
		add(&text, "")
	}
	return text.String()
}

func usedBy(rounds []sample) (line string) {
	all := 0.0
	for user := range len(work{}) {
		used := spreadOf(rounds, func(_ int, s sample) float64 { return s.used[user] }).median
		line, all = fmt.Sprintf("%s%.0f | ", line, used), all+used
	}
	return fmt.Sprintf("%s%.0f |", line, all)
}
