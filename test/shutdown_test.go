package test

import (
	"fmt"
	"testing"
	"time"

	"goods/test/harness"
)

// awaitLock waits until a session waits for an advisory lock.
func awaitLock(t testing.TB, w *harness.World) {
	t.Helper()
	harness.Eventually(t, 15*time.Second, func() error {
		if harness.One[int](t, w, `SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`) == 0 {
			return fmt.Errorf("no session waits for a lock")
		}
		return nil
	})
}

// Shutting down, the service says so before it stops listening, and answers what is in flight.
func TestShutdown(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	a := w.Start(t)
	tx := w.Hold(t, `SELECT lock_priorities()`)
	created := make(chan harness.Reply, 1)
	go func() {
		r, _ := a.Try("POST", create, `{"name":"in flight"}`)
		created <- r
	}()
	awaitLock(t, w)
	stopped := make(chan error, 1)
	go func() { stopped <- a.Stop() }()
	saidSo := false
	harness.Eventually(t, 10*time.Second, func() error {
		r, err := a.Try("GET", "/readyz", "")
		saidSo = saidSo || r.Status == 503
		if err == nil {
			return fmt.Errorf("the service still listens")
		}
		return nil
	})
	harness.Equal(t, saidSo, true, "503 from /readyz before it stopped listening")
	harness.Must(t, tx.Rollback())
	harness.Equal(t, (<-created).Status, 201, "the request in flight")
	harness.Must(t, <-stopped)
	w.Start(t)
	harness.Equal(t, w.Settled(t, 15*time.Second), 1, "events")
}
