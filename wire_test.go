//go:build faults || soak

package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func (a *app) dial() (net.Conn, error) { return net.Dial("tcp", strings.TrimPrefix(a.url, "http://")) }

// slowClients send a header or a body a byte a second. The service must not
// wait for them for ever.
func slowClients(t testing.TB, s *scene) {
	const header = "POST /goods/create?projectId=1 HTTP/1.1\r\nHost: goods\r\nContent-Length: 1000\r\n\r\n"
	together(64, func(i int) {
		c, err := s.apps[0].dial()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		text, begin := header, time.Now()
		if i%2 == 0 {
			_, _ = c.Write([]byte(header))
			text = `{"name":"` + strings.Repeat("x", 100)
		}
		gone := make(chan struct{})
		go func() {
			defer close(gone)
			_, _ = io.Copy(io.Discard, c)
		}()
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for _, b := range []byte(text) {
			_, _ = c.Write([]byte{b}) // its failure shows in the read, too
			select {
			case <-gone:
				return
			case <-tick.C:
			}
			if time.Since(begin) > 15*time.Second {
				t.Errorf("client %d still has a connection after %v", i, time.Since(begin))
				return
			}
		}
	})
}

// endlessBodies are refused with 413, and no more of them is read.
func endlessBodies(t testing.TB, s *scene) {
	together(16, func(i int) {
		c, err := s.apps[0].dial()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(15 * time.Second))
		_, _ = io.WriteString(c, "POST /goods/create?projectId=1 HTTP/1.1\r\nHost: goods\r\nTransfer-Encoding: chunked\r\n\r\n")
		sent := make(chan int)
		go func() {
			n := 0
			for chunk := "400\r\n" + strings.Repeat("x", 1024) + "\r\n"; ; n++ {
				if _, err := io.WriteString(c, chunk); err != nil {
					sent <- n
					return
				}
			}
		}()
		response, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Errorf("client %d got no answer: %v", i, err)
		} else if response.StatusCode != http.StatusRequestEntityTooLarge {
			t.Errorf("client %d got %s", i, response.Status)
		}
		if n := <-sent; n > 64<<10 {
			t.Errorf("the service took %d KiB from client %d", n, i)
		}
	})
}

func idleClients(t testing.TB, s *scene) {
	const clients = 10_000
	conns := make([]net.Conn, clients)
	defer func() {
		for _, c := range conns {
			if c != nil {
				c.Close()
			}
		}
	}()
	var refused atomic.Int64
	together(64, func(i int) {
		for n := i; n < clients; n += 64 {
			c, err := s.apps[0].dial()
			if err != nil {
				refused.Add(1)
				continue
			}
			conns[n] = c
			// After an answer, a connection may stay idle for long.
			_, _ = io.WriteString(c, "GET /healthz HTTP/1.1\r\nHost: goods\r\n\r\n")
		}
	})
	if n := refused.Load(); n > 0 {
		t.Errorf("%d of %d connections were refused", n, clients)
	}
	s.last(aWhile)
}

// leavingClients give up a create after some milliseconds. It is then done or
// not done.
func leavingClients(t testing.TB, s *scene) {
	begin := time.Now()
	together(16, func(i int) {
		for n := 0; time.Since(begin) < aWhile; n++ {
			name := fmt.Sprintf("leaver-%d-%d", i, n)
			s.load.mu.Lock()
			s.load.doubted = append(s.load.doubted, name)
			s.load.mu.Unlock()
			ctx, cancel := context.WithTimeout(context.Background(), rand.N(30*time.Millisecond))
			request, err := http.NewRequestWithContext(ctx, "POST", s.apps[0].url+"/goods/create?projectId=1",
				strings.NewReader(fmt.Sprintf(`{"name":%q,"description":%q}`, name, name)))
			if err != nil {
				t.Error(err)
				cancel()
				return
			}
			if response, err := client.Do(request); err == nil {
				response.Body.Close()
			}
			cancel()
		}
	})
}
