// Package test runs the built program, speaks HTTP to it, and looks into the stores behind it.
package test

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"goods/test/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

const create, someName, somePlace = "/goods/create?projectId=1", `{"name":"x"}`, `{"newPriority":1}`

// target is the query of a good in project 1.
func target(id int) string { return fmt.Sprintf("?id=%d&projectId=1", id) }

type call struct{ method, path, body string }

// calls are one of each that Postgres answers, with the good 1 in project 1.
var calls = []call{
	{"POST", create, someName},
	{"PATCH", "/goods/update" + target(1), someName},
	{"PATCH", "/goods/reprioritize" + target(1), somePlace},
	{"DELETE", "/goods/remove" + target(1), ""},
	{"GET", "/goods/list?limit=1&offset=1", ""},
	{"GET", "/goods/list?projectId=1&limit=1&offset=1", ""},
	{"GET", "/goods/get" + target(1), ""},
}

// allCalls are these and the one that ClickHouse answers.
var allCalls = append(slices.Clip(calls), call{"GET", "/goods/history" + target(1) + "&limit=1&offset=1", ""})

// started gives a test a world and a service of its own. The test runs beside others.
func started(t *testing.T, variables ...string) (*harness.World, *harness.App) {
	t.Helper()
	t.Parallel()
	w := harness.NewWorld(t)
	return w, w.Start(t, variables...)
}

// ok sends a request that must get 200.
func ok(t testing.TB, a *harness.App, method, path, body string, header ...string) {
	t.Helper()
	harness.Want[json.RawMessage](t, a, http.StatusOK, method, path, body, header...)
}

var refusals = map[int]string{
	1:  "500 errors.internal",
	2:  "400 errors.request.invalid",
	3:  "404 errors.good.notFound",
	4:  "404 errors.campaign.notFound",
	5:  "404 errors.route.notFound",
	6:  "405 errors.method.notAllowed",
	7:  "413 errors.request.tooLarge",
	8:  "503 errors.service.unavailable",
	9:  "422 errors.request.keyReused",
	10: "403 errors.request.crossOrigin",
	11: "408 errors.request.timeout",
	12: "412 errors.good.changed",
}

// refused sends a request that must get the error of this code, and returns its details.
func refused(
	t testing.TB, a *harness.App, code int, method, path, body string, header ...string,
) map[string]string {
	t.Helper()
	r := a.Call(t, method, path, body, header...)
	status, message, _ := strings.Cut(refusals[code], " ")
	start := fmt.Sprintf(`{"code":%d,"message":"%s","details":{`, code, message)
	var f struct{ Details map[string]string }
	err := json.Unmarshal([]byte(r.Body), &f)
	if err != nil || fmt.Sprint(r.Status) != status || !strings.HasPrefix(r.Body, start) ||
		(code == 2) != (len(f.Details) > 0) {
		t.Errorf("%s %s %.100s: got %d %s, want %s %s…", method, path, body, r.Status, r.Body, status, start)
	}
	return f.Details
}

func TestCalls(t *testing.T) {
	w, a := started(t)
	r := a.Call(t, "POST", create, `{"name":"a <b> & é","description":"d"}`)
	pattern := `^201 \{"id":1,"projectId":1,"name":"a <b> & é","description":"d","priority":1,` +
		`"removed":false,"createdAt":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"\}\n$`
	if got := fmt.Sprint(r.Status, " ", r.Body); !regexp.MustCompile(pattern).MatchString(got) {
		t.Errorf("create: got %s, want %s", got, pattern)
	}
	var want harness.Good
	harness.Must(t, json.Unmarshal([]byte(r.Body), &want))
	a.Stock(t, 4)

	want.Name = "A"
	update := func(body string) harness.Good {
		return harness.Want[harness.Good](t, a, 200, "PATCH", "/goods/update"+target(1), body)
	}
	harness.Equal(t, update(`{"name":"A"}`), want, "update without description")
	want.Description = ""
	harness.Equal(t, update(`{"name":"A","description":""}`), want, "update with an empty one")
	for _, move := range []struct {
		id, to int
		want   string
	}{
		{4, 2, `{"id":4,"priority":2},{"id":2,"priority":3},{"id":3,"priority":4}`},
		{1, 3, `{"id":4,"priority":1},{"id":2,"priority":2},{"id":1,"priority":3}`},
		{1, 3, `{"id":1,"priority":3}`},
		{1, 99, `{"id":3,"priority":3},{"id":5,"priority":4},{"id":1,"priority":5}`},
		{1, math.MaxInt32, `{"id":1,"priority":5}`},
	} {
		r := a.Call(t, "PATCH", "/goods/reprioritize"+target(move.id), fmt.Sprintf(`{"newPriority":%d}`, move.to))
		want := `200{"priorities":[` + move.want + "]}\n"
		harness.Equal(t, fmt.Sprint(r.Status, r.Body), want, "move %d to %d", move.id, move.to)
	}
	r = a.Call(t, "DELETE", "/goods/remove"+target(2), "ignored")
	harness.Equal(t, fmt.Sprint(r.Status, r.Body), `200{"id":2,"campaignId":1,"removed":true}`+"\n", "remove")
	l := harness.Want[answer](t, a, 200, "GET", "/goods/list", "")
	order := []item{
		{4, 1, "3", 1, false, 0},
		{2, 1, "1", 2, true, 0},
		{3, 1, "2", 3, false, 0},
		{5, 1, "4", 4, false, 0},
		{1, 1, "A", 5, false, 0},
	}
	harness.Equal(t, []any{l.Meta.Total, l.Meta.Removed, l.Goods}, []any{5, 1, order}, "list")
	harness.Equal(t, w.Settled(t, 15*time.Second), 5+2+3+3+3+1, "events")
}

func TestListPages(t *testing.T) {
	w, a := started(t)
	empty := a.Call(t, "GET", "/goods/list", "").Body
	const nothing = `{"meta":{"total":0,"removed":0,"limit":10,"offset":1},"goods":[]}` + "\n"
	harness.Equal(t, empty, nothing, "empty list")
	a.Stock(t, 45)
	pages := []struct{ limit, offset, first, last int }{
		{10, 1, 1, 10}, {20, 20, 20, 39}, {20, 40, 40, 45}, {1, 45, 45, 45}, {1000, 1, 1, 45},
		{10, 46, 1, 0}, {1000, math.MaxInt32, 1, 0},
	}
	check := func(i int) {
		page := pages[i%len(pages)]
		l := a.List(t, page.limit, page.offset)
		meta := fmt.Sprintf("{45 0 %d %d} %d", page.limit, page.offset, page.last-page.first+1)
		harness.Equal(t, fmt.Sprint(l.Meta, len(l.Goods)), meta, "page from %d", page.offset)
		for i, g := range l.Goods {
			n := page.first + i
			harness.Equal(t, fmt.Sprint(g.Priority, "@", g.Name), fmt.Sprint(n, "@", n), "page from %d", page.offset)
		}
	}
	for i := range 2 * len(pages) { // the second time, all is cached
		check(i)
	}
	// One list waits for it, and the others form a batch.
	tx := w.Hold(t, `LOCK TABLE meta IN ACCESS EXCLUSIVE MODE`)
	time.AfterFunc(200*time.Millisecond, func() { _ = tx.Rollback() })
	harness.Together(len(pages), check)
	ok(t, a, "GET", "/goods/list?limit=1&offset=9", "a body is ignored")
	head := a.Call(t, "HEAD", "/goods/list", "")
	harness.Equal(t, fmt.Sprint(head.Status, head.Body), "200", "HEAD")
}

func TestRefusals(t *testing.T) {
	w, a := started(t)
	a.Stock(t, 2)
	w.Exec(t, `INSERT INTO campaigns (name) VALUES ('second')`)
	ok(t, a, "DELETE", "/goods/remove"+target(2), "")
	for _, query := range []string{
		"?id=3&projectId=1", "?id=1&projectId=2", "?id=1&projectId=9", "?id=2&projectId=1",
		"?id=2147483647&projectId=1",
	} {
		for _, call := range calls[1:4] {
			refused(t, a, 3, call.method, strings.ReplaceAll(call.path, target(1), query), call.body)
		}
	}
	for _, query := range []string{"?id=3&projectId=1", "?id=1&projectId=2", "?id=1&projectId=9"} {
		refused(t, a, 3, "GET", "/goods/get"+query, "")
	}
	refused(t, a, 4, "POST", "/goods/create?projectId=3", someName)
	refused(t, a, 4, "GET", "/goods/list?projectId=3", "")
	refused(t, a, 4, "GET", "/goods/list?projectId=2147483647&offset=9", "")
	for _, path := range []string{
		"/index.html", "/goods", "/goods/", "/goods/list/", "//goods/list", "/goods/../goods/list",
		"/GOODS/LIST", "/goods%2Flist", "/goods/%6cist",
	} {
		refused(t, a, 5, "GET", path, "")
	}
	for call, allow := range map[string]string{
		"GET /goods/create": "POST", "POST /goods/update": "PATCH",
		"PUT /goods/reprioritize": "PATCH", "GET /goods/remove": "DELETE",
		"POST /goods/list": "GET, HEAD", "PATCH /goods/get": "GET, HEAD", "DELETE /goods/history": "GET, HEAD",
		"POST /": "GET, HEAD", "OPTIONS /healthz": "GET, HEAD", "DELETE /metrics": "GET, HEAD",
	} {
		method, path, _ := strings.Cut(call, " ")
		refused(t, a, 6, method, path, "")
		harness.Equal(t, a.Call(t, method, path, "").Header.Get("Allow"), allow, "Allow of %s", call)
	}
	events := w.Settled(t, 15*time.Second)
	harness.Equal(t, events, 3, "events, one of each change: refused requests change nothing")
}

func TestBadRequests(t *testing.T) {
	w, a := started(t)
	a.Create(t, "one")
	// bad sends a request whose faults are exactly in these fields.
	bad := func(method, path, body, fields string, header ...string) {
		t.Helper()
		details := refused(t, a, 2, method, path, body, header...)
		for _, field := range strings.Fields(fields) {
			if details[field] == "" || len(details) != len(strings.Fields(fields)) {
				t.Errorf("%s %s %.100s %.50q: got details %v, want %s", method, path, body, header, details, fields)
			}
		}
	}
	for _, value := range []string{
		"", "PARAM=", "PARAM=0", "PARAM=-1", "PARAM=%2B1", "PARAM=1.0", "PARAM=1e0", "PARAM=0x1", "PARAM=x",
		"PARAM=1%20",
		"PARAM=2147483648", "PARAM=99999999999999999999", "PARAM=1&PARAM=1", "PARAM=1&PARAM=",
	} {
		for _, parameter := range []string{"id", "projectId", "limit", "offset"} {
			for _, call := range allCalls {
				path := strings.Replace(call.path, parameter+"=1", strings.ReplaceAll(value, "PARAM", parameter), 1)
				isList := strings.HasPrefix(call.path, "/goods/list")
				optional := parameter == "limit" || parameter == "offset" || isList
				if path != call.path && (value != "" || !optional) {
					bad(call.method, path, call.body, parameter)
				}
			}
		}
	}
	bad("GET", "/goods/list?limit=1001", "", "limit")
	bad("GET", "/goods/history"+target(1)+"&limit=1001", "", "limit")
	bad("GET", "/goods/list?limit=0&offset=0&projectId=0", "", "limit offset projectId")
	bad("GET", "/goods/get", "", "id projectId")
	bad("GET", "/goods/history", "", "id projectId")
	bad("GET", "/goods/list?a=%zz", "", "query")
	bad("PATCH", "/goods/update?id=0", `{"name":""}`, "id projectId name")
	for fields, bodies := range map[string][]string{
		"name": {
			`{}`, `{"name":null}`, `{"name":1}`, `{"name":["x"]}`, `{"name":""}`,
			`{"name":"a\u0000b"}`, `{"name":"a\ud800"}`, `{"name":"a\udc00b"}`, `{"name":"\udc00\ud800"}`,
			`{"name":"x","name":"y"}`, `{"name":"x","n\u0061me":"y"}`, `{"name":"` + strings.Repeat("é", 256) + `"}`,
		},
		"name Name": {`{"Name":"x"}`},
		"priority":  {`{"name":"x","priority":1}`},
		"description": {
			`{"name":"x","description":null}`, `{"name":"x","description":7}`, `{"name":"x","description":"\u0000"}`,
			`{"name":"x","description":"` + strings.Repeat("é", 10001) + `"}`,
		},
		"body": {
			``, `null`, `[]`, `"x"`, `{"name":"x"`, `{"name":"x"}{}`, `{"name":"x"} x`, `{"name":"x",}`, `{name:"x"}`,
			"{\"name\":\"a\xff\"}", "\xef\xbb\xbf" + someName, strings.Repeat(`{"name":`, 8000),
		},
	} {
		for _, body := range bodies {
			bad("POST", calls[0].path, body, fields)
			bad("PATCH", calls[1].path, body, fields)
		}
	}
	for _, value := range []string{`null`, `1.5`, `1.0`, `1e2`, `"1"`, `0`, `-1`, `2147483648`, `true`, `[1]`} {
		bad("PATCH", calls[2].path, `{"newPriority":`+value+`}`, "newPriority")
	}
	bad("PATCH", calls[2].path, `{}`, "newPriority")
	for _, header := range [][]string{
		{keyHeader}, {keyHeader + "   "}, {keyHeader + strings.Repeat("k", 256)}, {keyHeader + "clé"},
		{keyHeader + "a\tb"},
		{keyHeader + "a", keyHeader + "b"}, {keyHeader + "a", keyHeader + "a"},
	} {
		bad("POST", create, `{"name":""}`, "Idempotency-Key name", header...)
	}
	for _, header := range [][]string{
		{ifMatch}, {ifMatch + `1`}, {ifMatch + `"`}, {ifMatch + `""`}, {ifMatch + `"a"`}, {ifMatch + `"-1"`},
		{ifMatch + `"+1"`}, {ifMatch + `"1`}, {ifMatch + `"1 "`}, {ifMatch + `"1.0"`}, {ifMatch + `"2147483648"`},
		{ifMatch + `W/"1"`}, {ifMatch + `"1", "1"`}, {ifMatch + `"*"`}, {ifMatch + `*, "1"`},
		{ifMatch + `"1"`, ifMatch + `"1"`}, {ifMatch + `*`, ifMatch + `*`},
	} {
		bad("PATCH", calls[1].path, `{}`, "If-Match name", header...)
		bad("PATCH", calls[2].path, calls[2].body, "If-Match", header...)
		bad("DELETE", calls[3].path, "", "If-Match", header...)
	}
	harness.Equal(t, w.Settled(t, 15*time.Second), 1, "events, one of each change: bad requests change nothing")

	// The largest and oddest texts are taken as they are.
	for _, text := range []string{
		`\ud83d\ude00`, `\\ud800`, `\\\\`, `\"\\`, "\ufffd", `\ufffd`, "  padded ", strings.Repeat("é", 255),
	} {
		var sent struct{ Name, Description string }
		body := `{"name":"` + text + `","description":"` + strings.Repeat("日", 10000) + `"}`
		harness.Must(t, json.Unmarshal([]byte(body), &sent))
		g := harness.Want[harness.Good](t, a, 200, "PATCH", "/goods/update"+target(1), body)
		harness.Equal(t, g.Name+g.Description, sent.Name+sent.Description, "update")
		harness.Equal(t, a.List(t, 1, 1).Goods[0], g, "list")
	}
	w.Settled(t, 15*time.Second)
}

// A client that gives up is counted, and is nobody's error. A lock that is not given in time is as good as
// a server out of reach. What is broken inside is only for the log.
func TestLockedAndBroken(t *testing.T) {
	w, a := started(t)
	a.Create(t, "good")
	tx := w.Hold(t, `LOCK TABLE goods, meta IN ACCESS EXCLUSIVE MODE`)
	harness.Together(len(calls), func(i int) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		call := calls[i]
		r, err := http.NewRequestWithContext(ctx, call.method, a.URL+call.path, strings.NewReader(call.body))
		harness.Must(t, err)
		if response, err := harness.Client.Do(r); err == nil {
			t.Errorf("%s: got %s, want none", calls[i].path, response.Status)
		}
	})
	left := func() int { return int(value(t, a, "goods_http_requests_total", `value:"499"`)) }
	harness.AwaitEqual(t, 10*time.Second, left, len(calls), "clients that went away")

	everyCall := func(code int) {
		harness.Together(len(calls), func(i int) {
			start := time.Now()
			refused(t, a, code, calls[i].method, calls[i].path, calls[i].body)
			if took := time.Since(start); took > 5*time.Second {
				t.Errorf("%s took %v, want five seconds at most", calls[i].path, took)
			}
		})
	}
	everyCall(8)
	logged := strings.Contains(a.Log(), `"level":"ERROR"`)
	harness.Equal(t, logged, false, "a client that went away, or a lock, is an error in the log")
	_, err := tx.Exec(`ALTER TABLE goods RENAME TO hidden_goods; ALTER TABLE meta RENAME TO hidden_meta`)
	harness.Must(t, err)
	harness.Must(t, tx.Commit())
	const often = 6 // so that connections would run out if each failure kept one
	for range often {
		everyCall(1)
	}
	a.AwaitLines(t, "request failed", often*len(calls))
	w.Exec(t, `ALTER TABLE hidden_goods RENAME TO goods; ALTER TABLE hidden_meta RENAME TO meta`)
	a.List(t, 10, 1)
	w.Exec(t, `UPDATE meta SET total = total + 1`)
	refused(t, a, 1, "GET", "/goods/list", "") // rather than a page without one of its goods
}
