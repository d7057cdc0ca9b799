package harness

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Good is a good as the service shows it.
type Good struct {
	ID, ProjectID     int
	Name, Description string
	Priority          int
	Removed           bool
	CreatedAt         time.Time
}

// ListReply is the reply to a list.
type ListReply struct {
	Meta  struct{ Total, Removed, Limit, Offset int }
	Goods []Good
}

// Reply is what the service answered.
type Reply struct {
	Status int
	Header http.Header
	Body   string
}

// App is a service that runs.
type App struct {
	URL     string
	Log     *Log
	Process *os.Process
	Stop    func() error // ends it with SIGTERM, and returns how it ended; may be called again
	t       testing.TB
	checked bool
}

// Command returns goods with these arguments, in the service's environment as changed by overrides.
func (w *World) Command(args []string, overrides ...string) *exec.Cmd {
	cmd := exec.Command(cmp.Or(w.Program, program), args...)
	cmd.Env = []string{} // not the test's own
	for name, value := range w.with(overrides) {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	return cmd
}

// Start runs the service, until the test ends, and waits until it listens.
func (w *World) Start(t testing.TB, overrides ...string) *App {
	t.Helper()
	a := w.Launch(t, overrides...)
	a.Await(t)
	return a
}

// Launch is Start without waiting.
func (w *World) Launch(t testing.TB, overrides ...string) *App {
	t.Helper()
	cmd := w.Command(nil, overrides...)
	a := &App{Log: &Log{}, t: t, checked: !w.Unchecked}
	if a.checked {
		_, err := contract() // not while a test measures time
		Must(t, err)
	}
	cmd.Stdout, cmd.Stderr = a.Log, a.Log
	Must(t, cmd.Start())
	a.Process = cmd.Process
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	a.Stop = sync.OnceValue(func() error {
		_ = cmd.Process.Signal(syscall.SIGTERM) // it may have been killed
		select {
		case err := <-done:
			return err
		case <-time.After(30 * time.Second):
			_ = cmd.Process.Kill()
			return fmt.Errorf("the service does not end")
		}
	})
	t.Cleanup(func() {
		_ = a.Stop()
		if log := a.Log.String(); strings.Contains(log, "DATA RACE") || strings.Contains(log, "panic") {
			t.Error("the service had a data race or a panic")
		}
		if t.Failed() {
			t.Logf("log of the service:\n%s", a.Log.tail(100))
		}
	})
	return a
}

// Await waits until the service listens, and learns its address.
func (a *App) Await(t testing.TB) {
	t.Helper()
	Eventually(t, 30*time.Second, func() error {
		for _, entry := range a.Log.Lines("listening") {
			a.URL = fmt.Sprintf("http://%v", entry["addr"])
			return nil
		}
		return fmt.Errorf("the service does not listen:\n%s", a.Log.String())
	})
}

// Log is what a service logs. It may be used concurrently.
type Log struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// Lines returns the entries with this message.
func (l *Log) Lines(message string) []map[string]any {
	var found []map[string]any
	for line := range strings.Lines(l.String()) {
		var entry map[string]any
		if json.Unmarshal([]byte(line), &entry) == nil && entry["msg"] == message {
			found = append(found, entry)
		}
	}
	return found
}

// AwaitLines waits for n lines with this message, and returns them. What the service logs arrives a moment later than
// what it answers.
func (a *App) AwaitLines(t testing.TB, message string, n int) (lines []map[string]any) {
	t.Helper()
	Eventually(t, 15*time.Second, func() error {
		if lines = a.Log.Lines(message); len(lines) < n {
			return fmt.Errorf("got %d lines %q in the log, want %d", len(lines), message, n)
		}
		return nil
	})
	return lines
}

// tail returns the last n lines, but for requests that went well.
func (l *Log) tail(n int) string {
	var lines []string
	for line := range strings.SplitSeq(l.String(), "\n") {
		if !strings.Contains(line, `"msg":"request"`) || !strings.Contains(line, `"err":null`) {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// Ready returns an error unless the service reports all four servers as up.
func (a *App) Ready() error {
	r, err := a.Try("GET", "/readyz", "")
	if err == nil && (r.Status != 200 || strings.Contains(r.Body, "down")) {
		err = fmt.Errorf("/readyz: %d %s", r.Status, r.Body)
	}
	return err
}

// Client keeps enough connections for every test.
var Client = &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 256}}

// Try sends one request, with header lines such as "Idempotency-Key: x". Whatever is answered must be as openapi.yaml
// says, or the test fails.
func (a *App) Try(method, path, body string, header ...string) (Reply, error) {
	return a.send(a.t, method, path, body, header)
}

// Call is Try for a service that must answer.
func (a *App) Call(t testing.TB, method, path, body string, header ...string) Reply {
	t.Helper()
	r, err := a.send(t, method, path, body, header)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	return r
}

func (a *App) send(t testing.TB, method, path, body string, header []string) (Reply, error) {
	t.Helper()
	request, err := http.NewRequest(method, a.URL+path, strings.NewReader(body))
	if err != nil {
		return Reply{}, err
	}
	for _, line := range header {
		name, value, _ := strings.Cut(line, ": ")
		request.Header[name] = append(request.Header[name], value)
	}
	response, err := Client.Do(request)
	if err != nil {
		return Reply{}, err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return Reply{}, err
	}
	r := Reply{response.StatusCode, response.Header, string(text)}
	if a.checked {
		r.check(t, method, path)
	}
	return r, nil
}

// Want calls and checks the status; the reply is decoded into a T.
func Want[T any](t testing.TB, a *App, status int, method, path, body string, header ...string) T {
	t.Helper()
	r := a.Call(t, method, path, body, header...)
	if r.Status != status {
		t.Fatalf("%s %s %.200s: got %d %s, want %d", method, path, body, r.Status, r.Body, status)
	}
	var v T
	if err := json.Unmarshal([]byte(r.Body), &v); err != nil {
		t.Fatalf("%s %s: %v in %s", method, path, err, r.Body)
	}
	return v
}

// Create creates a good in project 1.
func (a *App) Create(t testing.TB, name string) Good {
	t.Helper()
	body, err := json.Marshal(map[string]string{"name": name})
	Must(t, err)
	return Want[Good](t, a, http.StatusCreated, "POST", "/goods/create?projectId=1", string(body))
}

// Stock creates n goods, named 1 to n.
func (a *App) Stock(t testing.TB, n int) {
	t.Helper()
	for i := range n {
		a.Create(t, fmt.Sprint(i+1))
	}
}

// List lists one page.
func (a *App) List(t testing.TB, limit, offset int) ListReply {
	t.Helper()
	return Want[ListReply](t, a, http.StatusOK, "GET", fmt.Sprintf("/goods/list?limit=%d&offset=%d", limit, offset), "")
}
