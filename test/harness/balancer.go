package harness

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// StartBalancer runs a balancer with its file in deploy/, in which only addresses and the names of files
// are others, before two replicas, until the test ends. What it returns is the service as clients of the
// balancer see it: they log in, and come from many addresses, so that the limit for each address is not
// theirs together. Replies are not compared with openapi.yaml, as some are the balancer's own.
func StartBalancer(t testing.TB, name string, replicas ...*App) *App {
	t.Helper()
	dir := t.TempDir()
	certificate, key, pool := serverCertificate(t)
	port := freePorts(t)
	address := fmt.Sprint("127.0.0.1:", port)
	write := func(file, text string) string {
		path := filepath.Join(dir, file)
		Must(t, os.WriteFile(path, []byte(text), 0o600))
		return path
	}
	hosts := []string{replicas[0].Host(), replicas[1].Host()}
	var cmd *exec.Cmd
	switch name {
	case "nginx":
		config := write("goods.conf", strings.NewReplacer(
			"10.0.0.11:8080", hosts[0],
			"10.0.0.12:8080", hosts[1],
			"listen 443", "listen "+address,
			"/etc/nginx/", dir+"/",
		).Replace(string(File(t, "deploy/nginx.conf"))))
		write("goods.crt", certificate)
		write("goods.key", key)
		write("goods.htpasswd", "goods:{PLAIN}secret\n")
		main := write("nginx.conf", fmt.Sprintf(`
user root; # where a test's folder is root's
daemon off;
worker_processes 2;
pid %[1]s/pid;
events { }
http {
    access_log %[1]s/access.log;
    client_body_temp_path %[1]s/body;
    proxy_temp_path %[1]s/proxy;
    fastcgi_temp_path %[1]s/fastcgi;
    uwsgi_temp_path %[1]s/uwsgi;
    scgi_temp_path %[1]s/scgi;
    include %[2]s;
}
`, dir, config))
		cmd = exec.Command("nginx", "-e", "stderr", "-c", main)
	case "haproxy":
		config := write("haproxy.cfg", strings.NewReplacer(
			"10.0.0.11:8080", hosts[0],
			"10.0.0.12:8080", hosts[1],
			"bind :443", "bind "+address,
			"/etc/haproxy/", dir+"/",
		).Replace(string(File(t, "deploy/haproxy.cfg"))))
		write("goods.pem", certificate+key)
		cmd = exec.Command("haproxy", "-db", "-f", config)
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	Must(t, err)
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	// Debian keeps both where only root's PATH looks.
	cmd.Path, err = exec.LookPath("/usr/sbin/" + name)
	if err != nil {
		t.Fatalf("%v: install it with scripts/servers.sh install %s", err, name)
	}
	Must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Signal(os.Interrupt)
		_ = cmd.Wait()
		text, err := os.ReadFile(log.Name())
		Must(t, err)
		if t.Failed() {
			lines := slices.DeleteFunc(strings.Split(string(text), "\n"), func(line string) bool {
				return strings.Contains(line, "Connection refused") // the request then goes to the other replica
			})
			t.Logf("log of %s:\n%.3000s", name, strings.Join(lines, "\n"))
		}
	})

	dialer := func(ctx context.Context, network, to string) (net.Conn, error) {
		from := net.IPv4(127, 0, 1, byte(1+rand.N(200)))
		return (&net.Dialer{LocalAddr: &net.TCPAddr{IP: from}}).DialContext(ctx, network, to)
	}
	seen := *replicas[0]
	seen.checked = false
	seen.URL = (&url.URL{Scheme: "https", User: url.UserPassword("goods", "secret"), Host: address}).String()
	seen.client = &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{
		DialContext: dialer, TLSClientConfig: &tls.Config{RootCAs: pool}, MaxIdleConnsPerHost: 256,
	}}
	Eventually(t, 10*time.Second, func() error {
		r, err := seen.Try("GET", "/goods/list", "")
		if err == nil && r.Status != http.StatusOK {
			err = fmt.Errorf("%s answers %d", name, r.Status)
		}
		return err
	})
	return &seen
}

// serverCertificate returns a certificate for 127.0.0.1 and its key, in PEM, and who trusts it.
func serverCertificate(t testing.TB) (certificate, key string, pool *x509.CertPool) {
	t.Helper()
	server := httptest.NewTLSServer(nil)
	defer server.Close()
	pair := server.TLS.Certificates[0]
	encoded, err := x509.MarshalPKCS8PrivateKey(pair.PrivateKey)
	Must(t, err)
	pool = x509.NewCertPool()
	pool.AddCert(server.Certificate())
	block := func(kind string, bytes []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: bytes}))
	}
	return block("CERTIFICATE", pair.Certificate[0]), block("PRIVATE KEY", encoded), pool
}
