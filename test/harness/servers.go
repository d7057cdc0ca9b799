package harness

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Servers are servers of a test's own, which it may break.
type Servers struct {
	Dir  string   // their data
	URLs []string // as variables of the service, NAME=URL
	env  []string
}

// NewServers starts those named. They and their data are gone when the test ends.
func NewServers(t testing.TB, names ...string) *Servers {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "goods-servers-") // where user postgres may enter, too
	Must(t, err)
	Must(t, os.Chmod(dir, 0o755))
	s := &Servers{
		Dir: dir,
		env: append(os.Environ(), "SERVERS_DIR="+dir, fmt.Sprint("SERVERS_PORT=", freePorts(t))),
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if len(names) > 0 {
		t.Cleanup(func() { s.Sh(t, "clean") })
		s.Sh(t, append([]string{"start"}, names...)...)
		for line := range strings.Lines(s.Sh(t, append([]string{"env"}, names...)...)) {
			s.URLs = append(s.URLs, strings.NewReplacer("export ", "", "'", "", "\n", "").Replace(line))
		}
	}
	return s
}

// freePorts returns the first of seven ports in a row that nobody listens on.
func freePorts(t testing.TB) (first int) {
	t.Helper()
	Eventually(t, 10*time.Second, func() error {
		first = 20_000 + 10*rand.N(1000)
		for port := first; port < first+7; port++ {
			listener, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", port))
			if err != nil {
				return err
			}
			listener.Close()
		}
		return nil
	})
	return first
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
