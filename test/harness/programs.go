package harness

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
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

// Run runs a server that servers.sh does not know, or knows otherwise, until the test ends, and waits until it accepts
// connections on address.
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

// Configure changes the configuration under the running server.
func (n *NATS) Configure(t testing.TB, config string) {
	t.Helper()
	Must(t, os.WriteFile(n.path, []byte(n.fixed+config), 0o600))
	Must(t, n.process.Signal(syscall.SIGHUP))
}

// URL is the server's, with a user such as "name:password".
func (n *NATS) URL(user string) string { return "nats://" + user + "@" + n.Address }

// Certificate makes a key and a certificate for 127.0.0.1, in two PEM files. It is its own authority.
func Certificate(t testing.TB) (certificate, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	Must(t, err)
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	signed, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	Must(t, err)
	encoded, err := x509.MarshalPKCS8PrivateKey(private)
	Must(t, err)
	dir := t.TempDir()
	write := func(name, kind string, bytes []byte) string {
		path := filepath.Join(dir, name)
		Must(t, os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: bytes}), 0o600))
		return path
	}
	return write("certificate.pem", "CERTIFICATE", signed), write("key.pem", "PRIVATE KEY", encoded)
}

// NewRedis runs a redis-server with these options besides, until the test ends.
func NewRedis(t testing.TB, options ...string) (address string, process *os.Process) {
	t.Helper()
	address = FreeAddress(t)
	host, port, _ := net.SplitHostPort(address)
	args := append([]string{"redis-server", "--bind", host, "--port", port, "--save", ""}, options...)
	return address, Run(t, address, args...)
}
