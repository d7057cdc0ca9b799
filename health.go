package main

import (
	"context"
	"database/sql"
	_ "embed"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
)

const (
	pingInterval = time.Second
	downAfter    = 3 * pingInterval // a server is up while its last answer is not older
	// quietEnd is how long no request may fail until a run of failures has ended.
	quietEnd = 5 * time.Second

	sampleInterval = 2 * time.Second
	// fullSampleInterval is how often the whole outbox is looked at: see outboxSampler.
	fullSampleInterval = time.Minute
)

// health knows which servers can be used, by their names.
type health struct {
	log     *slog.Logger
	pings   map[string]func(context.Context) error
	started time.Time

	mu     sync.Mutex           // guards what follows
	lastOK map[string]time.Time // by server
}

func newHealth(log *slog.Logger, pings map[string]func(context.Context) error) *health {
	return &health{log: log, pings: pings, started: time.Now(), lastOK: map[string]time.Time{}}
}

// watch pings each server forever.
func (h *health) watch() {
	for name, ping := range h.pings {
		go h.watchServer(name, ping)
	}
}

func (h *health) watchServer(name string, ping func(context.Context) error) {
	state := stateLog{log: h.log, name: name}
	for {
		ctx, cancel := context.WithTimeout(context.Background(), downAfter)
		err := ping(ctx)
		cancel()
		if err == nil {
			h.mu.Lock()
			h.lastOK[name] = time.Now()
			h.mu.Unlock()
			state.report(nil)
		} else if !h.up(name) && time.Since(h.started) > downAfter {
			state.report(err)
		}
		time.Sleep(pingInterval)
	}
}

// up reports whether a server answered within the last downAfter.
func (h *health) up(name string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	last, ok := h.lastOK[name]
	return ok && time.Since(last) < downAfter
}

// report returns "up" or "down" for each server.
func (h *health) report() map[string]string {
	states := map[string]string{}
	for name := range h.pings {
		states[name] = "down"
		if h.up(name) {
			states[name] = "up"
		}
	}
	return states
}

// stateLog logs when something begins to fail, with the cause, and when it has recovered. One goroutine may
// use it.
type stateLog struct {
	log     *slog.Logger
	name    string
	failing bool
}

func (s *stateLog) report(err error) {
	switch {
	case err != nil && !s.failing:
		s.log.Warn("failing", "name", s.name, "err", err)
	case err == nil && s.failing:
		s.log.Info("recovered", "name", s.name)
	}
	s.failing = err != nil
}

// runOfErrors does the same for many requests at once, of which some may fail and others not: a run of
// failures has ended when none came for quietEnd. All methods may be called concurrently.
type runOfErrors struct {
	failing atomic.Bool // is cheap to ask

	mu    sync.Mutex // guards what follows
	state stateLog
	last  time.Time // failure
}

func (r *runOfErrors) failed(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.state.report(err)
	r.last = time.Now()
	r.failing.Store(true)
}

func (r *runOfErrors) succeeded() {
	if !r.failing.Load() {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if time.Since(r.last) >= quietEnd {
		r.state.report(nil)
		r.failing.Store(false)
	}
}

// pingPostgres asks for nothing but an answer: how much waits in the outbox may take long to find out.
func (db *database) pingPostgres(context.Context) error {
	return db.query(`SELECT 1`, nil, ignoreRow)
}

//go:embed sql/queries/sample_outbox.sql
var sampleOutbox string

// outboxSampler tells the metrics how much waits in the outbox. Where a long transaction keeps dead rows
// from being vacuumed, it takes long to find the first row after them: so it looks from where it found that
// row before, and only once a fullSampleInterval from the beginning, for rows that were committed late.
type outboxSampler struct {
	db      *database
	metrics *metrics

	lowest   int64     // id, when there was a row
	lastFull time.Time // sample
}

// run samples forever.
func (s *outboxSampler) run() {
	for {
		if err := s.sample(); err == nil {
			s.metrics.outboxSampled.Store(time.Now().UnixMilli())
		}
		time.Sleep(sampleInterval)
	}
}

func (s *outboxSampler) sample() error {
	from := s.lowest
	full := time.Since(s.lastFull) >= fullSampleInterval
	if full {
		from = 0
	}
	var count, ageMillis int64 // of no rows
	err := s.db.query(sampleOutbox, []any{from}, func(rows *sql.Rows) error {
		return rows.Scan(&s.lowest, &count, &ageMillis)
	})
	if err != nil {
		return err
	}
	s.metrics.outboxRows.Store(count)
	s.metrics.outboxAgeMillis.Store(ageMillis)
	if full {
		s.lastFull = time.Now()
	}
	return nil
}
