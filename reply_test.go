package main

import (
	"bytes"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// A panic costs the request in which it happens, and no other: its client gets the error of anything that
// is not expected, and it is counted and logged.
func TestPanic(t *testing.T) {
	var log bytes.Buffer
	metrics := newMetrics(nil)
	a := newAPI(nil, nil, metrics, slog.New(slog.NewJSONHandler(&log, nil)))
	route := metrics.addRoute("/goods/list")
	fails := func(http.ResponseWriter, *http.Request) (reply, error) { panic("a bug") }
	server := httptest.NewServer(a.adapt(route, fails))
	defer server.Close()
	response, err := http.Get(server.URL + "/goods/list")
	if err != nil {
		t.Fatalf("no reply: %v", err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	var f failure
	if err := json.Unmarshal(text, &f); err != nil || response.StatusCode != 500 || f.Code != 1 ||
		strings.Contains(string(text), "a bug") {
		t.Errorf("got %s %s, want 500 with code 1, without the cause", response.Status, text)
	}
	if n := route.statuses[500].Load(); n != 1 {
		t.Errorf("%d requests are counted with status 500, want 1", n)
	}
	server.Close() // the line is written before the reply
	if !strings.Contains(log.String(), "a bug") || !strings.Contains(log.String(), "reply_test.go") {
		t.Errorf("got the log %s, want the panic, and where it was", log.String())
	}
}
