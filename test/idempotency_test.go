package test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"goods/test/harness"
)

const create = "/goods/create?projectId=1"

func TestKeyMakesOneGood(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	a := w.Start(t)
	w.Exec(t, `INSERT INTO campaigns (name) VALUES ('second')`)
	const body, key = `{"name":"a","description":"d"}`, "Idempotency-Key: order 66 ~!"
	a.Stock(t, 1)
	first := harness.Want[harness.Good](t, a, 201, "POST", create, body, key)
	want := first
	again := func() {
		t.Helper()
		if got := harness.Want[harness.Good](t, a, 200, "POST", create, body, key); got != want {
			t.Errorf("repeated: got %+v, want %+v", got, want)
		}
	}
	again()
	want = harness.Want[harness.Good](t, a, 200, "PATCH", "/goods/update?id=2&projectId=1", `{"name":"b"}`)
	again()
	harness.Want[json.RawMessage](t, a, 200, "PATCH", "/goods/reprioritize?id=2&projectId=1", somePlace)
	want.Priority = 1
	again()
	harness.Want[json.RawMessage](t, a, 200, "DELETE", "/goods/remove?id=2&projectId=1", "")
	want.Removed = true
	again()
	for _, other := range []string{`{"name":"b","description":"d"}`, `{"name":"a","description":"e"}`, `{"name":"a"}`, `{"name":"ad"}`} {
		refused(t, a, 422, 9, "errors.request.keyReused", "POST", create, other, key)
	}
	again()

	// Other keys, and other projects, are other goods.
	longest := "Idempotency-Key: " + strings.Repeat("k", 255)
	for _, other := range []struct{ path, key string }{{create, longest}, {create, "Idempotency-Key: Order 66 ~!"}, {"/goods/create?projectId=2", key}} {
		made := harness.Want[harness.Good](t, a, 201, "POST", other.path, body, other.key)
		if got := harness.Want[harness.Good](t, a, 200, "POST", other.path, body, other.key); got != made || got.ID == first.ID {
			t.Errorf("%.40s %s: got %+v, then %+v", other.key, other.path, made, got)
		}
	}
	// A key is not used up by a request that failed.
	refused(t, a, 404, 4, "errors.campaign.notFound", "POST", "/goods/create?projectId=3", body, key)
	w.Exec(t, `INSERT INTO campaigns (name) VALUES ('third')`)
	harness.Want[harness.Good](t, a, 201, "POST", "/goods/create?projectId=3", body, key)
	if n := w.Settled(t, 15*time.Second); n != 6+4 { // the move renumbered two
		t.Errorf("got %d events, want 10", n)
	}
}

func TestBadKeys(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	a := w.Start(t)
	const key = "Idempotency-Key: "
	for label, header := range map[string][]string{
		"empty":          {key},
		"blank":          {key + "   "},
		"256 characters": {key + strings.Repeat("k", 256)},
		"not ASCII":      {key + "clé"},
		"tab":            {key + "a\tb"},
		"repeated":       {key + "a", key + "b"},
		"repeated, same": {key + "a", key + "a"},
	} {
		f := refused(t, a, 400, 2, "errors.request.invalid", "POST", create, `{"name":""}`, header...)
		if len(f.Details) != 2 || f.Details["Idempotency-Key"] == "" || f.Details["name"] == "" {
			t.Errorf("%s: got details %v, want them for Idempotency-Key and name", label, f.Details)
		}
	}
	if n := harness.One[int](t, w, `SELECT count(*) FROM goods`); n != 0 {
		t.Errorf("bad keys made %d goods", n)
	}
}

// The same keys at once, on two replicas and within one batch.
func TestKeysAtOnce(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	replicas := []*harness.App{w.Start(t), w.Start(t)}
	const keys, each = 20, 16
	var made [keys]atomic.Int64
	var ids [keys]sync.Map
	harness.Together(each, func(i int) {
		for n := range keys {
			r := replicas[i%2].Call(t, "POST", create, fmt.Sprintf(`{"name":"n%d"}`, n), fmt.Sprintf("Idempotency-Key: k%d", n))
			var g harness.Good
			if err := json.Unmarshal([]byte(r.Body), &g); err != nil || r.Status != 200 && r.Status != 201 {
				t.Errorf("key %d: got %d %s", n, r.Status, r.Body)
			}
			made[n].Add(int64(r.Status - 200))
			ids[n].Store(g.ID, true)
		}
	})
	for n := range keys {
		different := 0
		ids[n].Range(func(_, _ any) bool { different++; return true })
		if made[n].Load() != 1 || different != 1 {
			t.Errorf("key %d: got 201 %d times, and %d goods, want one", n, made[n].Load(), different)
		}
	}
	if n := w.Settled(t, 15*time.Second); n != keys {
		t.Errorf("got %d events, want %d", n, keys)
	}
}

// Whatever a kill cut off is repeated until it is answered: one good a key.
func TestKeysAcrossKills(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	stable := w.Start(t, "EVENTS_BATCH=50")
	var shaky atomic.Pointer[harness.App]
	shaky.Store(w.Start(t, "EVENTS_BATCH=50"))
	var done atomic.Bool
	var repeated, keys atomic.Int64
	var clients sync.WaitGroup
	for i := range 8 {
		clients.Go(func() {
			for n := 0; !done.Load(); n++ {
				name := fmt.Sprintf("%d-%d", i, n)
				for try := 0; ; try++ {
					a := shaky.Load()
					if try%2 == 1 { // the second try is at another replica
						a = stable
						repeated.Add(1)
					}
					r, err := a.Try("POST", create, fmt.Sprintf(`{"name":%q}`, name), "Idempotency-Key: "+name)
					if err == nil && (r.Status == http.StatusOK || r.Status == http.StatusCreated) {
						break
					}
					if err == nil && r.Status != http.StatusServiceUnavailable {
						t.Errorf("%s: got %d %s", name, r.Status, r.Body)
					}
				}
				keys.Add(1)
			}
		})
	}
	for range 6 {
		seen := keys.Load()
		harness.Eventually(t, 30*time.Second, func() error {
			if n := keys.Load() - seen; n < 40 {
				return fmt.Errorf("only %d creates are answered", n)
			}
			return nil
		})
		harness.Must(t, shaky.Load().Process.Kill())
		shaky.Store(w.Start(t, "EVENTS_BATCH=50"))
	}
	done.Store(true)
	clients.Wait()
	if repeated.Load() == 0 {
		t.Error("no kill cut anything off")
	}
	if got := harness.One[int64](t, w, `SELECT count(*) FROM goods`); got != keys.Load() {
		t.Errorf("got %d goods for %d keys", got, keys.Load())
	}
	if n := w.Settled(t, 30*time.Second); int64(n) != keys.Load() {
		t.Errorf("got %d events, want %d", n, keys.Load())
	}
}
