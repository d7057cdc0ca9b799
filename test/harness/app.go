package harness

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
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
	Process *os.Process
	Stop    func() error // ends it with SIGTERM, and returns how it ended; may be called again
	t       testing.TB
	log     string // a file
	checked bool
	client  *http.Client // Client, if nil

	logReader *os.File    // reads the log, if it is a pipe
	reading   *sync.Mutex // is held while nothing is read
}

// Host is where the service listens.
func (a *App) Host() string { return strings.TrimPrefix(a.URL, "http://") }

// Command returns goods with these arguments, in the service's environment as changed by overrides.
func (w *World) Command(args []string, overrides ...string) *exec.Cmd {
	cmd := exec.Command(cmp.Or(w.Program, program), args...)
	cmd.Env = []string{} // not the test's own
	for name, value := range w.Env {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	cmd.Env = append(cmd.Env, overrides...) // the last one counts
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
	a := &App{t: t, log: filepath.Join(t.TempDir(), "log"), checked: !w.Unchecked}
	log, err := os.Create(a.log)
	Must(t, err)
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if w.PipedLog {
		cmd.Stdout = a.pipeLog(t)
		defer cmd.Stdout.(io.Closer).Close()
	}
	Must(t, cmd.Start())
	a.Process = cmd.Process
	a.Stop = sync.OnceValue(func() error {
		_ = cmd.Process.Signal(syscall.SIGTERM) // it may have been killed
		defer time.AfterFunc(30*time.Second, func() { _ = cmd.Process.Kill() }).Stop()
		return cmd.Wait()
	})
	t.Cleanup(func() {
		_ = a.Stop()
		if log := a.Log(); strings.Contains(log, "DATA RACE") || strings.Contains(log, "panic") {
			t.Error("the service had a data race or a panic")
		}
		if t.Failed() {
			wentWell := func(line string) bool {
				return strings.Contains(line, `"msg":"request"`) && strings.Contains(line, `"err":null`)
			}
			lines := slices.DeleteFunc(strings.Split(a.Log(), "\n"), wentWell)
			t.Logf("log of the service:\n%s", strings.Join(lines[max(0, len(lines)-100):], "\n"))
		}
	})
	return a
}

// pipeLog returns a pipe, from which the log is copied into its file.
func (a *App) pipeLog(t testing.TB) *os.File {
	t.Helper()
	reader, writer, err := os.Pipe()
	Must(t, err)
	a.logReader = reader
	a.reading = new(sync.Mutex)
	log, err := os.OpenFile(a.log, os.O_WRONLY|os.O_APPEND, 0)
	Must(t, err)
	go func() {
		defer log.Close()
		for b := make([]byte, 4<<10); ; {
			n, err := reader.Read(b)
			if err != nil {
				return
			}
			a.reading.Lock() // waits while the reader is frozen
			_, _ = log.Write(b[:n])
			a.reading.Unlock()
		}
	}()
	t.Cleanup(a.EndLog)
	return writer
}

// EndLog ends the reader of a log that is a pipe.
func (a *App) EndLog() { _ = a.logReader.Close() }

// FreezeLog lets the reader of a log that is a pipe read nothing until the function that it returns is
// called.
func (a *App) FreezeLog() (resume func()) {
	a.reading.Lock()
	return a.reading.Unlock
}

// Await waits until the service listens, and learns its address.
func (a *App) Await(t testing.TB) {
	t.Helper()
	a.URL = fmt.Sprintf("http://%v", a.AwaitLines(t, "listening", 1)[0]["addr"])
}

// Log returns what the service has logged.
func (a *App) Log() string {
	text, err := os.ReadFile(a.log)
	Must(a.t, err)
	return string(text)
}

// AwaitLines waits for n entries of the log with this message, and returns them. What the service logs
// arrives a moment later than what it answers.
func (a *App) AwaitLines(t testing.TB, message string, n int) (found []map[string]any) {
	t.Helper()
	Eventually(t, 30*time.Second, func() error {
		found = nil
		for line := range strings.Lines(a.Log()) {
			var entry map[string]any
			if json.Unmarshal([]byte(line), &entry) == nil && entry["msg"] == message {
				found = append(found, entry)
			}
		}
		if len(found) < n {
			return fmt.Errorf("got %d lines %q in the log, want %d", len(found), message, n)
		}
		return nil
	})
	return found
}

// Ready returns an error unless the service reports all four servers as up.
func (a *App) Ready() error {
	r, err := a.Try("GET", "/readyz", "")
	if err == nil && (r.Status != 200 || strings.Contains(r.Body, "down")) {
		err = fmt.Errorf("/readyz: %d %s", r.Status, r.Body)
	}
	return err
}

// Client keeps enough connections for every test. It may open one and then send its request on another, which
// has become free: the service closes the first after five seconds, perhaps just when it is used.
var Client = &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{
	MaxIdleConnsPerHost: 256,
	IdleConnTimeout:     4 * time.Second,
}}

// Try sends one request, with header lines such as "Idempotency-Key: x". Whatever is answered must be as
// openapi.yaml says, or the test fails.
func (a *App) Try(method, path, body string, header ...string) (r Reply, err error) {
	a.t.Helper()
	request, err := http.NewRequest(method, a.URL+path, strings.NewReader(body))
	if err != nil {
		return r, err
	}
	for _, line := range header {
		name, value, _ := strings.Cut(line, ": ")
		request.Header[name] = append(request.Header[name], value)
	}
	response, err := cmp.Or(a.client, Client).Do(request)
	if err != nil {
		return r, err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return r, err
	}
	r = Reply{response.StatusCode, response.Header, string(text)}
	if a.checked {
		r.check(a.t, method, path)
	}
	return r, nil
}

// Call is Try for a service that must answer.
func (a *App) Call(t testing.TB, method, path, body string, header ...string) Reply {
	t.Helper()
	r, err := a.Try(method, path, body, header...)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	return r
}

// Want calls and checks the status; the reply is decoded into a T.
func Want[T any](t testing.TB, a *App, status int, method, path, body string, header ...string) T {
	t.Helper()
	r := a.Call(t, method, path, body, header...)
	if r.Status != status {
		t.Fatalf("%s %s %.200s: got %d %s, want %d", method, path, body, r.Status, r.Body, status)
	}
	var v T
	Must(t, json.Unmarshal([]byte(r.Body), &v))
	return v
}

// Create creates a good in project 1.
func (a *App) Create(t testing.TB, name string) Good {
	t.Helper()
	body := fmt.Sprintf(`{"name":%q}`, name)
	return Want[Good](t, a, http.StatusCreated, "POST", "/goods/create?projectId=1", body)
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
	path := fmt.Sprintf("/goods/list?limit=%d&offset=%d", limit, offset)
	return Want[ListReply](t, a, http.StatusOK, "GET", path, "")
}
