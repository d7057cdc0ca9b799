package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// A plain go build tells the tag and the commit, and whether files were changed.
func TestBuildVersion(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	run := func(name string, args ...string) string {
		t.Helper()
		cmd := exec.Command(name, args...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "GOFLAGS=-buildvcs=auto", "GIT_CONFIG_GLOBAL=/dev/null",
			"GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@b", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@b")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
		}
		return strings.TrimSpace(string(out))
	}
	expect := func(version, revision string) {
		t.Helper()
		run("go", "build", "-o", "goods")
		if got, want := run("./goods"), version+" "+revision; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}

	source, err := os.ReadFile("version.go")
	if err != nil {
		t.Fatal(err)
	}
	write("version.go", string(source))
	write("main.go", "package main\n\nimport \"fmt\"\n\nfunc main() { fmt.Println(buildVersion()) }\n")
	write("go.mod", "module goods\n\ngo 1.26\n")
	write(".gitignore", "goods\n")
	expect("(devel)", "unknown")

	run("git", "init", "--quiet")
	run("git", "add", ".")
	run("git", "commit", "--quiet", "--message=first")
	run("git", "tag", "v1.2.3")
	first := run("git", "rev-parse", "HEAD")
	expect("v1.2.3", first)

	write("main.go", "package main\n\nimport \"fmt\"\n\nfunc main() {\n\tfmt.Println(buildVersion())\n}\n")
	expect("v1.2.3+dirty", first)

	run("git", "commit", "--quiet", "--all", "--message=second")
	second := run("git", "rev-parse", "HEAD")
	run("go", "build", "-o", "goods")
	got := run("./goods")
	if !strings.HasPrefix(got, "v1.2.4-0.") || !strings.HasSuffix(got, second[:12]+" "+second) {
		t.Errorf("without a tag: got %q, want a pseudo-version after v1.2.3 of %s", got, second)
	}
}
