package main

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

const (
	pingInterval = time.Second
	downAfter    = 3 * pingInterval // a server is up while its last answer is not older
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

// watch begins to ping each server, which goes on forever.
func (h *health) watch() {
	for name, ping := range h.pings {
		go h.watchServer(name, ping)
	}
}

func (h *health) watchServer(name string, ping func(context.Context) error) {
	state := &stateLog{log: h.log, name: name}
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
