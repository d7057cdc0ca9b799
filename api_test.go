package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"
)

// failure is the reply to a request that could not be served.
type failure struct {
	Code    int
	Message string
	Details map[string]string
}

func (a *app) refused(t testing.TB, status, code int, message, method, path, body string) failure {
	t.Helper()
	f := want[failure](t, a, status, method, path, body)
	if f.Code != code || f.Message != message || f.Details == nil {
		t.Errorf("%s %s %.100s: got %+v, want code %d, %s, with details", method, path, body, f, code, message)
	}
	return f
}

func TestCalls(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.start(t)

	r := a.call(t, "POST", "/goods/create?projectId=1", `{"name":"a <b> & é","description":"d"}`)
	pattern := `^\{"id":1,"projectId":1,"name":"a <b> & é","description":"d","priority":1,"removed":false,"createdAt":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"\}\n$`
	if r.status != http.StatusCreated || !regexp.MustCompile(pattern).MatchString(r.body) {
		t.Errorf("create: got %d %s, want 201 and %s", r.status, r.body, pattern)
	}
	if got := r.header.Get("Content-Type"); got != "application/json" {
		t.Errorf("create: got Content-Type %s, want application/json", got)
	}
	if got := one[int](t, w, `SELECT count(*) FROM goods WHERE id = 1 AND name = 'a <b> & é' AND description = 'd' AND priority = 1`); got != 1 {
		t.Errorf("create: Postgres has %d such goods, want 1", got)
	}
	for i, name := range []string{"b", "c", "d", "e"} {
		if g := a.create(t, name); int(g.Priority) != i+2 || g.Description != "" {
			t.Errorf("create %s: got %+v, want priority %d and no description", name, g, i+2)
		}
	}

	g := want[good](t, a, 200, "PATCH", "/goods/update?id=1&projectId=1", `{"name":"A"}`)
	if g.Name != "A" || g.Description != "d" {
		t.Errorf("update without description: got %+v, want it left", g)
	}
	g = want[good](t, a, 200, "PATCH", "/goods/update?id=1&projectId=1", `{"name":"A","description":""}`)
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
		path := fmt.Sprintf("/goods/reprioritize?id=%d&projectId=1", move.id)
		r := a.call(t, "PATCH", path, fmt.Sprintf(`{"newPriority":%d}`, move.to))
		if r.status != 200 || strings.TrimSpace(r.body) != move.want {
			t.Errorf("%s to %d: got %d %s, want 200 %s", path, move.to, r.status, r.body, move.want)
		}
	}

	if r := a.call(t, "DELETE", "/goods/remove?id=2&projectId=1", "ignored"); r.status != 200 || r.body != `{"id":2,"campaignId":1,"removed":true}`+"\n" {
		t.Errorf("remove: got %d %s", r.status, r.body)
	}
	l := a.list(t, 10, 1)
	var order []int32
	for _, g := range l.Goods {
		order = append(order, g.ID)
		if g.Removed != (g.ID == 2) {
			t.Errorf("list: good %d has removed %v", g.ID, g.Removed)
		}
	}
	if got, want := fmt.Sprint(order, l.Meta), "[4 2 3 5 1] {5 1 10 1}"; got != want {
		t.Errorf("list: got %s, want %s", got, want)
	}
	if n := w.settled(t, 5*time.Second); n != 5+2+3+3+3+1 {
		t.Errorf("got %d events, want 17", n)
	}
}

func TestListPages(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.start(t)
	if r := a.call(t, "GET", "/goods/list", ""); r.body != `{"meta":{"total":0,"removed":0,"limit":10,"offset":1},"goods":[]}`+"\n" {
		t.Errorf("empty list: got %s", r.body)
	}
	a.stock(t, 45)
	for _, test := range []struct{ limit, offset, first, count int }{
		{10, 1, 1, 10}, {20, 20, 20, 20}, {20, 40, 40, 6}, {1, 45, 45, 1}, {1000, 1, 1, 45}, {10, 46, 0, 0}, {1000, maxInt32, 0, 0},
	} {
		for _, cache := range []string{"cold", "warm"} {
			l := a.list(t, test.limit, test.offset)
			if len(l.Goods) != test.count || l.Meta.Total != 45 || l.Meta.Limit != test.limit || l.Meta.Offset != test.offset {
				t.Fatalf("limit %d offset %d, %s: got %d goods and %+v, want %d", test.limit, test.offset, cache, len(l.Goods), l.Meta, test.count)
			}
			for i, g := range l.Goods {
				if int(g.Priority) != test.first+i || g.Name != fmt.Sprint(test.first+i) {
					t.Errorf("limit %d offset %d, %s: got %+v at %d", test.limit, test.offset, cache, g, i)
				}
			}
		}
	}
	if r := a.call(t, "GET", "/goods/list?limit=1&offset=9", "a body is ignored"); r.status != 200 {
		t.Errorf("list with a body: got %d", r.status)
	}
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.start(t)
	a.create(t, "one")
	a.create(t, "two")
	must(t, errorOf(w.db.Exec(`INSERT INTO campaigns (name) VALUES ('second')`)))
	want[json.RawMessage](t, a, 200, "DELETE", "/goods/remove?id=2&projectId=1", "")
	w.settled(t, 5*time.Second)
	before := w.snapshot(t)

	const name = `{"name":"x"}`
	for _, path := range []string{"id=3&projectId=1", "id=1&projectId=2", "id=1&projectId=9", "id=2&projectId=1", "id=2147483647&projectId=1"} {
		for _, call := range []struct{ method, path, body string }{
			{"PATCH", "/goods/update?", name}, {"PATCH", "/goods/reprioritize?", `{"newPriority":1}`}, {"DELETE", "/goods/remove?", ""},
		} {
			f := a.refused(t, 404, 3, "errors.good.notFound", call.method, call.path+path, call.body)
			if len(f.Details) != 0 {
				t.Errorf("%s%s: got details %v, want {}", call.path, path, f.Details)
			}
		}
	}
	a.refused(t, 404, 4, "errors.campaign.notFound", "POST", "/goods/create?projectId=3", name)
	for _, path := range []string{"/", "/goods", "/goods/", "/goods/list/", "//goods/list", "/goods/../goods/list", "/GOODS/LIST", "/goods%2Flist", "/goods/%6cist"} {
		a.refused(t, 404, 5, "errors.route.notFound", "GET", path, "")
	}
	for _, call := range []struct{ method, path, allow string }{
		{"GET", "/goods/create", "POST"}, {"POST", "/goods/update", "PATCH"}, {"PUT", "/goods/reprioritize", "PATCH"},
		{"GET", "/goods/remove", "DELETE"}, {"POST", "/goods/list", "GET, HEAD"}, {"OPTIONS", "/healthz", "GET, HEAD"}, {"DELETE", "/metrics", "GET, HEAD"},
	} {
		a.refused(t, 405, 6, "errors.method.notAllowed", call.method, call.path, "")
		if got := a.call(t, call.method, call.path, "").header.Get("Allow"); got != call.allow {
			t.Errorf("%s %s: got Allow %q, want %q", call.method, call.path, got, call.allow)
		}
	}
	large := fmt.Sprintf(`{"name":"x","description":"%s"}`, strings.Repeat("x", maxBody))
	a.refused(t, 413, 7, "errors.request.tooLarge", "POST", "/goods/create?projectId=1", large)
	a.refused(t, 413, 7, "errors.request.tooLarge", "PATCH", "/goods/update?id=1&projectId=1", large)

	if after := w.snapshot(t); after != before {
		t.Errorf("a refused request changed something: before %s, after %s", before, after)
	}
}

// snapshot is everything that a request could change.
func (w *world) snapshot(t testing.TB) string {
	t.Helper()
	return one[string](t, w, `SELECT concat((SELECT json_agg(g ORDER BY id) FROM goods AS g), (SELECT json_agg(m) FROM meta AS m), (SELECT count(*) FROM outbox))`)
}

func errorOf[T any](_ T, err error) error { return err }

func TestBadRequests(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.start(t)
	a.create(t, "one")
	w.settled(t, 5*time.Second)
	before := w.snapshot(t)

	bad := func(method, path, body string, fields ...string) {
		t.Helper()
		f := a.refused(t, 400, 2, "errors.request.invalid", method, path, body)
		if len(f.Details) != len(fields) {
			t.Errorf("%s %s %.100s: got details %v, want %v", method, path, body, f.Details, fields)
		}
		for _, field := range fields {
			if f.Details[field] == "" {
				t.Errorf("%s %s %.100s: got details %v, want one for %s", method, path, body, f.Details, field)
			}
		}
	}
	const name, one = `{"name":"x"}`, `{"newPriority":1}`
	for _, value := range []string{"", "=", "=0", "=-1", "=%2B1", "=1.0", "=1e0", "=0x1", "=x", "=1%20", "=2147483648", "=99999999999999999999", "=1&PARAM=1", "=1&PARAM="} {
		for _, parameter := range []string{"id", "projectId"} {
			other := map[string]string{"id": "&projectId=1", "projectId": "&id=1"}[parameter]
			query := "?"
			if value != "" {
				query += parameter + strings.ReplaceAll(value, "PARAM", parameter)
			}
			bad("PATCH", "/goods/update"+query+other, name, parameter)
			bad("PATCH", "/goods/reprioritize"+query+other, one, parameter)
			bad("DELETE", "/goods/remove"+query+other, "", parameter)
			if parameter == "projectId" {
				bad("POST", "/goods/create"+query, name, parameter)
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

	texts := map[string]string{
		"missing name":              `{}`,
		"null name":                 `{"name":null}`,
		"number as name":            `{"name":1}`,
		"array as name":             `{"name":["x"]}`,
		"empty name":                `{"name":""}`,
		"blank name":                `{"name":" \t\n\u00a0\u2003"}`,
		"256 characters":            `{"name":"` + strings.Repeat("é", 256) + `"}`,
		"U+0000 in the name":        `{"name":"a\u0000b"}`,
		"lone surrogate":            `{"name":"a\ud800"}`,
		"lone surrogate, low":       `{"name":"a\udc00b"}`,
		"surrogates in wrong order": `{"name":"\udc00\ud800"}`,
		"name in another case":      `{"Name":"x"}`,
	}
	fields := map[string][]string{"name in another case": {"Name", "name"}}
	for label, body := range texts {
		names := fields[label]
		if names == nil {
			names = []string{"name"}
		}
		bad("POST", "/goods/create?projectId=1", body, names...)
		bad("PATCH", "/goods/update?id=1&projectId=1", body, names...)
	}
	for body, field := range map[string]string{
		`{"name":"x","description":null}`:                                 "description",
		`{"name":"x","description":7}`:                                    "description",
		`{"name":"x","description":"` + strings.Repeat("é", 10001) + `"}`: "description",
		`{"name":"x","description":"\u0000"}`:                             "description",
		`{"name":"x","priority":1}`:                                       "priority",
		`{"name":"x","name":"y"}`:                                         "name",
		`{"name":"x","n\u0061me":"y"}`:                                    "name",
		``:                                                                "body",
		`null`:                                                            "body",
		`[]`:                                                              "body",
		`"x"`:                                                             "body",
		`{"name":"x"`:                                                     "body",
		`{"name":"x"}{}`:                                                  "body",
		`{"name":"x"} x`:                                                  "body",
		`{"name":"x",}`:                                                   "body",
		`{name:"x"}`:                                                      "body",
		"{\"name\":\"a\xff\"}":                                            "body",
		"\xef\xbb\xbf{\"name\":\"x\"}":                                    "body",
		strings.Repeat(`{"name":`, 8000):                                  "body",
	} {
		bad("POST", "/goods/create?projectId=1", body, field)
		bad("PATCH", "/goods/update?id=1&projectId=1", body, field)
	}
	for _, value := range []string{"null", "1.5", "1.0", "1e2", `"1"`, "0", "-1", "2147483648", "true", "[1]"} {
		bad("PATCH", "/goods/reprioritize?id=1&projectId=1", `{"newPriority":`+value+`}`, "newPriority")
	}
	bad("PATCH", "/goods/reprioritize?id=1&projectId=1", `{}`, "newPriority")
	bad("PATCH", "/goods/update?id=0", `{"name":""}`, "id", "projectId", "name")

	if after := w.snapshot(t); after != before {
		t.Errorf("a bad request changed something: before %s, after %s", before, after)
	}
}

func TestLargestRequests(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.start(t)
	name, description := strings.Repeat("é", 255), strings.Repeat("日", 10000)
	body, err := json.Marshal(map[string]string{"name": name, "description": description})
	must(t, err)
	g := want[good](t, a, 201, "POST", "/goods/create?projectId=1", string(body))
	if g.Name != name || g.Description != description {
		t.Error("the largest good came back changed")
	}
	for _, text := range []string{`\ud83d\ude00`, `\\ud800`, `\\\\`, `\"\\`, "\ufffd", `\ufffd`, "  padded "} {
		body := `{"name":"` + text + `"}`
		var sent struct{ Name string }
		must(t, json.Unmarshal([]byte(body), &sent))
		g := want[good](t, a, 200, "PATCH", "/goods/update?id=1&projectId=1", body)
		if g.Name != sent.Name || a.list(t, 1, 1).Goods[0].Name != sent.Name {
			t.Errorf("name %s: got %q, want %q", text, g.Name, sent.Name)
		}
	}
	w.settled(t, 5*time.Second)
}
