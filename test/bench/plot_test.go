package bench

import (
	"fmt"
	"math"
	"slices"
	"strings"
)

// figure shows how rates change along one axis.
type figure struct {
	title string
	x     []string
	lines []*line
}

type line struct {
	name    string
	samples [][]sample // of each x, by round
}

// add adds a round at x, and with its first also x, and the line of that name.
func (f *figure) add(name string, x int, s sample) {
	at := slices.Index(f.x, fmt.Sprint(x))
	if at < 0 {
		at, f.x = len(f.x), append(f.x, fmt.Sprint(x))
	}
	i := slices.IndexFunc(f.lines, func(l *line) bool { return l.name == name })
	if i < 0 {
		i, f.lines = len(f.lines), append(f.lines, &line{name: name})
	}
	l := f.lines[i]
	for len(l.samples) <= at {
		l.samples = append(l.samples, nil)
	}
	l.samples[at] = append(l.samples[at], s)
}

// plot draws figures side by side as SVG, rates on a logarithmic scale from 100
// to 100,000, in colours that can be read on white and on black. A bar at each
// median spans the rounds.
func plot(figures []*figure) string {
	const width, height, left, top, bottom = 290.0, 300.0, 44.0, 34.0, 40.0
	colours := []string{"#2f81f7", "#d97706", "#2da44e", "#a371f7"}
	y := func(rate float64) float64 {
		return top + (height-top-bottom)*(5-math.Log10(max(rate, 100)))/3
	}
	var svg strings.Builder
	draw := func(format string, args ...any) { fmt.Fprintf(&svg, format+"\n", args...) }
	draw(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %.0f %.0f" font-family="sans-serif" font-size="11" fill="#7d8590">`, width*float64(len(figures)), height)
	for n, f := range figures {
		from := width*float64(n) + left
		step := (width - left - 80) / float64(max(1, len(f.x)-1))
		draw(`<text x="%.0f" y="16" font-size="13">requests a second, by %s</text>`, from, f.title)
		for _, rate := range []float64{100, 1000, 10_000, 100_000} {
			draw(`<text x="%.0f" y="%.1f" text-anchor="end">%.0f</text>`, from-8, y(rate)+4, rate)
			draw(`<path d="M%.0f %.1fh%.1f" stroke="#7d8590" stroke-opacity=".4"/>`, from, y(rate), width-left-80)
		}
		for i, x := range f.x {
			draw(`<text x="%.1f" y="%.0f" text-anchor="middle">%s</text>`, from+step*float64(i), height-bottom+18, x)
		}
		taken := []float64{}
		for c, l := range f.lines {
			path, last := "M", 0.0
			for i, samples := range l.samples {
				s := spreadOf(samples, rateOf)
				x := from + step*float64(i)
				last = y(s.median)
				path += fmt.Sprintf("%.1f %.1f ", x, last)
				draw(`<path d="M%.1f %.1fV%.1f" stroke="%s" stroke-width="5" stroke-opacity=".4"/>`, x, y(s.low)+1, y(s.high)-1, colours[c%4])
			}
			draw(`<path d="%s" fill="none" stroke="%s" stroke-width="2"/>`, path, colours[c%4])
			for slices.ContainsFunc(taken, func(t float64) bool { return math.Abs(t-last) < 12 }) {
				last++ // labels may not overlap
			}
			taken = append(taken, last)
			draw(`<text x="%.1f" y="%.1f" fill="%s">%s</text>`, from+step*float64(len(f.x)-1)+6, last+4, colours[c%4], l.name)
		}
	}
	draw(`</svg>`)
	return svg.String()
}
