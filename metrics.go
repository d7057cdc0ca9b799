package main

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// metrics counts what the service does, for /metrics. Writing it asks no server: what they know is sampled
// elsewhere. Prometheus' own library would be a fifth dependency, with a dozen more of its own. The counters
// may be used concurrently.
type metrics struct {
	started time.Time
	db      *database
	routes  map[string]*routeMetrics // by path; filled before the first request is served, as is sizes
	sizes   map[string]*histogram    // of batches, by the name of their batcher

	cacheHits, cacheMisses, cacheErrors atomic.Int64
	published, requeued, inserted       atomic.Int64 // events
	rejected                            atomic.Int64 // messages
	inserts, insertFailures             atomic.Int64 // INSERTs
	outboxRows, outboxAgeMillis         atomic.Int64
	outboxSampled                       atomic.Int64 // when the two were read, in Unix milliseconds
	backlog                             atomic.Int64 // messages in the stream
}

func newMetrics(db *database) *metrics {
	return &metrics{
		started: time.Now(),
		db:      db,
		routes:  map[string]*routeMetrics{},
		sizes:   map[string]*histogram{},
	}
}

// routeMetrics counts the requests of one route.
type routeMetrics struct {
	latency  *histogram        // seconds
	statuses [600]atomic.Int64 // requests, by the status of their reply
}

func (m *routeMetrics) observe(status int, took time.Duration) {
	m.latency.observe(took.Seconds())
	m.statuses[status].Add(1)
}

// addRoute returns the metrics of a new route.
func (m *metrics) addRoute(path string) *routeMetrics {
	r := &routeMetrics{
		latency: newHistogram(.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5),
	}
	m.routes[path] = r
	return r
}

// addBatcher returns the histogram of the sizes of a new batcher's batches.
func (m *metrics) addBatcher(name string) *histogram {
	h := newHistogram(1, 2, 4, 8, 16, 32, 64)
	m.sizes[name] = h
	return h
}

// histogram counts observations by ranges. It may be used concurrently.
type histogram struct {
	bounds []float64 // upper bounds, which belong to their range

	mu     sync.Mutex // guards what follows
	counts []int64    // by range; the last one has no upper bound
	sum    float64
}

func newHistogram(bounds ...float64) *histogram {
	return &histogram{bounds: bounds, counts: make([]int64, len(bounds)+1)}
}

func (h *histogram) observe(v float64) {
	i, _ := slices.BinarySearch(h.bounds, v)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.counts[i]++
	h.sum += v
}

// write prints the histogram in Prometheus' text format, with a label such as `route="/x"`.
func (h *histogram) write(w io.Writer, name, label string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	total := int64(0)
	for i, bound := range h.bounds {
		total += h.counts[i]
		fmt.Fprintf(w, "%s_bucket{%s,le=\"%g\"} %d\n", name, label, bound, total)
	}
	total += h.counts[len(h.bounds)]
	fmt.Fprintf(w, "%s_bucket{%s,le=\"+Inf\"} %d\n", name, label, total)
	fmt.Fprintf(w, "%s_sum{%s} %g\n", name, label, h.sum)
	fmt.Fprintf(w, "%s_count{%s} %d\n", name, label, total)
}

// text returns everything in Prometheus' text format.
func (m *metrics) text(h *health) []byte {
	var b bytes.Buffer
	m.writeRequests(&b)
	writeHead(&b, "goods_batch_size", "histogram", "Requests that were answered together.")
	for _, name := range slices.Sorted(maps.Keys(m.sizes)) {
		m.sizes[name].write(&b, "goods_batch_size", fmt.Sprintf("batch=%q", name))
	}
	writeHead(&b, "goods_dependency_up", "gauge", "Whether the server can be used, 1 or 0.")
	for _, name := range slices.Sorted(maps.Keys(h.pings)) {
		up := 0
		if h.up(name) {
			up = 1
		}
		fmt.Fprintf(&b, "goods_dependency_up{name=%q} %d\n", name, up)
	}
	writeHead(&b, "goods_build_info", "gauge", "The program, always 1.")
	version, revision := buildVersion()
	fmt.Fprintf(&b, "goods_build_info{version=%q,revision=%q,goversion=%q} 1\n",
		version, revision, runtime.Version())
	m.writeNumbers(&b)
	return b.Bytes()
}

func (m *metrics) writeRequests(w io.Writer) {
	const total, duration = "goods_http_requests_total", "goods_http_request_duration_seconds"
	routes := slices.Sorted(maps.Keys(m.routes))
	writeHead(w, total, "counter", "Requests answered; status 499: the client went away.")
	for _, route := range routes {
		statuses := &m.routes[route].statuses
		for status := range statuses {
			if n := statuses[status].Load(); n > 0 {
				fmt.Fprintf(w, "%s{route=%q,status=\"%d\"} %d\n", total, route, status, n)
			}
		}
	}
	writeHead(w, duration, "histogram", "Time from a request's header to the end of its reply.")
	for _, route := range routes {
		m.routes[route].latency.write(w, duration, fmt.Sprintf("route=%q", route))
	}
}

// writeNumbers writes the metrics that have one value. Those whose name ends in _total are counters.
func (m *metrics) writeNumbers(w io.Writer) {
	number := func(name string, value float64, help string) {
		kind := "gauge"
		if strings.HasSuffix(name, "_total") {
			kind = "counter"
		}
		writeHead(w, name, kind, help)
		fmt.Fprintf(w, "%s %s\n", name, strconv.FormatFloat(value, 'f', -1, 64))
	}
	count := func(name string, value *atomic.Int64, help string) {
		number(name, float64(value.Load()), help)
	}
	count("goods_cache_hits_total", &m.cacheHits, "Goods of lists that were cached.")
	count("goods_cache_misses_total", &m.cacheMisses, "Goods of lists that were not cached.")
	count("goods_cache_errors_total", &m.cacheErrors, "Failed exchanges with Redis.")
	count("goods_events_published_total", &m.published, "Events acknowledged by NATS.")
	count("goods_events_requeued_total", &m.requeued, "Events that NATS lost, and that are published again.")
	count("goods_events_inserted_total", &m.inserted, "Events inserted into ClickHouse, repeats among them.")
	count("goods_events_batches_total", &m.inserts, "INSERTs into ClickHouse.")
	count("goods_events_insert_failures_total", &m.insertFailures, "Failed INSERTs into ClickHouse.")
	count("goods_events_rejected_total", &m.rejected, "Messages in the stream that were no events.")
	count("goods_outbox_rows", &m.outboxRows,
		"Events that ClickHouse does not hold yet, and gaps between them.")
	number("goods_outbox_oldest_age_seconds", float64(m.outboxAgeMillis.Load())/1000,
		"Age of the oldest of them.")
	sampled := time.UnixMilli(m.outboxSampled.Load())
	number("goods_outbox_sample_age_seconds", max(time.Since(sampled).Seconds(), 0),
		"Age of these two figures.")
	count("goods_stream_backlog_messages", &m.backlog, "Messages in the NATS stream.")

	pool := m.db.Stats()
	number("goods_postgres_connections_max", float64(pool.MaxOpenConnections),
		"Most connections the pool may open.")
	number("goods_postgres_connections_open", float64(pool.OpenConnections), "Connections of the pool.")
	number("goods_postgres_connections_in_use", float64(pool.InUse), "Connections of the pool in use.")
	number("goods_postgres_connection_waits_total", float64(pool.WaitCount),
		"Waits for a connection of the pool.")
	number("goods_postgres_connection_wait_seconds_total", pool.WaitDuration.Seconds(),
		"Time waited for a connection of the pool.")

	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	number("go_goroutines", float64(runtime.NumGoroutine()), "Goroutines that exist.")
	number("go_memstats_heap_alloc_bytes", float64(mem.HeapAlloc), "Heap bytes in use by objects.")
	number("go_memstats_sys_bytes", float64(mem.Sys), "Bytes obtained from the system.")
	number("go_memstats_alloc_bytes_total", float64(mem.TotalAlloc), "Heap bytes allocated so far.")
	number("go_gc_cycles_total", float64(mem.NumGC), "Garbage collections so far.")
	number("process_start_time_seconds", float64(m.started.Unix()), "Start of the process, in Unix time.")
}

func writeHead(w io.Writer, name, kind, help string) {
	fmt.Fprintf(w, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
}
