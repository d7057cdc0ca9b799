package harness

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// FreeAddress returns an address of this machine that nobody listens on.
func FreeAddress(t testing.TB) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	Must(t, err)
	defer listener.Close()
	return listener.Addr().String()
}

// Run runs a server that servers.sh does not know, or knows otherwise, until the test ends, and waits until
// it accepts connections on address.
func Run(t testing.TB, address string, args ...string) *os.Process {
	t.Helper()
	// Debian keeps some of them where only root's PATH looks.
	cmd := exec.Command("bash", append([]string{"-c", `PATH=$PATH:/usr/sbin exec "$0" "$@"`}, args...)...)
	cmd.Dir = t.TempDir()
	path := filepath.Join(cmd.Dir, "log")
	log, err := os.Create(path)
	Must(t, err)
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	Must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGCONT)
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // says that it was killed
		if text, err := os.ReadFile(path); t.Failed() && err == nil {
			t.Logf("log of %s:\n%s", args[0], text[max(0, len(text)-4000):])
		}
	})
	Eventually(t, 30*time.Second, func() error {
		c, err := net.Dial("tcp", address)
		if err == nil {
			c.Close()
		}
		return err
	})
	return cmd.Process
}

// NATS is a nats-server with a configuration of the test's own.
type NATS struct {
	Address string
	process *os.Process
	path    string // of its configuration
	fixed   string // the part of it that says where to listen and to store
}

// NewNATS runs a nats-server with JetStream and this configuration, until the test ends.
func NewNATS(t testing.TB, config string) *NATS {
	t.Helper()
	dir := t.TempDir()
	n := &NATS{Address: FreeAddress(t), path: filepath.Join(dir, "nats.conf")}
	n.fixed = fmt.Sprintf("listen: %q\njetstream { store_dir: %q }\n", n.Address, dir)
	Must(t, os.WriteFile(n.path, []byte(n.fixed+config), 0o600))
	n.process = Run(t, n.Address, "nats-server", "-c", n.path)
	return n
}

// NewNATSCluster runs n of them that form a cluster, until the test ends. They are named "1" and so on.
func NewNATSCluster(t testing.TB, n int) (servers []*NATS) {
	t.Helper()
	var addresses, routes []string
	for range n {
		address := FreeAddress(t)
		addresses = append(addresses, address)
		routes = append(routes, "nats://"+address)
	}
	for i, address := range addresses {
		servers = append(servers, NewNATS(t, fmt.Sprintf(`
server_name: "%d"
cluster { name: test, listen: %q, routes: [%s] }
`, i+1, address, strings.Join(routes, ", "))))
	}
	return servers
}

// Kill ends the server as a crash would.
func (n *NATS) Kill(t testing.TB) {
	t.Helper()
	Must(t, n.process.Kill())
}

// Configure changes the configuration under the running server.
func (n *NATS) Configure(t testing.TB, config string) {
	t.Helper()
	Must(t, os.WriteFile(n.path, []byte(n.fixed+config), 0o600))
	Must(t, n.process.Signal(syscall.SIGHUP))
}

// URL is the server's, with a user such as "name:password".
func (n *NATS) URL(user string) string { return "nats://" + user + "@" + n.Address }

// Certificate makes a certificate for 127.0.0.1 that is its own authority, and its key, in two PEM files.
func Certificate(t testing.TB) (certificate, key string) {
	t.Helper()
	certificateText, keyText, _ := serverCertificate(t)
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		Must(t, os.WriteFile(path, []byte(text), 0o600))
		return path
	}
	return write("certificate.pem", certificateText), write("key.pem", keyText)
}

// NewRedis runs a redis-server with these options besides, until the test ends.
func NewRedis(t testing.TB, options ...string) (address string, process *os.Process) {
	t.Helper()
	address = FreeAddress(t)
	host, port, _ := net.SplitHostPort(address)
	args := append([]string{"redis-server", "--bind", host, "--port", port, "--save", ""}, options...)
	return address, Run(t, address, args...)
}

// UseTLSRedis gives the service a redis-server of its own, which it reaches with TLS.
func (w *World) UseTLSRedis(t testing.TB) *os.Process {
	t.Helper()
	certificate, key := Certificate(t)
	withTLS := FreeAddress(t)
	_, port, err := net.SplitHostPort(withTLS)
	Must(t, err)
	address, process := NewRedis(t, "--tls-port", port, "--tls-auth-clients", "no",
		"--tls-cert-file", certificate, "--tls-key-file", key, "--tls-ca-cert-file", certificate)
	w.redisURL = "redis://" + address
	w.Env["REDIS_URL"] = "rediss://" + withTLS + "/0"
	w.Env["SSL_CERT_FILE"] = certificate
	return process
}
