package test

import (
	"fmt"
	"math"
	"regexp"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"goods/test/harness"
)

// families are the metrics of a service, as Prometheus reads them.
func families(t testing.TB, a *harness.App) map[string]*dto.MetricFamily {
	t.Helper()
	parser := expfmt.NewTextParser(model.LegacyValidation)
	found, err := parser.TextToMetricFamilies(strings.NewReader(a.Call(t, "GET", "/metrics", "").Body))
	harness.Must(t, err)
	return found
}

// value sums the values of the series of a counter or gauge that have these labels, such as `status="200"`; of a
// histogram, it sums the counts.
func value(t testing.TB, a *harness.App, name string, labels ...string) (sum float64) {
	t.Helper()
	family := families(t, a)[name]
	if family == nil {
		t.Fatalf("there is no metric %s", name)
	}
series:
	for _, m := range family.Metric {
		for _, label := range labels {
			if !strings.Contains(fmt.Sprint(m.Label), label) {
				continue series
			}
		}
		sum += m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
	}
	return sum
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	p := w.NewProxy(t, "CLICKHOUSE_URL")
	p.Shut()
	a := w.Start(t)
	a.Stock(t, 3)
	a.List(t, 3, 1)
	a.List(t, 3, 1)
	refused(t, a, 2, "POST", "/goods/create", "")
	refused(t, a, 5, "GET", "/metric", "")

	type sample struct {
		name, label string
		want        float64
	}
	expect := func(samples ...sample) {
		t.Helper()
		harness.Eventually(t, 15*time.Second, func() error {
			for _, s := range samples {
				if got := value(t, a, s.name, s.label); got != s.want {
					return fmt.Errorf("%s{%s}: got %v, want %v", s.name, s.label, got, s.want)
				}
			}
			return nil
		})
	}
	expect(
		sample{"goods_http_requests_total", `value:"/goods/create"`, 4},
		sample{"goods_http_requests_total", `value:"400"`, 1},
		sample{"goods_http_requests_total", `value:"other"`, 1},
		sample{"goods_http_request_duration_seconds", `value:"/goods/create"`, 4},
		sample{"goods_http_request_duration_seconds", `value:"/goods/reprioritize"`, 0},
		sample{"goods_batch_size", `value:"create"`, 3},
		sample{"goods_cache_errors_total", "", 0},
		sample{"goods_events_published_total", "", 3},
		sample{"goods_events_inserted_total", "", 0},
		sample{"goods_outbox_rows", "", 3},
		sample{"goods_dependency_up", "", 3},
		sample{"goods_dependency_up", `value:"clickhouse"`, 0},
	)
	if hits, misses := value(t, a, "goods_cache_hits_total"), value(t, a, "goods_cache_misses_total"); hits+misses != 6 || hits < 3 {
		t.Errorf("got %v hits and %v misses for six goods, half of them shown before", hits, misses)
	}
	if age := value(t, a, "goods_outbox_oldest_age_seconds"); age <= 0 {
		t.Errorf("the oldest event is %v seconds old", age)
	}
	harness.Eventually(t, 15*time.Second, func() error {
		if value(t, a, "goods_stream_backlog_messages") < 1 {
			return fmt.Errorf("no message is in the stream")
		}
		return nil
	})
	p.Pass()
	expect(
		sample{"goods_events_inserted_total", "", 3},
		sample{"goods_outbox_rows", "", 0},
		sample{"goods_outbox_oldest_age_seconds", "", 0},
		sample{"goods_stream_backlog_messages", "", 0},
		sample{"goods_dependency_up", "", 4},
		sample{"goods_build_info", `value:"test"`, 1},
	)
	all := families(t, a)
	for name, family := range all {
		if kind := family.GetType(); family.GetHelp() == "" || (kind == dto.MetricType_COUNTER) != strings.HasSuffix(name, "_total") {
			t.Errorf("%s is a %s, its help is %q", name, kind, family.GetHelp())
		}
		for _, m := range family.Metric {
			h, last := m.GetHistogram(), &dto.Bucket{}
			for _, b := range h.GetBucket() {
				if b.GetCumulativeCount() < last.GetCumulativeCount() {
					t.Errorf("%s: bucket %v after %v", name, b, last)
				}
				last = b
			}
			if h != nil && (last.GetUpperBound() != math.Inf(1) || last.GetCumulativeCount() != h.GetSampleCount()) {
				t.Errorf("%s: the last bucket is %v, the count %d", name, last, h.GetSampleCount())
			}
		}
	}
	// The alerts name metrics that exist.
	used := regexp.MustCompile(`\b(goods|go|process)_[a-z_]+`).FindAllString(string(harness.File(t, "deploy/alerts.yaml")), -1)
	for _, name := range used {
		if all[name] == nil && all[strings.TrimSuffix(name, "_bucket")] == nil {
			t.Errorf("the alerts use %s, which does not exist", name)
		}
	}
	if len(used) < 5 {
		t.Errorf("the alerts use only %v", used)
	}
}
