package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// Redis comes back as it was before a write that it has seen: what the write
// had deleted is in it again.
func TestCacheRedisBackInTime(t *testing.T) {
	t.Parallel()
	own := newServers(t, "redis")
	w := newWorld(t, own.variable(t, "redis"))
	a, b := w.start(t), w.start(t)
	a.create(t, "old")
	b.list(t, 10, 1)
	w.redisDo(t, "SAVE")
	want[good](t, a, 200, "PATCH", "/goods/update?id=1&projectId=1", `{"name":"new"}`)
	own.kill(t, "redis")
	own.sh(t, "start", "redis")
	eventually(t, 10*time.Second, func() error {
		for _, service := range []*app{a, b} {
			if got := service.list(t, 10, 1).Goods[0].Name; got != "new" {
				t.Errorf("a list shows %q, want %q", got, "new")
			}
			if r := service.call(t, "GET", "/readyz", ""); r.body != `{"postgres":"up","redis":"up","nats":"up","clickhouse":"up"}`+"\n" {
				return fmt.Errorf("not ready: %s", r.body)
			}
		}
		return nil
	})
	for _, service := range []*app{a, b} {
		if got := service.list(t, 10, 1).Goods[0].Name; got != "new" {
			t.Errorf("a list shows %q, want %q", got, "new")
		}
	}
	w.settled(t, 5*time.Second)
}

// NATS loses everything while ClickHouse can not take it, and nothing is
// written afterwards that could show the loss.
func TestEventsNATSEmptiedWhileIdle(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	own := newServers(t, "nats")
	w := newWorld(t, own.variable(t, "nats"))
	a := w.start(t)
	a.create(t, "0")
	w.settled(t, 5*time.Second)
	must(t, w.clickhouse.Exec(ctx, `RENAME TABLE goods_log TO away`))
	a.stock(t, 11)
	w.waiting(t, 11)
	own.kill(t, "nats")
	must(t, os.RemoveAll(filepath.Join(own.dir, "nats")))
	own.sh(t, "start", "nats")
	must(t, w.clickhouse.Exec(ctx, `RENAME TABLE away TO goods_log`))
	if n := w.settled(t, 40*time.Second); n != 12 {
		t.Errorf("got %d events, want 12", n)
	}
}
