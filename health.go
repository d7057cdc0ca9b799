package main

import (
	"encoding/json"
	"log/slog"
	"sync"
)

// health is the state of the four servers.
type health struct {
	postgres, redis, nats, clickhouse *dependency
}

func newHealth(log *slog.Logger) *health {
	d := func(name string) *dependency { return &dependency{name: name, log: log, failing: map[string]error{}} }
	return &health{d("postgres"), d("redis"), d("nats"), d("clickhouse")}
}

// MarshalJSON has one field a server.
func (h *health) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		Postgres   *dependency `json:"postgres"`
		Redis      *dependency `json:"redis"`
		NATS       *dependency `json:"nats"`
		ClickHouse *dependency `json:"clickhouse"`
	}{h.postgres, h.redis, h.nats, h.clickhouse})
}

// dependency is a server that may come and go. Several parts of the service
// report on it; it is up while none of them fails. Only changes are logged.
type dependency struct {
	name string
	log  *slog.Logger

	mu      sync.Mutex
	known   bool // somebody has reported
	failing map[string]error
}

// report notes how the last use by one part of the service went.
func (d *dependency) report(part string, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	was := len(d.failing) == 0
	if err != nil {
		d.failing[part] = err
	} else {
		delete(d.failing, part)
	}
	now := len(d.failing) == 0
	switch {
	case was && !now:
		d.log.Warn("dependency is down", "name", d.name, "part", part, "err", err)
	case !was && now:
		d.log.Info("dependency is up again", "name", d.name)
	}
	d.known = true
}

func (d *dependency) up() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.known && len(d.failing) == 0
}

// MarshalText says "up" or "down".
func (d *dependency) MarshalText() ([]byte, error) {
	if d.up() {
		return []byte("up"), nil
	}
	return []byte("down"), nil
}
