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

// input is what a request says, and what is wrong with it. Each getter returns
// a usable value or notes the fault; fault tells whether there was one.
type input struct {
	query url.Values
	body  map[string]json.RawMessage
	bad   map[string]string // what is wrong with each bad field
}

// readInput reads the query, and where fields are named also the body, which
// must be an object with no other fields.
func readInput(w http.ResponseWriter, r *http.Request, fields ...string) (*input, error) {
	in := &input{bad: map[string]string{}}
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

// fault returns an error if anything is wrong.
func (in *input) fault() error {
	if len(in.bad) > 0 {
		return invalid(in.bad)
	}
	return nil
}

// number returns a query parameter between 1 and most.
func (in *input) number(name string, most int32) int32 {
	values := in.query[name]
	if len(values) != 1 {
		in.bad[name] = "is required"
		if len(values) > 1 {
			in.bad[name] = "must be given once"
		}
		return 0
	}
	n, err := strconv.ParseInt(values[0], 10, 32)
	if err != nil || n < 1 || n > int64(most) || values[0][0] == '+' {
		in.bad[name] = fmt.Sprintf("must be an integer from 1 to %d", most)
		return 0
	}
	return int32(n)
}

// numberOr is number with a default for a parameter that is absent.
func (in *input) numberOr(name string, absent, most int32) int32 {
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
func (in *input) integer(name string) int32 {
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
	return int32(n)
}

// idempotencyKey returns the header of that name, or "" when it is absent.
func (in *input) idempotencyKey(h http.Header) string {
	const name = "Idempotency-Key"
	values := h.Values(name)
	switch {
	case len(values) == 0:
		return ""
	case len(values) > 1:
		in.bad[name] = "must be given once"
	case values[0] == "" || len(values[0]) > maxKey || strings.ContainsFunc(values[0], func(c rune) bool { return c < ' ' || c > '~' }):
		in.bad[name] = fmt.Sprintf("must have 1 to %d printable ASCII characters", maxKey)
	}
	return values[0]
}
