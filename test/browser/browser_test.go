// Package browser drives the page at / in a real browser, as a person does.
package browser

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/chromedp/cdproto/input"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"

	"goods/test/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

// TestPage shares one browser, as that takes longest to start.
func TestPage(t *testing.T) {
	browser := launch(t)
	tests := map[string]func(t *testing.T, browser context.Context){
		"create and edit":                createAndEdit,
		"text is text":                   textIsText,
		"drag":                           drag,
		"drag with a finger":             dragWithFinger,
		"move with the keyboard":         moveWithTheKeyboard,
		"remove":                         remove,
		"history":                        history,
		"pages":                          pages,
		"a hidden page asks nothing":     hidden,
		"others write meanwhile":         othersWrite,
		"others move what is edited":     othersMove,
		"one project":                    oneProject,
		"errors are beside their fields": errorsBesideFields,
		"without Postgres":               withoutPostgres,
		"a create whose answer was lost": lostAnswer,
		"headers":                        headers,
		"1,000 goods":                    thousand,
	}
	if os.Getenv("SCREENSHOTS") != "" {
		tests["pictures"] = pictures
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, browser)
		})
	}
}

// names returns the names in the list that the service answers.
func (tb *tab) names() (names []string) {
	tb.t.Helper()
	for _, g := range tb.List(tb.t, 1000, 1).Goods {
		names = append(names, g.Name)
	}
	return names
}

// other changes a good of project 1 as another client.
func (tb *tab) other(method, call string, id int, body string) {
	tb.t.Helper()
	harness.Want[any](tb.t, tb.App, 200, method, fmt.Sprintf("/goods/%s?id=%d&projectId=1", call, id), body)
}

// disabled tells whether a button is.
func (tb *tab) disabled(selector string) bool {
	tb.t.Helper()
	return eval[bool](tb, fmt.Sprintf(`document.querySelector(%q).disabled`, selector))
}

func createAndEdit(t *testing.T, browser context.Context) {
	tb := newTab(t, browser, harness.NewWorld(t))
	tb.visit("")
	tb.do(chromedp.SendKeys(chromedp.CSS("#create [name=name]"), "Hammer"))
	tb.do(chromedp.SendKeys(chromedp.CSS("#create [name=description]"), "500 g"))
	tb.click("#create .main")
	tb.awaitNames("Hammer")
	tb.awaitText("#good-1 .text", "500 g")
	tb.awaitText("#said", "Hammer is at the end, at position 1")
	await(tb, `document.activeElement === document.querySelector('#create [name=name]')`, true)
	tb.do(chromedp.KeyEvent("Saw" + kb.Enter))
	tb.awaitNames("Hammer", "Saw")
	tb.awaitText("#counts", "2 in all, 0 removed")

	tb.click("#good-1 .name")
	await(tb, `document.activeElement.value`, "Hammer")
	tb.write("#good-1 [name=name]", "Claw hammer")
	tb.write("#good-1 [name=description]", "ash handle")
	tb.click("#good-1 .main")
	tb.awaitNames("Claw hammer", "Saw")
	tb.awaitText("#good-1 .text", "ash handle")
	await(tb, focused, "good-1")
	harness.Equal(t, tb.List(t, 1, 1).Goods[0].Description, "ash handle", "the description")

	tb.click("#good-2 .name")
	tb.do(chromedp.WaitVisible(chromedp.CSS("#good-2 form")), chromedp.KeyEvent("x"+kb.Escape))
	tb.do(chromedp.WaitNotPresent(chromedp.CSS("#good-2 form")))
	harness.Equal(t, tb.names(), []string{"Claw hammer", "Saw"}, "after Escape")
}

func textIsText(t *testing.T, browser context.Context) {
	tb := newTab(t, browser, harness.NewWorld(t))
	const evil = `<img src=x onerror="document.title='hacked'"><script>document.title='hacked'</script>$&`
	body, _ := json.Marshal(map[string]string{"name": evil, "description": evil})
	harness.Want[harness.Good](t, tb.App, 201, "POST", "/goods/create?projectId=1", string(body))
	tb.visit("")
	tb.awaitNames(evil)
	tb.awaitText("#good-1 .text", evil)
	tb.click("#good-1 [data-do=history]")
	tb.awaitText("#whose", evil)
	tb.click("#good-1 .name")
	await(tb, `document.activeElement.value`, evil)
	harness.Equal(t, eval[string](tb, `document.title`), "Goods", "title")
	harness.Equal(t, eval[int](tb, `document.images.length`), 0, "images")
}

func drag(t *testing.T, browser context.Context) {
	tb := newTab(t, browser, harness.NewWorld(t))
	tb.Stock(t, 5)
	tb.visit("")
	tb.awaitNames("1", "2", "3", "4", "5")
	tb.drag(1, 3)
	tb.awaitNames("2", "3", "1", "4", "5")
	tb.awaitText("#said", "1 is at position 3; others that made room: 2")
	harness.Equal(t, tb.names(), []string{"2", "3", "1", "4", "5"}, "after a drag down")
	tb.drag(5, 2)
	tb.awaitNames("5", "2", "3", "1", "4")
	harness.AwaitEqual(t, patience, tb.names, []string{"5", "2", "3", "1", "4"}, "after a drag up")
	await(tb, `document.querySelector('#good-5 .grip').textContent`, "1")
}

func dragWithFinger(t *testing.T, browser context.Context) {
	tb := newTab(t, browser, harness.NewWorld(t))
	tb.Stock(t, 4)
	tb.phone()
	tb.visit("")
	tb.awaitNames("1", "2", "3", "4")
	row := tb.middle("#good-3")
	tb.do(chromedp.TapXY(row.X+100, row.Y)) // beside the name: shows what can be done
	tb.click("#good-3 [data-do=up]")
	tb.awaitNames("1", "3", "2", "4")
	tb.awaitText("#good-3 .grip", "2")

	from, to := tb.middle("#good-4 .grip"), tb.middle("#good-2")
	touch := func(kind input.DispatchTouchEventType, points ...*input.TouchPoint) {
		t.Helper()
		event := input.DispatchTouchEventParams{Type: kind, TouchPoints: points}
		_, err := chromedp.Call(tb.ctx, input.DispatchTouchEvent, event)
		harness.Must(t, err)
	}
	touch(input.DispatchTouchEventTypeTouchStart, &input.TouchPoint{X: from.X, Y: from.Y})
	const steps = 8
	for i := range steps + 1 {
		y := from.Y + (to.Y-from.Y)*float64(i)/steps
		touch(input.DispatchTouchEventTypeTouchMove, &input.TouchPoint{X: from.X, Y: y})
	}
	touch(input.DispatchTouchEventTypeTouchEnd)
	tb.awaitNames("1", "3", "4", "2")
	harness.AwaitEqual(t, patience, tb.names, []string{"1", "3", "4", "2"}, "after a drag")
}

func moveWithTheKeyboard(t *testing.T, browser context.Context) {
	tb := newTab(t, browser, harness.NewWorld(t))
	tb.Stock(t, 12)
	tb.visit("#limit=10")
	tb.awaitText("#good-2 .name", "2")
	tb.do(chromedp.Focus(chromedp.CSS("#good-2 .name")))
	tb.alt(kb.ArrowUp)
	tb.awaitText("#good-2 .grip", "1")
	await(tb, focused, "good-2")
	tb.alt(kb.ArrowUp) // is at the top
	tb.alt(kb.ArrowDown)
	tb.alt(kb.ArrowDown)
	tb.awaitText("#good-2 .grip", "3")
	await(tb, focused, "good-2")
	harness.Equal(t, tb.names()[:4], []string{"1", "3", "2", "4"}, "after three moves")

	tb.do(chromedp.Focus(chromedp.CSS("#good-10 [data-do=down]")))
	tb.do(chromedp.KeyEvent(kb.Enter)) // to the next page
	tb.awaitText("#good-10 .grip", "11")
	tb.awaitText("#range", "11–12 of 12")
	await(tb, `document.activeElement.ariaLabel`, "Move down (Alt+↓): 10")
	await(tb, focused, "good-10")
	tb.do(chromedp.KeyEvent(kb.Enter))
	tb.awaitText("#good-10 .grip", "12")
	harness.Equal(t, tb.names()[8:], []string{"9", "11", "12", "10"}, "after moves over pages")
}

func remove(t *testing.T, browser context.Context) {
	tb := newTab(t, browser, harness.NewWorld(t))
	tb.Stock(t, 2)
	tb.visit("")
	tb.click("#good-1 [data-do=remove]")
	tb.click("#good-1 form [data-do=close]")
	tb.do(chromedp.WaitNotPresent(chromedp.CSS("#good-1 form")))
	harness.Equal(t, tb.List(t, 1, 1).Meta.Removed, 0, "removed after No")
	tb.click("#good-1 [data-do=remove]")
	tb.click("#good-1 form .main")
	tb.awaitText("#good-1 small", "project 1, removed")
	tb.awaitText("#counts", "2 in all, 1 removed")
	tb.awaitNames("1", "2")
	await(tb, `document.querySelector('#good-1 .name').disabled`, true)
	harness.Equal(t, tb.List(t, 1, 1).Goods[0].Removed, true, "removed")
}

func history(t *testing.T, browser context.Context) {
	tb := newTab(t, browser, harness.NewWorld(t))
	tb.Stock(t, 3)
	tb.other("PATCH", "update", 2, `{"name":"B","description":"d"}`)
	tb.other("PATCH", "reprioritize", 2, `{"newPriority":1}`)
	tb.visit("")
	tb.click("#good-2 [data-do=history]")
	await(tb, `[...document.querySelectorAll('aside li')].map(item => item.firstChild.data)`,
		[]string{"position: 2 → 1\n", "name: 2 → B\n", "name: 2\n"})
	tb.other("DELETE", "remove", 2, "")
	await(tb, `document.querySelector('aside li').firstChild.data`, "removed\n")
	tb.click("#close")
	await(tb, `document.querySelector('aside').hidden`, true)
}

func pages(t *testing.T, browser context.Context) {
	tb := newTab(t, browser, harness.NewWorld(t))
	tb.world.Exec(t, `INSERT INTO goods (project_id, name) SELECT 1, n FROM generate_series(1, 25) AS n`)
	tb.visit("#limit=10")
	tb.awaitText("#range", "1–10 of 25")
	harness.Equal(t, tb.disabled("#previous"), true, "previous is disabled")
	tb.click("#next")
	tb.awaitText("#range", "11–20 of 25")
	tb.click("#last")
	tb.awaitText("#range", "21–25 of 25")
	tb.awaitNames("21", "22", "23", "24", "25")
	harness.Equal(t, tb.disabled("#next"), true, "next is disabled")
	tb.click("#previous")
	tb.awaitText("#range", "11–20 of 25")
	tb.do(chromedp.NavigateBack())
	tb.awaitText("#range", "21–25 of 25")
	tb.do(chromedp.Focus(chromedp.CSS("#limit")), chromedp.KeyEvent("2")) // the option that begins so: 20
	tb.awaitText("#range", "1–20 of 25")
	tb.visit("#limit=20&offset=1000") // past the end
	tb.awaitText("#range", "21–25 of 25")
}

func hidden(t *testing.T, browser context.Context) {
	tb := newTab(t, browser, harness.NewWorld(t))
	tb.visit("")
	const hide = `Object.defineProperty(document, 'hidden', { value: %t, configurable: true }); ` +
		`document.dispatchEvent(new Event('visibilitychange'))`
	eval[any](tb, fmt.Sprintf(hide, true))
	tb.Create(t, "1")
	<-time.After(4 * time.Second) // longer than the page waits between two requests
	harness.Equal(t, eval[int](tb, `list.children.length`), 0, "goods that a hidden page shows")
	eval[any](tb, fmt.Sprintf(hide, false))
	tb.awaitNames("1")
}

// othersWrite also checks that what is edited stays, and that nobody overwrites unseen what others wrote.
func othersWrite(t *testing.T, browser context.Context) {
	tb := newTab(t, browser, harness.NewWorld(t), "412")
	tb.Stock(t, 2)
	tb.visit("")
	tb.click("#good-1 .name")
	await(tb, `document.activeElement.value`, "1")
	tb.write("#good-1 [name=name]", "mine")
	tb.Create(t, "3")
	tb.other("PATCH", "update", 1, `{"name":"theirs"}`)
	tb.other("PATCH", "reprioritize", 1, `{"newPriority":3}`)
	tb.awaitNames("2", "3", "theirs")
	await(tb, `document.activeElement.value`, "mine")
	await(tb, focused, "good-1")
	tb.click("#good-1 .main")
	tb.awaitText("#good-1 form .note", "Changed meanwhile; once more overwrites that.\nIt is now “theirs”. ")
	harness.Equal(t, tb.names(), []string{"2", "3", "theirs"}, "not overwritten")
	tb.click("#good-1 .main")
	tb.awaitNames("2", "3", "mine")
}

func othersMove(t *testing.T, browser context.Context) {
	tb := newTab(t, browser, harness.NewWorld(t), "412")
	tb.Stock(t, 12)
	tb.visit("#limit=10")
	tb.click("#good-1 .name")
	await(tb, `document.activeElement.value`, "1")
	tb.write("#good-1 [name=name]", "mine")
	tb.other("PATCH", "reprioritize", 1, `{"newPriority":12}`) // off the page
	await(tb, `document.querySelector('#list > li').id`, "good-2")
	await(tb, `document.activeElement.value`, "mine")
	tb.do(chromedp.KeyEvent(kb.Enter))
	await(tb, `document.querySelector('#good-1')`, any(nil))
	harness.Equal(t, tb.names()[11], "mine", "the name")
}

func oneProject(t *testing.T, browser context.Context) {
	w := harness.NewWorld(t)
	tb := newTab(t, browser, w, "404")
	w.Exec(t, `INSERT INTO campaigns (name) VALUES ('second')`)
	w.Exec(t, `INSERT INTO goods (project_id, name) SELECT 1 + n % 2, n FROM generate_series(1, 9) AS n`)
	tb.visit("")
	tb.write("#filter input", "2"+kb.Enter)
	tb.awaitNames("1", "3", "5", "7", "9")
	tb.awaitText("#counts", "5 in all, 0 removed")
	tb.awaitText("#good-3 small", "3 of all")
	harness.Equal(t, eval[string](tb, `create.elements.projectId.value`), "2", "the project of new goods")
	tb.do(chromedp.Focus(chromedp.CSS("#good-7 .name")))
	tb.alt(kb.ArrowUp)
	tb.awaitNames("1", "3", "7", "5", "9")
	tb.alt(kb.ArrowDown)
	tb.awaitNames("1", "3", "5", "7", "9")
	tb.drag(1, 5)
	tb.awaitNames("3", "5", "1", "7", "9")
	await(tb, focused, "good-1")
	whole := []string{"2", "3", "4", "5", "1", "7", "6", "8", "9"}
	harness.AwaitEqual(t, patience, tb.names, whole, "the whole list")
	tb.visit("#project=77")
	tb.awaitText("#filter .fault", "There is no such project.")
	await(tb, `list.children.length`, 0)
}

func errorsBesideFields(t *testing.T, browser context.Context) {
	tb := newTab(t, browser, harness.NewWorld(t), "400", "404")
	tb.Stock(t, 3)
	tb.visit("")
	tb.click("#create .main")
	tb.awaitText("#create [name=name] + .fault", "must not be blank")
	await(tb, `document.querySelector('#create [name=name]').ariaInvalid`, "true")
	tb.write("#create [name=projectId]", "77")
	tb.do(chromedp.SendKeys(chromedp.CSS("#create [name=name]"), "x"+kb.Enter))
	tb.awaitText("#create [name=projectId] + .fault", "There is no such project.")
	tb.awaitText("#create [name=name] + .fault", "")
	tb.write("#create [name=projectId]", "1")
	tb.click("#create .main")
	tb.awaitNames("1", "2", "3", "x")
	tb.awaitText("#create [name=projectId] + .fault", "")

	tb.click("#good-1 .name")
	await(tb, `document.activeElement.value`, "1")
	eval[any](tb, `document.activeElement.value = 'x'.repeat(256)`)
	tb.click("#good-1 .main")
	tb.awaitText("#good-1 [name=name] + .fault", "must have at most 255 characters")
	tb.click("#good-2 .name")
	tb.do(chromedp.WaitVisible(chromedp.CSS("#good-2 form")))
	tb.other("DELETE", "remove", 2, "")
	tb.click("#good-2 .main")
	await(tb, `document.querySelector('#good-2 form .note').textContent.split('\n')[0]`,
		"It is removed, or not in this project.")
}

func withoutPostgres(t *testing.T, browser context.Context) {
	w := harness.NewWorld(t)
	proxy := w.NewProxy(t, "POSTGRES_URL")
	tb := newTab(t, browser, w, "503")
	tb.Stock(t, 1)
	tb.visit("")
	tb.awaitNames("1")
	proxy.Shut()
	tb.write("#create [name=name]", "2"+kb.Enter)
	tb.awaitText("#create .note", "The service cannot do that now. Trying again…")
	tb.awaitText("#filter .note", "The service cannot do that now. Trying again…")
	tb.awaitText("#servers [title=down]", "Postgres")
	proxy.Pass()
	tb.awaitNames("1", "2")
	tb.awaitText("#create .note", "")
	tb.awaitText("#filter .note", "")
	await(tb, `document.querySelectorAll('#servers [title=up]').length`, 4)
	harness.Equal(t, tb.names(), []string{"1", "2"}, "the list")
}

// lostAnswer ends the connection after the service has made a good, before the browser has its answer, and
// then has the browser get an error, after which the person tries again.
func lostAnswer(t *testing.T, browser context.Context) {
	tb := newTab(t, browser, harness.NewWorld(t), "ERR_", "500")
	target, err := url.Parse(tb.URL)
	harness.Must(t, err)
	var creates atomic.Int32
	proxy := httputil.NewSingleHostReverseProxy(target)
	proxy.ModifyResponse = func(r *http.Response) error {
		if r.Request.Method != http.MethodPost {
			return nil
		}
		switch creates.Add(1) {
		case 1, 2:
			_, _ = io.Copy(io.Discard, r.Body)
			panic(http.ErrAbortHandler)
		case 3:
			r.StatusCode = http.StatusInternalServerError
			const failure = `{"code":1,"message":"errors.internal","details":{}}`
			r.Body = io.NopCloser(strings.NewReader(failure))
			r.Header.Del("Content-Length")
			r.ContentLength = int64(len(failure))
		}
		return nil
	}
	front := httptest.NewServer(proxy)
	t.Cleanup(front.Close)
	tb.URL = front.URL
	tb.visit("")
	tb.write("#create [name=name]", "one"+kb.Enter)
	tb.awaitText("#create .note", "The service failed; its log says why. Please try once more.")
	tb.click("#create .main")
	tb.awaitNames("one")
	await(tb, `document.querySelector('#create [name=name]').value`, "")
	harness.Equal(t, tb.names(), []string{"one"}, "the list")
	harness.Equal(t, int(creates.Load()), 4, "creates that were sent")
	tb.write("#create [name=name]", "one"+kb.Enter) // after an answer, another good
	tb.awaitNames("one", "one")
}

func headers(t *testing.T, browser context.Context) {
	tb := newTab(t, browser, harness.NewWorld(t))
	tb.visit("")
	reply, err := harness.Client.Get(tb.URL + "/")
	harness.Must(t, err)
	defer reply.Body.Close()
	policy := reply.Header.Get("Content-Security-Policy")
	for _, part := range []string{
		"default-src 'none'", "script-src 'sha256-", "style-src 'sha256-", "connect-src 'self'",
		"base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
	} {
		if !strings.Contains(policy, part) {
			t.Errorf("Content-Security-Policy: got %s, want %s", policy, part)
		}
	}
	for name, want := range map[string]string{
		"Content-Type": "text/html; charset=utf-8", "X-Content-Type-Options": "nosniff",
		"Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
	} {
		harness.Equal(t, reply.Header.Get(name), want, "%s", name)
	}
	text, err := io.ReadAll(reply.Body)
	harness.Must(t, err)
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	if len(lines) >= 300 {
		t.Errorf("the page has %d lines, want fewer than 300", len(lines))
	}
}

func thousand(t *testing.T, browser context.Context) {
	tb := newTab(t, browser, harness.NewWorld(t))
	tb.world.Exec(t, `INSERT INTO goods (project_id, name, description)
		SELECT 1, 'Good number ' || n, repeat('text ', n % 40) FROM generate_series(1, 1000) AS n`)
	tb.visit("#limit=1000")
	await(tb, `document.querySelectorAll('#list > li').length`, 1000)
	first := tb.cpu("list.replaceChildren(); render(); list.offsetHeight")
	again := tb.cpu("render(); list.offsetHeight")
	t.Logf("1,000 goods are shown in %v, and again in %v", first, again)
	if first > time.Second || again > 200*time.Millisecond {
		t.Errorf("1,000 goods took %v and %v, want at most 1s and 200ms", first, again)
	}
	tb.do(chromedp.Focus(chromedp.CSS("#good-500 .name")))
	tb.alt(kb.ArrowDown)
	tb.awaitText("#good-500 .grip", "501")
	await(tb, focused, "good-500")
}
