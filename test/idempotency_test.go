package test

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"goods/test/harness"
)

const keyHeader = "Idempotency-Key: "

func TestKeyMakesOneGood(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	a := w.Start(t)
	w.Exec(t, `INSERT INTO campaigns (name) VALUES ('second')`)
	a.Stock(t, 1)
	const body, key = `{"name":"a","description":"d"}`, keyHeader + "order 66 ~!"
	want := harness.Want[harness.Good](t, a, 201, "POST", create, body, key)
	again := func() {
		t.Helper()
		harness.Equal(t, harness.Want[harness.Good](t, a, 200, "POST", create, body, key), want, "repeated")
	}
	again()
	want = harness.Want[harness.Good](t, a, 200, "PATCH", "/goods/update"+target(2), `{"name":"b"}`)
	again()
	ok(t, a, "PATCH", "/goods/reprioritize"+target(2), somePlace)
	want.Priority = 1
	again()
	ok(t, a, "DELETE", "/goods/remove"+target(2), "")
	want.Removed = true
	again()
	for _, other := range []string{`{"name":"b","description":"d"}`, `{"name":"a","description":"e"}`, `{"name":"a"}`, `{"name":"ad"}`} {
		refused(t, a, 9, "POST", create, other, key)
	}
	again()
	// Other keys, and other projects, make other goods.
	for key, path := range map[string]string{keyHeader + strings.Repeat("k", 255): create, keyHeader + "Order 66 ~!": create, key: "/goods/create?projectId=2"} {
		made := harness.Want[harness.Good](t, a, 201, "POST", path, body, key)
		harness.Equal(t, harness.Want[harness.Good](t, a, 200, "POST", path, body, key), made, "repeated with %.40s", key)
	}
	// A request that failed does not use its key up.
	refused(t, a, 4, "POST", "/goods/create?projectId=3", body, key)
	w.Exec(t, `INSERT INTO campaigns (name) VALUES ('third')`)
	harness.Want[harness.Good](t, a, 201, "POST", "/goods/create?projectId=3", body, key)
	harness.Equal(t, w.Settled(t, 15*time.Second), 6+4, "events") // six creates, and the move renumbered two
}

func TestBadKeys(t *testing.T) {
	t.Parallel()
	a := harness.NewWorld(t).Start(t)
	for label, header := range map[string][]string{
		"empty":          {keyHeader},
		"blank":          {keyHeader + "   "},
		"256 characters": {keyHeader + strings.Repeat("k", 256)},
		"not ASCII":      {keyHeader + "clé"},
		"tab":            {keyHeader + "a\tb"},
		"repeated":       {keyHeader + "a", keyHeader + "b"},
		"repeated, same": {keyHeader + "a", keyHeader + "a"},
	} {
		details := refused(t, a, 2, "POST", create, `{"name":""}`, header...)
		if len(details) != 2 || details["Idempotency-Key"] == "" || details["name"] == "" {
			t.Errorf("%s: got details %v, want them for Idempotency-Key and name", label, details)
		}
	}
	harness.Equal(t, a.List(t, 10, 1).Meta.Total, 0, "goods")
}

// The same keys at once, on two replicas and within one batch.
func TestKeysAtOnce(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	replicas := []*harness.App{w.Start(t), w.Start(t)}
	const keys, clients = 20, 16
	var goods [keys][clients]string // each as a client saw it: its status and its id
	harness.Together(clients, func(i int) {
		for n := range keys {
			r := replicas[i%2].Call(t, "POST", create, fmt.Sprintf(`{"name":"n%d"}`, n), fmt.Sprint(keyHeader, n))
			var g harness.Good
			harness.Must(t, json.Unmarshal([]byte(r.Body), &g))
			goods[n][i] = fmt.Sprint(r.Status, " good ", g.ID)
		}
	})
	for _, seen := range goods {
		slices.Sort(seen[:]) // 201 comes last
		id := strings.TrimPrefix(seen[clients-1], "201")
		for i := range clients - 1 {
			harness.Equal(t, seen[i], "200"+id, "another reply")
		}
	}
	harness.Equal(t, w.Settled(t, 15*time.Second), keys, "events")
}

// Whatever a kill cut off is repeated until it is answered: one good a key.
func TestKeysAcrossKills(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	w.Env["EVENTS_BATCH"] = "50"
	stable := w.Start(t)
	var shaky atomic.Pointer[harness.App]
	shaky.Store(w.Start(t))
	var done atomic.Bool
	var repeated, keys atomic.Int64
	var clients sync.WaitGroup
	for i := range 8 {
		clients.Go(func() {
			for n := 0; !done.Load() && !t.Failed(); n++ {
				name := fmt.Sprintf("%d-%d", i, n)
				for a, answered := shaky.Load(), false; !answered && !t.Failed(); a = stable {
					r, err := a.Try("POST", create, fmt.Sprintf(`{"name":%q}`, name), keyHeader+name)
					if answered = err == nil && r.Status < 300; !answered {
						repeated.Add(1)
					}
					if r.Status >= 300 && r.Status != 503 {
						t.Errorf("key %s: got %d %s", name, r.Status, r.Body)
					}
				}
				keys.Add(1)
			}
		})
	}
	for range 6 {
		enough := keys.Load() + 40
		harness.Eventually(t, 30*time.Second, func() error {
			if n := keys.Load(); n < enough {
				return fmt.Errorf("only %d creates are answered, want %d", n, enough)
			}
			return nil
		})
		harness.Must(t, shaky.Load().Process.Kill())
		shaky.Store(w.Start(t))
	}
	done.Store(true)
	clients.Wait()
	if repeated.Load() == 0 {
		t.Error("no kill cut anything off")
	}
	harness.Equal(t, int64(w.Settled(t, 30*time.Second)), keys.Load(), "goods, and events, for the keys")
}
