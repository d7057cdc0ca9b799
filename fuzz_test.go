package main

import (
	"encoding/json"
	"errors"
	"math"
	"net/http"
	"net/http/httptest"
	"net/url"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"
)

// FuzzQuery holds the numbers of a query against what the interface says of
// them: decimal digits, given once, within their range.
func FuzzQuery(f *testing.F) {
	for _, seed := range []string{
		"", "id=1&projectId=1", "limit=10&offset=1", "limit=1000&offset=2147483647", "limit=1001", "limit=0", "offset=-1", "offset=2147483648",
		"id=1&id=1", "id=", "id", "id=+1", "id=%31", "id=1e3", "id=01", "id= 1", "id=0x1", "id=１", "limit=1;offset=2", "%zz", "&&=&", "id=99999999999999999999",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, query string) {
		r := httptest.NewRequest(http.MethodGet, "/goods/list", nil)
		r.URL.RawQuery = query
		in, err := readInput(httptest.NewRecorder(), r)
		if err != nil {
			t.Fatalf("%q: %v", query, err)
		}
		id, limit, offset := in.number("id", maxInt32), in.numberOr("limit", 10, maxLimit), in.numberOr("offset", 1, maxInt32)
		if fault := in.fault(); fault != nil {
			if !errors.As(fault, new(invalidError)) || len(in.bad) == 0 {
				t.Errorf("%q: got %v", query, fault)
			}
			return
		}
		values, err := url.ParseQuery(query)
		if err != nil {
			t.Fatalf("%q was accepted: %v", query, err)
		}
		for name, got := range map[string]int{"id": id, "limit": limit, "offset": offset} {
			if name != "id" && !values.Has(name) {
				continue
			}
			n, err := strconv.ParseUint(values.Get(name), 10, 31)
			if err != nil || n < 1 || int(n) != got || len(values[name]) != 1 {
				t.Errorf("%q: got %s %d", query, name, got)
			}
		}
		if limit < 1 || limit > maxLimit || offset < 1 {
			t.Errorf("%q: got limit %d, offset %d", query, limit, offset)
		}
	})
}

// read reads body as the body of a request with these fields.
func read(t *testing.T, body []byte, fields ...string) (*input, error) {
	t.Helper()
	return readInput(httptest.NewRecorder(), httptest.NewRequest(http.MethodPost, "/", strings.NewReader(string(body))), fields...)
}

// FuzzBody reads the body of a create or update. What is accepted must mean
// the same to encoding/json, and to the service when it is written anew; what
// is refused must have a reason.
func FuzzBody(f *testing.F) {
	for _, seed := range []string{
		`{"name":"x"}`, `{"name":"x","description":"y"}`, `{"name":"\u00e9\ud83d\ude00","description":""}`, `{"name":"\ud800"}`, `{"name":"\\ud800"}`,
		`{"name":"\u0000"}`, `{"Name":"x"}`, `{"name":"x","name":"y"}`, `{"name":"x"}{}`, `{"name":"x"} `, "\ufeff{}", `{"name":null}`, `{"name":" "}`,
		`{"name":1}`, `{"n\u0061me":"x"}`, `{"name":"x",}`, `[]`, `null`, ``, `{"name":{"name":"x"}}`, "{\"name\":\"\xff\"}", `{"name":"` + strings.Repeat("é", 256) + `"}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		in, err := read(t, body, "name", "description")
		if len(body) > maxBody {
			if !errors.Is(err, errTooLarge) {
				t.Errorf("%d bytes: got %v", len(body), err)
			}
			return
		}
		if err != nil {
			t.Fatalf("%q: %v", body, err)
		}
		name, description := in.name(), in.text("description", maxDescription)
		if in.fault() != nil {
			for field, reason := range in.bad {
				if reason == "" {
					t.Errorf("%q: no reason for %q", body, field)
				}
			}
			return
		}
		var want struct {
			Name        *string
			Description *string
		}
		if err := json.Unmarshal(body, &want); err != nil {
			t.Fatalf("%q was accepted: %v", body, err)
		}
		if want.Name == nil || *want.Name != name || !reflect.DeepEqual(want.Description, description) {
			t.Errorf("%q: got %q and %v, want %v", body, name, description, want)
		}
		texts := map[string]int{name: maxName}
		if description != nil {
			texts[*description] = max(texts[*description], maxDescription)
		}
		for text, most := range texts {
			if !utf8.ValidString(text) || strings.ContainsRune(text, 0) || utf8.RuneCountInString(text) > most {
				t.Errorf("%q: got the text %q", body, text)
			}
			if strings.ContainsRune(text, utf8.RuneError) && !strings.ContainsRune(string(body), utf8.RuneError) && !strings.Contains(strings.ToLower(string(body)), `\ufffd`) {
				t.Errorf("%q: got the text %q, with characters replaced", body, text)
			}
		}
		if strings.TrimSpace(name) == "" {
			t.Errorf("%q: got the name %q", body, name)
		}
		anew, err := json.Marshal(map[string]string{"name": name})
		if err != nil {
			t.Fatal(err)
		}
		if in, err := read(t, anew, "name"); err != nil || in.name() != name || in.fault() != nil {
			t.Errorf("%q was accepted, and %q is refused: %v", body, anew, in.fault())
		}
	})
}

// FuzzNewPriority reads the body of a reprioritize, which has one integer.
func FuzzNewPriority(f *testing.F) {
	for _, seed := range []string{
		`{"newPriority":1}`, `{"newPriority":2147483647}`, `{"newPriority":2147483648}`, `{"newPriority":0}`, `{"newPriority":-1}`, `{"newPriority":1.0}`,
		`{"newPriority":1e1}`, `{"newPriority":"1"}`, `{"newPriority":null}`, `{"newPriority":01}`, `{"newPriority":+1}`, `{}`, `{"newPriority":1,"newPriority":2}`,
		`{"newPriority": 1 }`, `{"newPriority":1}1`, `{"newPriority":1_0}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		in, err := read(t, body, "newPriority")
		if err != nil {
			if len(body) <= maxBody || !errors.Is(err, errTooLarge) {
				t.Fatalf("%q: %v", body, err)
			}
			return
		}
		n := in.integer("newPriority")
		if in.fault() != nil {
			return
		}
		var want struct{ NewPriority int32 }
		if err := json.Unmarshal(body, &want); err != nil || int(want.NewPriority) != n || n < 1 || n > math.MaxInt32 {
			t.Errorf("%q: got %d, want %d, %v", body, n, want.NewPriority, err)
		}
	})
}
