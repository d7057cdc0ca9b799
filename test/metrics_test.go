package test

import (
	"fmt"
	"math"
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

// value sums the values of the series of a counter or gauge that have a label such as `value:"200"`, or of
// all if that is empty; of a histogram, it sums the counts.
func value(t testing.TB, a *harness.App, name, label string) (sum float64) {
	t.Helper()
	family := families(t, a)[name]
	if family == nil {
		t.Fatalf("there is no metric %s", name)
	}
	for _, m := range family.Metric {
		if strings.Contains(fmt.Sprint(m.Label), label) {
			sum += m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return sum
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	clickhouse, redis := w.NewProxy(t, "CLICKHOUSE_URL"), w.NewProxy(t, "REDIS_URL")
	clickhouse.Shut()
	redis.Shut()
	a := w.Start(t)
	begin := time.Now()
	a.Stock(t, 3)
	a.List(t, 3, 1)
	a.List(t, 3, 1)
	refused(t, a, 2, "POST", "/goods/create", "")
	refused(t, a, 5, "GET", "/metric", "")
	expect := func(name, label string, want float64) {
		t.Helper()
		harness.AwaitEqual(t, 15*time.Second, func() float64 { return value(t, a, name, label) }, want, "%s{%s}", name, label)
	}
	expect("goods_http_requests_total", `value:"/goods/create"`, 4)
	expect("goods_http_requests_total", `value:"400"`, 1)
	expect("goods_http_requests_total", `value:"other"`, 1)
	expect("goods_http_request_duration_seconds", `value:"/goods/create"`, 4)
	expect("goods_http_request_duration_seconds", `value:"/goods/reprioritize"`, 0)
	expect("goods_batch_size", `value:"create"`, 3)
	expect("goods_events_published_total", "", 3)
	expect("goods_events_inserted_total", "", 0)
	expect("goods_outbox_rows", "", 3)
	expect("goods_dependency_up", "", 2)
	expect("goods_dependency_up", `value:"clickhouse"`, 0)
	for _, name := range []string{"goods_stream_backlog_messages", "goods_outbox_oldest_age_seconds", "goods_cache_errors_total"} {
		harness.AwaitEqual(t, 15*time.Second, func() bool { return value(t, a, name, "") > 0 }, true, "%s is more than 0", name)
	}
	age := func() float64 { return value(t, a, "goods_outbox_oldest_age_seconds", "") }
	harness.AwaitEqual(t, 15*time.Second, func() bool {
		return age() > 1
	}, true, "the oldest event is older than a second")
	if got := age(); got > time.Since(begin).Seconds() {
		t.Errorf("the oldest event is %v s old, %v after it was written", got, time.Since(begin))
	}
	// Six goods were listed, half of them for the second time.
	expect("goods_cache_hits_total", "", 3)
	expect("goods_cache_misses_total", "", 3)
	clickhouse.Pass()
	redis.Pass()
	expect("goods_events_inserted_total", "", 3)
	expect("goods_outbox_rows", "", 0)
	expect("goods_outbox_oldest_age_seconds", "", 0)
	expect("goods_stream_backlog_messages", "", 0)
	expect("goods_dependency_up", "", 4)
	expect("goods_build_info", `value:"(devel)"`, 1)
	all := families(t, a)
	for name, family := range all {
		if kind := family.GetType(); family.GetHelp() == "" || (kind == dto.MetricType_COUNTER) != strings.HasSuffix(name, "_total") {
			t.Errorf("%s is a %s, its help is %q", name, kind, family.GetHelp())
		}
		for _, m := range family.Metric {
			count, last := uint64(0), math.Inf(1) // of a metric without buckets
			for _, b := range m.GetHistogram().GetBucket() {
				if b.GetCumulativeCount() < count {
					t.Errorf("%s: bucket %v after %d", name, b, count)
				}
				count, last = b.GetCumulativeCount(), b.GetUpperBound()
			}
			if last != math.Inf(1) || count != m.GetHistogram().GetSampleCount() {
				t.Errorf("%s: the last bucket is %v with %d, the count %d", name, last, count, m.GetHistogram().GetSampleCount())
			}
		}
	}
}
