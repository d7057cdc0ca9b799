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
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

const (
	maxInt32       = math.MaxInt32
	maxBody        = 128 << 10 // bytes: 10,000 characters fit even when a client escapes each, as \ud83d\ude00
	maxName        = 255       // characters
	maxDescription = 10_000    // characters
	maxKey         = 255       // bytes
	maxRefused     = 20        // unknown fields and parameters that a reply names
	bodyTimeout    = 5 * time.Second
	// lateBodyTimeout is for the rest of a body that is not read, after the reply.
	lateBodyTimeout = 500 * time.Millisecond
)

// input is a request that is being read. Each getter returns a value that can be used, or notes a fault.
// err says whether there was one, and has to be asked before the values are used.
type input struct {
	header http.Header
	query  url.Values
	body   map[string]json.RawMessage

	parameters []string          // that were asked for
	faults     map[string]string // by field: what is wrong with it
	failure    *failure          // of the request as a whole, or nil
}

// readInput reads a request whose body is ignored.
func readInput(r *http.Request) *input {
	in := &input{header: r.Header, faults: map[string]string{}}
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		in.faults["query"] = "is malformed"
	}
	in.query = query
	return in
}

// readInputWithBody reads a request whose body must be a JSON object that has no other fields than these.
func readInputWithBody(w http.ResponseWriter, r *http.Request, fields ...string) *input {
	in := readInput(r)
	body, err := readBody(w, r)
	_, tooLarge := errors.AsType[*http.MaxBytesError](err)
	switch {
	case tooLarge:
		in.failure = errTooLarge
	case errors.Is(err, os.ErrDeadlineExceeded):
		in.failure = errBodyTimeout
	case err != nil:
		in.faults["body"] = "could not be read"
	default:
		in.readObject(body, fields)
	}
	return in
}

// readBody reads the body, which has to arrive within bodyTimeout. It leaves nothing for ignoreBody, also
// after an error.
func readBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	sent := r.Body
	r.Body = http.NoBody
	control := http.NewResponseController(w)
	if err := control.SetReadDeadline(time.Now().Add(bodyTimeout)); err != nil {
		return nil, err
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, sent, maxBody))
	if err != nil {
		return nil, err
	}
	// So that the server's read in the background never fails: it would take that for a client that has gone.
	return body, control.SetReadDeadline(time.Time{})
}

// ignoreBody drops a body that no handler has read. It does not wait for one that is still on its way: the
// connection is then closed after the reply, and ignoreBody returns false, as net/http may have canceled the
// request's context. So it is called after the handler.
func ignoreBody(w http.ResponseWriter, r *http.Request) bool {
	if r.Body == http.NoBody {
		return true
	}
	control := http.NewResponseController(w)
	err := control.SetReadDeadline(time.Now().Add(time.Millisecond))
	if err == nil {
		_, err = io.Copy(io.Discard, http.MaxBytesReader(w, r.Body, maxBody))
	}
	if err == nil {
		err = control.SetReadDeadline(time.Time{})
	}
	if err != nil {
		closeAfterReply(w)
	}
	return err == nil
}

// closeAfterReply ends the connection with the reply. What still comes of the body is read for a moment
// after it: if the connection were closed at once, it would be reset, and the client might not get the
// reply.
func closeAfterReply(w http.ResponseWriter) {
	w.Header().Set("Connection", "close")
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(lateBodyTimeout))
}

// readObject splits a JSON object into its fields. encoding/json alone would take repeated keys, keys in
// other cases, broken UTF-8, and text after the object.
func (in *input) readObject(text []byte, fields []string) {
	if !json.Valid(text) || !utf8.Valid(text) || bytes.TrimLeft(text, " \t\r\n")[0] != '{' {
		in.faults["body"] = "must be one JSON object in UTF-8"
		return
	}
	in.body = map[string]json.RawMessage{}
	decoder := json.NewDecoder(bytes.NewReader(text))
	_, _ = decoder.Token() // the brace; from here on errors are impossible, as the text is valid
	for decoder.More() {
		key, _ := decoder.Token()
		name := key.(string)
		var value json.RawMessage
		_ = decoder.Decode(&value)
		_, repeated := in.body[name]
		switch {
		case !slices.Contains(fields, name):
			in.refuse(name, "is not a known field")
		case repeated:
			in.faults[name] = "is repeated"
		}
		in.body[name] = value
	}
}

// refuse notes the fault of a field or parameter that is not known. A request may be full of them, and have
// long ones: maxRefused are noted, with the beginning of their names.
func (in *input) refuse(name, fault string) {
	if len(in.faults) < maxRefused {
		in.faults[fmt.Sprintf("%.100s", name)] = fault
	}
}

// err returns a failure if anything is wrong with the request. It is called after the getters: a query
// parameter that none of them has asked for is a fault, too.
func (in *input) err() error {
	if in.failure != nil {
		return in.failure
	}
	for name := range in.query {
		if !slices.Contains(in.parameters, name) {
			in.refuse(name, "is not a known parameter")
		}
	}
	if len(in.faults) > 0 {
		return invalid(in.faults)
	}
	return nil
}

// good returns the parameters that name a good.
func (in *input) good() (id, projectID int32) {
	return in.required("id"), in.required("projectId")
}

// required returns a parameter that has to be there, from 1 on.
func (in *input) required(name string) int32 {
	if !in.query.Has(name) {
		in.faults[name] = "is required"
	}
	return in.optional(name, 0, maxInt32)
}

// optional returns a parameter from 1 to most, or absent when it is not there.
func (in *input) optional(name string, absent, most int32) int32 {
	in.parameters = append(in.parameters, name)
	values := in.query[name]
	switch len(values) {
	case 0:
		return absent
	case 1:
		return in.parse(name, values[0], most)
	default:
		in.faults[name] = "must be given once"
		return absent
	}
}

// parse returns a number from 1 to most, written in decimal digits.
func (in *input) parse(field, digits string, most int32) int32 {
	n, err := strconv.ParseUint(digits, 10, 31)
	if err != nil || n < 1 || n > uint64(most) {
		in.faults[field] = fmt.Sprintf("must be an integer from 1 to %d", most)
		return 0
	}
	return int32(n)
}

// integer returns a field of the body that must be a positive 32-bit integer.
func (in *input) integer(name string) int32 {
	raw := in.requiredField(name)
	if raw == nil {
		return 0
	}
	return in.parse(name, string(raw), maxInt32)
}

// requiredField returns a field of the body as it was sent, nil if it is absent.
func (in *input) requiredField(name string) json.RawMessage {
	raw := in.body[name]
	if raw == nil && in.body != nil { // a body that cannot be used is a fault of its own
		in.faults[name] = "is required"
	}
	return raw
}

// name returns the name in the body, which is required: it is nil only if err returns an error.
func (in *input) name() *string {
	const field = "name"
	if in.requiredField(field) == nil {
		return nil
	}
	s := in.text(field, maxName)
	if in.faults[field] == "" && blank(*s) {
		in.faults[field] = "must not be blank"
	}
	return s
}

// blank reports whether a text shows nothing: it has only spaces, control and format characters, Hangul
// fillers and blank Braille cells.
func blank(s string) bool {
	return !strings.ContainsFunc(s, func(c rune) bool {
		switch c {
		case '\u115F', '\u1160', '\u2800', '\u3164', '\uFFA0':
			return false
		}
		return !unicode.IsSpace(c) && !unicode.In(c, unicode.Cc, unicode.Cf)
	})
}

// description returns the field description, nil when it is absent.
func (in *input) description() *string {
	return in.text("description", maxDescription)
}

// text returns a field of at most so many characters, nil when it is absent.
func (in *input) text(name string, most int) *string {
	raw := in.body[name]
	if raw == nil {
		return nil
	}
	var s string
	switch {
	case raw[0] != '"' || json.Unmarshal(raw, &s) != nil:
		in.faults[name] = "must be a string"
	case hasLoneSurrogate(raw) || strings.ContainsRune(s, 0):
		in.faults[name] = "must not contain U+0000 or a lone surrogate"
	case utf8.RuneCountInString(s) > most:
		in.faults[name] = fmt.Sprintf("must have at most %d characters", most)
	}
	return &s
}

var (
	surrogatePair = regexp.MustCompile(`(?i)\\ud[89ab]..\\ud[c-f]..`)
	surrogate     = regexp.MustCompile(`(?i)\\ud[89a-f]`)
)

// hasLoneSurrogate reports whether a JSON string has the escape of one half of a surrogate pair, which
// encoding/json would replace by U+FFFD.
func hasLoneSurrogate(raw []byte) bool {
	if !bytes.Contains(raw, []byte(`\u`)) {
		return false
	}
	raw = bytes.ReplaceAll(raw, []byte(`\\`), []byte(" ")) // an escaped backslash escapes nothing
	raw = surrogatePair.ReplaceAll(raw, []byte(" "))
	return surrogate.Match(raw)
}

// idempotencyKey returns the header of that name, "" when it is absent.
func (in *input) idempotencyKey() string {
	const name = "Idempotency-Key"
	values := in.header.Values(name)
	switch {
	case len(values) == 0:
		return ""
	case len(values) > 1:
		in.faults[name] = "must be given once"
	case values[0] == "" || len(values[0]) > maxKey || !printable(values[0]):
		in.faults[name] = fmt.Sprintf("must have 1 to %d printable ASCII characters", maxKey)
	}
	return values[0]
}

// ifMatch returns the version that the header If-Match names, nil when it is absent or *, which every
// version matches.
func (in *input) ifMatch() *int32 {
	const name = "If-Match"
	values := in.header.Values(name)
	if len(values) == 0 || len(values) == 1 && values[0] == "*" {
		return nil
	}
	tag := values[0]
	if len(values) == 1 && len(tag) > 2 && strings.HasPrefix(tag, `"`) && strings.HasSuffix(tag, `"`) {
		digits := tag[1 : len(tag)-1]
		version, err := strconv.ParseUint(digits, 10, 31)
		if err == nil {
			v := int32(version)
			if digits[0] == '0' {
				v = 0 // which no good has: "03" is another tag than "3"
			}
			return &v
		}
	}
	in.faults[name] = `must be one ETag of this good, such as "3", in its quotes`
	return nil
}

// printable reports whether s has printable ASCII characters only.
func printable(s string) bool {
	return !strings.ContainsFunc(s, func(c rune) bool { return c < ' ' || c > '~' })
}
