// Package bench measures the built program as its clients meet it: over HTTP,
// with wrk, on real servers. What it is compared with is measured by turns in
// the same run, so a ratio says more than a rate. make bench runs it.
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
	rounds = 3
	goods  = 100_000
	large  = 1_000_000
	docs   = "../../docs/"
	mark   = "<!-- make bench DOCS=1 writes all below -->\n"
)

func TestMain(m *testing.M) {
	if config := os.Getenv(referenceVariable); config != "" {
		serveReference(config)
	}
	harness.Main(m)
}

// TestBench prints its tables as Markdown. In the environment, BENCH picks
// parts by name, BEFORE is another build of the service to compare with, and
// DOCS=1 has the tables written to docs/benchmarks.md, and the plot beside it.
func TestBench(t *testing.T) {
	b := &bench{T: t, sites: map[int]*site{}}
	start := time.Now()
	if program := os.Getenv("BEFORE"); program != "" {
		b.before = b.open(goods, program)
		b.apps = nil
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
	apps    []target
	rows    []*row
	figures []*figure
	memo    string // what is no table
}

// site is a world with goods, and the service there.
type site struct {
	*harness.World
	app target
}

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
	return &site{w, b.start(w)}
}

// start runs a service that drains events by the hundred, so that the drain of
// one measurement is done before the next.
func (b *bench) start(w *harness.World) target {
	b.Helper()
	a := w.Start(b, "LOG_LEVEL=info", "EVENTS_BATCH=500")
	harness.Eventually(b, 10*time.Second, a.Ready)
	b.apps = append(b.apps, target{a.URL, a.Process.Pid})
	return b.apps[len(b.apps)-1]
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

// metric is one number of a sample.
type metric func(sample) float64

func rate(s sample) float64 { return s.rate }
func p50(s sample) float64  { return s.p50 }
func p99(s sample) float64  { return s.p99 }

// row compares the service with something else, round by round.
type row struct {
	what, with string
	because    string // why that is the right comparison, unless an earlier row says so
	metric     metric
	limit      float64 // the goal of the ratio, or 0
	atMost     bool    // the limit is an upper one
	short      string  // why the goal may be missed
	got, ref   []sample
}

// add adds a round to a row, and the row with its first.
func (b *bench) add(r row, got, ref sample) {
	i := slices.IndexFunc(b.rows, func(other *row) bool { return other.what == r.what })
	if i < 0 {
		i, b.rows = len(b.rows), append(b.rows, &r)
	}
	b.rows[i].got, b.rows[i].ref = append(b.rows[i].got, got), append(b.rows[i].ref, ref)
}

// spread is the lowest value, the median and the highest.
type spread struct{ low, median, high float64 }

func (m metric) of(rounds []sample) spread {
	var values []float64
	for _, s := range rounds {
		values = append(values, m(s))
	}
	slices.Sort(values)
	return spread{values[0], values[len(values)/2], values[len(values)-1]}
}

func (r *row) ratio() spread {
	var ratios []sample
	for i, s := range r.got {
		ratios = append(ratios, sample{rate: r.metric(s) / r.metric(r.ref[i])})
	}
	return metric(rate).of(ratios)
}

// goal says what the ratio should be, and whether it is.
func (r *row) goal(s spread) (text string, met bool) {
	sign, best := "≥", s.high >= r.limit
	if met = s.median >= r.limit || r.limit == 0; r.atMost {
		sign, met, best = "≤", s.median <= r.limit, s.low <= r.limit
	}
	switch {
	case r.limit == 0: // it is only told
	case met:
		text = fmt.Sprintf("%s %g: yes", sign, r.limit)
	case best:
		text = fmt.Sprintf("%s %g: in some rounds", sign, r.limit)
	default:
		text = fmt.Sprintf("%s %g: no", sign, r.limit)
	}
	return text, met
}

func describe(rounds []sample) string {
	text := fmt.Sprintf("%.0f, %.2f, %.2f", metric(rate).of(rounds).median, metric(p50).of(rounds).median, metric(p99).of(rounds).median)
	return strings.TrimSuffix(text, ", 0.00, 0.00")
}

// figure shows how rates change along one axis.
type figure struct {
	title  string
	x      []int
	lines  []string
	rounds map[point][]sample
}

type point struct {
	line string
	x    int
}

func (b *bench) figure(title string) *figure {
	f := &figure{title: title, rounds: map[point][]sample{}}
	b.figures = append(b.figures, f)
	return f
}

// add adds a round to a point, and the point with its first.
func (f *figure) add(line string, x int, s sample) {
	if !slices.Contains(f.lines, line) {
		f.lines = append(f.lines, line)
	}
	if !slices.Contains(f.x, x) {
		f.x = append(f.x, x)
	}
	f.rounds[point{line, x}] = append(f.rounds[point{line, x}], s)
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
	add(&text, "| what | requests/s, p50, p99 ms | compared with | requests/s, p50, p99 ms | ratio | spread | goal |\n|---|---|---|---|---|---|---|")
	add(&used, "| µs a request | client | service | Postgres | Redis | NATS | ClickHouse | idle, others | in all |\n|---|---|---|---|---|---|---|---|---|")
	for _, r := range b.rows {
		ratio := r.ratio()
		goal, met := r.goal(ratio)
		add(&text, "| %s | %s | %s | %s | %.2f | %.2f to %.2f | %s |", r.what, describe(r.got), r.with, describe(r.ref), ratio.median, ratio.low, ratio.high, goal)
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
	add(&text, "\nWhy these comparisons:\n\n%s\nWhere the cores spend their time (…: what the row above is compared with):\n\n%s", reasons.String(), used.String())
	for _, f := range b.figures {
		add(&text, "| %s | %s |\n|---%s|", f.title, strings.Trim(strings.ReplaceAll(fmt.Sprint(f.x), " ", " | "), "[]"), strings.Repeat("|---", len(f.x)))
		for _, line := range f.lines {
			cells := ""
			for _, x := range f.x {
				rounds := f.rounds[point{line, x}]
				s := metric(rate).of(rounds)
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
		used := metric(func(s sample) float64 { return s.used[user] }).of(rounds).median
		line, all = fmt.Sprintf("%s | %.0f", line, used), all+used
	}
	return fmt.Sprintf("%s | %.0f |", line, all)
}

// plot draws figures side by side as SVG, rates on a logarithmic scale from 100
// to 100,000, in colours that can be read on white and on black. A bar at each
// median spans the rounds.
func plot(figures []*figure) string {
	const width, height, left, right, top, bottom = 290.0, 300.0, 52.0, 18.0, 34.0, 52.0
	colours := []string{"#2f81f7", "#d97706", "#2da44e", "#a371f7"}
	y := func(rate float64) float64 {
		return top + (height-top-bottom)*(5-math.Log10(max(rate, 100)))/3
	}
	var svg strings.Builder
	draw := func(format string, args ...any) { fmt.Fprintf(&svg, format+"\n", args...) }
	draw(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %.0f %.0f" font-family="sans-serif" font-size="11" fill="#7d8590">`, width*float64(len(figures)), height)
	for n, f := range figures {
		from := width*float64(n) + left
		step := (width - left - right) / float64(len(f.x)-1)
		draw(`<text x="%.0f" y="16" font-size="13">requests a second, by %s</text>`, from, f.title)
		for _, rate := range []float64{100, 1000, 10_000, 100_000} {
			draw(`<text x="%.0f" y="%.1f" text-anchor="end">%.0f</text>`, from-8, y(rate)+4, rate)
			draw(`<path d="M%.0f %.1fh%.1f" stroke="#7d8590" stroke-opacity=".4"/>`, from, y(rate), width-left-right)
		}
		for i, x := range f.x {
			draw(`<text x="%.1f" y="%.0f" text-anchor="middle">%d</text>`, from+step*float64(i), height-bottom+16, x)
		}
		label := from
		for c, line := range f.lines {
			path := "M"
			for i, x := range f.x {
				s, at := metric(rate).of(f.rounds[point{line, x}]), from+step*float64(i)
				path += fmt.Sprintf("%.1f %.1f ", at, y(s.median))
				draw(`<path d="M%.1f %.1fV%.1f" stroke="%s" stroke-width="5" stroke-opacity=".4"/>`, at, y(s.low)+1, y(s.high)-1, colours[c])
			}
			draw(`<path d="%s" fill="none" stroke="%s" stroke-width="2"/>`, path, colours[c])
			draw(`<text x="%.0f" y="%.0f" fill="%s">%s</text>`, label, height-12, colours[c], line)
			label += 14 + 5.6*float64(len(line))
		}
	}
	draw(`</svg>`)
	return svg.String()
}
