package test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"

	"goods/test/harness"
)

// A reply of Postgres or ClickHouse that ends in the middle is taken for none, rather than for a short one.
func TestRepliesCutShort(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	proxies := []*harness.Proxy{w.NewProxy(t, "POSTGRES_URL"), w.NewProxy(t, "CLICKHOUSE_URL")}
	a := w.Start(t, "EVENTS_BATCH=50")
	makeGoods(t, w, 300)
	w.Exec(t, `UPDATE goods SET description = repeat('d', 2000) WHERE id <= 2`)
	w.Settled(t, 15*time.Second)
	harness.Eventually(t, 15*time.Second, a.Ready)
	cut := func(to net.Conn, part []byte) error {
		if len(part) < 1500 {
			return harness.Forward(to, part)
		}
		_, _ = to.Write(part[:len(part)/2])
		return io.ErrClosedPipe
	}
	for _, p := range proxies {
		p.Spoil(harness.Forward, cut)
	}
	requests := []call{
		{"GET", "/goods/list?limit=300", ""}, // which versions are on the page is long
		{"GET", "/goods/list?limit=300&projectId=1", ""},
		{"GET", "/goods/list?limit=2", ""}, // the goods are
		{"GET", "/goods/list?limit=2&projectId=1", ""},
		{"GET", "/goods/get" + target(1), ""},
		{"GET", "/goods/history" + target(1), ""},
		{"PATCH", "/goods/update" + target(1), someName},
	}
	for _, q := range requests {
		for range 2 {
			refused(t, a, 8, q.method, q.path, q.body)
		}
	}
	for _, p := range proxies {
		p.Pass()
	}
	for _, q := range requests {
		harness.Eventually(t, 15*time.Second, func() error {
			if r := a.Call(t, q.method, q.path, q.body); r.Status != 200 {
				return fmt.Errorf("%s: got %d %s", q.path, r.Status, r.Body)
			}
			return nil
		})
	}
	w.Settled(t, 15*time.Second)
}

// overlaps is a hook for replies of Postgres. It counts those that begin or go on while another one is on its
// way, and slows them down. Those of less than 4 KiB do not count.
type overlaps struct {
	mu    sync.Mutex // guards what follows
	open  map[net.Conn]bool
	count int
}

func (o *overlaps) pass(to net.Conn, part []byte) error {
	o.mu.Lock()
	if len(part) >= 4<<10 {
		o.open[to] = true
		if len(o.open) > 1 {
			o.count++
		}
	}
	if bytes.HasSuffix(part, []byte("Z\x00\x00\x00\x05I")) { // ReadyForQuery
		delete(o.open, to)
	}
	o.mu.Unlock()
	<-time.After(time.Millisecond)
	return harness.Forward(to, part)
}

// Pages of long texts are right, also those that many ask for at once. They are read one after the other, as
// each may need much memory, and none of them fills Redis.
func TestLargePages(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	w.Unchecked = true // to compare them with openapi.yaml takes long
	p := w.NewProxy(t, "POSTGRES_URL")
	a := w.Start(t, nowhere)
	const goods = 40
	w.Exec(t, `INSERT INTO campaigns (name) VALUES ('second')`)
	w.Exec(t, fmt.Sprintf(`
INSERT INTO goods (project_id, name, description)
SELECT 1 + n %% 2, n::text, repeat(CASE WHEN n %% 4 = 1 THEN E'\x01' ELSE '日' END, 10000)
FROM generate_series(1, %d) AS n`, goods))
	published(t, w)                   // no other long texts are on their way afterwards
	known := map[int][]harness.Good{} // by project, 0 is all
	for id := 1; id <= goods; id++ {
		path := fmt.Sprintf("/goods/get?id=%d&projectId=%d", id, 1+id%2)
		g := harness.Want[harness.Good](t, a, 200, "GET", path, "")
		known[0] = append(known[0], g)
		known[g.ProjectID] = append(known[g.ProjectID], g)
	}
	pages := []struct{ project, limit, offset int }{
		{0, 40, 1}, {1, 20, 1}, {2, 20, 1}, {0, 15, 11}, {1, 15, 4}, {2, 15, 4},
	}
	check := func(i int) {
		page := pages[i%len(pages)]
		path := fmt.Sprintf("/goods/list?limit=%d&offset=%d", page.limit, page.offset)
		if page.project != 0 {
			path += fmt.Sprint("&projectId=", page.project)
		}
		var got harness.ListReply
		harness.AwaitEqual(t, 30*time.Second, func() int { // on a busy machine some wait too long for the others
			reply := a.Call(t, "GET", path, "")
			harness.Must(t, json.Unmarshal([]byte(reply.Body), &got))
			return reply.Status
		}, 200, "status of %s", path)
		meta := fmt.Sprintf("{%d 0 %d %d}", len(known[page.project]), page.limit, page.offset)
		harness.Equal(t, fmt.Sprint(got.Meta), meta, "meta of %s", path)
		want := known[page.project][page.offset-1:][:page.limit]
		if len(got.Goods) != len(want) {
			t.Fatalf("%s: got %d goods, want %d", path, len(got.Goods), len(want))
		}
		for i, g := range got.Goods {
			if g != want[i] { // whose descriptions are long
				t.Errorf("%s: got good %d with %d bytes, want %d with %d", path,
					g.ID, len(g.Description), want[i].ID, len(want[i].Description))
			}
		}
	}
	check(1)
	// Each good counts once.
	harness.Equal(t, value(t, a, "goods_cache_misses_total", ""), 20.0, "goods that were not cached")
	large := &overlaps{open: map[net.Conn]bool{}}
	p.Spoil(harness.Forward, large.pass)
	harness.Together(3*len(pages), check)
	p.Pass()
	harness.Equal(t, large.count, 0, "parts of a large page that was read while another was")
	keys, err := redis.Strings(w.Redis(t, "KEYS", w.Namespace+":*:*:*"), nil)
	harness.Must(t, err)
	harness.Equal(t, strings.Join(keys, " "), "", "goods of large pages in Redis")
}
