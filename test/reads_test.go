package test

import (
	"bufio"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"goods/test/harness"
)

// get returns a good of project 1, and its ETag.
func get(t testing.TB, a *harness.App, id int) (g harness.Good, etag string) {
	t.Helper()
	path := "/goods/get" + target(id)
	g = harness.Want[harness.Good](t, a, 200, "GET", path, "")
	head := a.Call(t, "HEAD", path, "")
	etag = head.Header.Get("ETag")
	harness.Equal(t, fmt.Sprint(head.Status, head.Body), "200", "HEAD %s", path)
	return g, etag
}

// A get shows what the last write answered, whatever that was.
func TestGet(t *testing.T) {
	w, a := started(t)
	replicas := []*harness.App{a, w.Start(t)}
	made := harness.Want[harness.Good](t, a, 201, "POST", create, `{"name":"a <b> & é","description":"d"}`)
	a.Stock(t, 1)
	check := func(want harness.Good, version int, after string) {
		t.Helper()
		for _, replica := range replicas {
			got, etag := get(t, replica, want.ID)
			harness.Equal(t, got, want, "get after %s", after)
			harness.Equal(t, etag, fmt.Sprintf("%q", fmt.Sprint(version)), "ETag after %s", after)
		}
	}
	check(made, 1, "create")
	made.Name = "b"
	updated := harness.Want[harness.Good](t, a, 200, "PATCH", "/goods/update"+target(1), `{"name":"b"}`)
	harness.Equal(t, updated, made, "update")
	check(made, 2, "update")
	ok(t, a, "PATCH", "/goods/reprioritize"+target(1), `{"newPriority":2}`)
	made.Priority = 2
	check(made, 3, "its move")
	ok(t, a, "PATCH", "/goods/reprioritize"+target(2), `{"newPriority":2}`)
	made.Priority = 1
	check(made, 4, "the move of another")
	ok(t, a, "DELETE", "/goods/remove"+target(1), "")
	made.Removed = true
	check(made, 5, "its removal")
	// A client may also write by hand, and gets are batched.
	w.Exec(t, `UPDATE goods SET name = 'c' WHERE id = 1`)
	made.Name = "c"
	harness.Together(30, func(i int) {
		if i%3 == 0 {
			refused(t, a, 3, "GET", "/goods/get"+target(3), "")
			return
		}
		check(made, 6, "a write by hand")
	})
	w.Settled(t, 15*time.Second)
}

// projectPage returns one page of the list of a project.
func projectPage(t testing.TB, a *harness.App, project, limit, offset int) harness.ListReply {
	t.Helper()
	path := fmt.Sprintf("/goods/list?projectId=%d&limit=%d&offset=%d", project, limit, offset)
	return harness.Want[harness.ListReply](t, a, 200, "GET", path, "")
}

// The list of a project is the list of all goods without those of other projects.
func TestProjectList(t *testing.T) {
	w, a := started(t)
	const projects, goods = 3, 60
	w.Exec(t, `INSERT INTO campaigns (name) VALUES ('second'), ('third'), ('empty')`)
	w.Exec(t, fmt.Sprintf(`
INSERT INTO goods (project_id, name)
SELECT 1 + n %% %d, n::text
FROM generate_series(1, %d) AS n`, projects, goods))
	check := func(when string) {
		t.Helper()
		all := a.List(t, 1000, 1).Goods
		for project := 1; project <= projects+1; project++ {
			own := slices.Clone(all)
			own = slices.DeleteFunc(own, func(g harness.Good) bool { return g.ProjectID != project })
			removed := 0
			for _, g := range own {
				if g.Removed {
					removed++
				}
			}
			pages := [][2]int{
				{1000, 1}, {10, 1}, {7, 8}, {1, len(own)}, {10, len(own) + 1}, {1000, math.MaxInt32}, {20, 20},
			}
			for _, page := range pages {
				limit, offset := page[0], max(page[1], 1)
				got := projectPage(t, a, project, limit, offset)
				first := min(offset-1, len(own))
				last := min(first+limit, len(own))
				want := harness.ListReply{Goods: slices.Clone(own[first:last])}
				want.Meta.Total, want.Meta.Removed = len(own), removed
				want.Meta.Limit, want.Meta.Offset = limit, offset
				if len(want.Goods) == 0 {
					want.Goods = []harness.Good{} // not null
				}
				harness.Equal(t, got, want, "project %d, %d goods from %d, %s", project, limit, offset, when)
			}
		}
	}
	check("new")
	check("cached")
	ok(t, a, "DELETE", "/goods/remove?id=2&projectId=3", "")
	ok(t, a, "DELETE", "/goods/remove?id=3&projectId=1", "")
	check("after removals")
	ok(t, a, "PATCH", "/goods/reprioritize?id=60&projectId=1", somePlace)
	ok(t, a, "PATCH", "/goods/reprioritize?id=1&projectId=2", `{"newPriority":30}`)
	check("after moves")
	w.Exec(t, `UPDATE goods SET project_id = 4 WHERE id IN (4, 6)`)
	check("after goods were given to another project by hand")
	// One list waits for this lock, and the others form a batch.
	tx := w.Hold(t, `LOCK TABLE project_meta IN ACCESS EXCLUSIVE MODE`)
	time.AfterFunc(200*time.Millisecond, func() { _ = tx.Rollback() })
	harness.Together(8, func(i int) {
		if i < 6 {
			check("in a batch")
			return
		}
		refused(t, a, 4, "GET", "/goods/list?projectId=5", "")
	})

	// A project needs no restart.
	w.Exec(t, `INSERT INTO campaigns (name) VALUES ('new')`)
	harness.Equal(t, projectPage(t, a, 5, 10, 1).Meta.Total, 0, "goods of a new project")
	harness.Want[harness.Good](t, a, 201, "POST", "/goods/create?projectId=5", someName)
	harness.Equal(t, len(projectPage(t, a, 5, 10, 1).Goods), 1, "goods of a new project after a create")
	w.Settled(t, 15*time.Second)
}

// When goods move between two pages, each page is right at its own moment, and the pages of a project see
// nothing of the moves of others' goods.
func TestMovesBetweenPages(t *testing.T) {
	w, a := started(t)
	w.Exec(t, `INSERT INTO campaigns (name) VALUES ('second')`)
	w.Exec(t, `
INSERT INTO goods (project_id, name)
SELECT 1 + n % 2, n::text
FROM generate_series(1, 20) AS n`) // project 1 has the even ones
	ids := func(page harness.ListReply) (ids []int) {
		for _, g := range page.Goods {
			ids = append(ids, g.ID)
		}
		return ids
	}
	harness.Equal(t, ids(projectPage(t, a, 1, 4, 1)), []int{2, 4, 6, 8}, "the first page")
	ok(t, a, "PATCH", "/goods/reprioritize?id=19&projectId=2", somePlace)
	harness.Equal(t, ids(projectPage(t, a, 1, 4, 5)), []int{10, 12, 14, 16}, "the second page")
	ok(t, a, "PATCH", "/goods/reprioritize"+target(20), somePlace)
	harness.Equal(t, ids(projectPage(t, a, 1, 4, 9)), []int{16, 18}, "the third page, after a move of 20")
	ok(t, a, "PATCH", "/goods/reprioritize"+target(20), `{"newPriority":20}`)
	harness.Equal(t, ids(projectPage(t, a, 1, 4, 9)), []int{18, 20}, "the third page, after its move back")

	// As openapi.yaml says, to move a good before another one of its list: that one's priority on the way up,
	// one less on the way down.
	move := func(id, before int) {
		t.Helper()
		good, _ := get(t, a, id)
		other, _ := get(t, a, before)
		to := other.Priority
		if good.Priority < to {
			to--
		}
		ok(t, a, "PATCH", "/goods/reprioritize"+target(id), fmt.Sprintf(`{"newPriority":%d}`, to))
	}
	move(14, 4)
	order := []int{2, 14, 4, 6, 8, 10, 12, 16, 18, 20}
	harness.Equal(t, ids(projectPage(t, a, 1, 10, 1)), order, "14 moved up before 4")
	move(2, 12)
	order = []int{14, 4, 6, 8, 10, 2, 12, 16, 18, 20}
	harness.Equal(t, ids(projectPage(t, a, 1, 10, 1)), order, "2 moved down before 12")
	w.Settled(t, 15*time.Second)
}

// A reply that is not read for 30 seconds is cut off. One that is read slowly, but in time, is whole, and its
// client is not taken for one that went away.
func TestUnreadReply(t *testing.T) {
	w, a := started(t, nowhere)
	w.Exec(t, `
INSERT INTO goods (project_id, name, description)
SELECT 1, n::text, repeat('日', 10000)
FROM generate_series(1, 100) AS n`)
	readAfter := func(wait time.Duration) (got, want int64, err error) {
		conn, err := net.Dial("tcp", a.Host())
		harness.Must(t, err)
		defer conn.Close()
		harness.Must(t, conn.(*net.TCPConn).SetReadBuffer(64<<10)) // or the kernel would take all of it
		_, err = io.WriteString(conn, "GET /goods/list?limit=100 HTTP/1.1\r\nHost: goods\r\n\r\n")
		harness.Must(t, err)
		<-time.After(wait)
		harness.Must(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
		response, err := http.ReadResponse(bufio.NewReader(conn), nil)
		harness.Must(t, err)
		got, err = io.Copy(io.Discard, response.Body)
		return got, response.ContentLength, err
	}
	var running sync.WaitGroup
	running.Go(func() {
		read, all, err := readAfter(31 * time.Second)
		if err == nil || read >= all || all < 3e6 {
			t.Errorf("after 31 seconds: got %d of %d bytes, %v, want fewer and an error", read, all, err)
		}
	})
	read, all, err := readAfter(15 * time.Second)
	if err != nil || read != all {
		t.Errorf("after 15 seconds: got %d of %d bytes, %v, want all", read, all, err)
	}
	served := func() float64 { return value(t, a, "goods_http_request_duration_seconds", `value:"/goods/list"`) }
	harness.AwaitEqual(t, 5*time.Second, served, 1, "lists that were served")
	harness.Equal(t, value(t, a, "goods_http_requests_total", `value:"499"`), 0.0, "clients that went away")
	running.Wait()
	harness.Equal(t, len(a.List(t, 100, 1).Goods), 100, "goods on a page that is read")
}
