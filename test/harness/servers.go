package harness

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// Servers are servers of a test's own, which it may break.
type Servers struct {
	Dir string // their data
	env []string
}

// NewServers starts those named. They and their data are gone when the test ends.
func NewServers(t testing.TB, names ...string) *Servers {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "goods-servers-") // where user postgres may enter, too
	Must(t, err)
	Must(t, os.Chmod(dir, 0o755))
	s := &Servers{Dir: dir, env: append(os.Environ(), "SERVERS_DIR="+dir, fmt.Sprintf("SERVERS_PORT=%d", freePorts(t, 7)))}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if len(names) > 0 {
		t.Cleanup(func() { s.Sh(t, "clean") })
		s.Sh(t, append([]string{"start"}, names...)...)
	}
	return s
}

// freePorts returns the first of n ports in a row that nobody listens on.
func freePorts(t testing.TB, n int) int {
	t.Helper()
	for range 100 {
		first, free := 20_000+10*rand.N(1000), 0
		for ; free < n; free++ {
			listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", first+free))
			if err != nil {
				break
			}
			listener.Close()
		}
		if free == n {
			return first
		}
	}
	t.Fatalf("found no %d free ports in a row", n)
	return 0
}

// Sh runs servers.sh for these servers and returns what it prints.
func (s *Servers) Sh(t testing.TB, args ...string) string {
	t.Helper()
	cmd := exec.Command(filepath.Join(root(), "scripts", "servers.sh"), args...)
	cmd.Env = s.env
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("servers.sh %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// Variable returns a server's URL as a variable for the service, NAME=URL.
func (s *Servers) Variable(t testing.TB, name string) string {
	t.Helper()
	line := strings.TrimPrefix(strings.TrimSpace(s.Sh(t, "env", name)), "export ")
	return strings.ReplaceAll(line, "'", "")
}

// Kill ends a server with SIGKILL.
func (s *Servers) Kill(t testing.TB, name string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(s.Dir, name+".pid"))
	Must(t, err)
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	Must(t, err)
	Must(t, syscall.Kill(pid, syscall.SIGKILL))
}
