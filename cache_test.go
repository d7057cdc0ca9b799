package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
)

func (w *world) cacheKey(t testing.TB, position int) string {
	t.Helper()
	return fmt.Sprintf("%s:%d:%d", w.namespace, one[int64](t, w, `SELECT cache_epoch FROM meta`), position)
}

func (w *world) redisDo(t testing.TB, command string, args ...any) any {
	t.Helper()
	conn := w.redis.Get()
	defer conn.Close()
	v, err := conn.Do(command, args...)
	must(t, err)
	return v
}

func TestCacheEntries(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a, b := w.start(t), w.start(t)
	a.stock(t, 3)
	page := a.call(t, "GET", "/goods/list", "").body
	for p := 1; p <= 3; p++ {
		value, err := redis.String(w.redisDo(t, "GET", w.cacheKey(t, p)), nil)
		must(t, err)
		if !strings.Contains(page, value) || !isGood([]byte(value)) {
			t.Errorf("position %d is cached as %s, want the JSON of %s", p, value, page)
		}
		if life := w.redisDo(t, "PTTL", w.cacheKey(t, p)).(int64); life > 60_000 || life < 50_000 {
			t.Errorf("position %d lives %d ms, want 60 s", p, life)
		}
	}
	// What Redis has is what a list shows: the store is not asked.
	planted := `{"id":2,"projectId":1,"name":"planted","description":"","priority":2,"removed":false,"createdAt":"2026-01-02T15:04:05.123456Z"}`
	w.redisDo(t, "SET", w.cacheKey(t, 2), planted)
	if got := b.list(t, 10, 1).Goods[1].Name; got != "planted" {
		t.Errorf("a list shows %q, want what is cached", got)
	}
	for _, edit := range []struct {
		method, path, body string
		dropped, kept      []int
	}{
		{"PATCH", "/goods/update?id=2&projectId=1", `{"name":"2"}`, []int{2}, []int{1, 3}},
		{"PATCH", "/goods/reprioritize?id=1&projectId=1", `{"newPriority":2}`, []int{1, 2}, []int{3}},
		{"DELETE", "/goods/remove?id=3&projectId=1", "", []int{3}, []int{1, 2}},
	} {
		a.list(t, 10, 1)
		if r := a.call(t, edit.method, edit.path, edit.body); r.status != 200 {
			t.Fatalf("%s: got %d %s", edit.path, r.status, r.body)
		}
		for _, p := range edit.dropped {
			if w.redisDo(t, "EXISTS", w.cacheKey(t, p)).(int64) != 0 {
				t.Errorf("%s: position %d is still cached", edit.path, p)
			}
		}
		for _, p := range edit.kept {
			if w.redisDo(t, "EXISTS", w.cacheKey(t, p)).(int64) != 1 {
				t.Errorf("%s: position %d is not cached any more", edit.path, p)
			}
		}
	}
	w.settled(t, 5*time.Second)
}

// Values that are no goods are read around, whatever they are.
func TestCacheStrangeValues(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.start(t)
	a.stock(t, 4)
	w.redisDo(t, "SET", w.cacheKey(t, 1), "nonsense")
	w.redisDo(t, "SET", w.cacheKey(t, 2), "")
	w.redisDo(t, "RPUSH", w.cacheKey(t, 3), "a", "b")
	w.redisDo(t, "SET", w.cacheKey(t, 4), "lease:somebody")
	for range 3 {
		for i, g := range a.list(t, 10, 1).Goods {
			if g.Name != fmt.Sprint(i+1) {
				t.Errorf("position %d shows %q", i+1, g.Name)
			}
		}
	}
}

// A reader is held between its read of Postgres and its fill, while a writer
// commits: the fill comes too late, and must not be kept.
func TestCacheRefusesStaleFill(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := newProxy(t, w.env["REDIS_URL"])
	held := p.hold("EVALSHA")
	reader, writer := w.start(t, "REDIS_URL=redis://"+p.addr), w.start(t)
	writer.create(t, "old")
	// The script must be known, or the fill would fail for that reason.
	w.redisDo(t, "SCRIPT", "LOAD", fillSource)

	if got := reader.list(t, 10, 1).Goods[0].Name; got != "old" {
		t.Fatalf("the reader got %q", got)
	}
	<-held.arrived
	want[good](t, writer, 200, "PATCH", "/goods/update?id=1&projectId=1", `{"name":"new"}`)
	close(held.release)
	<-held.passed

	for _, a := range []*app{writer, reader} {
		if got := a.list(t, 10, 1).Goods[0].Name; got != "new" {
			t.Errorf("a list shows %q after the answer to the update", got)
		}
	}
	w.settled(t, 5*time.Second)
}

// A replica that can not reach Redis writes, while another has cached what it
// overwrites: the other's lists must show the write all the same.
func TestCacheWriterWithoutRedis(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := newProxy(t, w.env["REDIS_URL"])
	cut, other := w.start(t, "REDIS_URL=redis://"+p.addr), w.start(t)
	cut.create(t, "0")
	other.list(t, 10, 1)
	p.close()
	for i := range 5 {
		name := fmt.Sprint(i + 1)
		want[good](t, cut, 200, "PATCH", "/goods/update?id=1&projectId=1", `{"name":"`+name+`"}`)
		for range 2 { // from Postgres, and then from Redis
			if got := other.list(t, 10, 1).Goods[0].Name; got != name {
				t.Errorf("the other replica shows %q, want %q", got, name)
			}
		}
	}
	w.settled(t, 5*time.Second)
}

// A transaction that lost its client may still commit, behind a writer that
// can not wait for it: until it no longer can, the cache is not used, and what
// it holds by then is out of reach.
func TestCacheAfterDoubt(t *testing.T) {
	w := newWorld(t)
	s := newService(t, w.getenv())
	must(t, errorOf(s.insertGoods(t.Context(), []createRequest{{1, "good", ""}})))
	hits := func() int64 {
		t.Helper()
		before := s.counts.cacheHits.Load()
		must(t, serveTogether(t, &s.lists, listRequest{1, 1})[0].err)
		return s.counts.cacheHits.Load() - before
	}
	epoch := func() int { return one[int](t, w, `SELECT cache_epoch FROM meta`) }
	hits()
	if hits() != 1 {
		t.Fatal("a good that was listed is not cached")
	}

	before := epoch()
	s.doubtAt.Store(time.Now().UnixNano())
	s.settleDoubt(t.Context())
	if got := hits(); got != 0 || epoch() != before {
		t.Errorf("in doubt: %d goods from the cache, epoch %d; want 0, and still %d", got, epoch(), before)
	}
	s.doubtAt.Store(time.Now().Add(-doubtLife).UnixNano())
	s.settleDoubt(t.Context())
	if got := hits(); got != 0 || epoch() <= before {
		t.Errorf("settled: %d goods from the old cache, epoch %d; want 0, and more than %d", got, epoch(), before)
	}
	if hits() != 1 {
		t.Error("the cache is not used again")
	}
}

func TestCacheReadersAndWriters(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a, b := w.start(t), w.start(t)
	const goods = 12
	var answered [goods + 1]atomic.Int64 // the last answered update, by good
	for range goods {
		a.create(t, "0")
	}
	stop := time.After(3 * time.Second)
	var done atomic.Bool
	go func() { <-stop; done.Store(true) }()
	var reads, writes atomic.Int64
	together(12, func(i int) {
		service := []*app{a, b}[i%2]
		for n := 1; !done.Load(); n++ {
			switch {
			case i < 4: // each good has one writer
				id := 1 + i + 4*(n%3)
				want[good](t, service, 200, "PATCH", fmt.Sprintf("/goods/update?id=%d&projectId=1", id), fmt.Sprintf(`{"name":"%d"}`, n))
				answered[id].Store(int64(n))
				writes.Add(1)
			case i == 4:
				path := fmt.Sprintf("/goods/reprioritize?id=%d&projectId=1", 1+n%goods)
				service.call(t, "PATCH", path, fmt.Sprintf(`{"newPriority":%d}`, 1+n*7%goods))
			default:
				var before [goods + 1]int64
				for id := range before {
					before[id] = answered[id].Load()
				}
				for _, g := range service.list(t, goods, 1).Goods {
					var seen int64
					fmt.Sscan(g.Name, &seen)
					if seen < before[g.ID] {
						t.Errorf("good %d shows update %d, and %d was answered before", g.ID, seen, before[g.ID])
					}
				}
				reads.Add(1)
			}
		}
	})
	t.Logf("%d reads, %d writes", reads.Load(), writes.Load())
	w.settled(t, 20*time.Second)
}

// Redis is optional: without it, or with something else in its place, every
// call is served, and none waits long for it.
func TestWithoutRedis(t *testing.T) {
	t.Parallel()
	for name, serve := range map[string]func(net.Conn){
		"stopped": nil,
		"frozen":  func(c net.Conn) { _, _ = io.Copy(io.Discard, c) },
		"nonsense": func(c net.Conn) {
			for b := make([]byte, 4096); ; {
				if _, err := c.Read(b); err != nil {
					return
				}
				_, _ = c.Write([]byte("*2\r\n$3\r\nfoo\r\n:12\r\n?nonsense\r\n"))
			}
		},
		"hanging up":       func(net.Conn) {},
		"another protocol": func(c net.Conn) { _, _ = c.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n")) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			must(t, err)
			if serve == nil {
				listener.Close()
			} else {
				t.Cleanup(func() { listener.Close() })
				go func() {
					for {
						c, err := listener.Accept()
						if err != nil {
							return
						}
						go func() { serve(c); c.Close() }()
					}
				}()
			}
			w := newWorld(t)
			a := w.start(t, "REDIS_URL=redis://"+listener.Addr().String())
			for i := range 8 {
				start := time.Now()
				a.create(t, fmt.Sprint(i+1))
				if l := a.list(t, 10, 1); l.Meta.Total != i+1 || len(l.Goods) != i+1 || l.Goods[i].Name != fmt.Sprint(i+1) {
					t.Errorf("got %+v after %d creates", l, i+1)
				}
				want[good](t, a, 200, "PATCH", "/goods/update?id=1&projectId=1", `{"name":"1"}`)
				if took := time.Since(start); took > 2*time.Second {
					t.Errorf("three calls took %v", took)
				}
			}
			w.settled(t, 5*time.Second)
		})
	}
}

// proxy stands between a service and a server.
type proxy struct {
	addr     string
	server   string
	listener net.Listener

	// spoil, if there is one, gets every part of a reply in place of the client;
	// its error ends the connection.
	spoil atomic.Pointer[func(client io.Writer, part []byte) error]

	mu    sync.Mutex
	conns []net.Conn
	held  *hold
}

// hold stops what a client sends, once, when it contains a word.
type hold struct {
	word                     []byte
	arrived, release, passed chan struct{}
}

// newProxy forwards connections to the server of rawURL until the test ends.
func newProxy(t testing.TB, rawURL string) *proxy {
	t.Helper()
	u, err := url.Parse(rawURL)
	must(t, err)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	p := &proxy{addr: listener.Addr().String(), server: u.Host, listener: listener}
	t.Cleanup(p.close)
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", p.server)
			if err != nil {
				client.Close()
				continue
			}
			p.mu.Lock()
			p.conns = append(p.conns, client, server)
			p.mu.Unlock()
			go p.reply(client, server)
			go p.forward(server, client)
		}
	}()
	return p
}

// reply copies replies.
func (p *proxy) reply(client, server net.Conn) {
	defer client.Close()
	for b := make([]byte, 64<<10); ; {
		n, err := server.Read(b)
		if err != nil {
			return
		}
		if spoil := p.spoil.Load(); spoil != nil {
			err = (*spoil)(client, b[:n])
		} else {
			_, err = client.Write(b[:n])
		}
		if err != nil {
			return
		}
	}
}

// hold arms the proxy for the first request that contains word.
func (p *proxy) hold(word string) *hold {
	h := &hold{[]byte(word), make(chan struct{}), make(chan struct{}), make(chan struct{})}
	p.mu.Lock()
	p.held = h
	p.mu.Unlock()
	return h
}

// forward copies requests. What was held reaches the server even if the
// client has gone meanwhile; passed tells that the server has answered it.
func (p *proxy) forward(server, client net.Conn) {
	defer server.Close()
	for b := make([]byte, 64<<10); ; {
		n, err := client.Read(b)
		if err != nil {
			return
		}
		p.mu.Lock()
		h := p.held
		if h != nil && bytes.Contains(b[:n], h.word) {
			p.held = nil
		} else {
			h = nil
		}
		p.mu.Unlock()
		if h == nil {
			_, _ = server.Write(b[:n])
			continue
		}
		close(h.arrived)
		<-h.release
		direct, err := net.Dial("tcp", p.server)
		if err == nil {
			_, _ = direct.Write(b[:n])
			_, _ = direct.Read(make([]byte, 1024))
			direct.Close()
		}
		close(h.passed)
		return
	}
}

// close cuts every connection and takes no more.
func (p *proxy) close() {
	p.listener.Close()
	p.cut()
}

// cut cuts every connection.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		c.Close()
	}
	p.conns = nil
}
