// Package bench measures the built program as its clients meet it: over HTTP, with wrk, on real servers. What it is
// compared with is measured by turns in the same run, so a ratio says more than a rate. make bench runs it.
package bench

import (
	"fmt"
	"math"
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
	rounds = 5
	goods  = 100_000
	large  = 1_000_000
	docs   = "../../docs/"
	mark   = "<!-- make bench DOCS=1 writes all below -->\n"
)

func TestMain(m *testing.M) {
	if page := os.Getenv(referenceVariable); page != "" {
		serveReference([]byte(page))
	}
	harness.Main(m)
}

// TestBench prints its tables as Markdown. In the environment, BENCH picks parts by name, BEFORE is another build of
// the service to compare with, and DOCS=1 has the tables written to docs/benchmarks.md, and the plot beside it.
func TestBench(t *testing.T) {
	b := &bench{T: t, sites: map[int]*site{}}
	start := time.Now()
	if program := os.Getenv("BEFORE"); program != "" {
		w := b.stocked(goods, program)
		b.before = &site{w, []*harness.App{b.start(w)}}
		b.apps = nil // memory is not about that build
	}
	for _, part := range []struct {
		name string
		run  func()
	}{
		{"lists", b.lists}, {"writes", b.writes}, {"alone", b.alone}, {"events", b.events}, {"growth", b.growth}, {"memory", b.memory},
	} {
		if only := os.Getenv("BENCH"); only == "" || strings.Contains(only, part.name) {
			part.run()
		}
	}
	text := b.report(time.Since(start))
	fmt.Print("\n", text)
	if os.Getenv("DOCS") == "1" {
		page, _, _ := strings.Cut(string(harness.File(b, "docs/benchmarks.md")), mark)
		harness.Must(b, os.WriteFile(docs+"benchmarks.md", []byte(page+mark+"\n"+text), 0o644))
		harness.Must(b, os.WriteFile(docs+"growth.svg", []byte(plot(b.figures)), 0o644))
	}
}

type bench struct {
	*testing.T
	sites   map[int]*site // by the number of goods; parts share them
	before  *site         // of the build to compare with, or nil
	apps    []*harness.App
	rows    []*row
	figures []*figure
	memo    string // what is no table
}

// site is a world with goods, and services there.
type site struct {
	*harness.World
	apps []*harness.App
}

func (b *bench) site(n int) *site {
	b.Helper()
	if b.sites[n] == nil {
		w := b.stocked(n, "")
		b.sites[n] = &site{w, []*harness.App{b.start(w)}}
	}
	return b.sites[n]
}

// start runs a service that drains events by the hundred, so that the drain of one measurement is done before the next.
func (b *bench) start(w *harness.World) *harness.App {
	b.Helper()
	a := w.Start(b, "LOG_LEVEL=info", "EVENTS_BATCH=500")
	harness.Eventually(b, 10*time.Second, a.Ready)
	b.apps = append(b.apps, a)
	return a
}

// stocked makes a world with n goods and no service yet. Triggers are off meanwhile, so that a million goods are no
// million events.
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

// drained waits until no more than most events are on their way.
func (b *bench) drained(w *harness.World, most int) {
	b.Helper()
	over := func() int { return max(0, harness.One[int](b, w, `SELECT count(*) FROM outbox`)-most) }
	harness.AwaitEqual(b, time.Minute, over, 0, "events in the outbox beyond %d", most)
}

func rate(s sample) float64  { return s.rate }
func p50(s sample) float64   { return s.p50 }
func p99(s sample) float64   { return s.p99 }
func ratio(s sample) float64 { return s.ratio }

// spread is the lowest value, the median and the highest.
type spread struct{ low, median, high float64 }

func spreadOf(rounds []sample, number func(sample) float64) spread {
	var values []float64
	for _, s := range rounds {
		values = append(values, number(s))
	}
	slices.Sort(values)
	return spread{values[0], values[len(values)/2], values[len(values)-1]}
}

// row compares the service with something else, round by round.
type row struct {
	what, with string
	because    string               // why that is the right comparison, unless an earlier row says so
	number     func(sample) float64 // that is compared
	limit      float64              // the goal of the ratio, or 0
	atMost     bool                 // the limit is an upper one
	short      string               // why the goal may be missed
	got, ref   []sample
}

// add adds a round to a row, and the row with its first.
func (b *bench) add(r row, got, ref sample) {
	got.ratio = r.number(got) / r.number(ref)
	i := slices.IndexFunc(b.rows, func(other *row) bool { return other.what == r.what })
	if i < 0 {
		i, b.rows = len(b.rows), append(b.rows, &r)
	}
	b.rows[i].got, b.rows[i].ref = append(b.rows[i].got, got), append(b.rows[i].ref, ref)
}

// goal says what the ratio should be, and whether it is.
func (r *row) goal(s spread) (text string, met bool) {
	if r.limit == 0 { // it is only told
		return "", true
	}
	sign, verdict, met, best := "≥", "no", s.median >= r.limit, s.high >= r.limit
	if r.atMost {
		sign, met, best = "≤", s.median <= r.limit, s.low <= r.limit
	}
	if met {
		verdict = "yes"
	} else if best {
		verdict = "in some rounds"
	}
	return fmt.Sprintf("%s %g: %s", sign, r.limit, verdict), met
}

func describe(rounds []sample) string {
	text := fmt.Sprintf("%.0f, %.2f, %.2f",
		spreadOf(rounds, rate).median, spreadOf(rounds, p50).median, spreadOf(rounds, p99).median)
	return strings.TrimSuffix(text, ", 0.00, 0.00")
}

// figure shows how rates change along one axis.
type figure struct {
	title  string
	x      []int
	lines  []string
	rounds map[string]map[int][]sample // by line and x
}

func (b *bench) figure(title string, x ...int) *figure {
	f := &figure{title: title, x: x, rounds: map[string]map[int][]sample{}}
	b.figures = append(b.figures, f)
	return f
}

// add adds a round to a point, and the line with its first.
func (f *figure) add(line string, x int, s sample) {
	if f.rounds[line] == nil {
		f.lines, f.rounds[line] = append(f.lines, line), map[int][]sample{}
	}
	f.rounds[line][x] = append(f.rounds[line][x], s)
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
	add(&text, "| what | requests/s, p50, p99 ms | compared with | requests/s, p50, p99 ms | ratio | spread | goal |")
	add(&text, "|---|---|---|---|---|---|---|")
	add(&used, "| µs a request | client | service | Postgres | Redis | NATS | ClickHouse | idle, others | in all |")
	add(&used, "|---|---|---|---|---|---|---|---|---|")
	for _, r := range b.rows {
		s := spreadOf(r.got, ratio)
		goal, met := r.goal(s)
		add(&text, "| %s | %s | %s | %s | %.2f | %.2f to %.2f | %s |",
			r.what, describe(r.got), r.with, describe(r.ref), s.median, s.low, s.high, goal)
		if r.with == theBuildBefore {
			r.short = "this build is slower."
			if s.low < 1 && s.high > 1 {
				r.short = "some rounds are better than 1, others worse: they differ more than the builds."
			}
		}
		if !met {
			r.because = strings.TrimSpace(r.because + " Goal missed: " + r.short)
		}
		if r.because != "" {
			add(&reasons, "- **%s**: %s", r.what, r.because)
		}
		if r.with == theBuildBefore {
			continue
		}
		add(&used, "| %s%s", r.what, usedBy(r.got))
		if line := r.with + usedBy(r.ref); !strings.Contains(used.String(), line) {
			add(&used, "| … %s", line)
		}
	}
	add(&text, "\nWhy these comparisons:\n\n%s", reasons.String())
	add(&text, "Where the cores spend their time (…: what the row above is compared with):\n\n%s", used.String())
	for _, f := range b.figures {
		columns := strings.ReplaceAll(strings.Trim(fmt.Sprint(f.x), "[]"), " ", " | ")
		add(&text, "| %s | %s |\n|---%s|", f.title, columns, strings.Repeat("|---", len(f.x)))
		for _, line := range f.lines {
			cells := ""
			for _, x := range f.x {
				rounds := f.rounds[line][x]
				s := spreadOf(rounds, rate)
				cells += fmt.Sprintf(" | %s (%.0f to %.0f)", describe(rounds), s.low, s.high)
			}
			add(&text, "| %s%s |", line, cells)
		}
		add(&text, "")
	}
	return strings.TrimSuffix(text.String(), "\n")
}

func usedBy(rounds []sample) (line string) {
	all := 0.0
	for user := range len(work{}) {
		used := spreadOf(rounds, func(s sample) float64 { return s.used[user] }).median
		line, all = fmt.Sprintf("%s | %.0f", line, used), all+used
	}
	return fmt.Sprintf("%s | %.0f |", line, all)
}

// plot draws figures side by side as SVG, rates on a logarithmic scale from 100 to 100,000, in colours that can be
// read on white and on black. A bar at each median spans the rounds.
func plot(figures []*figure) string {
	colours := []string{"#2f81f7", "#d97706", "#2da44e", "#a371f7"}
	y := func(rate float64) float64 { return 248 - 214*(math.Log10(max(rate, 100))-2)/3 }
	var svg strings.Builder
	draw := func(format string, args ...any) { fmt.Fprintf(&svg, format+"\n", args...) }
	draw(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d 300" font-family="sans-serif" font-size="11" fill="#7d8590">`,
		290*len(figures))
	for n, f := range figures {
		draw(`<g transform="translate(%d)">`, 290*n+52)
		draw(`<text y="16" font-size="13">requests a second, by %s</text>`, f.title)
		for _, rate := range []float64{100, 1000, 10_000, 100_000} {
			draw(`<text x="-8" y="%.1f" text-anchor="end">%.0f</text>`, y(rate)+4, rate)
			draw(`<path d="M0 %.1fh220" stroke="#7d8590" stroke-opacity=".4"/>`, y(rate))
		}
		step, label := 220/float64(len(f.x)-1), 0.0
		for i, x := range f.x {
			draw(`<text x="%.1f" y="264" text-anchor="middle">%d</text>`, step*float64(i), x)
		}
		for c, line := range f.lines {
			points := ""
			for i, x := range f.x {
				s, at := spreadOf(f.rounds[line][x], rate), step*float64(i)
				points += fmt.Sprintf("%.1f,%.1f ", at, y(s.median))
				draw(`<path d="M%.1f %.1fV%.1f" stroke="%s" stroke-width="5" stroke-opacity=".4"/>`,
					at, y(s.low)+1, y(s.high)-1, colours[c])
			}
			draw(`<polyline points="%s" fill="none" stroke="%s" stroke-width="2"/>`, points, colours[c])
			draw(`<text x="%.0f" y="288" fill="%s">%s</text>`, label, colours[c], line)
			label += 14 + 5.6*float64(len(line))
		}
		draw(`</g>`)
	}
	draw(`</svg>`)
	return svg.String()
}
