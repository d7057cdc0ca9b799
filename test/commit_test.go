package test

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"goods/test/harness"
)

// The connection breaks at the COMMIT of a write: before Postgres has it, or before the service hears of it. The
// client gets 503 and the service does not repeat it; the client may.
func TestCommitOfUnknownOutcome(t *testing.T) {
	t.Parallel()
	for _, delivered := range []bool{false, true} {
		for _, call := range calls[:4] {
			t.Run(fmt.Sprint(call.path[7:13], " delivered ", delivered), func(t *testing.T) {
				t.Parallel()
				w := harness.NewWorld(t)
				p := w.NewProxy(t, "POSTGRES_URL")
				// Without NATS the relay is quiet: only requests commit.
				a := w.Start(t, "NATS_URL=nats://127.0.0.1:1")
				a.Stock(t, 3)
				a.List(t, 10, 1) // is cached now
				state := func() string {
					return harness.One[string](t, w, `SELECT string_agg(concat(id, name, priority, ' ', removed::text), ', ' ORDER BY id) FROM goods`)
				}
				before := state()
				var commits atomic.Int64
				p.Spoil(func(to net.Conn, part []byte) error {
					if bytes.Contains(part, []byte("COMMIT\x00")) {
						if commits.Add(1); delivered {
							_, _ = to.Write(part)
						}
						return io.ErrClosedPipe
					}
					_, err := to.Write(part)
					return err
				}, nil)
				const key = keyHeader + "once"
				body := strings.Replace(call.body, "1", "3", 1) // a move that moves
				refused(t, a, 8, call.method, call.path, body, key)
				p.Pass()
				harness.Equal(t, commits.Load(), 1, "commits")
				harness.Eventually(t, 10*time.Second, func() error {
					if changed := state() != before; changed != delivered {
						return fmt.Errorf("Postgres has %s, before %s", state(), before)
					}
					return nil
				})
				done := state()
				var listed []string // whichever it was, the cache must not hide it
				goods := a.List(t, 10, 1).Goods
				slices.SortFunc(goods, func(a, b harness.Good) int { return a.ID - b.ID })
				for _, g := range goods {
					listed = append(listed, fmt.Sprint(g.ID, g.Name, g.Priority, g.Removed))
				}
				harness.Equal(t, strings.Join(listed, ", "), done, "list")
				status := 200
				if call.method == "POST" && !delivered {
					status = 201
				} else if call.method == "DELETE" && delivered {
					status = 404
				}
				harness.Equal(t, a.Call(t, call.method, call.path, body, key).Status, status, "repeated")
				if delivered {
					harness.Equal(t, state(), done, "after it was repeated")
				}
				w.Start(t)
				w.Settled(t, 15*time.Second)
			})
		}
	}
}
