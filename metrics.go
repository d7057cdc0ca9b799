package main

import (
	"bytes"
	"context"
	"database/sql"
	_ "embed"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Each server is tried every pingEvery, and up while the last success is less than downAfter ago.
const pingEvery, downAfter = time.Second, 3 * time.Second

var started = time.Now()

// health is the state of the servers, by name.
type health struct {
	log    *slog.Logger
	pings  map[string]func(context.Context) error
	lastOK sync.Map // name -> time.Time
}

// watch tries each server forever.
func (h *health) watch() {
	for name, ping := range h.pings {
		go func() {
			for state := (state{log: h.log, name: name}); ; time.Sleep(pingEvery) {
				ctx, cancel := context.WithTimeout(context.Background(), downAfter)
				err := ping(ctx)
				cancel()
				if err == nil {
					h.lastOK.Store(name, time.Now())
				}
				if err == nil || !h.up(name) && time.Since(started) > downAfter {
					state.report(err)
				}
			}
		}()
	}
}

func (h *health) up(name string) bool {
	last, ok := h.lastOK.Load(name)
	return ok && time.Since(last.(time.Time)) < downAfter
}

// state is how a part of the service does. Only changes are logged.
type state struct {
	log     *slog.Logger
	name    string
	failing bool
}

func (s *state) report(err error) {
	if err != nil && !s.failing {
		s.log.Warn("failing", "name", s.name, "err", err)
	} else if err == nil && s.failing {
		s.log.Info("recovered", "name", s.name)
	}
	s.failing = err != nil
}

// report has one field a server, "up" or "down".
func (h *health) report() map[string]string {
	fields := map[string]string{}
	for name := range h.pings {
		fields[name] = map[bool]string{true: "up", false: "down"}[h.up(name)]
	}
	return fields
}

// histogram counts observations by their upper bounds.
type histogram struct {
	bounds []float64
	mu     sync.Mutex // guards what follows
	counts [16]int64  // by bound, and past the last one
	sum    float64
}

func (h *histogram) observe(v float64) {
	i, _ := slices.BinarySearch(h.bounds, v)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.counts[i]++
	h.sum += v
}

// write prints the histogram under name, with a label such as `route="/x"`.
func (h *histogram) write(w io.Writer, name, label string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	total := int64(0)
	for i, bound := range h.bounds {
		total += h.counts[i]
		fmt.Fprintf(w, "%s_bucket{%s,le=\"%g\"} %d\n", name, label, bound, total)
	}
	total += h.counts[len(h.bounds)]
	fmt.Fprintf(w, "%s_bucket{%s,le=\"+Inf\"} %d\n%[1]s_sum{%[2]s} %[4]g\n%[1]s_count{%[2]s} %[3]d\n", name, label, total, h.sum)
}

// routeMetrics counts the requests of one route.
type routeMetrics struct {
	latency  histogram // seconds
	statuses [600]atomic.Int64
}

// metrics counts what the service does, for /metrics. Writing it asks nothing of any server: what they know is
// sampled by the pings.
type metrics struct {
	db     *database
	routes map[string]*routeMetrics // filled before the service listens, as is sizes
	sizes  map[string]*histogram    // of batches

	cacheHits, cacheMisses, cacheErrors atomic.Int64
	published, requeued, thrownAway     atomic.Int64
	inserted, batches, insertFailures   atomic.Int64
	outboxRows, outboxAge, backlog      atomic.Int64 // the age in milliseconds
}

func newMetrics(db *database) *metrics {
	return &metrics{db: db, routes: map[string]*routeMetrics{}, sizes: map[string]*histogram{}}
}

func (m *metrics) route(name string) *routeMetrics {
	m.routes[name] = &routeMetrics{latency: histogram{bounds: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5}}}
	return m.routes[name]
}

func (m *metrics) batch(name string) *histogram {
	m.sizes[name] = &histogram{bounds: []float64{1, 2, 4, 8, 16, 32, 64}}
	return m.sizes[name]
}

//go:embed sql/queries/outbox.sql
var sampleOutbox string

// pingPostgres asks what waits in the outbox.
func (m *metrics) pingPostgres(context.Context) error {
	return m.db.query(nil, sampleOutbox, nil, func(rows *sql.Rows) error {
		var n, age int64
		err := rows.Scan(&n, &age)
		m.outboxRows.Store(n)
		m.outboxAge.Store(age)
		return err
	})
}

// text is everything in Prometheus' text format.
func (m *metrics) text(h *health) []byte {
	var b bytes.Buffer
	head := func(name, kind, help string) { fmt.Fprintf(&b, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind) }
	routes := slices.Sorted(maps.Keys(m.routes))
	head("goods_http_requests_total", "counter", "Requests answered; status 499: the client went away.")
	for _, name := range routes {
		for status := range m.routes[name].statuses {
			if n := m.routes[name].statuses[status].Load(); n > 0 {
				fmt.Fprintf(&b, "goods_http_requests_total{route=%q,status=\"%d\"} %d\n", name, status, n)
			}
		}
	}
	head("goods_http_request_duration_seconds", "histogram", "Time from a request's header to its reply.")
	for _, name := range routes {
		m.routes[name].latency.write(&b, "goods_http_request_duration_seconds", fmt.Sprintf("route=%q", name))
	}
	head("goods_batch_size", "histogram", "Requests that travelled together.")
	for _, name := range slices.Sorted(maps.Keys(m.sizes)) {
		m.sizes[name].write(&b, "goods_batch_size", fmt.Sprintf("batch=%q", name))
	}
	head("goods_dependency_up", "gauge", "Whether the server can be used, 1 or 0.")
	for _, name := range slices.Sorted(maps.Keys(h.pings)) {
		fmt.Fprintf(&b, "goods_dependency_up{name=%q} %d\n", name, map[bool]int{true: 1}[h.up(name)])
	}
	head("goods_build_info", "gauge", "The program, always 1.")
	fmt.Fprintf(&b, "goods_build_info{version=%q,goversion=%q} 1\n", version, runtime.Version())
	pool := m.db.Stats()
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	for _, v := range []struct {
		name, help string
		value      float64
	}{
		{"goods_cache_hits_total", "Goods of lists that were cached.", float64(m.cacheHits.Load())},
		{"goods_cache_misses_total", "Goods of lists that were not cached.", float64(m.cacheMisses.Load())},
		{"goods_cache_errors_total", "Failed exchanges with Redis.", float64(m.cacheErrors.Load())},
		{"goods_events_published_total", "Events acknowledged by NATS.", float64(m.published.Load())},
		{"goods_events_requeued_total", "Events that NATS lost and that travel again.", float64(m.requeued.Load())},
		{"goods_events_inserted_total", "Events inserted into ClickHouse, repeats among them.", float64(m.inserted.Load())},
		{"goods_events_batches_total", "INSERTs into ClickHouse.", float64(m.batches.Load())},
		{"goods_events_insert_failures_total", "Failed INSERTs into ClickHouse.", float64(m.insertFailures.Load())},
		{"goods_events_thrown_away_total", "Messages that were no events.", float64(m.thrownAway.Load())},
		{"goods_outbox_rows", "Events that ClickHouse does not hold yet, and gaps between them.", float64(m.outboxRows.Load())},
		{"goods_outbox_oldest_age_seconds", "Age of the oldest of them.", float64(m.outboxAge.Load()) / 1000},
		{"goods_stream_backlog_messages", "Messages in the NATS stream.", float64(m.backlog.Load())},
		{"goods_postgres_connections_max", "Most connections the pool may open.", float64(pool.MaxOpenConnections)},
		{"goods_postgres_connections_open", "Connections of the pool.", float64(pool.OpenConnections)},
		{"goods_postgres_connections_in_use", "Connections of the pool in use.", float64(pool.InUse)},
		{"goods_postgres_connection_waits_total", "Waits for a connection of the pool.", float64(pool.WaitCount)},
		{"goods_postgres_connection_wait_seconds_total", "Time waited for a connection of the pool.", pool.WaitDuration.Seconds()},
		{"go_goroutines", "Goroutines that exist.", float64(runtime.NumGoroutine())},
		{"go_memstats_heap_alloc_bytes", "Heap bytes in use by objects.", float64(mem.HeapAlloc)},
		{"go_memstats_sys_bytes", "Bytes obtained from the system.", float64(mem.Sys)},
		{"go_memstats_alloc_bytes_total", "Heap bytes allocated so far.", float64(mem.TotalAlloc)},
		{"go_gc_cycles_total", "Garbage collections so far.", float64(mem.NumGC)},
		{"process_start_time_seconds", "Start of the process, in Unix time.", float64(started.Unix())},
	} {
		kind := "gauge"
		if strings.HasSuffix(v.name, "_total") {
			kind = "counter"
		}
		head(v.name, kind, v.help)
		fmt.Fprintf(&b, "%s %s\n", v.name, strconv.FormatFloat(v.value, 'f', -1, 64))
	}
	return b.Bytes()
}
