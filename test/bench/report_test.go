package bench

import (
	"fmt"
	"math"
	"os"
	"runtime"
	"strings"
	"time"
)

// goal says what a row should reach, and whether it does.
func (r *row) goal() (text string, met bool) {
	if r.limit == 0 { // it is only told
		return "", true
	}
	s := spreadOf(r.got, ratio)
	if r.unit != "" {
		s = spreadOf(r.got, r.number)
	}
	sign := "≥"
	met = s.median >= r.limit
	best := s.high >= r.limit
	if r.atMost {
		sign = "≤"
		met = s.median <= r.limit
		best = s.low <= r.limit
	}
	verdict := "no"
	switch {
	case met:
		verdict = "yes"
	case best:
		verdict = "in some rounds"
	}
	return fmt.Sprintf("%s %g%s: %s", sign, r.limit, r.unit, verdict), met
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

// lines adds lines to a text.
type lines struct{ strings.Builder }

func (l *lines) add(format string, args ...any) { fmt.Fprintf(l, format+"\n", args...) }

// report is all that was measured, as Markdown.
func (b *bench) report(took time.Duration) string {
	var text lines
	info, _ := os.ReadFile("/proc/cpuinfo")
	_, cpu, _ := strings.Cut(string(info), "model name\t: ")
	cpu, _, _ = strings.Cut(cpu, "\n")
	date := time.Now().UTC().Format(time.DateOnly)
	text.add("Measured on %s with %s, on %d cores (%s) that the load shares, in %.0f s.%s\n",
		date, runtime.Version(), runtime.NumCPU(), cpu, took.Seconds(), b.memo)
	b.reportRows(&text)
	b.reportBuilds(&text)
	for _, f := range b.figures {
		f.report(&text)
	}
	return strings.TrimSuffix(text.String(), "\n")
}

// reportRows tells how the service compares with its references, and where each spends its time.
func (b *bench) reportRows(text *lines) {
	if len(b.rows) == 0 {
		return
	}
	var reasons, used lines
	text.add("| what | requests/s, p50, p99 ms | compared with | requests/s, p50, p99 ms" +
		" | ratio | spread | goal |")
	text.add("|---|---|---|---|---|---|---|")
	used.add("| µs a request | client | service | Postgres | Redis | NATS | ClickHouse" +
		" | idle, others | in all |")
	used.add("|---|---|---|---|---|---|---|---|---|")
	for _, r := range b.rows {
		s := spreadOf(r.got, ratio)
		goal, met := r.goal()
		text.add("| %s | %s | %s | %s | %.2f | %.2f to %.2f | %s |",
			r.what, describe(r.got), r.with, describe(r.ref), s.median, s.low, s.high, goal)
		because := r.because
		if !met {
			because = strings.TrimSpace(because + " Goal missed: " + r.short)
		}
		if because != "" {
			reasons.add("- **%s**: %s", r.what, because)
		}
		used.add("| %s%s", r.what, usedBy(r.got))
		if line := r.with + usedBy(r.ref); !strings.Contains(used.String(), line) {
			used.add("| … %s", line)
		}
	}
	text.add("\nWhy these comparisons:\n\n%s", reasons.String())
	text.add("Where the cores spend their time (…: what the row above is compared with):\n\n%s", used.String())
}

// reportBuilds tells how the service compares with the build before.
func (b *bench) reportBuilds(text *lines) {
	if len(b.builds) == 0 {
		return
	}
	text.add("| against the build before | requests/s, p50, p99 ms | before" +
		" | ratio | spread | ratio of p99 | spread | goal |")
	text.add("|---|---|---|---|---|---|---|---|")
	for _, r := range b.builds {
		rates := spreadOf(r.got, func(s sample) float64 { return s.rateRatio })
		tails := spreadOf(r.got, func(s sample) float64 { return s.p99Ratio })
		goal, _ := r.goal()
		text.add("| %s | %s | %s | %s | %s | %s |",
			r.what, describe(r.got), describe(r.ref), rates.cells(), tails.cells(), goal)
	}
	text.add("")
}

// cells are the median, and the others beside it; empty without numbers.
func (s spread) cells() string {
	if math.IsNaN(s.median) {
		return " | "
	}
	return fmt.Sprintf("%.2f | %.2f to %.2f", s.median, s.low, s.high)
}

// report is a table with a column for each point of the axis.
func (f *figure) report(text *lines) {
	columns := strings.ReplaceAll(strings.Trim(fmt.Sprint(f.x), "[]"), " ", " | ")
	text.add("| %s | %s |\n|---%s|", f.title, columns, strings.Repeat("|---", len(f.x)))
	for _, line := range f.lines {
		cells := ""
		for _, x := range f.x {
			rounds := f.rounds[line][x]
			s := spreadOf(rounds, rate)
			cells += fmt.Sprintf(" | %s (%.0f to %.0f)", describe(rounds), s.low, s.high)
		}
		text.add("| %s%s |", line, cells)
	}
	text.add("")
}

func usedBy(rounds []sample) (line string) {
	all := 0.0
	for user := range len(work{}) {
		used := spreadOf(rounds, func(s sample) float64 { return s.used[user] }).median
		line += fmt.Sprintf(" | %.0f", used)
		all += used
	}
	return fmt.Sprintf("%s | %.0f |", line, all)
}

// plot draws figures side by side as SVG, rates on a logarithmic scale from 100 to 100,000, in colours that
// can be read on white and on black. A bar at each median spans the rounds.
func plot(figures []*figure) string {
	colours := []string{"#2f81f7", "#d97706", "#2da44e", "#a371f7"}
	y := func(rate float64) float64 { return 248 - 214*(math.Log10(max(rate, 100))-2)/3 }
	var svg strings.Builder
	draw := func(format string, args ...any) { fmt.Fprintf(&svg, format+"\n", args...) }
	draw(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d 300"`, 290*len(figures))
	draw(` font-family="sans-serif" font-size="11" fill="#7d8590">`)
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
