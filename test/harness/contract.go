package harness

import (
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/pb33f/libopenapi"
	validator "github.com/pb33f/libopenapi-validator"
)

// contract is what openapi.yaml says.
var contract = sync.OnceValues(func() (validator.Validator, error) {
	text, err := os.ReadFile(filepath.Join(root(), "openapi.yaml"))
	if err != nil {
		return nil, err
	}
	document, err := libopenapi.NewDocument(text)
	if err != nil {
		return nil, err
	}
	v, errs := validator.NewValidator(document)
	return v, errors.Join(errs...)
})

// check fails the test when a reply is not as openapi.yaml says. That has no place for unknown paths and wrong
// methods: they get the errors of any other.
func (r Reply) check(t testing.TB, method, path string) {
	t.Helper()
	v, err := contract()
	Must(t, err)
	as, status := method+" "+path, r.Status
	switch {
	case status == http.StatusMethodNotAllowed:
		as = "GET /goods/list"
	case status == http.StatusNotFound && strings.Contains(r.Body, "errors.route.notFound"):
		as, status = "GET /goods/list", http.StatusBadRequest
	}
	documented, target, _ := strings.Cut(as, " ")
	request, err := http.NewRequest(documented, "http://goods"+target, nil)
	Must(t, err)
	response := &http.Response{StatusCode: status, Header: r.Header, Body: io.NopCloser(strings.NewReader(r.Body))}
	if ok, faults := v.ValidateHttpResponse(request, response); !ok {
		t.Errorf("not as openapi.yaml says: %s %.200s: %d %.500s", method, path, r.Status, r.Body)
		for _, f := range faults {
			t.Error(f)
		}
	}
}
