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
var contract = sync.OnceValue(func() validator.Validator {
	text, _ := os.ReadFile(filepath.Join(root(), "openapi.yaml")) // without it, there is no document
	document, err := libopenapi.NewDocument(text)
	if err != nil {
		panic(err)
	}
	v, errs := validator.NewValidator(document)
	if len(errs) > 0 {
		panic(errors.Join(errs...))
	}
	return v
})

// check fails the test when a reply is not as openapi.yaml says, or may be cached: a list from a cache
// would be stale. Unknown paths and wrong methods are not in openapi.yaml: they get the errors of any
// other.
func (r Reply) check(t testing.TB, method, path string) {
	t.Helper()
	cached := r.Header.Values("Cache-Control")
	Equal(t, cached, []string{"no-store"}, "Cache-Control of %s %s: %d", method, path, r.Status)
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
	body := io.NopCloser(strings.NewReader(r.Body))
	response := &http.Response{StatusCode: status, Header: r.Header, Body: body}
	if ok, faults := contract().ValidateHttpResponse(request, response); !ok {
		t.Errorf("not as openapi.yaml says: %s %.200s: %d %.500s", method, path, r.Status, r.Body)
		for _, f := range faults {
			t.Error(f)
		}
	}
}
