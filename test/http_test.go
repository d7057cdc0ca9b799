package test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/pb33f/libopenapi"
	validator "github.com/pb33f/libopenapi-validator/schema_validation"

	"goods/test/harness"
)

// A browser adds cookies and passwords to what a page of any other site sends, so a write from there is
// refused.
func TestCrossOrigin(t *testing.T) {
	w, a := started(t)
	own := "Origin: " + a.URL
	crossOrigin := [][]string{
		{"Sec-Fetch-Site: cross-site"},
		{"Sec-Fetch-Site: same-site"},
		{"Sec-Fetch-Site: cross-site", own},
		{"Origin: http://shop.example"},
		{"Origin: null"},
		{"Origin: " + a.URL + "0"}, // another port
		{"Sec-Fetch-Site: cross-site", "Content-Type: text/plain"},
	}
	for _, header := range crossOrigin {
		for _, call := range calls {
			if call.method != "GET" {
				refused(t, a, 10, call.method, call.path, call.body, header...)
			}
		}
	}
	harness.Equal(t, harness.One[int](t, w, `SELECT count(*) FROM goods`), 0, "goods after refused creates")

	sameOrigin := [][]string{
		{},
		{"Sec-Fetch-Site: same-origin", own},
		{"Sec-Fetch-Site: none"},
		{own},
		{"Content-Type: text/plain"},
	}
	for _, header := range sameOrigin {
		r := a.Call(t, "POST", create, someName, header...)
		harness.Equal(t, r.Status, 201, "create with %q", header)
	}
	for _, header := range crossOrigin {
		for _, path := range []string{"/goods/list", "/healthz", "/openapi.yaml"} {
			harness.Equal(t, a.Call(t, "GET", path, "", header...).Status, 200, "GET %s with %q", path, header)
		}
	}
	harness.Equal(t, w.Settled(t, 15*time.Second), len(sameOrigin), "events")
}

// A parameter that is misspelt, or of another service, must not silently return something else.
func TestUnknownParameters(t *testing.T) {
	w, a := started(t)
	a.Create(t, "one")
	for added, name := range map[string]string{
		"page=2": "page", "page": "page", "Limit=5": "Limit", "projectID=1": "projectID",
		"project_id=1": "project_id",
		"%70age=2":     "page", "name=x": "name", "newPriority=1": "newPriority",
		"limit%20=1": "limit ", "é=1": "é",
	} {
		for _, call := range allCalls {
			path := call.path + "&" + added
			details := refused(t, a, 2, call.method, path, call.body)
			if details[name] == "" || len(details) != 1 {
				t.Errorf("%s: got details %v, want %q", path, details, name)
			}
		}
	}
	// A parameter of one call is unknown to another.
	for path, name := range map[string]string{
		"/goods/list?id=1":                     "id",
		"/goods/list?limit=1&ID=1&offset=1":    "ID",
		"/goods/get?id=1&projectId=1&limit=1":  "limit",
		"/goods/get?id=1&projectId=1&offset=1": "offset",
	} {
		details := refused(t, a, 2, "GET", path, "")
		harness.Equal(t, len(details[name]) > 0, true, "%s is in the details of %s", name, path)
	}
	details := refused(t, a, 2, "POST", create+"&id=1&limit=1", `{"name":""}`)
	harness.Equal(t, len(details), 3, "unknown parameters and bad fields: faults in %v", details)
	// However many there are, and however long their names, the reply is short.
	var many strings.Builder
	for i := range 700 {
		fmt.Fprintf(&many, "&%d%s", i, strings.Repeat("x", i%400))
	}
	for _, call := range allCalls {
		path := call.path + many.String()[:15<<10]
		got := a.Call(t, call.method, path, call.body)
		if got.Status != 400 || len(got.Body) > 5000 {
			t.Errorf("%s with many unknown parameters: got %d and %d bytes", call.path, got.Status, len(got.Body))
		}
	}
	fields := `"name":"one"`
	for i := range 1000 {
		fields += fmt.Sprintf(`,"%d%s":1`, i, strings.Repeat("x", 100))
	}
	got := a.Call(t, "POST", create, "{"+fields+"}")
	if got.Status != 400 || len(got.Body) > 5000 {
		t.Errorf("many unknown fields: got %d and %d bytes", got.Status, len(got.Body))
	}
	harness.Equal(t, w.Settled(t, 15*time.Second), 1, "events: refused requests change nothing")
}

// newGoodSchema tells whether openapi.yaml accepts a body of create.
func newGoodSchema(t testing.TB) (accepts func(body string) bool) {
	t.Helper()
	document, err := libopenapi.NewDocument(harness.File(t, "openapi.yaml"))
	harness.Must(t, err)
	spec, err := document.BuildV3Model()
	harness.Must(t, err)
	proxy, found := spec.Model.Components.Schemas.Get("NewGood")
	harness.Equal(t, found, true, "openapi.yaml has a schema NewGood")
	return func(body string) bool {
		right, _ := validator.NewSchemaValidator().ValidateSchemaString(proxy.Schema(), body)
		return right
	}
}

// A name has to show something. The service and openapi.yaml agree on what does.
func TestBlankNames(t *testing.T) {
	w, a := started(t)
	a.Create(t, "one")
	accepts := newGoodSchema(t)
	blank := []string{
		"", " ", "\t", "\n", "\v", "\f", "\r", "\u0085", "\u00a0", "\u1680",
		"\u2000", "\u2003", "\u200a", "\u2028", "\u2029",
		"\u202f", "\u205f", "\u3000", // white space
		"\u00ad", "\u061c", "\u180e", "\u200b", "\u200c", "\u200d", "\u200e", "\u202a",
		"\u2060", "\u2064", "\ufeff",
		"\U000e0001", "\U000e0020", // format characters
		"\u115f", "\u1160", "\u2800", "\u3164", "\uffa0", // letters and a symbol that are drawn as nothing
		" \u200b\u2800\t\u3164", strings.Repeat("\ufeff", 255),
	}
	for _, name := range blank {
		body := fmt.Sprintf(`{"name":%s}`, quoted(name))
		for _, call := range calls[:2] {
			details := refused(t, a, 2, call.method, call.path, body)
			if details["name"] == "" || len(details) != 1 {
				t.Errorf("%s name %+q: got details %v, want the name", call.method, name, details)
			}
		}
		harness.Equal(t, accepts(body), false, "openapi.yaml accepts the name %+q", name)
	}
	visible := []string{
		"x", "0", "-", ".", "é", "日", "😀", "\u0301", " x ", "\u200bx", "x\ufeff", "\u2800.",
		"👩\u200d🔬", "\u1161", "\u2801",
		"\u3165", "\uffa1", "\u180f\u1820",
	}
	for _, name := range visible {
		body := fmt.Sprintf(`{"name":%s}`, quoted(name))
		g := harness.Want[harness.Good](t, a, 200, "PATCH", calls[1].path, body)
		harness.Equal(t, g.Name, name, "name")
		harness.Equal(t, accepts(body), true, "openapi.yaml accepts the name %+q", name)
	}
	harness.Equal(t, w.Settled(t, 15*time.Second), 1+len(visible), "events")
}

// quoted is s as JSON in plain ASCII, as Python's json.dumps writes it: each character past U+FFFF is two
// escapes.
func quoted(s string) string {
	var b strings.Builder
	for _, c := range s {
		switch {
		case c > 0xffff:
			fmt.Fprintf(&b, `\u%04x\u%04x`, 0xd800+(c-0x10000)>>10, 0xdc00+(c-0x10000)&0x3ff)
		case c < ' ' || c > '~' || c == '"' || c == '\\':
			fmt.Fprintf(&b, `\u%04x`, c)
		default:
			b.WriteRune(c)
		}
	}
	return `"` + b.String() + `"`
}

// The longest texts fit into a body however a client escapes them.
func TestLargestBody(t *testing.T) {
	w, a := started(t)
	name, description := strings.Repeat("😀", 255), strings.Repeat("😀", 10_000)
	body := fmt.Sprintf(`{"name": %s, "description": %s}`, quoted(name), quoted(description))
	g := harness.Want[harness.Good](t, a, 201, "POST", create, body)
	harness.Equal(t, g.Name+g.Description, name+description, "created")
	const most = 128 << 10
	padded := func(length int) string { return someName + strings.Repeat(" ", length-len(someName)) }
	ok(t, a, "PATCH", calls[1].path, padded(most))
	for _, call := range calls[:3] {
		refused(t, a, 7, call.method, call.path, padded(most+1))
	}
	harness.Equal(t, w.Settled(t, 15*time.Second), 2, "events")
}

// send writes a request as it is, and returns the reply, or an error if none comes within limit.
func send(
	t testing.TB, a *harness.App, request string, limit time.Duration,
) (status int, body string, err error) {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(a.URL, "http://"))
	harness.Must(t, err)
	defer conn.Close()
	harness.Must(t, conn.SetDeadline(time.Now().Add(limit)))
	_, err = io.WriteString(conn, request)
	harness.Must(t, err)
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return 0, "", err
	}
	text, _ := io.ReadAll(response.Body) // what there is of it
	return response.StatusCode, string(text), nil
}

// A body that a call needs and that does not arrive is answered with an error that clients repeat; one that
// it does not need is not waited for.
func TestStalledBodies(t *testing.T) {
	_, a := started(t)
	a.Stock(t, 2)
	ready(t, a)
	requests := []string{"GET /healthz", "GET /readyz", "GET /metrics", "GET /openapi.yaml", "GET /nowhere"}
	for _, call := range calls {
		requests = append(requests, call.method+" "+call.path)
	}
	framings := []string{
		"Content-Length: 12\r\n\r\n",
		"Content-Length: 12\r\n\r\n{\"na",
		"Transfer-Encoding: chunked\r\n\r\n4\r\n{\"na\r\n",
	}
	harness.Together(len(requests)*len(framings), func(i int) {
		request := requests[i/len(framings)]
		text := request + " HTTP/1.1\r\nHost: goods\r\n" + framings[i%len(framings)]
		begin := time.Now()
		status, body, err := send(t, a, text, 30*time.Second)
		took := time.Since(begin)
		if strings.HasPrefix(request, "GET") || strings.HasPrefix(request, "DELETE") {
			served := status == 200 || status == 404 // nowhere, and the good when it is removed
			if !served || took > 2*time.Second {
				t.Errorf("%q: got %d %.100s, %v after %v, want the reply at once", text, status, body, err, took)
			}
			return
		}
		var failure struct{ Code int }
		_ = json.Unmarshal([]byte(body), &failure)
		if status != 408 || failure.Code != 11 || took > 12*time.Second {
			t.Errorf("%q: got %d %.100s, %v after %v, want 408 with code 11", text, status, body, err, took)
		}
	})
	const late = 3 * 3 // calls with a body, and framings
	counted := func() float64 { return value(t, a, "goods_http_requests_total", `value:"408"`) }
	harness.AwaitEqual(t, 5*time.Second, counted, late, "late bodies that are counted")
	gone := value(t, a, "goods_http_requests_total", `value:"499"`)
	harness.Equal(t, gone, 0, "clients that are counted as gone")
}

// What Go's server answers by itself is as openapi.yaml says.
func TestRefusedByGo(t *testing.T) {
	_, a := started(t)
	const list = "GET /goods/list HTTP/1.1\r\nHost: goods\r\n"
	for _, exchange := range []struct {
		request string
		status  int
	}{
		{"GET /goods/%zz HTTP/1.1\r\nHost: goods\r\n\r\n", 400},
		{"GET /goods/list HTTP/1.1\r\n\r\n", 400}, // no Host
		{"nonsense\r\n\r\n", 400},
		{list + "Expect: foo\r\n\r\n", 417},
		{list + "Long: " + strings.Repeat("x", 17<<10) + "\r\n\r\n", 431},
		{"GET /goods/list?x=" + strings.Repeat("x", 17<<10) + " HTTP/1.1\r\nHost: goods\r\n\r\n", 431},
		{list + "Transfer-Encoding: gzip\r\n\r\n", 501},
		{"GET /goods/list HTTP/3.1\r\nHost: goods\r\n\r\n", 505},
		{list + "Long: " + strings.Repeat("x", 15<<10) + "\r\n\r\n", 200},
	} {
		status, body, err := send(t, a, exchange.request, 10*time.Second)
		if status != exchange.status || (status == 200) != strings.HasPrefix(body, "{") {
			t.Errorf("%.80q: got %d %.100s, %v, want %d", exchange.request, status, body, err, exchange.status)
		}
	}
	const halfLine = "GET /goods/l"
	parts := []string{"", halfLine, list, list + "Half: "}
	harness.Together(len(parts), func(i int) {
		begin := time.Now()
		status, body, _ := send(t, a, parts[i], 30*time.Second)
		took := time.Since(begin)
		want := 0 // no reply
		if parts[i] == halfLine {
			want = 400
		}
		if status != want || took < 4*time.Second || took > 15*time.Second {
			t.Errorf("%q: got %d %.100s after %v, want %d after 5 seconds", parts[i], status, body, took, want)
		}
	})
}
