package test

import (
	"database/sql"
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	"goods/test/harness"
)

// A standby that the URL names first would show lists of the past. It is not asked.
func TestStandbyNamedFirst(t *testing.T) {
	t.Parallel()
	own := harness.NewServers(t, "postgres")
	standby := harness.NewStandby(t, own, false)
	w := harness.NewWorld(t, own.URLs...)
	pause, err := sql.Open("postgres", standby.URL)
	harness.Must(t, err)
	defer pause.Close()
	goods(t, w, "migrate postgres")
	standby.CatchUp(t)
	_, err = pause.Exec(`SELECT pg_wal_replay_pause()`)
	harness.Must(t, err)

	first, err := url.Parse(standby.URL)
	harness.Must(t, err)
	u, err := url.Parse(w.Env["POSTGRES_URL"])
	harness.Must(t, err)
	hosts := fmt.Sprintf("&host=%s,%s&port=%s,%s", first.Hostname(), u.Hostname(), first.Port(), u.Port())
	w.Env["POSTGRES_URL"] += hosts
	a := w.Start(t)
	for i := range 20 {
		g := a.Create(t, "one")
		harness.Equal(t, a.List(t, 1, i+1).Goods[0].ID, g.ID, "the good at position %d", i+1)
	}
	harness.Equal(t, w.Settled(t, 15*time.Second), 20, "events")
}

// A server that takes no writes any more is one that cannot serve now: no bug of the service, and no line a
// request.
func TestPostgresBecomesReadOnly(t *testing.T) {
	t.Parallel()
	own := harness.NewServers(t, "postgres")
	standby := harness.NewStandby(t, own, false)
	reached, err := url.Parse(standby.URL)
	harness.Must(t, err)
	for name, test := range map[string]struct {
		query   string // of the URL, besides
		demoted bool   // the address leads to the standby
	}{
		"demoted":                          {"", true},
		"demoted, any server will":         {"&target_session_attrs=any", true},
		"by its settings":                  {"", false},
		"by its settings, any server will": {"&target_session_attrs=any", false},
	} {
		t.Run(name, func(t *testing.T) { // one after the other: they share the server
			w := harness.NewWorld(t, own.URLs...)
			p := w.NewProxy(t, "POSTGRES_URL")
			w.Env["POSTGRES_URL"] += test.query
			a := w.Start(t)
			a.Create(t, "one")
			w.Settled(t, 15*time.Second)
			standby.CatchUp(t)
			var back func()
			if test.demoted {
				back = p.Redirect(reached.Host)
			} else {
				back = readOnlyBySettings(t, w)
			}
			for range 3 {
				for _, call := range calls {
					r := a.Call(t, call.method, call.path, call.body)
					served := r.Status == 200 && call.method == "GET"
					if !test.demoted { // only the default, which a transaction that writes may change
						served = r.Status/100 == 2 || r.Status == 404
					}
					if !served && r.Status != 503 {
						t.Errorf("%s: got %d %s, want 503", call.path, r.Status, r.Body)
					}
				}
			}
			harness.Equal(t, strings.Count(a.Log(), `"level":"ERROR"`), 0, "errors in the log")
			if n := strings.Count(a.Log(), `"level":"WARN"`); n > 8 { // one for each part that fails
				t.Errorf("got %d warnings in the log", n)
			}
			back()
			harness.Eventually(t, 15*time.Second, a.Ready)
			a.Create(t, "last")
			w.Settled(t, 30*time.Second)
		})
	}
}

func readOnlyBySettings(t *testing.T, w *harness.World) (back func()) {
	set := func(value string) {
		w.Exec(t, `ALTER SYSTEM SET default_transaction_read_only = `+value)
		w.Exec(t, `SELECT pg_reload_conf()`)
		harness.AwaitEqual(t, 10*time.Second, func() string {
			return harness.One[string](t, w, `SHOW default_transaction_read_only`)
		}, value, "default_transaction_read_only")
	}
	set("on")
	return func() { set("off") }
}
