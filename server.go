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
	shutdownTimeout = 10 * time.Second       // for the requests in flight
	// silentTimeout is for the first byte of a connection, after the end of listening. ReadHeaderTimeout
	// would end it as well, but up to four seconds later.
	silentTimeout = time.Second
	// sendBuffer is what the kernel keeps of a reply that is not read, in bytes. By itself it takes
	// megabytes for each connection, which count as memory of the container.
	sendBuffer = 64 << 10
)

// serveHTTP answers requests until ctx ends. Then it says on /readyz and with each reply that it is going
// to end, for readyDelay; stops listening; closes idle connections; and waits until every other request
// that has begun to arrive is answered, for shutdownTimeout at most. Connections on which nothing has
// arrived are closed after silentTimeout. A request that arrives on an idle connection just when that is
// closed gets no answer, as at any server.
//
// It is not http.Server.Shutdown, which closes, without an answer, every connection whose first request has
// not been read yet, though its client has sent it.
func serveHTTP(ctx context.Context, listener net.Listener, api *api, log *slog.Logger) error {
	accepted := &connections{Listener: listener, open: map[*connection]bool{}}
	server := &http.Server{
		Handler:                      api.routes(),
		ReadHeaderTimeout:            5 * time.Second,
		WriteTimeout:                 30 * time.Second,
		IdleTimeout:                  2 * time.Minute,
		MaxHeaderBytes:               12 << 10, // Go adds 4 KiB
		DisableGeneralOptionsHandler: true,     // OPTIONS * gets an error of ours as well
		ErrorLog:                     slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		ConnState:                    accepted.track,
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(accepted) }()
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}

	log.Info("shutting down")
	api.closing.Store(true)
	time.Sleep(readyDelay)
	listener.Close()
	<-served                           // net.ErrClosed
	server.SetKeepAlivesEnabled(false) // closes idle connections
	stopped := time.Now()
	for accepted.count() > 0 && time.Since(stopped) < shutdownTimeout {
		if time.Since(stopped) > silentTimeout {
			accepted.closeSilent()
		}
		time.Sleep(5 * time.Millisecond)
	}
	if n := accepted.count(); n > 0 {
		log.Warn("requests were still in flight at the end", "connections", n)
	}
	return nil
}

// connections is a listener that knows the connections it has accepted and that are still open.
type connections struct {
	net.Listener

	mu   sync.Mutex // guards what follows
	open map[*connection]bool
}

// connection knows whether its client has sent anything.
type connection struct {
	*net.TCPConn // not net.Conn, which would hide CloseWrite from the server
	heard        atomic.Bool
}

func (c *connections) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	if err != nil {
		return nil, err
	}
	tcp := conn.(*net.TCPConn)
	_ = tcp.SetWriteBuffer(sendBuffer) // on an error, the buffer is only larger
	return &connection{TCPConn: tcp}, nil
}

func (c *connection) Read(b []byte) (int, error) {
	n, err := c.TCPConn.Read(b)
	if n > 0 {
		c.heard.Store(true)
	}
	return n, err
}

// track is called by the server when the state of a connection changes.
func (c *connections) track(conn net.Conn, state http.ConnState) {
	if state != http.StateNew && state != http.StateClosed {
		return // twice for each request
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if state == http.StateNew {
		c.open[conn.(*connection)] = true
	} else {
		delete(c.open, conn.(*connection))
	}
}

func (c *connections) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.open)
}

// closeSilent closes the connections that have never sent anything.
func (c *connections) closeSilent() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for conn := range c.open {
		if !conn.heard.Load() {
			conn.Close()
		}
	}
}
