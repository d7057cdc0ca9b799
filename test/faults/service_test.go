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
	"os"
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

// rawClients runs f for n connections at once.
func rawClients(t testing.TB, s *scene, n int, f func(i int, c net.Conn)) {
	harness.Together(n, func(i int) {
		c, err := dial(s.apps[0])
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(15 * time.Second))
		f(i, c)
	})
}

// slowClients send a header or a body a byte a second. The service must not wait for them forever.
func slowClients(t testing.TB, s *scene) {
	rawClients(t, s, 64, func(i int, c net.Conn) {
		text := "POST /goods/create?projectId=1 HTTP/1.1\r\nHost: goods\r\nContent-Length: 1000\r\n\r\n"
		if i%2 == 0 {
			_, _ = io.WriteString(c, text)
			text = `{"name":"` + strings.Repeat("x", 100)
		}
		go func() {
			for _, b := range []byte(text) {
				if _, err := c.Write([]byte{b}); err != nil {
					return
				}
				s.last(time.Second)
			}
		}()
		if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("client %d still has its connection", i)
		}
	})
}

// endlessBodies are refused with 413, and no more of them is read.
func endlessBodies(t testing.TB, s *scene) {
	zeros, err := os.Open("/dev/zero")
	harness.Must(t, err)
	defer zeros.Close()
	rawClients(t, s, 16, func(i int, c net.Conn) {
		_, _ = io.WriteString(c, "POST /goods/create?projectId=1 HTTP/1.1\r\nHost: goods\r\nTransfer-Encoding: chunked\r\n\r\nfffffffff\r\n")
		sent := make(chan int64)
		go func() {
			n, _ := io.Copy(c, struct{ io.Reader }{zeros}) // not sendfile, which would let one client at a time read
			sent <- n
		}()
		if response, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil || response.StatusCode != 413 {
			t.Errorf("client %d got no 413: %v", i, err)
		}
		if n := <-sent; n > 64<<20 {
			t.Errorf("the service took %d bytes from client %d", n, i)
		}
	})
}

// idleClients keep their connections after an answer.
func idleClients(t testing.TB, s *scene) {
	for range 10_000 {
		c, err := dial(s.apps[0])
		harness.Must(t, err)
		defer c.Close()
		_, _ = io.WriteString(c, "GET /healthz HTTP/1.1\r\nHost: goods\r\n\r\n")
		_, err = c.Read(make([]byte, 1))
		harness.Must(t, err)
	}
	s.last(aWhile)
}

// leavingClients give up a create after some milliseconds, and come back with its key.
func leavingClients(t testing.TB, s *scene) {
	for n, begin := 0, time.Now(); time.Since(begin) < aWhile; n++ {
		rawClients(t, s, 16, func(i int, c net.Conn) {
			key := fmt.Sprintf("leaver-%d-%d", i, n)
			s.load.asked.Add(1)
			fmt.Fprintf(c, "POST /goods/create?projectId=1 HTTP/1.1\r\nHost: goods\r\nIdempotency-Key: %s\r\nContent-Length: %d\r\n\r\n%s",
				key, len(text(key)), text(key))
			s.last(rand.N(30 * time.Millisecond))
			c.Close()
			s.load.create(key)
		})
	}
}

func serviceKilled(t testing.TB, s *scene) {
	for range 20 {
		s.last(rand.N(300 * time.Millisecond))
		s.restart(t, 0)
	}
}

// replicaKilled kills the last of several, and starts it again as its supervisor would.
func replicaKilled(t testing.TB, s *scene) {
	dead := len(s.apps) - 1
	harness.Must(t, s.apps[dead].Process.Kill())
	s.load.aim(s.apps[:dead]...)
	s.last(aWhile)
	s.restart(t, dead)
}

// killedWhile kills the service while other servers are away, and starts it again.
func killedWhile(down, up string, names ...string) func(testing.TB, *scene) {
	return func(t testing.TB, s *scene) {
		s.sh(t, down, names...)
		s.restart(t, 0)
		s.last(aWhile)
		s.sh(t, up, names...)
	}
}

// rolled restarts the replicas one after the other. A balancer leaves each soon after it is told to end.
func rolled(t testing.TB, s *scene) {
	for i, a := range s.apps {
		other := s.apps[1-i]
		time.AfterFunc(300*time.Millisecond, func() { s.load.aim(other) })
		if err := a.Stop(); err != nil {
			t.Errorf("the service ended with %v", err)
		}
		s.restart(t, i)
	}
}

// terminated ends two of three replicas with SIGTERM, again and again, while clients open a connection for each
// request. A client that has a connection must get an answer; one that is refused goes to another replica.
func terminated(t testing.TB, s *scene) {
	s.load.aim(s.apps[2])
	var current [2]atomic.Pointer[harness.App]
	current[0].Store(s.apps[0])
	current[1].Store(s.apps[1])
	ctx, cancel := context.WithCancel(context.Background())
	var clients sync.WaitGroup
	var left atomic.Int64
	for range 64 {
		clients.Go(func() {
			for ctx.Err() == nil {
				c, err := dial(current[rand.N(2)].Load())
				if err != nil {
					s.last(10 * time.Millisecond)
					continue
				}
				// The kernel connects before the service accepts, and resets what has not been accepted when the
				// service stops listening.
				_ = c.SetReadDeadline(time.Now().Add(250 * time.Millisecond))
				if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
					_ = c.SetReadDeadline(time.Now().Add(callWithin))
					_, _ = io.WriteString(c, "GET /goods/list?limit=1 HTTP/1.1\r\nHost: goods\r\nConnection: close\r\n\r\n")
					if response, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil || response.StatusCode != 200 {
						left.Add(1)
					}
				}
				c.Close()
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
	s.apps[0], s.apps[1] = current[0].Load(), current[1].Load()
	if n := left.Load(); n > 0 {
		t.Errorf("%d connections were accepted, and closed without an answer", n)
	}
}
