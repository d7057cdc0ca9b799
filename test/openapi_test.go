package test

import (
	"encoding/json"
	"net/url"
	"strings"
	"testing"

	"github.com/pb33f/libopenapi"
	validator "github.com/pb33f/libopenapi-validator/schema_validation"
	v3 "github.com/pb33f/libopenapi/datamodel/high/v3"
	"github.com/pb33f/libopenapi/orderedmap"

	"goods/test/harness"
)

// Every call of openapi.yaml works as its examples say, and the examples of its replies are right. Real
// replies, here and in every other test, are checked where they arrive.
func TestOpenAPIExamples(t *testing.T) {
	_, a := started(t)
	a.Stock(t, 3)
	text := harness.File(t, "openapi.yaml")
	served := a.Call(t, "GET", "/openapi.yaml", "")
	harness.Equal(
		t,
		served.Body+served.Header.Get("Content-Type"),
		string(text)+"application/yaml",
		"/openapi.yaml",
	)
	document, err := libopenapi.NewDocument(text)
	harness.Must(t, err)
	spec, err := document.BuildV3Model()
	harness.Must(t, err)
	for path, item := range spec.Model.Paths.PathItems.FromOldest() {
		for method, operation := range item.GetOperations().FromOldest() {
			query := url.Values{}
			for _, p := range operation.Parameters {
				var example string
				if p.In == "query" && p.Example != nil {
					harness.Must(t, p.Example.Decode(&example))
					query.Set(p.Name, example)
				}
			}
			bodies := []string{""}
			if operation.RequestBody != nil {
				bodies = examples(t, operation.RequestBody.Content)
			}
			for _, body := range bodies {
				if r := a.Call(t, strings.ToUpper(method), path+"?"+query.Encode(), body); r.Status > 299 {
					t.Errorf("%s %s?%s %s: got %d %s", method, path, query.Encode(), body, r.Status, r.Body)
				}
			}
			for _, response := range operation.Responses.Codes.FromOldest() {
				examples(t, response.Content)
			}
		}
	}
}

// examples returns the examples of a body, which must be as its schema says.
func examples(t testing.TB, content *orderedmap.Map[string, *v3.MediaType]) (bodies []string) {
	t.Helper()
	for contentType, media := range content.FromOldest() {
		if contentType == "application/json" && media.Examples.Len() == 0 {
			t.Errorf("there is a body without examples: %v", media.Schema.GetReference())
		}
		for name, example := range media.Examples.FromOldest() {
			var value any
			harness.Must(t, example.Value.Decode(&value))
			text, err := json.Marshal(value)
			harness.Must(t, err)
			schemas := validator.NewSchemaValidator()
			if right, faults := schemas.ValidateSchemaString(media.Schema.Schema(), string(text)); !right {
				t.Errorf("example %s: %v", name, faults)
			}
			bodies = append(bodies, string(text))
		}
	}
	return bodies
}
