package bench

import (
	"database/sql"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"

	"github.com/lib/pq"

	"goods/test/harness"
)

// In the environment, they make the test binary serve what the service is compared with: its list and its
// good.
const listVariable, goodVariable = "GOODS_BENCH_LIST", "GOODS_BENCH_GOOD"

// reference starts what the service is compared with, in a process of its own: a bare net/http handler that
// answers with the bytes of the service's list, or of its good, and, except at /bare, first sends the
// service's own statements. It checks nothing, batches nothing and caches nothing.
func (b *bench) reference() *site {
	b.Helper()
	s := b.site(goods)
	list := s.apps[0].Call(b, "GET", pathOf(pageAt(1)), "").Body
	good := s.apps[0].Call(b, "GET", pathOf(getOf(1)), "").Body
	w := &harness.World{Env: s.Env, Program: "/proc/self/exe", Unchecked: true}
	// What the service sets for its own sessions, too: plans depend on it.
	const options = "PGOPTIONS=-c enable_seqscan=off -c jit=off -c plan_cache_mode=force_generic_plan"
	a := w.Start(b, listVariable+"="+list, goodVariable+"="+good, options)
	return &site{s.World, []*harness.App{a}}
}

// must ends a reference; its log tells why the bench then fails.
func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

// The statements of a move, when a client sends them by hand.
const (
	lockPriorities = `
SELECT lock_priorities()`

	findGood = `
SELECT priority
FROM goods
WHERE id = $1
  AND project_id = 1
  AND NOT removed`

	rotateGoods = `
UPDATE goods
SET priority = CASE WHEN id = $1 THEN $2 ELSE priority + $3 END
WHERE priority BETWEEN $4 AND $5`
)

// mover moves goods by hand.
type mover struct {
	db                 *sql.DB
	lock, find, rotate *sql.Stmt
}

func newMover(db *sql.DB) (m mover, err error) {
	m.db = db
	if m.lock, err = db.Prepare(lockPriorities); err != nil {
		return m, err
	}
	if m.find, err = db.Prepare(findGood); err != nil {
		return m, err
	}
	m.rotate, err = db.Prepare(rotateGoods)
	return m, err
}

// move moves a good to another position, in five exchanges.
func (m mover) move(id, to int) error {
	tx, err := m.db.Begin()
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }() // unless it is committed
	if err := tx.Stmt(m.lock).QueryRow().Scan(new(int)); err != nil {
		return err
	}
	var from int
	if err := tx.Stmt(m.find).QueryRow(id).Scan(&from); err != nil {
		return err
	}
	step := 1
	if from < to {
		step = -1
	}
	if _, err := tx.Stmt(m.rotate).Exec(id, to, step, min(from, to), max(from, to)); err != nil {
		return err
	}
	return tx.Commit()
}

func serveReference() {
	db, err := sql.Open("postgres", os.Getenv("POSTGRES_URL"))
	must(err)
	prepare := func(name string) *sql.Stmt {
		query, err := os.ReadFile("../../sql/queries/" + name + ".sql")
		must(err)
		stmt, err := db.Prepare(string(query))
		must(err)
		return stmt
	}
	versions := prepare("list_versions")
	create := prepare("create_goods")
	edit := prepare("edit_goods")
	mover, err := newMover(db)
	must(err)
	// write runs a statement in a transaction. Its parameter is the request, with more fields.
	write := func(r *http.Request, change *sql.Stmt, fields string) {
		body, err := io.ReadAll(r.Body)
		must(err)
		tx, err := db.Begin()
		must(err)
		_, err = tx.Stmt(change).Exec(fmt.Sprintf(`[{"project_id":1,%s,%s]`, fields, body[1:]))
		must(err)
		must(tx.Commit())
	}
	list := []byte(os.Getenv(listVariable))
	good := []byte(os.Getenv(goodVariable))
	handle := func(w http.ResponseWriter, r *http.Request) {
		reply := list
		switch r.URL.Path {
		case "/bare/good":
			reply = good
		case "/goods/list":
			first, last := pq.Int64Array{1}, pq.Int64Array{10}
			var n, total, removed, bytes int
			var keys []byte
			must(versions.QueryRow(pq.Int32Array{0}, first, last).Scan(&n, &total, &removed, &bytes, &keys))
		case "/goods/create":
			write(r, create, `"description":""`)
		case "/goods/update":
			write(r, edit, `"description":null,"removed":false,"id":`+r.FormValue("id"))
		case "/goods/reprioritize":
			var id, to int
			_, err := fmt.Sscan(r.FormValue("id"), &id)
			must(err)
			_, err = fmt.Fscanf(r.Body, `{"newPriority":%d}`, &to)
			must(err)
			must(mover.move(id, to))
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(reply)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(err)
	fmt.Printf("{\"msg\":\"listening\",\"addr\":%q}\n", listener.Addr()) // as the service does
	must(http.Serve(listener, http.HandlerFunc(handle)))
}
