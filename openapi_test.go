package main

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// TestOpenAPIExamples sends every request of openapi.yaml, in the order of the
// API, and holds the examples of its replies against their schemas. The real
// replies, here and in every other test, are checked where they arrive.
func TestOpenAPIExamples(t *testing.T) {
	spec, err := readYAML(string(openAPI))
	must(t, err)
	c := contract{spec}
	w := newWorld(t)
	a := w.start(t)
	for range 3 {
		a.create(t, "good")
	}
	documented := map[string]bool{}
	for path, item := range c.object("paths") {
		for method := range item.(map[string]any) {
			if method != "parameters" {
				documented[strings.ToUpper(method)+" "+path] = true
			}
		}
	}
	for _, rt := range new(service).routes() {
		name := rt.method + " " + rt.path
		if !documented[name] {
			t.Errorf("%s is served and not documented", name)
			continue
		}
		delete(documented, name)
		operation := c.object("paths", rt.path, strings.ToLower(rt.method))
		query := url.Values{}
		parameters, _ := operation["parameters"].([]any)
		for _, p := range parameters {
			p := c.resolve(p)
			query.Set(p["name"].(string), fmt.Sprint(p["example"]))
			if faults := c.check(p["schema"], p["example"], "parameter"); len(faults) > 0 {
				t.Errorf("%s: the example of %s: %v", name, p["name"], faults)
			}
		}
		bodies := []string{""}
		if body, ok := operation["requestBody"].(map[string]any); ok {
			bodies = c.examples(t, name, body)
		}
		for _, body := range bodies {
			if r := a.call(t, rt.method, rt.path+"?"+query.Encode(), body); r.status/100 != 2 {
				t.Errorf("%s?%s %s: got %d %s", name, query.Encode(), body, r.status, r.body)
			}
		}
		for status, response := range operation["responses"].(map[string]any) {
			c.examples(t, name+" "+status, c.resolve(response))
		}
	}
	for name := range documented {
		t.Errorf("%s is documented and not served", name)
	}
	if r := a.call(t, "GET", "/openapi.yaml", ""); r.body != string(openAPI) || r.header.Get("Content-Type") != "application/yaml" {
		t.Error("/openapi.yaml is not the file")
	}
}

// TestOpenAPIErrors provokes every error of every call.
func TestOpenAPIErrors(t *testing.T) {
	w := newWorld(t)
	a := w.start(t)
	a.create(t, "good")
	const name, large = `{"name":"x"}`, `{"name":"0123456789abcdef`
	calls := []struct{ method, path, notFound, body string }{
		{"POST", "/goods/create?projectId=1", "/goods/create?projectId=9", name},
		{"PATCH", "/goods/update?id=1&projectId=1", "/goods/update?id=9&projectId=1", name},
		{"PATCH", "/goods/reprioritize?id=1&projectId=1", "/goods/reprioritize?id=9&projectId=1", `{"newPriority":1}`},
		{"DELETE", "/goods/remove?id=1&projectId=1", "/goods/remove?id=9&projectId=1", ""},
		{"GET", "/goods/list", "", ""},
	}
	for _, call := range calls {
		path, _, _ := strings.Cut(call.path, "?")
		a.refused(t, 400, 2, "errors.request.invalid", call.method, path+"?id=0&projectId=0&limit=0", call.body)
		a.refused(t, 405, 6, "errors.method.notAllowed", "PUT", call.path, call.body)
		a.refused(t, 404, 5, "errors.route.notFound", call.method, path+"/", call.body)
		if call.body != "" {
			a.refused(t, 413, 7, "errors.request.tooLarge", call.method, call.path, strings.Repeat(large, maxBody/len(large)+1))
		}
		if call.notFound != "" {
			code, message := 3, "errors.good.notFound"
			if call.method == "POST" {
				code, message = 4, "errors.campaign.notFound"
			}
			a.refused(t, 404, code, message, call.method, call.notFound, call.body)
		}
	}
	everyCall := func(status, code int, message string) {
		t.Helper()
		done := make(chan struct{})
		for _, call := range calls {
			go func() {
				defer func() { done <- struct{}{} }()
				r, err := a.try(call.method, call.path, call.body)
				var f failure
				if err == nil {
					err = json.Unmarshal([]byte(r.body), &f)
				}
				if err != nil || r.status != status || f.Code != code || f.Message != message {
					t.Errorf("%s %s: got %d %s %v, want %d, code %d", call.method, call.path, r.status, r.body, err, status, code)
				}
			}()
		}
		for range calls {
			<-done
		}
	}
	tx, err := w.db.BeginTx(context.Background(), &sql.TxOptions{})
	must(t, err)
	defer tx.Rollback()
	// A lock that is not given in time is as good as a server out of reach.
	must(t, errorOf(tx.Exec(`LOCK TABLE goods, meta IN ACCESS EXCLUSIVE MODE`)))
	everyCall(http.StatusServiceUnavailable, 8, "errors.service.unavailable")
	must(t, errorOf(tx.Exec(`ALTER TABLE goods RENAME TO hidden_goods; ALTER TABLE meta RENAME TO hidden_meta`)))
	must(t, tx.Commit())
	everyCall(http.StatusInternalServerError, 1, "errors.internal")
	must(t, errorOf(w.db.Exec(`ALTER TABLE hidden_goods RENAME TO goods; ALTER TABLE hidden_meta RENAME TO meta`)))
}

// examples checks the examples of a request or response, and returns them.
func (c contract) examples(t testing.TB, name string, message map[string]any) []string {
	t.Helper()
	var texts []string
	for contentType, content := range message["content"].(map[string]any) {
		content := content.(map[string]any)
		examples, ok := content["examples"].(map[string]any)
		if !ok && contentType == "application/json" {
			t.Errorf("%s has no examples", name)
		}
		for label, example := range examples {
			value := example.(map[string]any)["value"]
			if faults := c.check(content["schema"], value, "body"); len(faults) > 0 {
				t.Errorf("%s: example %s: %v", name, label, faults)
			}
			text, err := json.Marshal(value)
			must(t, err)
			texts = append(texts, string(text))
		}
	}
	slices.Sort(texts)
	return texts
}

func TestContract(t *testing.T) {
	spec, err := readYAML(string(openAPI))
	must(t, err)
	c := contract{spec}
	header := http.Header{"X-Request-Id": {"x"}, "Content-Type": {"application/json"}}
	const good = `{"id":1,"projectId":1,"name":"a","description":"","priority":1,"removed":false,"createdAt":"2026-01-02T15:04:05.123456Z"}`
	for _, test := range []struct {
		method, path string
		reply        reply
		ok           bool
	}{
		{"POST", "/goods/create", reply{201, header, good}, true},
		{"POST", "/goods/create?x=y", reply{200, header, good}, false},
		{"POST", "/goods/create", reply{201, http.Header{"X-Request-Id": {"x"}}, good}, false},
		{"POST", "/goods/create", reply{201, http.Header{"Content-Type": {"application/json"}}, good}, false},
		{"POST", "/goods/create", reply{201, header, strings.Replace(good, `"id":1`, `"id":"1"`, 1)}, false},
		{"POST", "/goods/create", reply{201, header, strings.Replace(good, `"id":1`, `"id":1.5`, 1)}, false},
		{"POST", "/goods/create", reply{201, header, strings.Replace(good, `"id":1`, `"id":0`, 1)}, false},
		{"POST", "/goods/create", reply{201, header, strings.Replace(good, `"id":1,`, ``, 1)}, false},
		{"POST", "/goods/create", reply{201, header, strings.Replace(good, `"id":1,`, `"id":1,"x":1,`, 1)}, false},
		{"POST", "/goods/create", reply{201, header, strings.Replace(good, `:05.123456Z`, `:05.123Z`, 1)}, false},
		{"GET", "/goods/list", reply{200, header, `{"meta":{"total":1,"removed":0,"limit":1,"offset":1},"goods":[` + good + `]}`}, true},
		{"GET", "/goods/list", reply{200, header, `{"meta":{"total":1,"removed":0,"limit":1,"offset":1},"goods":null}`}, false},
		{"GET", "/goods/list", reply{200, header, `{"meta":{"total":1,"removed":0,"limit":1,"offset":1},"goods":[{}]}`}, false},
		{"GET", "/nowhere", reply{404, header, `{"code":5,"message":"errors.route.notFound","details":{}}`}, true},
		{"GET", "/nowhere", reply{404, header, `{"code":3,"message":"errors.good.notFound","details":{}}`}, false},
		{"PATCH", "/goods/update", reply{404, header, `{"code":3,"message":"errors.good.notFound","details":{}}`}, true},
		{"PATCH", "/goods/update", reply{404, header, `{"code":3,"message":"errors.good.notFound","details":{"x":"y"}}`}, false},
		{"PATCH", "/goods/update", reply{400, header, `{"code":2,"message":"errors.request.invalid","details":{}}`}, false},
		{"PATCH", "/goods/update", reply{503, header, `{"code":8,"message":"errors.service.unavailable","details":{}}`}, false},
		{"GET", "/healthz", reply{200, header, `{"status":"ok"} x`}, false},
	} {
		if faults := c.faults(test.method, test.path, test.reply); (len(faults) == 0) != test.ok {
			t.Errorf("%s %s, reply %+v: got faults %v, want them: %v", test.method, test.path, test.reply, faults, !test.ok)
		}
	}
}

func TestReadYAML(t *testing.T) {
	for text, want := range map[string]string{
		"a: 1\nb: x y\n": `{"a":1,"b":"x y"}`,
		"# note\na:\n  b:\n    - c\n    - 'd: e'": `{"a":{"b":["c","d: e"]}}`,
		"a:\n  - b: 1\n    c: {\"d\": [2]}\n":     `{"a":[{"b":1,"c":{"d":[2]}}]}`,
		"'200': >-\n  one\n  two\nb: true":        `{"200":"one two","b":true}`,
		"a: 1\na: 2":                              "",
		"a: &x 1":                                 "",
		"a: b # c":                                "",
		"a: |\n  b":                               "",
		"a: 1\n  b: 2":                            "",
		"a:\n\t b: 2":                             "",
		"a":                                       "",
		"a: [b]":                                  "",
		"a: 1\n- b":                               "",
	} {
		v, err := readYAML(text)
		var got bytes.Buffer
		if err == nil {
			must(t, json.NewEncoder(&got).Encode(v))
		}
		if strings.TrimSpace(got.String()) != want || (err == nil) != (want != "") {
			t.Errorf("%q: got %s %v, want %q", text, got.String(), err, want)
		}
	}
	if v, err := readYAML("a: [1]"); err != nil || !reflect.DeepEqual(v, map[string]any{"a": []any{1.0}}) {
		t.Errorf("got %v %v", v, err)
	}
}
