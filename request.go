package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

const (
	maxInt32       = math.MaxInt32
	maxBody        = 64 << 10 // bytes
	maxName        = 255      // characters
	maxDescription = 10_000   // characters
	maxKey         = 255      // bytes
)

var errTooLarge = &failure{413, 7, "errors.request.tooLarge", none}

// input is what a request says, and what is wrong with it. Each getter returns a usable value or notes the fault;
// fault tells whether there was one.
type input struct {
	query    url.Values
	body     map[string]json.RawMessage
	bad      map[string]string // what is wrong with each bad field
	tooLarge bool
}

// readInput reads the query, and where fields are named also the body, which must be an object with no other fields.
func readInput(w http.ResponseWriter, r *http.Request, fields ...string) *input {
	in := &input{bad: map[string]string{}}
	var err error
	if in.query, err = url.ParseQuery(r.URL.RawQuery); err != nil {
		in.bad["query"] = "is malformed"
	}
	if len(fields) > 0 {
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
		if in.tooLarge = errors.As(err, new(*http.MaxBytesError)); err != nil {
			in.bad["body"] = "could not be read"
		} else {
			in.body = in.object(body, fields)
		}
	}
	return in
}

// object splits a JSON object into its fields. encoding/json alone would take repeated keys, keys in other cases,
// broken UTF-8, and text after the object.
func (in *input) object(body []byte, fields []string) map[string]json.RawMessage {
	if !json.Valid(body) || !utf8.Valid(body) || bytes.TrimLeft(body, " \t\r\n")[0] != '{' {
		in.bad["body"] = "must be one JSON object in UTF-8"
		return nil
	}
	values := map[string]json.RawMessage{}
	d := json.NewDecoder(bytes.NewReader(body))
	for _, _ = d.Token(); d.More(); {
		key, _ := d.Token()
		name := key.(string)
		if _, repeated := values[name]; repeated {
			in.bad[name] = "is repeated"
		}
		if !slices.Contains(fields, name) {
			in.bad[name] = "is not a known field"
		}
		var value json.RawMessage
		_ = d.Decode(&value)
		values[name] = value
	}
	return values
}

// fault returns an error if anything is wrong.
func (in *input) fault() error {
	switch {
	case in.tooLarge:
		return errTooLarge
	case len(in.bad) > 0:
		return invalid(in.bad)
	}
	return nil
}

// number returns a query parameter from 1 to most, or the default for one that is absent; a default of 0 makes it
// required.
func (in *input) number(name string, absent, most int32) int32 {
	switch values := in.query[name]; {
	case len(values) == 1:
		return in.parse(name, values[0], most)
	case len(values) > 1:
		in.bad[name] = "must be given once"
	case absent == 0:
		in.bad[name] = "is required"
	}
	return absent
}

// parse returns a number from 1 to most, in digits only.
func (in *input) parse(name, digits string, most int32) int32 {
	n, err := strconv.ParseInt(digits, 10, 32)
	if err != nil || n < 1 || n > int64(most) || digits[0] == '+' {
		in.bad[name] = fmt.Sprintf("must be an integer from 1 to %d", most)
	}
	return int32(n)
}

// field returns a field of the body, nil if it is absent.
func (in *input) field(name string, required bool) json.RawMessage {
	raw := in.body[name]
	if raw == nil && required && in.bad["body"] == "" {
		in.bad[name] = "is required"
	}
	return raw
}

// integer returns a field that must be a positive 32-bit integer.
func (in *input) integer(name string) (n int32) {
	if raw := in.field(name, true); raw != nil {
		n = in.parse(name, string(raw), maxInt32)
	}
	return n
}

// text returns a field of at most that many characters, nil when it is absent.
func (in *input) text(name string, most int) *string {
	raw := in.field(name, false)
	if raw == nil {
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

var surrogatePair, surrogate = regexp.MustCompile(`(?i)\\ud[89ab]..\\ud[c-f]..`), regexp.MustCompile(`(?i)\\ud[89a-f]`)

// loneSurrogate reports whether a JSON string has the escape of one half of a surrogate pair, which encoding/json
// would replace by U+FFFD.
func loneSurrogate(raw []byte) bool {
	if !bytes.Contains(raw, []byte(`\u`)) {
		return false
	}
	raw = bytes.ReplaceAll(raw, []byte(`\\`), []byte(" ")) // an escaped backslash escapes nothing
	return surrogate.Match(surrogatePair.ReplaceAll(raw, []byte(" ")))
}

// name returns the field name, which every good has.
func (in *input) name() *string {
	in.field("name", true)
	s := in.text("name", maxName)
	if s != nil && in.bad["name"] == "" && strings.TrimSpace(*s) == "" {
		in.bad["name"] = "must not be blank"
	}
	return s
}

// idempotencyKey returns the header of that name, or "" when it is absent.
func (in *input) idempotencyKey(h http.Header) string {
	const name = "Idempotency-Key"
	values := h.Values(name)
	if len(values) == 0 {
		return ""
	}
	if len(values) > 1 {
		in.bad[name] = "must be given once"
	} else if values[0] == "" || len(values[0]) > maxKey || !printable(values[0]) {
		in.bad[name] = fmt.Sprintf("must have 1 to %d printable ASCII characters", maxKey)
	}
	return values[0]
}

func printable(s string) bool {
	return !strings.ContainsFunc(s, func(c rune) bool { return c < ' ' || c > '~' })
}
