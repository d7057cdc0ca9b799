package test

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"sync"
	"syscall"
	"testing"
	"time"

	"goods/test/harness"
)

// awaitLock waits until a session waits for an advisory lock.
func awaitLock(t testing.TB, w *harness.World) {
	t.Helper()
	waits := func() bool {
		return harness.One[bool](t, w, `
SELECT count(*) > 0
FROM pg_stat_activity
WHERE datname = current_database() AND wait_event = 'advisory'`)
	}
	harness.AwaitEqual(t, 15*time.Second, waits, true, "a session waits for the lock")
}

// Shutting down, the service says so before it stops listening, and answers all that has begun to arrive,
// also what takes seconds.
func TestShutdown(t *testing.T) {
	w, a := started(t)
	a.Create(t, "first")
	tx := w.Hold(t, `SELECT lock_priorities()`)
	w.Hold(t, `SELECT FROM goods WHERE id = 1 FOR UPDATE`) // until the update gets its 503
	half, err := net.Dial("tcp", a.Host())
	harness.Must(t, err)
	defer half.Close()
	_, err = io.WriteString(half, "GET /healthz HTTP/1.1\r\n")
	harness.Must(t, err)
	var running sync.WaitGroup
	running.Go(func() { a.Create(t, "in flight") })
	running.Go(func() { refused(t, a, 8, "PATCH", calls[1].path, someName) })
	awaitLock(t, w)
	running.Go(func() { harness.Must(t, a.Stop()) })
	saidSo := false
	harness.AwaitEqual(t, 10*time.Second, func() bool {
		response, err := harness.Client.Get(a.URL + "/readyz")
		if err != nil {
			return false
		}
		response.Body.Close()
		saidSo = saidSo || response.StatusCode == 503 && response.Close
		return true
	}, false, "the service listens")
	harness.Equal(t, saidSo, true, "503 and Connection: close from /readyz before it stopped listening")
	harness.Must(t, tx.Rollback())
	<-time.After(1500 * time.Millisecond) // connections that have said nothing are closed by now
	_, err = io.WriteString(half, "Host: goods\r\n\r\n")
	harness.Must(t, err)
	harness.Must(t, half.SetDeadline(time.Now().Add(10*time.Second)))
	response, err := http.ReadResponse(bufio.NewReader(half), nil)
	harness.Must(t, err)
	harness.Equal(t, response.StatusCode, 200, "status of a request that was arriving")
	running.Wait()
	w.Start(t)
	harness.Equal(t, w.Settled(t, 15*time.Second), 2, "events")
}

// A second signal ends the service at once, whatever is in flight.
func TestSecondSignal(t *testing.T) {
	w, a := started(t)
	w.Hold(t, `SELECT lock_priorities()`)
	answered := make(chan bool)
	go func() {
		_, err := a.Try("POST", create, someName)
		answered <- err == nil
	}()
	awaitLock(t, w)
	harness.Must(t, a.Process.Signal(syscall.SIGTERM))
	a.AwaitLines(t, "shutting down", 1)
	go func() {
		for a.Process.Signal(syscall.SIGTERM) == nil { // on a busy machine, the second one may come too early
			<-time.After(50 * time.Millisecond)
		}
	}()
	harness.Equal(t, <-answered, false, "the create was answered before the service ended")
	if err := a.Stop(); err == nil {
		t.Error("the service ended well, want it ended by the signal")
	}
}

// Connections that ask nothing hold nobody up, and neither does what the start waits for.
func TestShutdownWaitsForNobody(t *testing.T) {
	_, a := started(t)
	for i := range 20 {
		c, err := net.Dial("tcp", a.Host())
		harness.Must(t, err)
		defer c.Close()
		if i%2 == 0 { // keeps its connection after a reply; the others have never said anything
			_, err = c.Write([]byte("GET /healthz HTTP/1.1\r\nHost: goods\r\n\r\n"))
			harness.Must(t, err)
			_, err = c.Read(make([]byte, 1))
			harness.Must(t, err)
		}
	}
	ends := func(a *harness.App, limit time.Duration, how string) {
		t.Helper()
		begin := time.Now()
		harness.Equal(t, a.Stop(), nil, "how the service ended %s", how)
		if took := time.Since(begin); took > limit {
			t.Errorf("%s: ended after %v, want %v", how, took, limit)
		}
	}
	ends(a, 3*time.Second, "with silent and idle connections")

	w := harness.NewWorld(t) // where migrations are to be applied
	tx := w.Hold(t, `SELECT pg_advisory_xact_lock(hashtext('goods.migrations'))`)
	b := w.Launch(t)
	awaitLock(t, w)
	ends(b, 3*time.Second, "waiting for another's migrations")
	harness.Must(t, tx.Rollback())

	p := w.NewProxy(t, "POSTGRES_URL")
	for how, fail := range map[string]func(){"shut": p.Shut, "frozen": func() { t.Cleanup(p.Freeze()) }} {
		fail()
		c := w.Launch(t)
		c.AwaitLines(t, "waiting for postgres", 1)
		ends(c, 3*time.Second, "waiting for a Postgres that is "+how)
	}
}

// Ctrl-C ends a migration that waits for another one, also where no supervisor kills it in the end.
func TestMigrationIsStopped(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	w.Hold(t, `SELECT pg_advisory_xact_lock(hashtext('goods.migrations'))`)
	cmd := w.Command([]string{"migrate", "postgres"})
	harness.Must(t, cmd.Start())
	defer time.AfterFunc(15*time.Second, func() { _ = cmd.Process.Kill() }).Stop()
	awaitLock(t, w)
	begin := time.Now()
	harness.Must(t, cmd.Process.Signal(syscall.SIGINT))
	err := cmd.Wait()
	if took := time.Since(begin); err == nil || took > 3*time.Second {
		t.Errorf("migrate ended after %v with %v, want a failure within three seconds", took, err)
	}
}
