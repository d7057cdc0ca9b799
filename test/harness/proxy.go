package harness

import (
	"io"
	"net"
	"net/url"
	"slices"
	"sync"
	"testing"
)

// Proxy stands between a service and one of its servers, and can spoil what passes.
type Proxy struct {
	mu             sync.Mutex // guards what follows
	server         string     // where new connections lead
	request, reply Hook
	conns          []net.Conn
}

// Hook passes part on, or less of it, or later, or something else. It may be called concurrently for
// different connections; its error ends the connection.
type Hook func(to net.Conn, part []byte) error

// Forward is the hook that passes part on unchanged.
func Forward(to net.Conn, part []byte) error {
	_, err := to.Write(part)
	return err
}

// NewProxy puts a proxy before the server that a variable of w names.
func (w *World) NewProxy(t testing.TB, variable string) *Proxy {
	t.Helper()
	u, err := url.Parse(w.Env[variable])
	Must(t, err)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	Must(t, err)
	p := &Proxy{server: u.Host, request: Forward, reply: Forward}
	u.Host = listener.Addr().String()
	w.Env[variable] = u.String()
	t.Cleanup(func() {
		listener.Close()
		p.Shut()
	})
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			p.mu.Lock()
			address := p.server
			p.mu.Unlock()
			server, err := net.Dial("tcp", address)
			if err != nil {
				client.Close()
				continue
			}
			p.mu.Lock()
			p.conns = append(p.conns, client, server)
			p.mu.Unlock()
			go p.pass(server, client, &p.request)
			go p.pass(client, server, &p.reply)
		}
	}()
	return p
}

func (p *Proxy) pass(to, from net.Conn, current *Hook) {
	defer to.Close()
	defer from.Close()
	for b := make([]byte, 64<<10); ; {
		n, err := from.Read(b)
		p.mu.Lock()
		hook := *current
		p.mu.Unlock()
		if err != nil || hook(to, b[:n]) != nil {
			return
		}
	}
}

// Spoil lets hooks treat what passes from now on.
func (p *Proxy) Spoil(request, reply Hook) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.request, p.reply = request, reply
}

// Redirect cuts all connections, and makes new ones lead to another server until the function that it
// returns is called.
func (p *Proxy) Redirect(server string) (back func()) {
	lead := func(server string) (before string) {
		p.mu.Lock()
		defer p.mu.Unlock()
		before = p.server
		p.server = server
		return before
	}
	first := lead(server)
	p.Cut()
	return func() {
		lead(first)
		p.Cut()
	}
}

// Pass lets everything pass again.
func (p *Proxy) Pass() { p.Spoil(Forward, Forward) }

// Freeze holds everything back until the function that it returns is called.
func (p *Proxy) Freeze() (resume func()) {
	thawed := make(chan struct{})
	hold := func(to net.Conn, part []byte) error {
		<-thawed
		return Forward(to, part)
	}
	p.Spoil(hold, hold)
	return sync.OnceFunc(func() {
		p.Pass()
		close(thawed)
	})
}

// Strand lets nothing pass any more on the connections that there are. They stay open until the test ends, as
// when the machine at their end has vanished. New ones work.
func (p *Proxy) Strand(t testing.TB) {
	t.Helper()
	p.mu.Lock()
	stranded := slices.Clone(p.conns)
	p.mu.Unlock()
	ended := make(chan struct{})
	t.Cleanup(func() { close(ended) })
	hook := func(to net.Conn, part []byte) error {
		if slices.Contains(stranded, to) {
			<-ended
			return io.ErrClosedPipe
		}
		return Forward(to, part)
	}
	p.Spoil(hook, hook)
}

// Shut cuts every connection, and each new one at its first byte, until Pass.
func (p *Proxy) Shut() {
	refuse := func(net.Conn, []byte) error { return io.ErrClosedPipe }
	p.Spoil(refuse, refuse)
	p.Cut()
}

// Cut cuts every connection that there is.
func (p *Proxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		c.Close()
	}
	p.conns = nil
}
