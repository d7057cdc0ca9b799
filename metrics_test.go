package main

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

var writeMetrics = flag.Bool("update", false, "write the metrics of this run to testdata/metrics.txt")

// metricsFile is a scrape with every metric there is: promtool checks it in
// make lint, and the alerts are checked against it.
const metricsFile = "testdata/metrics.txt"

func TestMetrics(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	d := w.newDoor(t, "CLICKHOUSE_URL")
	d.set("shut")
	a := w.start(t)
	for range 3 {
		a.create(t, "x")
	}
	a.refused(t, 400, 2, "errors.request.invalid", "POST", "/goods/create", "")
	a.refused(t, 404, 5, "errors.route.notFound", "GET", "/metric", "")
	a.list(t, 3, 1)
	a.list(t, 3, 1)
	a.call(t, "DELETE", "/goods/remove?id=1&projectId=1", "")
	a.call(t, "GET", "/readyz", "")
	expect := func(want map[string]float64) string {
		t.Helper()
		var text string
		eventually(t, 15*time.Second, func() error {
			text = a.call(t, "GET", "/metrics", "").body
			got := parseMetrics(t, text)
			for series, value := range want {
				if v, ok := got[series]; !ok || v != value {
					return fmt.Errorf("%s: got %v, want %v", series, v, value)
				}
			}
			return nil
		})
		return text
	}
	text := expect(map[string]float64{
		`goods_http_requests_total{route="/goods/create",status="201"}`:               3,
		`goods_http_requests_total{route="/goods/create",status="400"}`:               1,
		`goods_http_requests_total{route="other",status="404"}`:                       1,
		`goods_http_requests_total{route="/goods/list",status="200"}`:                 2,
		`goods_http_requests_total{route="/goods/remove",status="200"}`:               1,
		`goods_http_request_duration_seconds_count{route="/goods/create"}`:            4,
		`goods_http_request_duration_seconds_bucket{route="/goods/create",le="+Inf"}`: 4,
		`goods_http_request_duration_seconds_count{route="/goods/reprioritize"}`:      0,
		`goods_batch_size_bucket{batch="create",le="1"}`:                              3,
		`goods_batch_size_sum{batch="list"}`:                                          2,
		`goods_cache_misses_total`:                                                    3,
		`goods_cache_hits_total`:                                                      3,
		`goods_cache_refused_fills_total`:                                             0,
		`goods_cache_errors_total`:                                                    0,
		`goods_events_published_total`:                                                4,
		`goods_events_inserted_total`:                                                 0,
		`goods_events_requeued_total`:                                                 0,
		`goods_outbox_rows`:                                                           4,
		`goods_stream_backlog_messages`:                                               4,
		`goods_dependency_up{name="postgres"}`:                                        1,
		`goods_dependency_up{name="redis"}`:                                           1,
		`goods_dependency_up{name="nats"}`:                                            1,
		`goods_dependency_up{name="clickhouse"}`:                                      0,
		`goods_postgres_connections_max`:                                              postgresConns,
	})
	if age := parseMetrics(t, text)["goods_outbox_oldest_age_seconds"]; age <= 0 || age > 20 {
		t.Errorf("goods_outbox_oldest_age_seconds: got %v", age)
	}
	d.set("open")
	must(t, errorOf(w.js.Publish(t.Context(), w.subject(), []byte("no event"))))
	text = expect(map[string]float64{
		`goods_events_inserted_total`:            4,
		`goods_events_batches_total`:             1,
		`goods_events_thrown_away_total`:         1,
		`goods_outbox_rows`:                      0,
		`goods_outbox_oldest_age_seconds`:        0,
		`goods_stream_backlog_messages`:          0,
		`goods_dependency_up{name="clickhouse"}`: 1,
	})
	if *writeMetrics {
		must(t, os.WriteFile(metricsFile, []byte(text), 0o644))
	}
	golden, err := os.ReadFile(metricsFile)
	must(t, err)
	if got, want := skeleton(text), skeleton(string(golden)); !slices.Equal(got, want) {
		t.Errorf("the metrics are not those of %s; write it again with TESTFLAGS='-run TestMetrics -args -update'; got\n%s", metricsFile, strings.Join(got, "\n"))
	}
}

// skeleton is everything in metrics but the values.
func skeleton(metrics string) []string {
	var lines []string
	for line := range strings.Lines(metrics) {
		if !strings.HasPrefix(line, "#") {
			line = line[:strings.LastIndexByte(line, ' ')]
		}
		lines = append(lines, strings.TrimSpace(line))
	}
	return lines
}

var metricsLine = regexp.MustCompile(`^(# HELP ([a-z_]+) [A-Z].*\.|# TYPE ([a-z_]+) (counter|gauge|histogram)|(([a-z_]+)(?:\{[a-z]+="[^"]+"(?:,[a-z]+="[^"]+")*\})?) ([0-9.e+-]+))$`)

// parseMetrics returns the values by series. What promtool does not look at, it
// checks: that metrics are together, and that histograms add up.
func parseMetrics(t testing.TB, text string) map[string]float64 {
	t.Helper()
	series := map[string]float64{}
	helped, current, kind := map[string]bool{}, "", ""
	last := 0.0 // count of the previous bucket
	for line := range strings.Lines(text) {
		m := metricsLine.FindStringSubmatch(strings.TrimSuffix(line, "\n"))
		switch {
		case m == nil:
			t.Fatalf("not a line of metrics: %q", line)
		case m[2] != "":
			if helped[m[2]] {
				t.Errorf("%s comes twice", m[2])
			}
			current, helped[m[2]] = m[2], true
		case m[3] != "":
			if kind = m[4]; m[3] != current {
				t.Errorf("the type of %s follows the help of %s", m[3], current)
			}
		default:
			name, suffix := m[6], strings.TrimPrefix(m[6], current)
			if name != current && (kind != "histogram" || suffix != "_bucket" && suffix != "_sum" && suffix != "_count") {
				t.Errorf("%s is among the %s of %s", name, kind, current)
			}
			value, err := strconv.ParseFloat(m[7], 64)
			must(t, err)
			if _, repeated := series[m[5]]; repeated {
				t.Errorf("%s comes twice", m[5])
			}
			series[m[5]] = value
			if suffix == "_bucket" && value < last || suffix == "_count" && value != last {
				t.Errorf("%s is %v after %v", m[5], value, last)
			}
			if last = 0; suffix == "_bucket" || suffix == "_sum" {
				last = value
			}
			if suffix == "_sum" { // the count that follows is that of the last bucket
				last = series[strings.Replace(m[5][:len(m[5])-1], "_sum{", "_bucket{", 1)+`,le="+Inf"}`]
			}
		}
	}
	return series
}

// The alerts name metrics that exist, and the states that they can have.
func TestAlerts(t *testing.T) {
	alerts, err := os.ReadFile("alerts.yml")
	must(t, err)
	golden, err := os.ReadFile(metricsFile)
	must(t, err)
	known := map[string]bool{}
	for series := range parseMetrics(t, string(golden)) {
		name, _, _ := strings.Cut(series, "{")
		known[name] = true
	}
	used := map[string]bool{}
	for _, name := range regexp.MustCompile(`\bgoods_[a-z_]+`).FindAllString(string(alerts), -1) {
		used[name] = true
		if !known[name] {
			t.Errorf("alerts.yml uses %s, which is not in %s", name, metricsFile)
		}
	}
	if len(used) < 5 {
		t.Errorf("alerts.yml uses only %v", slices.Sorted(maps.Keys(used)))
	}
}
