package test

import (
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"goods/test/harness"
)

// failure is the reply to a request that could not be served.
type failure struct {
	Code    int
	Message string
	Details map[string]string
}

// refused sends a request that must get this error, and nothing else.
func refused(t testing.TB, a *harness.App, status, code int, message, method, path, body string, header ...string) failure {
	t.Helper()
	r := a.Call(t, method, path, body, header...)
	var f failure
	start := fmt.Sprintf(`{"code":%d,"message":"%s","details":{`, code, message)
	if err := json.Unmarshal([]byte(r.Body), &f); err != nil || r.Status != status || !strings.HasPrefix(r.Body, start) {
		t.Errorf("%s %s %.100s: got %d %s, want %d %s…", method, path, body, r.Status, r.Body, status, start)
	}
	if code != 2 && len(f.Details) > 0 {
		t.Errorf("%s %s %.100s: got details %v, want {}", method, path, body, f.Details)
	}
	return f
}

const someName, somePlace = `{"name":"x"}`, `{"newPriority":1}`

// calls are one of each, with the good 1 in project 1.
var calls = []struct{ method, path, body string }{
	{"POST", "/goods/create?projectId=1", someName},
	{"PATCH", "/goods/update?id=1&projectId=1", someName},
	{"PATCH", "/goods/reprioritize?id=1&projectId=1", somePlace},
	{"DELETE", "/goods/remove?id=1&projectId=1", ""},
	{"GET", "/goods/list", ""},
}

func TestCalls(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	a := w.Start(t)

	r := a.Call(t, "POST", "/goods/create?projectId=1", `{"name":"a <b> & é","description":"d"}`)
	pattern := `^\{"id":1,"projectId":1,"name":"a <b> & é","description":"d","priority":1,"removed":false,"createdAt":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"\}\n$`
	if r.Status != http.StatusCreated || !regexp.MustCompile(pattern).MatchString(r.Body) {
		t.Errorf("create: got %d %s, want 201 and %s", r.Status, r.Body, pattern)
	}
	for i, name := range []string{"b", "c", "d", "e"} {
		if g := a.Create(t, name); g.Priority != i+2 || g.Description != "" {
			t.Errorf("create %s: got %+v, want priority %d and no description", name, g, i+2)
		}
	}
	g := harness.Want[harness.Good](t, a, 200, "PATCH", "/goods/update?id=1&projectId=1", `{"name":"A"}`)
	if g.Name != "A" || g.Description != "d" {
		t.Errorf("update without description: got %+v, want it left", g)
	}
	g = harness.Want[harness.Good](t, a, 200, "PATCH", "/goods/update?id=1&projectId=1", `{"name":"A","description":""}`)
	if g.Description != "" || g.ID != 1 || g.ProjectID != 1 || g.Priority != 1 || g.Removed || g.CreatedAt.IsZero() {
		t.Errorf("update with empty description: got %+v, want it emptied and the rest unchanged", g)
	}
	for _, move := range []struct {
		id, to int
		want   string
	}{
		{4, 2, `{"priorities":[{"id":4,"priority":2},{"id":2,"priority":3},{"id":3,"priority":4}]}`},
		{1, 3, `{"priorities":[{"id":4,"priority":1},{"id":2,"priority":2},{"id":1,"priority":3}]}`},
		{1, 3, `{"priorities":[{"id":1,"priority":3}]}`},
		{1, 99, `{"priorities":[{"id":3,"priority":3},{"id":5,"priority":4},{"id":1,"priority":5}]}`},
		{1, 99, `{"priorities":[{"id":1,"priority":5}]}`},
	} {
		r := a.Call(t, "PATCH", fmt.Sprintf("/goods/reprioritize?id=%d&projectId=1", move.id), fmt.Sprintf(`{"newPriority":%d}`, move.to))
		if r.Status != 200 || strings.TrimSpace(r.Body) != move.want {
			t.Errorf("move %d to %d: got %d %s, want 200 %s", move.id, move.to, r.Status, r.Body, move.want)
		}
	}
	if r := a.Call(t, "DELETE", "/goods/remove?id=2&projectId=1", "ignored"); r.Status != 200 || r.Body != `{"id":2,"campaignId":1,"removed":true}`+"\n" {
		t.Errorf("remove: got %d %s", r.Status, r.Body)
	}
	l := a.List(t, 10, 1)
	var order []int
	for _, g := range l.Goods {
		order = append(order, g.ID)
		if g.Removed != (g.ID == 2) {
			t.Errorf("list: good %d has removed %v", g.ID, g.Removed)
		}
	}
	if got, want := fmt.Sprint(order, l.Meta), "[4 2 3 5 1] {5 1 10 1}"; got != want {
		t.Errorf("list: got %s, want %s", got, want)
	}
	if n := w.Settled(t, 15*time.Second); n != 5+2+3+3+3+1 {
		t.Errorf("got %d events, want 17", n)
	}
}

func TestListPages(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	a := w.Start(t)
	if r := a.Call(t, "GET", "/goods/list", ""); r.Body != `{"meta":{"total":0,"removed":0,"limit":10,"offset":1},"goods":[]}`+"\n" {
		t.Errorf("empty list: got %s", r.Body)
	}
	a.Stock(t, 45)
	for _, test := range []struct{ limit, offset, first, count int }{
		{10, 1, 1, 10}, {20, 20, 20, 20}, {20, 40, 40, 6}, {1, 45, 45, 1}, {1000, 1, 1, 45}, {10, 46, 0, 0}, {1000, math.MaxInt32, 0, 0},
	} {
		for _, cache := range []string{"cold", "warm"} {
			l := a.List(t, test.limit, test.offset)
			if len(l.Goods) != test.count || l.Meta.Total != 45 || l.Meta.Limit != test.limit || l.Meta.Offset != test.offset {
				t.Fatalf("limit %d offset %d, %s: got %d goods and %+v, want %d", test.limit, test.offset, cache, len(l.Goods), l.Meta, test.count)
			}
			for i, g := range l.Goods {
				if g.Priority != test.first+i || g.Name != fmt.Sprint(test.first+i) {
					t.Errorf("limit %d offset %d, %s: got %+v at %d", test.limit, test.offset, cache, g, i)
				}
			}
		}
	}
	if r := a.Call(t, "GET", "/goods/list?limit=1&offset=9", "a body is ignored"); r.Status != 200 {
		t.Errorf("list with a body: got %d", r.Status)
	}
	if r := a.Call(t, "HEAD", "/goods/list", ""); r.Status != 200 || r.Body != "" {
		t.Errorf("HEAD: got %d %q", r.Status, r.Body)
	}
}

// snapshot is everything that a request could change.
func snapshot(t testing.TB, w *harness.World) string {
	t.Helper()
	return harness.One[string](t, w, `SELECT concat((SELECT json_agg(g ORDER BY id) FROM goods AS g), (SELECT json_agg(m) FROM meta AS m), (SELECT count(*) FROM outbox))`)
}

// A request that is refused changes nothing.
func TestRefusals(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	a := w.Start(t)
	a.Stock(t, 2)
	w.Exec(t, `INSERT INTO campaigns (name) VALUES ('second')`)
	harness.Want[json.RawMessage](t, a, 200, "DELETE", "/goods/remove?id=2&projectId=1", "")
	w.Settled(t, 15*time.Second)
	before := snapshot(t, w)

	for _, query := range []string{"id=3&projectId=1", "id=1&projectId=2", "id=1&projectId=9", "id=2&projectId=1", "id=2147483647&projectId=1"} {
		for _, call := range calls[1:4] {
			path, _, _ := strings.Cut(call.path, "?")
			refused(t, a, 404, 3, "errors.good.notFound", call.method, path+"?"+query, call.body)
		}
	}
	refused(t, a, 404, 4, "errors.campaign.notFound", "POST", "/goods/create?projectId=3", someName)
	for _, path := range []string{"/", "/goods", "/goods/", "/goods/list/", "//goods/list", "/goods/../goods/list", "/GOODS/LIST", "/goods%2Flist", "/goods/%6cist"} {
		refused(t, a, 404, 5, "errors.route.notFound", "GET", path, "")
	}
	for _, call := range []struct{ method, path, allow string }{
		{"GET", "/goods/create", "POST"}, {"POST", "/goods/update", "PATCH"}, {"PUT", "/goods/reprioritize", "PATCH"}, {"GET", "/goods/remove", "DELETE"},
		{"POST", "/goods/list", "GET, HEAD"}, {"OPTIONS", "/healthz", "GET, HEAD"}, {"DELETE", "/metrics", "GET, HEAD"},
	} {
		refused(t, a, 405, 6, "errors.method.notAllowed", call.method, call.path, "")
		if got := a.Call(t, call.method, call.path, "").Header.Get("Allow"); got != call.allow {
			t.Errorf("%s %s: got Allow %q, want %q", call.method, call.path, got, call.allow)
		}
	}
	large := fmt.Sprintf(`{"name":"x","description":"%s"}`, strings.Repeat("x", 64<<10))
	for _, call := range calls[:3] {
		refused(t, a, 413, 7, "errors.request.tooLarge", call.method, call.path, large)
	}
	if after := snapshot(t, w); after != before {
		t.Errorf("a refused request changed something: before %s, after %s", before, after)
	}
}

func TestBadRequests(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	a := w.Start(t)
	a.Create(t, "one")
	w.Settled(t, 15*time.Second)
	before := snapshot(t, w)

	bad := func(method, path, body string, fields ...string) {
		t.Helper()
		f := refused(t, a, 400, 2, "errors.request.invalid", method, path, body)
		for _, field := range fields {
			if f.Details[field] == "" || len(f.Details) != len(fields) {
				t.Errorf("%s %s %.100s: got details %v, want %v", method, path, body, f.Details, fields)
			}
		}
	}
	for _, value := range []string{"", "=", "=0", "=-1", "=%2B1", "=1.0", "=1e0", "=0x1", "=x", "=1%20", "=2147483648", "=99999999999999999999", "=1&PARAM=1", "=1&PARAM="} {
		for _, parameter := range []string{"id", "projectId"} {
			query := "?"
			if value != "" {
				query += parameter + strings.ReplaceAll(value, "PARAM", parameter)
			}
			other := map[string]string{"id": "&projectId=1", "projectId": "&id=1"}[parameter]
			bad("PATCH", "/goods/update"+query+other, someName, parameter)
			bad("PATCH", "/goods/reprioritize"+query+other, somePlace, parameter)
			bad("DELETE", "/goods/remove"+query+other, "", parameter)
			if parameter == "projectId" {
				bad("POST", "/goods/create"+query, someName, parameter)
			}
		}
		if value != "" { // limit and offset may be absent
			for _, parameter := range []string{"limit", "offset"} {
				bad("GET", "/goods/list?"+parameter+strings.ReplaceAll(value, "PARAM", parameter), "", parameter)
			}
		}
	}
	bad("GET", "/goods/list?limit=1001", "", "limit")
	bad("GET", "/goods/list?limit=0&offset=0", "", "limit", "offset")
	bad("GET", "/goods/list?a=%zz", "", "query")
	bad("PATCH", "/goods/update?id=0", `{"name":""}`, "id", "projectId", "name")

	for body, fields := range map[string]string{
		`{}`:                                  "name",
		`{"name":null}`:                       "name",
		`{"name":1}`:                          "name",
		`{"name":["x"]}`:                      "name",
		`{"name":""}`:                         "name",
		`{"name":" \t\n\u00a0\u2003"}`:        "name",
		`{"name":"a\u0000b"}`:                 "name",
		`{"name":"a\ud800"}`:                  "name",
		`{"name":"a\udc00b"}`:                 "name",
		`{"name":"\udc00\ud800"}`:             "name",
		`{"Name":"x"}`:                        "name Name",
		`{"name":"x","name":"y"}`:             "name",
		`{"name":"x","n\u0061me":"y"}`:        "name",
		`{"name":"x","description":null}`:     "description",
		`{"name":"x","description":7}`:        "description",
		`{"name":"x","description":"\u0000"}`: "description",
		`{"name":"x","priority":1}`:           "priority",
		``:                                    "body",
		`null`:                                "body",
		`[]`:                                  "body",
		`"x"`:                                 "body",
		`{"name":"x"`:                         "body",
		`{"name":"x"}{}`:                      "body",
		`{"name":"x"} x`:                      "body",
		`{"name":"x",}`:                       "body",
		`{name:"x"}`:                          "body",
		"{\"name\":\"a\xff\"}":                "body",
		"\xef\xbb\xbf{\"name\":\"x\"}":        "body",
		strings.Repeat(`{"name":`, 8000):      "body",
		`{"name":"` + strings.Repeat("é", 256) + `"}`:                     "name",
		`{"name":"x","description":"` + strings.Repeat("é", 10001) + `"}`: "description",
	} {
		bad("POST", "/goods/create?projectId=1", body, strings.Fields(fields)...)
		bad("PATCH", "/goods/update?id=1&projectId=1", body, strings.Fields(fields)...)
	}
	for _, value := range []string{"null", "1.5", "1.0", "1e2", `"1"`, "0", "-1", "2147483648", "true", "[1]"} {
		bad("PATCH", "/goods/reprioritize?id=1&projectId=1", `{"newPriority":`+value+`}`, "newPriority")
	}
	bad("PATCH", "/goods/reprioritize?id=1&projectId=1", `{}`, "newPriority")
	if after := snapshot(t, w); after != before {
		t.Errorf("a bad request changed something: before %s, after %s", before, after)
	}
}

func TestLargestAndOddTexts(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	a := w.Start(t)
	name, description := strings.Repeat("é", 255), strings.Repeat("日", 10000)
	body, err := json.Marshal(map[string]string{"name": name, "description": description})
	harness.Must(t, err)
	if g := harness.Want[harness.Good](t, a, 201, "POST", "/goods/create?projectId=1", string(body)); g.Name != name || g.Description != description {
		t.Error("the largest good came back changed")
	}
	for _, text := range []string{`\ud83d\ude00`, `\\ud800`, `\\\\`, `\"\\`, "\ufffd", `\ufffd`, "  padded "} {
		body := `{"name":"` + text + `"}`
		var sent struct{ Name string }
		harness.Must(t, json.Unmarshal([]byte(body), &sent))
		g := harness.Want[harness.Good](t, a, 200, "PATCH", "/goods/update?id=1&projectId=1", body)
		if g.Name != sent.Name || a.List(t, 1, 1).Goods[0].Name != sent.Name {
			t.Errorf("name %s: got %q, want %q", text, g.Name, sent.Name)
		}
	}
	w.Settled(t, 15*time.Second)
}

// A lock that is not given in time is as good as a server out of reach; what
// is broken inside is nobody's business but the log's.
func TestUnavailableAndInternalErrors(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	a := w.Start(t)
	a.Create(t, "good")
	everyCall := func(status, code int, message string) {
		t.Helper()
		harness.Together(len(calls), func(i int) {
			start := time.Now()
			refused(t, a, status, code, message, calls[i].method, calls[i].path, calls[i].body)
			if took := time.Since(start); took > 5*time.Second {
				t.Errorf("%s took %v, want five seconds at most", calls[i].path, took)
			}
		})
	}
	tx := w.Hold(t, `LOCK TABLE goods, meta IN ACCESS EXCLUSIVE MODE`)
	everyCall(http.StatusServiceUnavailable, 8, "errors.service.unavailable")
	_, err := tx.Exec(`ALTER TABLE goods RENAME TO hidden_goods; ALTER TABLE meta RENAME TO hidden_meta`)
	harness.Must(t, err)
	harness.Must(t, tx.Commit())
	everyCall(http.StatusInternalServerError, 1, "errors.internal")
	harness.Eventually(t, 5*time.Second, func() error {
		if n := len(a.Log.Lines("request failed")); n != len(calls) {
			return fmt.Errorf("the log has %d causes, want %d", n, len(calls))
		}
		return nil
	})
	w.Exec(t, `ALTER TABLE hidden_goods RENAME TO goods; ALTER TABLE hidden_meta RENAME TO meta`)
	a.List(t, 10, 1)
}
