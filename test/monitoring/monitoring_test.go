// Package monitoring runs every expression of deploy/grafana.json and deploy/alerts.yaml on a real Prometheus
// that scrapes a busy service.
package monitoring

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	prometheusquery "github.com/grafana/grafana-foundation-sdk/go/prometheus"
	"github.com/grafana/grafana-foundation-sdk/go/stat"
	"github.com/grafana/grafana-foundation-sdk/go/timeseries"

	"goods/test/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

// expression is a PromQL query, and the panel or alert that it belongs to.
type expression struct{ owner, query string }

// metrics returns the names of the service's metrics in e.
func (e expression) metrics() []string {
	return regexp.MustCompile(`\b(goods|go|process)_[a-z_]+\b`).FindAllString(e.query, -1)
}

func TestMonitoring(t *testing.T) {
	w := harness.NewWorld(t)
	a := w.Start(t)
	p := startPrometheus(t, a)
	failOnce(t, w, a)
	keepBusy(t, a)
	panels, alerts := panelQueries(t), p.alertQueries(t)
	all := slices.Concat(panels, alerts)
	for _, e := range all {
		harness.Eventually(t, 30*time.Second, func() error {
			if err := p.evaluate(e.query); err != nil {
				return fmt.Errorf("%s: %s: %w", e.owner, e.query, err)
			}
			return nil
		})
	}

	kinds := p.kinds(t)
	for _, e := range all {
		for _, name := range e.metrics() {
			if kinds[family(kinds, name)] == "" {
				t.Errorf("%s: the service has no metric %s", e.owner, name)
			}
		}
	}
	shown := map[string]bool{}
	for _, e := range panels {
		for _, name := range e.metrics() {
			shown[family(kinds, name)] = true
		}
	}
	manual := string(harness.File(t, "docs/operations.md"))
	for name := range kinds {
		if !shown[name] && !strings.Contains(manual, name) {
			t.Errorf("%s is on no panel and not in docs/operations.md", name)
		}
	}
	for _, e := range alerts {
		if !strings.Contains(manual, "**"+e.owner+"**") {
			t.Errorf("docs/operations.md does not say what to do about %s", e.owner)
		}
	}
}

// family returns the name under which a metric is declared: for a part of a histogram, the histogram's.
func family(kinds map[string]string, name string) string {
	for _, suffix := range []string{"_bucket", "_sum", "_count"} {
		if base, found := strings.CutSuffix(name, suffix); found && kinds[base] == "histogram" {
			return base
		}
	}
	return name
}

// failOnce makes a create and a history end with 503, so that there are failures to count.
func failOnce(t *testing.T, w *harness.World, a *harness.App) {
	t.Helper()
	held := w.Hold(t, "LOCK TABLE goods")
	r := a.Call(t, "POST", "/goods/create?projectId=1", `{"name":"x"}`)
	harness.Equal(t, r.Status, http.StatusServiceUnavailable, "status of a create while the table is locked")
	harness.Must(t, held.Rollback())
	harness.Eventually(t, 20*time.Second, a.Ready)
	show := w.HideLog(t)
	r = a.Call(t, "GET", "/goods/history?projectId=1&id=1", "")
	harness.Equal(t, r.Status, http.StatusServiceUnavailable, "status of a history without its table")
	show()
}

// keepBusy makes every kind of call on goods, until the test ends.
func keepBusy(t *testing.T, a *harness.App) {
	t.Helper()
	done := make(chan struct{})
	var clients sync.WaitGroup
	for range 4 {
		clients.Go(func() {
			for tick := time.Tick(50 * time.Millisecond); ; {
				select {
				case <-done:
					return
				case <-tick:
				}
				good := a.Create(t, "busy")
				where := fmt.Sprintf("?projectId=1&id=%d", good.ID)
				a.Call(t, "PATCH", "/goods/update"+where, `{"name":"busier"}`)
				a.Call(t, "PATCH", "/goods/reprioritize"+where, `{"newPriority":1}`)
				a.Call(t, "DELETE", "/goods/remove"+where, "")
				a.List(t, 10, 1)
				a.Call(t, "GET", "/goods/history"+where, "")
			}
		})
	}
	t.Cleanup(func() {
		close(done)
		clients.Wait()
	})
}

// panelQueries returns the queries of the dashboard, with its variables filled in as Grafana would. The
// dashboard must be as Grafana's schema says.
func panelQueries(t *testing.T) (queries []expression) {
	t.Helper()
	cog.NewRuntime().RegisterPanelcfgVariant(timeseries.VariantConfig())
	cog.NewRuntime().RegisterPanelcfgVariant(stat.VariantConfig())
	cog.NewRuntime().RegisterDataqueryVariant(prometheusquery.VariantConfig())
	text := harness.File(t, "deploy/grafana.json")
	//lint:ignore SA1019 the newer schema cannot be imported into Grafana 11 and older
	var checked, board dashboard.Dashboard
	// What it finds are all faults in the text, as one error that is not nil even when there are none. It
	// leaves out panels, so the dashboard is decoded once more.
	if err := checked.UnmarshalJSONStrict(text); err != nil && err.Error() != "" {
		t.Fatal(err)
	}
	harness.Must(t, json.Unmarshal(text, &board))
	harness.Must(t, board.Validate())
	variables := strings.NewReplacer("$__rate_interval", "1m", "$instance", ".*")
	for _, p := range board.Panels {
		if p.Panel == nil {
			continue
		}
		if len(p.Panel.Targets) == 0 {
			t.Errorf("panel %s has no query", *p.Panel.Title)
		}
		for _, target := range p.Panel.Targets {
			query := variables.Replace(target.(*prometheusquery.Dataquery).Expr)
			queries = append(queries, expression{"panel " + *p.Panel.Title, query})
		}
	}
	if len(queries) == 0 {
		t.Error("the dashboard has no queries")
	}
	return queries
}

// prometheus is the address of a Prometheus that runs.
type prometheus string

// startPrometheus runs it with deploy/prometheus.yml, changed to scrape a each second, until the test ends.
func startPrometheus(t *testing.T, a *harness.App) prometheus {
	t.Helper()
	alerts, err := filepath.Abs("../../deploy/alerts.yaml")
	harness.Must(t, err)
	config := string(harness.File(t, "deploy/prometheus.yml"))
	for _, change := range [][2]string{
		{"15s", "1s"},
		{"alerts.yaml", alerts},
		{"goods:8080", strings.TrimPrefix(a.URL, "http://")},
	} {
		if !strings.Contains(config, change[0]) {
			t.Fatalf("deploy/prometheus.yml does not have %s", change[0])
		}
		config = strings.ReplaceAll(config, change[0], change[1])
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "prometheus.yml")
	harness.Must(t, os.WriteFile(file, []byte(config), 0o644))
	log, err := os.Create(filepath.Join(dir, "log"))
	harness.Must(t, err)
	defer log.Close()
	cmd := exec.Command("prometheus", "--config.file="+file, "--storage.tsdb.path="+filepath.Join(dir, "data"),
		"--web.listen-address=127.0.0.1:0")
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatalf("%v: use make test, or scripts/servers.sh install prometheus", err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	var address string
	harness.Eventually(t, 30*time.Second, func() error {
		text, err := os.ReadFile(log.Name())
		harness.Must(t, err)
		listening := regexp.MustCompile(`msg="Listening on" address=(\S+)`).FindSubmatch(text)
		if listening == nil {
			return fmt.Errorf("it does not listen: %s", text)
		}
		address = string(listening[1])
		return nil
	})
	return prometheus(address)
}

// get calls Prometheus's HTTP API and decodes the data that it returns.
func (p prometheus) get(path string, data any) error {
	response, err := harness.Client.Get("http://" + string(p) + "/api/v1/" + path)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	reply := struct {
		Error string
		Data  any
	}{Data: data}
	if err := json.NewDecoder(response.Body).Decode(&reply); err != nil {
		return err
	}
	if reply.Error != "" {
		return errors.New(reply.Error)
	}
	return nil
}

// evaluate returns an error unless query yields a number now.
func (p prometheus) evaluate(query string) error {
	var data struct {
		Result []struct {
			Value [2]any // the time, and the number as a string
		}
	}
	if err := p.get("query?query="+url.QueryEscape(query), &data); err != nil {
		return err
	}
	for _, sample := range data.Result {
		if sample.Value[1] != "NaN" {
			return nil
		}
	}
	return fmt.Errorf("got %v, want a number", data.Result)
}

// kinds returns the type of each metric of the service, by its name.
func (p prometheus) kinds(t *testing.T) map[string]string {
	t.Helper()
	var metadata map[string][]struct{ Type string }
	harness.Must(t, p.get("metadata", &metadata))
	kinds := map[string]string{}
	for name, entries := range metadata {
		kinds[name] = entries[0].Type
	}
	return kinds
}

// alertQueries returns the left side of each alert's condition, as the condition itself holds only when
// something is wrong. Prometheus must have evaluated the whole.
func (p prometheus) alertQueries(t *testing.T) (queries []expression) {
	t.Helper()
	var data struct {
		Groups []struct {
			Rules []struct{ Name, Query, Health, LastError string }
		}
	}
	harness.Eventually(t, 30*time.Second, func() error {
		queries = nil
		if err := p.get("rules", &data); err != nil {
			return err
		}
		for _, group := range data.Groups {
			for _, rule := range group.Rules {
				if rule.Health != "ok" {
					return fmt.Errorf("alert %s: %s %s", rule.Name, rule.Health, rule.LastError)
				}
				queries = append(queries, expression{rule.Name, leftSide(t, rule.Query)})
			}
		}
		if len(queries) == 0 {
			return errors.New("there are no alerts")
		}
		return nil
	})
	return queries
}

// leftSide returns A of the condition "A > number", and of absent(A == number).
func leftSide(t *testing.T, condition string) string {
	t.Helper()
	comparison := regexp.MustCompile(`^(?:absent\()?(.*) (?:==|!=|<|>|<=|>=) [0-9.e+-]+\)?$`)
	m := comparison.FindStringSubmatch(condition)
	if m == nil {
		t.Fatalf("the alert %q is not a comparison with a number", condition)
	}
	return m[1]
}
