package test

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math"
	"net"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"goods/test/harness"
)

// historyPage is the reply to a history.
type historyPage struct {
	Meta     struct{ Total, Limit, Offset int }
	Versions []version
}

type version struct {
	Version           int
	Name, Description string
	Priority          int
	Removed           bool
	Time              string
}

// versions returns one page of the history of a good, and checks that its times, which it clears, are not
// before start, and in the order of the versions.
func versions(t testing.TB, a *harness.App, id, limit, offset int, start time.Time) historyPage {
	t.Helper()
	path := fmt.Sprintf("/goods/history%s&limit=%d&offset=%d", target(id), limit, offset)
	page := harness.Want[historyPage](t, a, 200, "GET", path, "")
	newer := time.Now()
	for i := range page.Versions {
		v := &page.Versions[i]
		at, err := time.Parse("2006-01-02T15:04:05Z", v.Time)
		harness.Must(t, err)
		if at.Before(start.Truncate(time.Second)) || at.After(newer) {
			t.Errorf("good %d: version %d is of %v, want %v to %v", id, v.Version, at, start, newer)
		}
		newer = at
		v.Time = ""
	}
	return page
}

// A history has every version, the newest first, in pages. What ClickHouse got twice is one version.
func TestHistory(t *testing.T) {
	w, a := started(t)
	overHTTP := w.Start(t, "CLICKHOUSE_URL="+httpURL(t, w))
	speaksHTTP := clickHouseYear(t, w) > 18 // to the driver, which sends a setting that 18.16 does not know
	start := time.Now()
	harness.Want[harness.Good](t, a, 201, "POST", create, `{"name":"a <b> & é","description":"d\u0001"}`)
	a.Stock(t, 1)
	ok(t, a, "PATCH", "/goods/update"+target(1), `{"name":"b"}`)
	ok(t, a, "PATCH", "/goods/reprioritize"+target(2), somePlace)
	ok(t, a, "DELETE", "/goods/remove"+target(1), "")
	ok(t, a, "PATCH", "/goods/reprioritize"+target(2), `{"newPriority":2}`)
	w.Settled(t, 15*time.Second)
	want := []version{
		{5, "b", "d\u0001", 1, true, ""},
		{4, "b", "d\u0001", 2, true, ""},
		{3, "b", "d\u0001", 2, false, ""},
		{2, "b", "d\u0001", 1, false, ""},
		{1, "a <b> & é", "d\u0001", 1, false, ""},
	}
	pages := []struct{ limit, offset, first, last int }{
		{10, 1, 0, 5}, {5, 1, 0, 5}, {1000, 1, 0, 5}, {2, 1, 0, 2}, {2, 3, 2, 4}, {2, 5, 4, 5}, {1, 5, 4, 5},
		{10, 6, 0, 0}, {1000, math.MaxInt32, 0, 0},
	}
	checkPage := func(a *harness.App, i int, when string) {
		t.Helper()
		page := pages[i%len(pages)]
		got := versions(t, a, 1, page.limit, page.offset, start)
		harness.Equal(t, got.Versions, append([]version{}, want[page.first:page.last]...),
			"%d versions from %d, %s", page.limit, page.offset, when)
		harness.Equal(t, fmt.Sprint(got.Meta), fmt.Sprint("{5 ", page.limit, " ", page.offset, "}"), "meta")
	}
	check := func(a *harness.App, when string) {
		t.Helper()
		for i := range pages {
			checkPage(a, i, when)
		}
	}
	check(a, "through "+w.Env["CLICKHOUSE_URL"])
	harness.Together(3*len(pages), func(i int) { checkPage(a, i, "beside others") })
	if speaksHTTP {
		check(overHTTP, "over HTTP")
	} else {
		refused(t, overHTTP, 8, "GET", "/goods/history"+target(1), "")
	}
	_, etag := get(t, a, 1)
	harness.Equal(t, etag, `"5"`, "the ETag of the good whose newest version is 5")
	harness.Must(t, w.ClickHouse.Exec(t.Context(), `INSERT INTO goods_log SELECT * FROM goods_log`))
	check(a, "with every event twice")

	// Nothing is known of these.
	w.Exec(t, `INSERT INTO campaigns (name) VALUES ('second')`)
	for _, query := range []string{
		"?id=3&projectId=1", "?id=1&projectId=2", "?id=1&projectId=9", "?id=2147483647&projectId=1",
	} {
		got := a.Call(t, "GET", "/goods/history"+query, "")
		want := `{"meta":{"total":0,"limit":10,"offset":1},"versions":[]}` + "\n"
		harness.Equal(t, fmt.Sprint(got.Status, got.Body), "200"+want, "history of %s", query)
	}
	head := a.Call(t, "HEAD", "/goods/history"+target(1), "")
	harness.Equal(t, fmt.Sprint(head.Status, head.Body), "200", "HEAD")
}

// httpURL returns CLICKHOUSE_URL for HTTP, which servers.sh serves at the next port, and others at 8123.
func httpURL(t testing.TB, w *harness.World) string {
	t.Helper()
	u, err := url.Parse(w.Env["CLICKHOUSE_URL"])
	harness.Must(t, err)
	port, err := strconv.Atoi(cmp.Or(u.Port(), "9000"))
	harness.Must(t, err)
	port++
	if port == 9001 {
		port = 8123
	}
	u.Scheme = "http"
	u.Host = fmt.Sprint(u.Hostname(), ":", port)
	return u.String()
}

// clickHouseYear returns the first number of ClickHouse's version.
func clickHouseYear(t testing.TB, w *harness.World) (year int) {
	t.Helper()
	var version string
	harness.Must(t, w.ClickHouse.QueryRow(t.Context(), `SELECT version()`).Scan(&version))
	first, _, _ := strings.Cut(version, ".")
	year, err := strconv.Atoi(first)
	harness.Must(t, err)
	return year
}

// A good of long texts with many versions fits into no small reply. It is not read before there is memory
// for it, and so only once.
func TestLongHistory(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	p := w.NewProxy(t, "CLICKHOUSE_URL")
	var read atomic.Int64 // bytes
	p.Spoil(harness.Forward, func(to net.Conn, part []byte) error {
		read.Add(int64(len(part)))
		return harness.Forward(to, part)
	})
	a := w.Start(t, "EVENTS_BATCH=50")
	a.Create(t, "one")
	const changes = 150
	w.Exec(t, fmt.Sprintf(`
DO $$
BEGIN
    FOR n IN 1..%d LOOP
        UPDATE goods SET name = n::text, description = repeat('日', 10000);
    END LOOP;
END
$$`, changes))
	harness.Equal(t, w.Settled(t, 30*time.Second), changes+1, "events")
	before := read.Load()
	page := versions(t, a, 1, 1000, 1, time.Now().Add(-time.Minute))
	const texts = changes * 30_000
	if n := read.Load() - before; n < texts || n > texts*3/2 {
		t.Errorf("read %d bytes from ClickHouse for %d bytes of texts", n, texts)
	}
	harness.Equal(t, []int{page.Meta.Total, len(page.Versions)}, []int{changes + 1, changes + 1}, "versions")
	for i, v := range page.Versions[:changes] {
		harness.Equal(t, []any{v.Version, v.Name}, []any{changes + 1 - i, fmt.Sprint(changes - i)}, "version")
		harness.Equal(t, len(v.Description), 30000, "bytes of the description")
	}
}

// Without ClickHouse a history is refused in time, however many ask, and nothing else is held up. It comes
// back by itself.
func TestHistoryWithoutClickHouse(t *testing.T) {
	w, _ := started(t, nowhere)
	p := w.NewProxy(t, "CLICKHOUSE_URL")
	a := w.Start(t)
	a.Create(t, "one")
	w.Settled(t, 15*time.Second)
	history := "/goods/history" + target(1)
	unavailable := func(why string) {
		t.Helper()
		harness.Together(40, func(i int) {
			begin := time.Now()
			r := a.Call(t, "GET", history, "")
			took := time.Since(begin)
			var failure struct{ Code int }
			harness.Must(t, json.Unmarshal([]byte(r.Body), &failure))
			refused := r.Status == 503 && failure.Code == 8 && r.Header.Get("Retry-After") != ""
			if !refused || took > 5*time.Second {
				t.Errorf("ClickHouse %s: got %d %s after %v, want 503 within five seconds",
					why, r.Status, r.Body, took)
			}
			if i < 10 {
				begin = time.Now()
				get(t, a, 1)
				a.List(t, 10, 1)
				a.Create(t, why)
				if took := time.Since(begin); took > 3*time.Second {
					t.Errorf("ClickHouse %s: a get, a list and a create took %v", why, took)
				}
			}
		})
	}
	answers := func() {
		t.Helper()
		status := func() int { return a.Call(t, "GET", history, "").Status }
		harness.AwaitEqual(t, 30*time.Second, status, 200, "status of a history")
	}
	back := func() {
		t.Helper()
		answers()
		page := versions(t, a, 1, 10, 1, time.Now().Add(-time.Minute))
		harness.Equal(t, len(page.Versions), 1, "versions")
	}
	resume := p.Freeze()
	unavailable("frozen")
	resume()
	back()
	p.Shut()
	unavailable("gone")
	p.Pass()
	back()
	w.Settled(t, 15*time.Second) // or an event on its way would make the table again
	harness.Must(t, w.ClickHouse.Exec(t.Context(), `DROP TABLE goods_log`))
	refused(t, a, 8, "GET", history, "")
	a.Create(t, "the event that makes the table again")
	answers()
	harness.Equal(t, inLog(a, "failing", "history") > 0, true, "whether the log says that histories failed")
	harness.Equal(t, inLog(a, "failing", "requests"), 0, "failures of other calls in the log")
}
