// Package bench measures the built program as its clients meet it: over HTTP, with wrk, on real servers. What
// it is compared with is measured by turns in the same run, so a ratio says more than a rate. make bench runs
// it.
package bench

import (
	"fmt"
	"os"
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
	if os.Getenv(listVariable) != "" {
		serveReference()
	}
	harness.Main(m)
}

// TestBench prints its tables as Markdown. In the environment, BENCH picks parts by name, BEFORE is another
// build of the service to compare with, and DOCS=1 has the tables written to docs/benchmarks.md, and the plot
// beside it.
func TestBench(t *testing.T) {
	b := &bench{T: t, sites: map[siteOf]*site{}, before: os.Getenv("BEFORE")}
	start := time.Now()
	for _, part := range []struct {
		name string
		run  func()
	}{
		{"lists", b.lists},
		{"reads", b.reads},
		{"writes", b.writes},
		{"moves", b.moves},
		{"alone", b.alone},
		{"events", b.events},
		{"history", b.history},
		{"growth", b.growth},
		{"memory", b.memory},
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
	before  string           // the program of the build to compare with, or empty
	sites   map[siteOf]*site // parts share them
	apps    []*harness.App   // of this build
	rows    []*row           // that have a reference of the same run
	builds  []*row           // that compare with the build before
	figures []*figure
	memo    string // what is no table
}

// siteOf tells sites from each other.
type siteOf struct {
	goods   int
	program string // empty for this build
}

// site is a world with goods, and services there.
type site struct {
	*harness.World
	apps []*harness.App
}

// site returns the site of this build that has n goods.
func (b *bench) site(n int) *site {
	b.Helper()
	return b.siteOf(n, "")
}

func (b *bench) siteOf(n int, program string) *site {
	b.Helper()
	key := siteOf{n, program}
	if b.sites[key] == nil {
		w := b.stocked(n, program)
		b.sites[key] = &site{w, []*harness.App{b.start(w)}}
	}
	return b.sites[key]
}

// start runs a service that stores events by the hundred, so that those of one measurement are stored before
// the next.
func (b *bench) start(w *harness.World) *harness.App {
	b.Helper()
	a := w.Start(b, "LOG_LEVEL=info", "EVENTS_BATCH=500")
	harness.Eventually(b, 10*time.Second, a.Ready)
	if w.Program == "" {
		b.apps = append(b.apps, a)
	}
	return a
}

// stocked makes a world with n goods, all in project 1, and no service yet. Triggers are off meanwhile, so
// that a million goods are no million events.
func (b *bench) stocked(n int, program string) *harness.World {
	b.Helper()
	w := harness.NewWorld(b)
	w.Program = program
	w.Unchecked = program != "" // openapi.yaml is of this build
	if out, err := w.Command([]string{"migrate", "postgres"}).CombinedOutput(); err != nil {
		b.Fatalf("migrate: %v: %s", err, out)
	}
	counts := "meta"
	if harness.One[bool](b, w, `SELECT to_regclass('project_meta') IS NOT NULL`) { // an older build has none
		counts = "project_meta"
	}
	w.Exec(b, fmt.Sprintf(`
BEGIN;
SET LOCAL session_replication_role = replica;
INSERT INTO goods (id, project_id, name, description, priority) OVERRIDING SYSTEM VALUE
SELECT n, 1, 'good ' || n, 'the description of good ' || n, n FROM generate_series(1, %d) AS n;
SELECT setval(pg_get_serial_sequence('goods', 'id'), %[1]d);
UPDATE meta SET total = %[1]d;
UPDATE %[2]s SET total = %[1]d;
COMMIT`, n, counts))
	w.Exec(b, `VACUUM ANALYZE goods`)
	w.Exec(b, `CHECKPOINT`)
	return w
}

// stored waits until no more than most events are on their way.
func (b *bench) stored(w *harness.World, most int) {
	b.Helper()
	over := func() int { return max(0, harness.One[int](b, w, `SELECT count(*) FROM outbox`)-most) }
	harness.AwaitEqual(b, 2*time.Minute, over, 0, "events in the outbox beyond %d", most)
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
	unit       string               // if not empty, the limit is one of the number itself, in this unit
	short      string               // why the goal may be missed
	got, ref   []sample
}

// add adds a round to a row, and the row with its first.
func (b *bench) add(r row, got, ref sample) { b.rows = addTo(b.rows, r, got, ref) }

func addTo(rows []*row, r row, got, ref sample) []*row {
	got.ratio = r.number(got) / r.number(ref)
	got.rateRatio = got.rate / ref.rate
	got.p99Ratio = got.p99 / ref.p99
	i := slices.IndexFunc(rows, func(other *row) bool { return other.what == r.what })
	if i < 0 {
		i = len(rows)
		rows = append(rows, &r)
	}
	rows[i].got = append(rows[i].got, got)
	rows[i].ref = append(rows[i].ref, ref)
	return rows
}

// noise is how much slower than the build before a row may be.
const noise = 0.03

// earlier compares a round with the build before, if there is one. measure does the same on a site of that
// build.
func (b *bench) earlier(what string, goods int, got sample, measure func(before *site) sample) {
	b.Helper()
	b.earlierRow(row{what: what, number: rate, limit: 1 - noise}, goods, got, measure)
}

// earlierRow is earlier with a goal of its own.
func (b *bench) earlierRow(r row, goods int, got sample, measure func(before *site) sample) {
	b.Helper()
	if b.before == "" {
		return
	}
	b.builds = addTo(b.builds, r, got, measure(b.siteOf(goods, b.before)))
}
