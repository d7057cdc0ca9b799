package main

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

// servers are servers of a test's own, which it may break.
type servers struct {
	env []string
	dir string
}

// newServers starts those named. They and their data are gone when the test
// ends.
func newServers(t testing.TB, names ...string) *servers {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "goods-faults-") // where user postgres may enter, too
	must(t, err)
	must(t, os.Chmod(dir, 0o755))
	s := &servers{dir: dir, env: append(os.Environ(), "SERVERS_DIR="+dir, fmt.Sprintf("SERVERS_PORT=%d", freePorts(t, 7)))}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if len(names) > 0 {
		t.Cleanup(func() { s.sh(t, "clean") })
		s.sh(t, append([]string{"start"}, names...)...)
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

// sh runs servers.sh for these servers and returns what it prints.
func (s *servers) sh(t testing.TB, args ...string) string {
	t.Helper()
	cmd := exec.Command("./servers.sh", args...)
	cmd.Env = s.env
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("servers.sh %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// variable returns a server's URL as a variable for the service, NAME=URL.
func (s *servers) variable(t testing.TB, name string) string {
	t.Helper()
	line := strings.TrimPrefix(strings.TrimSpace(s.sh(t, "env", name)), "export ")
	return strings.ReplaceAll(line, "'", "")
}

// kill ends a server with SIGKILL.
func (s *servers) kill(t testing.TB, name string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(s.dir, name+".pid"))
	must(t, err)
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	must(t, err)
	must(t, syscall.Kill(pid, syscall.SIGKILL))
}
