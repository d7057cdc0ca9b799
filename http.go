package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/url"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

const maxBody = 64 << 10 // bytes

// The errors that a client is told about. Every other one is errInternal, and
// its cause is in the log only.
var (
	errGoodNotFound     = errors.New("good not found")
	errCampaignNotFound = errors.New("campaign not found")
	errRouteNotFound    = errors.New("no such path")
	errMethod           = errors.New("method not allowed")
	errTooLarge         = errors.New("body too large")
)

// invalidError names what is wrong with each bad field of a request.
type invalidError map[string]string

func (e invalidError) Error() string { return fmt.Sprintf("invalid request: %v", map[string]string(e)) }

// answers turns errors into replies: the first row that matches counts.
var answers = []struct {
	matches func(error) bool
	status  int
	code    int
	message string
}{
	{is(errGoodNotFound), http.StatusNotFound, 3, "errors.good.notFound"},
	{is(errCampaignNotFound), http.StatusNotFound, 4, "errors.campaign.notFound"},
	{func(err error) bool { return errors.As(err, new(invalidError)) }, http.StatusBadRequest, 2, "errors.request.invalid"},
	{is(errRouteNotFound), http.StatusNotFound, 5, "errors.route.notFound"},
	{is(errMethod), http.StatusMethodNotAllowed, 6, "errors.method.notAllowed"},
	{is(errTooLarge), http.StatusRequestEntityTooLarge, 7, "errors.request.tooLarge"},
	{unavailable, http.StatusServiceUnavailable, 8, "errors.service.unavailable"},
	{func(error) bool { return true }, http.StatusInternalServerError, 1, "errors.internal"},
}

func is(target error) func(error) bool {
	return func(err error) bool { return errors.Is(err, target) }
}

// route is one row of the API.
type route struct {
	method  string
	path    string
	handler func(w http.ResponseWriter, r *http.Request) error
}

// newHandler serves routes; every other request gets its error as JSON.
func (s *service) newHandler(routes []route) http.Handler {
	mux := http.NewServeMux()
	known := map[string]bool{}
	for _, rt := range routes {
		methods := rt.method
		if methods == http.MethodGet {
			methods = "GET, HEAD"
		}
		known[rt.path] = true
		mux.Handle(rt.method+" "+rt.path, s.answer(rt.path, rt.handler))
		mux.Handle(rt.path, s.answer(rt.path, func(w http.ResponseWriter, r *http.Request) error {
			w.Header().Set("Allow", methods)
			return errMethod
		}))
	}
	unknown := s.answer("other", func(http.ResponseWriter, *http.Request) error { return errRouteNotFound })
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// Paths are exact: the mux would redirect one that it can clean.
		if !known[r.URL.EscapedPath()] {
			unknown.ServeHTTP(w, r)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// answer adapts a handler: it turns its error into a reply, survives its
// panic, and counts and logs the request once.
func (s *service) answer(route string, handler func(http.ResponseWriter, *http.Request) error) http.Handler {
	observed := s.counts.route(route)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		id := requestID(r)
		w.Header().Set("X-Request-Id", id)
		reply := &recorder{ResponseWriter: w, status: http.StatusOK}
		err := safely(func() error { return handler(reply, r) })
		if err != nil {
			s.writeError(reply, r, id, err)
		}
		if errors.Is(r.Context().Err(), context.Canceled) {
			reply.status = 499 // the client has gone, or is very slow: the reply is hardly read
		}
		took := time.Since(start)
		observed.observe(reply.status, took)
		if s.log.Enabled(r.Context(), slog.LevelDebug) { // or its values would be made for nothing
			s.log.Debug("request", "id", id, "method", r.Method, "path", r.URL.Path, "status", reply.status, "seconds", took.Seconds(), "err", err)
		}
	})
}

// safely turns a panic of f into its error.
func safely(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return f()
}

func (s *service) writeError(w http.ResponseWriter, r *http.Request, id string, err error) {
	for _, a := range answers {
		if !a.matches(err) {
			continue
		}
		details := invalidError{}
		if a.status == http.StatusBadRequest {
			errors.As(err, &details)
		}
		if a.status == http.StatusServiceUnavailable {
			w.Header().Set("Retry-After", "1")
		}
		if a.status == http.StatusInternalServerError {
			s.log.Error("request failed", "id", id, "method", r.Method, "path", r.URL.Path, "err", err)
		}
		_ = writeJSON(w, a.status, struct {
			Code    int          `json:"code"`
			Message string       `json:"message"`
			Details invalidError `json:"details"`
		}{a.code, a.message, details})
		return
	}
}

// recorder remembers the status of a reply.
type recorder struct {
	http.ResponseWriter
	status int
}

func (r *recorder) WriteHeader(status int) {
	r.status = status
	r.ResponseWriter.WriteHeader(status)
}

// Unwrap lets http.ResponseController and MaxBytesReader reach the connection.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

// requestID returns the caller's X-Request-Id if it is fit for a log, else a
// new one.
func requestID(r *http.Request) string {
	id := r.Header.Get("X-Request-Id")
	unfit := func(c rune) bool { return c <= ' ' || c > '~' }
	if id == "" || len(id) > 128 || strings.ContainsFunc(id, unfit) {
		return strconv.FormatUint(rand.Uint64(), 36)
	}
	return id
}

// writeJSON encodes v before it writes anything.
func writeJSON(w http.ResponseWriter, status int, v any) error {
	body, err := encodeJSON(v)
	if err != nil {
		return err
	}
	writeBody(w, status, append(body, '\n'))
	return nil
}

// writeBody sends a reply that is JSON already. Its errors are the client's.
func writeBody(w http.ResponseWriter, status int, body []byte) {
	h := w.Header()
	h["Content-Type"] = jsonType
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	_, _ = w.Write(body)
}

var jsonType = []string{"application/json"}

// encodeJSON is json.Marshal without the escapes that only HTML needs.
func encodeJSON(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

// input is what a request says, and what is wrong with it. Each getter returns
// a usable value or notes the fault; fault tells whether there was one.
type input struct {
	query url.Values
	body  map[string]json.RawMessage
	bad   invalidError
}

// readInput reads the query, and where fields are named also the body, which
// must be an object with no other fields.
func readInput(w http.ResponseWriter, r *http.Request, fields ...string) (*input, error) {
	in := &input{bad: invalidError{}}
	var err error
	if in.query, err = url.ParseQuery(r.URL.RawQuery); err != nil {
		in.bad["query"] = "is malformed"
	}
	if len(fields) == 0 {
		return in, nil
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if errors.As(err, new(*http.MaxBytesError)) {
		return nil, errTooLarge
	}
	if err != nil {
		in.bad["body"] = "could not be read"
		return in, nil
	}
	in.body = in.object(body, fields)
	return in, nil
}

// object splits a JSON object into its fields. encoding/json alone would take
// repeated keys, keys in other cases, broken UTF-8, and text after the object.
func (in *input) object(body []byte, fields []string) map[string]json.RawMessage {
	d := json.NewDecoder(bytes.NewReader(body))
	if start, err := d.Token(); err != nil || start != json.Delim('{') || !utf8.Valid(body) {
		in.bad["body"] = "must be a JSON object in UTF-8"
		return nil
	}
	values := map[string]json.RawMessage{}
	for d.More() {
		var value json.RawMessage
		key, err := d.Token()
		if err == nil {
			err = d.Decode(&value)
		}
		if err != nil {
			in.bad["body"] = "is not valid JSON"
			return nil
		}
		name := key.(string) // the decoder takes no other keys
		if _, repeated := values[name]; repeated {
			in.bad[name] = "is repeated"
		}
		if !slices.Contains(fields, name) {
			in.bad[name] = "is not a known field"
		}
		values[name] = value
	}
	if _, err := d.Token(); err != nil {
		in.bad["body"] = "is not valid JSON"
	} else if _, err := d.Token(); err != io.EOF {
		in.bad["body"] = "must end after the object"
	}
	return values
}

// fault returns an invalidError, or nil if there is nothing to complain about.
func (in *input) fault() error {
	if len(in.bad) > 0 {
		return maps.Clone(in.bad)
	}
	return nil
}

// number returns a query parameter between 1 and most.
func (in *input) number(name string, most int) int {
	values := in.query[name]
	if len(values) != 1 {
		in.bad[name] = "is required"
		if len(values) > 1 {
			in.bad[name] = "must be given once"
		}
		return 0
	}
	digits := values[0] != "" && strings.Trim(values[0], "0123456789") == ""
	n, err := strconv.Atoi(values[0])
	if !digits || err != nil || n < 1 || n > most {
		in.bad[name] = fmt.Sprintf("must be an integer from 1 to %d", most)
		return 0
	}
	return n
}

// numberOr is number with a default for a parameter that is absent.
func (in *input) numberOr(name string, absent, most int) int {
	if !in.query.Has(name) {
		return absent
	}
	return in.number(name, most)
}

// text returns a field of at most the given number of characters, or nil when
// it is absent.
func (in *input) text(name string, most int) *string {
	raw, ok := in.body[name]
	if !ok {
		return nil
	}
	var s string
	switch {
	case raw[0] != '"' || json.Unmarshal(raw, &s) != nil:
		in.bad[name] = "must be a string"
	case loneSurrogate(raw) || strings.ContainsRune(s, 0):
		in.bad[name] = "must not contain U+0000 or a lone surrogate"
	case utf8.RuneCountInString(s) > most:
		in.bad[name] = fmt.Sprintf("must have at most %d characters", most)
	}
	return &s
}

// loneSurrogate reports whether a JSON string has the escape of one half of a
// surrogate pair, which encoding/json would replace by U+FFFD.
func loneSurrogate(raw []byte) bool {
	unit := func(i int) (rune, bool) {
		if i+6 > len(raw) || raw[i] != '\\' || raw[i+1] != 'u' {
			return 0, false
		}
		n, err := strconv.ParseUint(string(raw[i+2:i+6]), 16, 16)
		return rune(n), err == nil
	}
	for i := 0; i < len(raw); i++ {
		if raw[i] != '\\' {
			continue
		}
		high, _ := unit(i)
		if high>>10 == 0xDC00>>10 {
			return true
		}
		if high>>10 == 0xD800>>10 {
			if low, _ := unit(i + 6); low>>10 != 0xDC00>>10 {
				return true
			}
			i += 6
		}
		i++ // past the escaped character, which may be another backslash
	}
	return false
}

// missing notes that a field is absent, unless the whole body is unreadable.
func (in *input) missing(name string) {
	if in.bad["body"] == "" {
		in.bad[name] = "is required"
	}
}

// name returns the field name, which every good has.
func (in *input) name() string {
	s := in.text("name", maxName)
	switch {
	case s == nil:
		in.missing("name")
		return ""
	case in.bad["name"] == "" && strings.TrimSpace(*s) == "":
		in.bad["name"] = "must not be blank"
	}
	return *s
}

// integer returns a field that must be a positive 32-bit integer.
func (in *input) integer(name string) int {
	raw, ok := in.body[name]
	if !ok {
		in.missing(name)
		return 0
	}
	n, err := strconv.ParseInt(string(raw), 10, 32)
	if err != nil || n < 1 {
		in.bad[name] = fmt.Sprintf("must be an integer from 1 to %d", maxInt32)
		return 0
	}
	return int(n)
}
