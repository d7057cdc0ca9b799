package faults

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"goods/test/harness"
)

func dial(a *harness.App) (net.Conn, error) {
	return net.Dial("tcp", strings.TrimPrefix(a.URL, "http://"))
}

// slowClients send a header or a body a byte a second. The service must not
// wait for them forever.
func slowClients(t testing.TB, s *scene) {
	const header = "POST /goods/create?projectId=1 HTTP/1.1\r\nHost: goods\r\nContent-Length: 1000\r\n\r\n"
	harness.Together(64, func(i int) {
		c, err := dial(s.apps[0])
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
	harness.Together(16, func(i int) {
		c, err := dial(s.apps[0])
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
	harness.Together(64, func(i int) {
		for n := i; n < clients; n += 64 {
			c, err := dial(s.apps[0])
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

// leavingClients give up a create after some milliseconds, and come back with
// its key.
func leavingClients(_ testing.TB, s *scene) {
	begin := time.Now()
	harness.Together(16, func(i int) {
		for n := 0; time.Since(begin) < aWhile; n++ {
			key := fmt.Sprintf("leaver-%d-%d", i, n)
			s.load.asked.Add(1)
			if c, err := dial(s.apps[0]); err == nil {
				body := fmt.Sprintf(`{"name":%q,"description":%q}`, key, key)
				fmt.Fprintf(c, "POST /goods/create?projectId=1 HTTP/1.1\r\nHost: goods\r\nIdempotency-Key: %s\r\nContent-Length: %d\r\n\r\n%s", key, len(body), body)
				s.last(rand.N(30 * time.Millisecond))
				c.Close()
			}
			s.load.once(key)
		}
	})
}

// terminated ends two of three replicas with SIGTERM, again and again, while
// clients open a connection for each request. One that gets a connection must
// get its answer; one that is refused goes to another replica.
func terminated(t testing.TB, s *scene) {
	s.load.aim(s.apps[2])
	var current [2]atomic.Pointer[harness.App]
	current[0].Store(s.apps[0])
	current[1].Store(s.apps[1])
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	ctx, cancel := context.WithCancel(context.Background())
	var clients sync.WaitGroup
	var answered, lost atomic.Int64
	for range 4 {
		clients.Go(func() {
			for ctx.Err() == nil {
				response, err := client.Get(current[rand.N(2)].Load().URL + "/goods/list?limit=1")
				if err == nil {
					_, err = io.Copy(io.Discard, response.Body)
					response.Body.Close()
				}
				switch {
				case errors.Is(err, syscall.ECONNREFUSED):
				case err != nil || response.StatusCode != http.StatusOK:
					lost.Add(1)
					t.Logf("a new connection: %v", err)
				default:
					answered.Add(1)
				}
				s.last(time.Millisecond)
			}
		})
	}
	harness.Together(2, func(i int) {
		for range 25 {
			if err := current[i].Load().Stop(); err != nil {
				t.Errorf("the service ended with %v", err)
			}
			current[i].Store(s.Start(t))
		}
	})
	cancel()
	clients.Wait()
	if n := lost.Load(); n > 0 {
		t.Errorf("%d of %d connections were closed without an answer", n, n+answered.Load())
	}
	t.Logf("%d new connections were answered", answered.Load())
	s.apps[0], s.apps[1] = current[0].Load(), current[1].Load()
}
