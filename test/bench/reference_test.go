package bench

import (
	"bufio"
	"database/sql"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/constant"
	"go/parser"
	"go/token"
	"go/types"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/lib/pq"

	"goods/test/harness"
)

// referenceVariable makes the test binary serve what the service is compared
// with, in a process of its own.
const referenceVariable = "GOODS_BENCH_REFERENCE"

// reference is a bare net/http handler that writes the same bytes as the
// service and, where it has a database, first sends the service's own
// statements. It checks nothing, batches nothing and caches nothing.
type reference struct {
	Body                       string // of the reply to a list
	Postgres                   string
	List, Lock, Create, Update string // statements
}

// serve runs a reference until the test ends.
func (b *bench) serve(r reference) target {
	b.Helper()
	config, err := json.Marshal(r)
	harness.Must(b, err)
	self, err := os.Executable()
	harness.Must(b, err)
	cmd := exec.Command(self)
	cmd.Env, cmd.Stderr = []string{referenceVariable + "=" + string(config)}, os.Stderr
	out, err := cmd.StdoutPipe()
	harness.Must(b, err)
	harness.Must(b, cmd.Start())
	b.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	address, err := bufio.NewReader(out).ReadString('\n')
	harness.Must(b, err)
	return target{"http://" + strings.TrimSpace(address), cmd.Process.Pid}
}

// statement returns the text of a constant of the service, so that what is
// sent by hand is always what the service sends.
func (b *bench) statement(name string) string {
	b.Helper()
	paths, err := filepath.Glob("../../*.go")
	harness.Must(b, err)
	fset := token.NewFileSet()
	var files []*ast.File
	for _, path := range paths {
		if f, err := parser.ParseFile(fset, path, nil, 0); err == nil && !strings.HasSuffix(path, "_test.go") {
			files = append(files, f)
		}
	}
	// Nothing is imported: the errors that this makes do not concern constants of text.
	config := types.Config{IgnoreFuncBodies: true, Error: func(error) {}}
	pkg, _ := config.Check("goods", fset, files, nil)
	c, ok := pkg.Scope().Lookup(name).(*types.Const)
	if !ok {
		b.Fatalf("the service has no constant %s", name)
	}
	return constant.StringVal(c.Val())
}

func serveReference(config string) error {
	var ref reference
	must(json.Unmarshal([]byte(config), &ref))
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(err)
	fmt.Println(listener.Addr())
	body := []byte(ref.Body)
	list := func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(body)
	}
	if ref.Postgres == "" {
		return http.Serve(listener, http.HandlerFunc(list))
	}
	db, err := sql.Open("postgres", ref.Postgres)
	must(err)
	prepare := func(query string) *sql.Stmt {
		stmt, err := db.Prepare(query)
		must(err)
		return stmt
	}
	versions, insert, edit := prepare(ref.List), prepare(ref.Create), prepare(ref.Update)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /goods/list", func(w http.ResponseWriter, r *http.Request) {
		var total, removed int64
		var keys []byte
		must(versions.QueryRow(pq.Int32Array{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}).Scan(&total, &removed, &keys))
		list(w, r)
	})
	// write answers with the good that a statement in a transaction returns.
	write := func(w http.ResponseWriter, r *http.Request, run func(tx *sql.Tx, name string) *sql.Row, dest ...any) {
		var body struct{ Name string }
		must(json.NewDecoder(r.Body).Decode(&body))
		tx, err := db.Begin()
		must(err)
		defer tx.Rollback() // does nothing after a commit
		var g harness.Good
		must(run(tx, body.Name).Scan(append(dest, &g.ID, &g.ProjectID, &g.Name, &g.Description, &g.Priority, &g.Removed, &g.CreatedAt, new(int))...))
		must(tx.Commit())
		w.Header().Set("Content-Type", "application/json")
		must(json.NewEncoder(w).Encode(g))
	}
	none := pq.StringArray{""}
	mux.HandleFunc("POST /goods/create", func(w http.ResponseWriter, r *http.Request) {
		write(w, r, func(tx *sql.Tx, name string) *sql.Row {
			_, err := tx.Exec(ref.Lock)
			must(err)
			return tx.Stmt(insert).QueryRow(pq.Int32Array{1}, pq.StringArray{name}, none, none, none)
		}, new(int), new(bool))
	})
	mux.HandleFunc("PATCH /goods/update", func(w http.ResponseWriter, r *http.Request) {
		write(w, r, func(tx *sql.Tx, name string) *sql.Row {
			id, err := strconv.Atoi(r.FormValue("id"))
			must(err)
			return tx.Stmt(edit).QueryRow(pq.Int32Array{int32(id)}, pq.Int32Array{1}, pq.StringArray{name}, none, pq.BoolArray{false}, pq.BoolArray{false})
		})
	})
	return http.Serve(listener, mux)
}

// must ends the request of a reference: wrk counts it, and the bench fails.
func must(err error) {
	if err != nil {
		panic(err)
	}
}
