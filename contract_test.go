package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"
)

// contract is openapi.yaml. It knows just as much of OpenAPI and of JSON
// Schema as that file uses, and complains about anything else.
type contract struct {
	spec map[string]any
}

var theContract = sync.OnceValue(func() contract {
	spec, err := readYAML(string(openAPI))
	if err != nil {
		panic(err)
	}
	return contract{spec}
})

// breaches are the replies, of all tests, that are not as openapi.yaml says.
var breaches struct {
	sync.Mutex
	texts []string
}

// checkReply notes a reply that is not as openapi.yaml says, for TestMain.
func checkReply(method, path string, r reply) {
	faults := theContract().faults(method, path, r)
	if len(faults) > 0 {
		breaches.Lock()
		defer breaches.Unlock()
		breaches.texts = append(breaches.texts, fmt.Sprintf("%s %.200s: %d %.500s: %s", method, path, r.status, r.body, strings.Join(faults, "; ")))
	}
}

func (c contract) object(path ...string) map[string]any {
	v := c.spec
	for _, name := range path {
		v, _ = v[name].(map[string]any)
	}
	return v
}

// resolve follows a reference.
func (c contract) resolve(v any) map[string]any {
	object, _ := v.(map[string]any)
	if ref, ok := object["$ref"].(string); ok {
		target := c.object(strings.Split(strings.TrimPrefix(ref, "#/"), "/")...)
		if target == nil {
			panic("openapi.yaml has no " + ref)
		}
		return target
	}
	return object
}

// faults tells in which ways a reply is not as documented.
func (c contract) faults(method, path string, r reply) []string {
	path, _, _ = strings.Cut(path, "?")
	operation := c.object("paths", path, strings.ToLower(method), "responses")
	if method == http.MethodHead {
		operation = c.object("paths", path, "get", "responses")
	}
	response, ok := operation[fmt.Sprint(r.status)]
	if !ok && (r.status == http.StatusNotFound || r.status == http.StatusMethodNotAllowed) {
		response, ok = c.object("components", "responses")["Misdirected"]
	}
	if !ok {
		return []string{"the status is not documented"}
	}
	documented := c.resolve(response)
	var faults []string
	headers, _ := documented["headers"].(map[string]any)
	for name, h := range headers {
		h := c.resolve(h)
		required := name == "X-Request-Id" || h["required"] == true || name == "Allow" && r.status == http.StatusMethodNotAllowed
		if (r.header.Get(name) == "") == required {
			faults = append(faults, fmt.Sprintf("header %s is %q", name, r.header.Get(name)))
		}
	}
	contentType, _, _ := mime.ParseMediaType(r.header.Get("Content-Type"))
	content, ok := documented["content"].(map[string]any)[contentType].(map[string]any)
	if !ok {
		return append(faults, fmt.Sprintf("Content-Type is %q", contentType))
	}
	if contentType != "application/json" || method == http.MethodHead {
		return faults
	}
	var body any
	d := json.NewDecoder(strings.NewReader(r.body))
	if err := d.Decode(&body); err != nil {
		return append(faults, err.Error())
	}
	if _, err := d.Token(); err != io.EOF {
		return append(faults, "something follows the body")
	}
	return append(faults, c.check(content["schema"], body, "body")...)
}

// check tells in which ways a value does not match a JSON schema. The value is
// named where in errors.
func (c contract) check(schema, value any, where string) (faults []string) {
	s, ok := schema.(map[string]any)
	if !ok {
		return []string{where + " has no schema"}
	}
	fail := func(format string, args ...any) {
		faults = append(faults, where+" "+fmt.Sprintf(format, args...))
	}
	text, isText := value.(string)
	number, isNumber := value.(float64)
	list, isList := value.([]any)
	object, isObject := value.(map[string]any)
	for keyword, limit := range s {
		size, _ := limit.(float64)
		switch keyword {
		case "description", "default":
		case "$ref":
			faults = append(faults, c.check(c.resolve(s), value, where)...)
		case "type":
			kinds := map[string]bool{
				"string": isText, "object": isObject, "array": isList,
				"integer": isNumber && number == float64(int64(number)), "boolean": value == true || value == false,
			}
			if !kinds[limit.(string)] {
				fail("is no %v: %v", limit, value)
			}
		case "const":
			if !reflect.DeepEqual(value, limit) {
				fail("is %v, not %v", value, limit)
			}
		case "enum":
			if !slices.Contains(limit.([]any), value) {
				fail("is %v, not one of %v", value, limit)
			}
		case "pattern":
			if isText && !regexp.MustCompile(limit.(string)).MatchString(text) {
				fail("is %q, which does not match %v", text, limit)
			}
		case "format":
			if _, err := time.Parse(time.RFC3339Nano, text); limit != "date-time" || isText && err != nil {
				fail("is %q, which is no %v", text, limit)
			}
		case "minimum", "maximum":
			if isNumber && (keyword == "minimum" && number < size || keyword == "maximum" && number > size) {
				fail("is %v, %s %v", value, keyword, limit)
			}
		case "minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties":
			n, applies := utf8.RuneCountInString(text), isText
			if strings.HasSuffix(keyword, "Items") {
				n, applies = len(list), isList
			} else if strings.HasSuffix(keyword, "Properties") {
				n, applies = len(object), isObject
			}
			if applies && (keyword[:3] == "min" && float64(n) < size || keyword[:3] == "max" && float64(n) > size) {
				fail("has size %d, %s %v", n, keyword, limit)
			}
		case "required":
			for _, name := range limit.([]any) {
				if _, ok := object[name.(string)]; isObject && !ok {
					fail("has no %v", name)
				}
			}
		case "items":
			for i, item := range list {
				faults = append(faults, c.check(limit, item, fmt.Sprintf("%s[%d]", where, i))...)
			}
		case "properties":
			for name, property := range limit.(map[string]any) {
				if v, ok := object[name]; ok {
					faults = append(faults, c.check(property, v, where+"."+name)...)
				}
			}
		case "additionalProperties":
			known, _ := s["properties"].(map[string]any)
			for name, v := range object {
				if _, ok := known[name]; ok {
					continue
				} else if limit == false {
					fail("has %s, which is not documented", name)
				} else {
					faults = append(faults, c.check(limit, v, where+"."+name)...)
				}
			}
		default:
			fail("has a schema with %s, which this test does not know", keyword)
		}
	}
	return faults
}

// readYAML reads the part of YAML that openapi.yaml uses: mappings and
// sequences in blocks; JSON, quoted or plain scalars on one line; texts folded
// with >-. Whatever else YAML has is an error.
func readYAML(text string) (object map[string]any, err error) {
	var y yamlReader
	for i, line := range strings.Split(text, "\n") {
		if trimmed := strings.TrimLeft(line, " "); trimmed != "" && trimmed[0] != '#' {
			y.lines = append(y.lines, yamlLine{i + 1, len(line) - len(trimmed), trimmed})
		}
	}
	defer func() {
		if fault, ok := recover().(yamlFault); ok {
			object, err = nil, errors.New(string(fault))
		}
	}()
	object, ok := y.block(0).(map[string]any)
	if !ok || len(y.lines) > 0 {
		y.fail("not a mapping from beginning to end")
	}
	return object, nil
}

type yamlLine struct {
	number, indent int
	text           string
}

type yamlFault string

type yamlReader struct {
	lines []yamlLine // still to be read
	last  int
}

func (y *yamlReader) fail(what string) {
	panic(yamlFault(fmt.Sprintf("near line %d: %s", y.last, what)))
}

// next tells whether the next line belongs to the block at indent.
func (y *yamlReader) next(indent int) bool {
	if len(y.lines) == 0 || y.lines[0].indent < indent {
		return false
	}
	y.last = y.lines[0].number
	if y.lines[0].indent > indent {
		y.fail("unexpected indentation")
	}
	return true
}

var yamlKey = regexp.MustCompile(`^('[^']+'|"[^"]+"|[\w$/.-]+):(?: +(.*))?$`)

func (y *yamlReader) block(indent int) any {
	if !y.next(indent) {
		y.fail("a value is missing")
	}
	if strings.HasPrefix(y.lines[0].text, "- ") {
		var list []any
		for y.next(indent) && strings.HasPrefix(y.lines[0].text, "- ") {
			rest := strings.TrimPrefix(y.lines[0].text, "- ")
			if yamlKey.MatchString(rest) {
				y.lines[0].text, y.lines[0].indent = rest, indent+2
				list = append(list, y.block(indent+2))
			} else {
				y.lines = y.lines[1:]
				list = append(list, y.scalar(rest))
			}
		}
		return list
	}
	object := map[string]any{}
	for y.next(indent) {
		match := yamlKey.FindStringSubmatch(y.lines[0].text)
		if match == nil {
			y.fail("neither a key nor an item")
		}
		y.lines = y.lines[1:]
		key := strings.Trim(match[1], `'"`)
		if _, repeated := object[key]; repeated {
			y.fail("repeated key")
		}
		switch {
		case match[2] == ">-":
			var words []string
			for len(y.lines) > 0 && y.lines[0].indent > indent {
				words, y.lines = append(words, y.lines[0].text), y.lines[1:]
			}
			object[key] = strings.Join(words, " ")
		case match[2] != "":
			object[key] = y.scalar(match[2])
		case len(y.lines) > 0 && y.lines[0].indent > indent:
			object[key] = y.block(y.lines[0].indent)
		default:
			y.fail("a value is missing")
		}
	}
	return object
}

func (y *yamlReader) scalar(text string) any {
	var v any
	d := json.NewDecoder(bytes.NewReader([]byte(text)))
	if err := d.Decode(&v); err == nil && !d.More() {
		return v
	}
	if len(text) > 1 && text[0] == '\'' && strings.Count(text, "'") == 2 && strings.HasSuffix(text, "'") {
		return strings.Trim(text, "'")
	}
	if strings.ContainsAny(text[:1], "'\"{}[]&*!|>%@`#?,") || strings.Contains(text, ": ") || strings.Contains(text, " #") {
		y.fail("a scalar that this test does not know: " + text)
	}
	return text
}
