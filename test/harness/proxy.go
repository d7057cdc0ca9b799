package harness

import (
	"net"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
)

// Proxy stands between a service and one of its servers, and can spoil what passes.
type Proxy struct {
	server         string
	listener       net.Listener
	request, reply atomic.Pointer[Hook]

	mu    sync.Mutex
	shut  bool
	conns []net.Conn
}

// Hook passes part on, or less of it, or later, or something else. It may be called concurrently for different
// connections; its error ends the connection.
type Hook func(to net.Conn, part []byte) error

// NewProxy puts a proxy before the server that a variable of w names.
func (w *World) NewProxy(t testing.TB, variable string) *Proxy {
	t.Helper()
	u, err := url.Parse(w.Env[variable])
	Must(t, err)
	p := &Proxy{server: u.Host}
	p.listener, err = net.Listen("tcp", "127.0.0.1:0")
	Must(t, err)
	u.Host = p.listener.Addr().String()
	w.Env[variable] = u.String()
	p.Pass()
	t.Cleanup(func() {
		p.listener.Close()
		p.Shut()
	})
	go func() {
		for {
			client, err := p.listener.Accept()
			if err != nil {
				return
			}
			p.serve(client)
		}
	}()
	return p
}

func (p *Proxy) serve(client net.Conn) {
	server, err := net.Dial("tcp", p.server)
	if err != nil {
		client.Close()
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.shut {
		client.Close()
		server.Close()
		return
	}
	p.conns = append(p.conns, client, server)
	go pass(server, client, &p.request)
	go pass(client, server, &p.reply)
}

func pass(to, from net.Conn, hook *atomic.Pointer[Hook]) {
	defer to.Close()
	defer from.Close()
	for b := make([]byte, 64<<10); ; {
		n, err := from.Read(b)
		if err != nil {
			return
		}
		if err := (*hook.Load())(to, b[:n]); err != nil {
			return
		}
	}
}

// Forward passes part on unchanged.
func Forward(to net.Conn, part []byte) error {
	_, err := to.Write(part)
	return err
}

// Spoil lets hooks treat what passes from now on; nil passes everything on.
func (p *Proxy) Spoil(request, reply Hook) {
	for at, hook := range map[*atomic.Pointer[Hook]]Hook{&p.request: request, &p.reply: reply} {
		if hook == nil {
			hook = Forward
		}
		at.Store(&hook)
	}
}

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

// Pass lets everything pass again.
func (p *Proxy) Pass() {
	p.Spoil(nil, nil)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.shut = false
}

// Shut cuts every connection and closes each new one, until Pass.
func (p *Proxy) Shut() {
	p.mu.Lock()
	p.shut = true
	p.mu.Unlock()
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
