package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// metrics counts what the service does, for /metrics. Writing it asks nothing
// of any server: what they know is sampled in the background.
type metrics struct {
	db *database

	cacheHits, cacheMisses, cacheRefused, cacheErrors atomic.Int64
	published, requeued, thrownAway                   atomic.Int64
	inserted, batches, insertFailures                 atomic.Int64
	outboxRows, outboxAge, backlog                    atomic.Int64 // sampled; the age in milliseconds

	mu         sync.Mutex // guards the maps, not what is in them
	routes     map[string]*routeMetrics
	batchSizes map[string]*histogram
}

func newMetrics(db *database) *metrics {
	return &metrics{db: db, routes: map[string]*routeMetrics{}, batchSizes: map[string]*histogram{}}
}

// histogram counts observations by their upper bounds. It may be used
// concurrently.
type histogram struct {
	bounds []float64
	mu     sync.Mutex
	counts []int64 // by bound, and past the last one
	sum    float64
}

func newHistogram(bounds ...float64) *histogram {
	return &histogram{bounds: bounds, counts: make([]int64, len(bounds)+1)}
}

func (h *histogram) observe(v float64) {
	i, _ := slices.BinarySearch(h.bounds, v)
	h.mu.Lock()
	h.counts[i]++
	h.sum += v
	h.mu.Unlock()
}

// write prints the histogram under name, with labels such as `route="/x"`.
func (h *histogram) write(w io.Writer, name, labels string) {
	h.mu.Lock()
	counts, sum := slices.Clone(h.counts), h.sum
	h.mu.Unlock()
	total := int64(0)
	for i, bound := range h.bounds {
		total += counts[i]
		fmt.Fprintf(w, "%s_bucket{%s,le=\"%s\"} %d\n", name, labels, strconv.FormatFloat(bound, 'g', -1, 64), total)
	}
	total += counts[len(h.bounds)]
	fmt.Fprintf(w, "%s_bucket{%s,le=\"+Inf\"} %d\n%s_sum{%s} %g\n%s_count{%s} %d\n", name, labels, total, name, labels, sum, name, labels, total)
}

// routeMetrics counts the requests of one route.
type routeMetrics struct {
	latency  *histogram // seconds
	mu       sync.Mutex
	statuses map[int]int64
}

func (r *routeMetrics) observe(status int, took time.Duration) {
	r.latency.observe(took.Seconds())
	r.mu.Lock()
	r.statuses[status]++
	r.mu.Unlock()
}

func (m *metrics) route(name string) *routeMetrics {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.routes[name] == nil {
		m.routes[name] = &routeMetrics{
			latency:  newHistogram(.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5),
			statuses: map[int]int64{},
		}
	}
	return m.routes[name]
}

func (m *metrics) batch(name string) *histogram {
	h := newHistogram(1, 2, 4, 8, 16, 32, 64)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.batchSizes[name] = h
	return h
}

// sample asks Postgres and NATS how much is on its way.
func (m *metrics) sample(ctx context.Context, p *pipeline) {
	const outbox = `
SELECT count(*), coalesce(extract(epoch FROM now() - min(event_time)) * 1000, 0)::bigint
FROM outbox`
	var rows, age int64
	if m.db.queryRow(ctx, nil, outbox, nil, &rows, &age) == nil {
		m.outboxRows.Store(rows)
		m.outboxAge.Store(age)
	}
	if stream, err := p.js.Stream(ctx, p.stream); err == nil {
		m.backlog.Store(int64(stream.CachedInfo().State.Msgs))
	}
}

// write prints everything in Prometheus' text format.
func (m *metrics) write(w io.Writer, h *health) error {
	var b bytes.Buffer
	head := func(name, kind, help string) { fmt.Fprintf(&b, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind) }
	one := func(name, kind, help string, v float64) {
		head(name, kind, help)
		fmt.Fprintf(&b, "%s %s\n", name, strconv.FormatFloat(v, 'f', -1, 64))
	}
	m.mu.Lock()
	routes, batches := maps.Clone(m.routes), maps.Clone(m.batchSizes)
	m.mu.Unlock()
	head("goods_http_requests_total", "counter", "Requests answered; status 499: the client went away.")
	for _, name := range slices.Sorted(maps.Keys(routes)) {
		r := routes[name]
		r.mu.Lock()
		for _, status := range slices.Sorted(maps.Keys(r.statuses)) {
			fmt.Fprintf(&b, "goods_http_requests_total{route=%q,status=\"%d\"} %d\n", name, status, r.statuses[status])
		}
		r.mu.Unlock()
	}
	head("goods_http_request_duration_seconds", "histogram", "Time from a request's header to its reply.")
	for _, name := range slices.Sorted(maps.Keys(routes)) {
		routes[name].latency.write(&b, "goods_http_request_duration_seconds", fmt.Sprintf("route=%q", name))
	}
	head("goods_batch_size", "histogram", "Requests that travelled together.")
	for _, name := range slices.Sorted(maps.Keys(batches)) {
		batches[name].write(&b, "goods_batch_size", fmt.Sprintf("batch=%q", name))
	}
	counters := []struct {
		name, help string
		n          *atomic.Int64
	}{
		{"goods_cache_hits_total", "Goods found in Redis.", &m.cacheHits},
		{"goods_cache_misses_total", "Goods not found in Redis.", &m.cacheMisses},
		{"goods_cache_refused_fills_total", "Goods not cached because a write came between.", &m.cacheRefused},
		{"goods_cache_errors_total", "Failed exchanges with Redis.", &m.cacheErrors},
		{"goods_events_published_total", "Events acknowledged by NATS.", &m.published},
		{"goods_events_requeued_total", "Events that NATS lost and that travel again.", &m.requeued},
		{"goods_events_inserted_total", "Events inserted into ClickHouse, repeats among them.", &m.inserted},
		{"goods_events_batches_total", "INSERTs into ClickHouse.", &m.batches},
		{"goods_events_insert_failures_total", "Failed INSERTs into ClickHouse.", &m.insertFailures},
		{"goods_events_thrown_away_total", "Messages that were no events.", &m.thrownAway},
	}
	for _, c := range counters {
		one(c.name, "counter", c.help, float64(c.n.Load()))
	}
	one("goods_outbox_rows", "gauge", "Events that ClickHouse does not hold yet.", float64(m.outboxRows.Load()))
	one("goods_outbox_oldest_age_seconds", "gauge", "Age of the oldest of them.", float64(m.outboxAge.Load())/1000)
	one("goods_stream_backlog_messages", "gauge", "Messages in the NATS stream.", float64(m.backlog.Load()))
	head("goods_dependency_up", "gauge", "Whether the server can be used, 1 or 0.")
	for _, d := range []*dependency{h.postgres, h.redis, h.nats, h.clickhouse} {
		up := 0
		if d.up() {
			up = 1
		}
		fmt.Fprintf(&b, "goods_dependency_up{name=%q} %d\n", d.name, up)
	}
	pool := m.db.Stats()
	one("goods_postgres_connections_max", "gauge", "Most connections the pool may open.", float64(pool.MaxOpenConnections))
	one("goods_postgres_connections_open", "gauge", "Connections of the pool.", float64(pool.OpenConnections))
	one("goods_postgres_connections_in_use", "gauge", "Connections of the pool in use.", float64(pool.InUse))
	one("goods_postgres_connection_waits_total", "counter", "Waits for a connection of the pool.", float64(pool.WaitCount))
	one("goods_postgres_connection_wait_seconds_total", "counter", "Time waited for a connection of the pool.", pool.WaitDuration.Seconds())
	_, err := w.Write(b.Bytes())
	return err
}
