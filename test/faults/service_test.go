package faults

import (
	"bufio"
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
	"time"

	"goods/test/harness"
)

const createHead = "POST /goods/create?projectId=1 HTTP/1.1\r\nHost: goods\r\n"

func dial(a *harness.App) (net.Conn, error) {
	return net.Dial("tcp", strings.TrimPrefix(a.URL, "http://"))
}

// rawClients runs f for n connections at once.
func rawClients(s *scene, n int, f func(i int, c net.Conn)) {
	harness.Together(n, func(i int) {
		c, err := dial(s.apps[0])
		harness.Must(s, err)
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(15 * time.Second))
		f(i, c)
	})
}

// slowClients send a header or a body a byte a second. The service must not wait for them forever.
func slowClients(s *scene) {
	starts := []string{createHead + "X-Slow: ", createHead + "Content-Length: 1000\r\n\r\n{\"name\":\""}
	rawClients(s, 64, func(i int, c net.Conn) {
		_, err := io.WriteString(c, starts[i%2])
		for err == nil {
			s.last(time.Second)
			_, err = io.WriteString(c, "x")
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			s.Errorf("client %d still has its connection", i)
		}
	})
}

// endlessBodies are refused with 413, and no more of them is read.
func endlessBodies(s *scene) {
	rawClients(s, 16, func(i int, c net.Conn) {
		_, _ = io.WriteString(c, createHead+"Transfer-Encoding: chunked\r\n\r\nfffffffff\r\n")
		sent := make(chan int64)
		go func() {
			n, _ := io.Copy(c, rand.NewChaCha8([32]byte{})) // which never ends
			sent <- n
		}()
		if response, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil || response.StatusCode != 413 {
			s.Errorf("client %d got no 413: %v", i, err)
		}
		if n := <-sent; n > 64<<20 {
			s.Errorf("the service took %d bytes from client %d", n, i)
		}
	})
}

// idleClients keep their connections after an answer.
func idleClients(s *scene) {
	for range 10_000 {
		c, err := dial(s.apps[0])
		harness.Must(s, err)
		defer c.Close()
		_, _ = io.WriteString(c, "GET /healthz HTTP/1.1\r\nHost: goods\r\n\r\n")
		_, err = c.Read(make([]byte, 1))
		harness.Must(s, err)
	}
	s.last(aWhile)
}

// leavingClients give up a create after some milliseconds, and come back with its key.
func leavingClients(s *scene) {
	for n, begin := 0, time.Now(); time.Since(begin) < aWhile; n++ {
		rawClients(s, 16, func(i int, c net.Conn) {
			key := fmt.Sprintf("leaver-%d-%d", i, n)
			s.load.asked.Add(1)
			fmt.Fprintf(
				c,
				createHead+"Idempotency-Key: %s\r\nContent-Length: %d\r\n\r\n%s",
				key,
				len(text(key)),
				text(key),
			)
			s.last(rand.N(30 * time.Millisecond))
			c.Close()
			s.load.create(key)
		})
	}
}

func serviceKilled(s *scene) {
	for range 20 {
		s.last(rand.N(300 * time.Millisecond))
		s.restart(0)
	}
}

// replicaKilled kills the last of several, and starts it again as its supervisor would.
func replicaKilled(s *scene) {
	dead := len(s.apps) - 1
	harness.Must(s, s.apps[dead].Process.Kill())
	s.load.aim(s.apps[:dead]...)
	s.last(aWhile)
	s.restart(dead)
}

// killedWhile kills the service while other servers are away, and starts it again.
func killedWhile(down, up string, names ...string) func(*scene) {
	return func(s *scene) {
		s.sh(down, names...)
		s.restart(0)
		s.last(aWhile)
		s.sh(up, names...)
	}
}

// rolled restarts the replicas one after the other. A balancer leaves each soon after it is told to end.
func rolled(s *scene) {
	for i, a := range s.apps {
		other := s.apps[1-i]
		time.AfterFunc(300*time.Millisecond, func() { s.load.aim(other) })
		harness.Equal(s, a.Stop(), nil, "how the service ended")
		s.restart(i)
	}
}

// terminated ends one of two replicas with SIGTERM, again and again, while clients open a connection for
// each request. A client that has a connection must get an answer; one that is refused tries again.
func terminated(s *scene) {
	s.load.aim(s.apps[1])
	var current atomic.Pointer[harness.App]
	current.Store(s.apps[0])
	var clients sync.WaitGroup
	var ended atomic.Bool
	var left atomic.Int64
	for range 64 {
		clients.Go(func() {
			for !ended.Load() {
				if !served(current.Load()) {
					left.Add(1)
				}
			}
		})
	}
	for range 50 {
		harness.Equal(s, s.apps[0].Stop(), nil, "how the service ended")
		s.apps[0] = s.Start(s)
		current.Store(s.apps[0])
	}
	ended.Store(true)
	clients.Wait()
	harness.Equal(s, left.Load(), 0, "connections that were accepted, and closed without an answer")
}

// served reports whether the service answers on a new connection, or does not accept it.
func served(a *harness.App) bool {
	c, err := dial(a)
	if err != nil {
		<-time.After(10 * time.Millisecond)
		return true
	}
	defer c.Close()
	// The kernel connects before the service accepts, and resets what has not been accepted when the service
	// stops listening.
	_ = c.SetReadDeadline(time.Now().Add(250 * time.Millisecond))
	if _, err := c.Read(make([]byte, 1)); errors.Is(err, syscall.ECONNRESET) {
		return true
	}
	_ = c.SetReadDeadline(time.Now().Add(callWithin))
	_, _ = io.WriteString(c, "GET /goods/list?limit=1 HTTP/1.1\r\nHost: goods\r\nConnection: close\r\n\r\n")
	response, err := http.ReadResponse(bufio.NewReader(c), nil)
	return err == nil && response.StatusCode == 200
}
