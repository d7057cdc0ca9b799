package test

import (
	"fmt"
	"math"
	"strings"
	"sync"
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
			sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			sum += float64(m.GetHistogram().GetSampleCount())
		}
	}
	return sum
}

// observed returns a histogram with a label such as `value:"create"`: how many observations it has, how many
// of them are 1 at most, and their sum.
func observed(t testing.TB, a *harness.App, name, label string) (count, ones uint64, sum float64) {
	t.Helper()
	for _, m := range families(t, a)[name].GetMetric() {
		if !strings.Contains(fmt.Sprint(m.Label), label) {
			continue
		}
		h := m.GetHistogram()
		count += h.GetSampleCount()
		sum += h.GetSampleSum()
		for _, bucket := range h.Bucket {
			if bucket.GetUpperBound() == 1 {
				ones += bucket.GetCumulativeCount()
			}
		}
	}
	return count, ones, sum
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	begin := time.Now()
	w := harness.NewWorld(t)
	clickhouse, redis := w.NewProxy(t, "CLICKHOUSE_URL"), w.NewProxy(t, "REDIS_URL")
	clickhouse.Shut()
	redis.Shut()
	a := w.Start(t)
	asked := time.Now()
	a.Stock(t, 3)
	took := time.Since(asked)
	for range 3 {
		a.List(t, 3, 1)
	}
	refused(t, a, 2, "POST", "/goods/create", "")
	refused(t, a, 5, "GET", "/metric", "")
	expect := func(name, label string, want float64) {
		t.Helper()
		get := func() float64 { return value(t, a, name, label) }
		harness.AwaitEqual(t, 15*time.Second, get, want, "%s{%s}", name, label)
	}
	within := func(name string, least, most float64) {
		t.Helper()
		harness.Eventually(t, 15*time.Second, func() error {
			if got := value(t, a, name, ""); got < least || got > most {
				return fmt.Errorf("%s: got %g, want %g to %g", name, got, least, most)
			}
			return nil
		})
	}
	sinceBegin := func() float64 { return time.Since(begin).Seconds() }
	expect("goods_http_requests_total", `value:"/goods/create"`, 4)
	expect("goods_http_requests_total", `value:"400"`, 1)
	expect("goods_http_requests_total", `value:"other"`, 1)
	expect("goods_http_request_duration_seconds", `value:"/goods/create"`, 4)
	expect("goods_http_request_duration_seconds", `value:"/goods/reprioritize"`, 0)
	expect("goods_batch_size", `value:"create"`, 3)
	expect("goods_events_published_total", "", 3)
	expect("goods_events_inserted_total", "", 0)
	expect("goods_events_batches_total", "", 0)
	expect("goods_outbox_rows", "", 3)
	expect("goods_dependency_up", "", 2)
	expect("goods_dependency_up", `value:"clickhouse"`, 0)
	within("goods_stream_backlog_messages", 1, 3)
	within("goods_outbox_oldest_age_seconds", 0.1, sinceBegin()+15)
	within("goods_cache_errors_total", 1, 1000)
	// Nine goods were listed, three of them for the first time.
	expect("goods_cache_hits_total", "", 6)
	expect("goods_cache_misses_total", "", 3)

	// Creates that come while others wait are one batch, and all take as long as their clients see.
	const together = 8
	const held = 500 * time.Millisecond
	tx := w.Hold(t, `SELECT lock_priorities()`)
	asked = time.Now()
	var running sync.WaitGroup
	for i := range together {
		running.Go(func() { a.Create(t, fmt.Sprint("together ", i)) })
	}
	awaitLock(t, w)
	<-time.After(held)
	harness.Must(t, tx.Rollback())
	running.Wait()
	took += together * time.Since(asked)
	count, ones, sum := observed(t, a, "goods_batch_size", `value:"create"`)
	if ones < 3 || count <= ones || count >= 3+together || sum != 3+together {
		t.Errorf("got %d batches of %g creates, %d of one", count, sum, ones)
	}
	expect("goods_http_request_duration_seconds", `value:"/goods/create"`, 4+together)
	_, _, seconds := observed(t, a, "goods_http_request_duration_seconds", `value:"/goods/create"`)
	if seconds < held.Seconds() || seconds > took.Seconds() {
		t.Errorf("%d creates took %g s, want %g to %g", 4+together, seconds, held.Seconds(), took.Seconds())
	}
	for range 10 { // also while nothing uses one
		within("goods_postgres_connections_open", 1, 25)
	}
	expect("goods_postgres_connections_max", "", 25)
	expect("goods_postgres_connection_waits_total", "", 0)
	within("process_start_time_seconds", float64(begin.Unix()), float64(begin.Unix())+sinceBegin()+1)

	clickhouse.Pass()
	redis.Pass()
	expect("goods_events_inserted_total", "", 3+together)
	within("goods_events_batches_total", 2, 3+together)
	expect("goods_outbox_rows", "", 0)
	expect("goods_outbox_oldest_age_seconds", "", 0)
	expect("goods_stream_backlog_messages", "", 0)
	expect("goods_dependency_up", "", 4)
	expect("goods_build_info", `value:"(devel)"`, 1)
	clickhouse.Shut()
	a.Create(t, "last")
	within("goods_events_insert_failures_total", 1, 1000)
	for name, family := range families(t, a) {
		kind := family.GetType()
		if family.GetHelp() == "" || (kind == dto.MetricType_COUNTER) != strings.HasSuffix(name, "_total") {
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
			if all := m.GetHistogram().GetSampleCount(); last != math.Inf(1) || count != all {
				t.Errorf("%s: the last bucket is %v with %d, the count %d", name, last, count, all)
			}
		}
	}
}
