// Package client checks that a Go client can be generated from openapi.yaml,
// compiles, and works.
package client

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	_ "github.com/oapi-codegen/runtime" // what the generated code imports

	"goods/test/harness"
)

const generator = "github.com/oapi-codegen/oapi-codegen/v2/cmd/oapi-codegen@v2.8.2"

func TestMain(m *testing.M) { harness.Main(m) }

func TestGeneratedClient(t *testing.T) {
	a := harness.NewWorld(t).Start(t)
	// Inside the module, so that imports are found; the underscore hides it from ./... .
	dir, err := os.MkdirTemp(".", "_generated-")
	harness.Must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	run(
		t,
		"go",
		"run",
		generator,
		"-generate",
		"types,client",
		"-include-tags",
		"goods",
		"-package",
		"main",
		"-o",
		filepath.Join(dir, "client.go"),
		"../../openapi.yaml",
	)
	program, err := os.ReadFile("testdata/main.go")
	harness.Must(t, err)
	harness.Must(t, os.WriteFile(filepath.Join(dir, "main.go"), program, 0o644))
	run(t, "go", "run", dir, a.URL)
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
}
