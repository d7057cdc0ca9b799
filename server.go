package main

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

const (
	readyDelay      = 500 * time.Millisecond // between a 503 on /readyz and the end of listening
	silentTimeout   = time.Second            // for the first byte of a connection, after the end of listening
	shutdownTimeout = 10 * time.Second       // for the requests in flight
	// sendBuffer is what the kernel keeps of a reply that is not read, in bytes. By itself it takes
	// megabytes for each connection, which count as memory of the container.
	sendBuffer = 64 << 10
)

// serveHTTP answers requests until ctx ends. Then it says on /readyz and with each reply that it is going
// to end, for readyDelay; stops listening; and waits until every request that has begun to arrive is
// answered, for shutdownTimeout at most. Connections without one are closed.
//
// It is not http.Server.Shutdown, which closes, without an answer, every connection whose first request has
// not been read yet, though its client has sent it.
func serveHTTP(ctx context.Context, listener net.Listener, api *api, log *slog.Logger) error {
	open := &connections{Listener: listener, states: map[*connection]http.ConnState{}}
	server := &http.Server{
		Handler:                      api.routes(),
		ReadHeaderTimeout:            5 * time.Second,
		ReadTimeout:                  10 * time.Second,
		WriteTimeout:                 30 * time.Second,
		IdleTimeout:                  2 * time.Minute,
		MaxHeaderBytes:               12 << 10, // Go adds 4 KiB
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		ConnState:                    open.note,
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(open) }()
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}

	log.Info("shutting down")
	api.closing.Store(true)
	time.Sleep(readyDelay)
	listener.Close()
	<-served
	server.SetKeepAlivesEnabled(false) // closes idle connections
	stopped := time.Now()
	for open.count() > 0 && time.Since(stopped) < shutdownTimeout {
		if time.Since(stopped) > silentTimeout {
			open.closeSilent()
		}
		time.Sleep(5 * time.Millisecond)
	}
	if n := open.count(); n > 0 {
		log.Warn("requests were still in flight at the end", "connections", n)
	}
	return nil
}

// connections is a listener that knows the connections it has accepted and that are still open.
type connections struct {
	net.Listener

	mu     sync.Mutex // guards what follows
	states map[*connection]http.ConnState
}

// connection knows whether its client has sent anything.
type connection struct {
	net.Conn
	heard atomic.Bool
}

func (c *connections) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	if err != nil {
		return nil, err
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetWriteBuffer(sendBuffer) // on an error, the buffer is only larger
	}
	return &connection{Conn: conn}, nil
}

func (c *connection) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n > 0 && !c.heard.Load() {
		c.heard.Store(true)
	}
	return n, err
}

// note is called by the server when the state of a connection changes.
func (c *connections) note(conn net.Conn, state http.ConnState) {
	known := conn.(*connection)
	c.mu.Lock()
	defer c.mu.Unlock()
	if state == http.StateClosed {
		delete(c.states, known)
		return
	}
	c.states[known] = state
}

func (c *connections) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.states)
}

// closeSilent closes the connections that have never sent anything.
func (c *connections) closeSilent() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for conn, state := range c.states {
		if state == http.StateNew && !conn.heard.Load() {
			conn.Close()
		}
	}
}
