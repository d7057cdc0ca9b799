package main

import (
	"encoding/json"
	"maps"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// read reads a request, and returns its name, its description and the bad fields.
func read(query, body string) (name, description *string, in *input) {
	r := httptest.NewRequest("PATCH", "/goods/update", strings.NewReader(body))
	r.URL.RawQuery = query
	in = readInputWithBody(deadlineRecorder{httptest.NewRecorder()}, r, "name", "description")
	in.required("id")
	return in.name(), in.description(), in
}

// deadlineRecorder takes the deadline that a real connection would.
type deadlineRecorder struct{ *httptest.ResponseRecorder }

func (deadlineRecorder) SetReadDeadline(time.Time) error { return nil }

func FuzzBody(f *testing.F) {
	for _, seed := range []string{
		`{"name":"x"}`, `{"name":"\ud83d\ude00 \\ud800","description":""}`, `{"name":"\ud800"}`,
		`{"name":"\\\uDC00"}`,
		`{"name":"x","name":"y"}`, `{"Name":"x"}`, `{"name":null}`, `null`, `[`,
		`{"name":"x"} {}`, "{\"name\":\"\xff\"}", `{"name":"\u0000"}`,
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, body string) {
		name, description, in := read("id=1", body)
		if in.err() != nil {
			return
		}
		// What is taken is an object of just these two, with texts that Postgres and every client can hold.
		var object map[string]string
		err := json.Unmarshal([]byte(body), &object)
		taken := map[string]string{"name": *name}
		if description != nil {
			taken["description"] = *description
		}
		if err != nil || !maps.Equal(taken, object) || blank(*name) ||
			utf8.RuneCountInString(*name) > maxName {
			t.Fatalf("%q: taken as %q: %v", body, taken, err)
		}
		for _, s := range taken {
			if !utf8.ValidString(s) || strings.ContainsRune(s, 0) ||
				utf8.RuneCountInString(s) > maxDescription {
				t.Fatalf("%q: taken as %q", body, s)
			}
		}
	})
}

func FuzzQuery(f *testing.F) {
	for _, seed := range []string{"id=1", "id=+1", "id=01", "id=", "id=1&id=2", "id=2147483648", "id=-1",
		"id=%31", "id=1&page=2", "%zz",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, query string) {
		_, _, in := read(query, `{"name":"x"}`)
		values, err := url.ParseQuery(query)
		want := false
		ids := values["id"]
		// One id in digits, and no other parameter.
		if err == nil && len(values) == 1 && len(ids) == 1 && strings.Trim(ids[0], "0123456789") == "" {
			n, err := strconv.ParseInt(ids[0], 10, 32)
			want = err == nil && n > 0
		}
		if got := in.err() == nil; got != want {
			t.Fatalf("%q: taken %v, want %v: %v", query, got, want, in.faults)
		}
	})
}
