package browser

import (
	"context"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/input"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/performance"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"

	"goods/test/harness"
)

// patience limits how long the page may take to show something, on a busy machine.
const patience = 20 * time.Second

// tab is a tab of the browser, with a service and a world of its own.
type tab struct {
	*harness.App
	world *harness.World
	t     *testing.T
	ctx   context.Context

	mu       sync.Mutex // guards what follows
	messages []string   // in the browser's console
	requests []string   // the URLs that the browser has asked for
}

// launch starts a browser, which ends with the test.
func launch(t *testing.T) context.Context {
	t.Helper()
	options := []chromedp.ExecAllocatorOption{
		chromedp.ExecPath("chromium"),
		chromedp.Headless,
		chromedp.NoSandbox,
		chromedp.DisableGPU,
		chromedp.NoFirstRun,
		chromedp.WindowSize(1280, 900),
	}
	for _, name := range []string{
		"disable-quic", "disable-background-networking", "disable-component-update", "disable-sync",
	} {
		options = append(options, chromedp.Flag(name, true))
	}
	allocator, stop := chromedp.NewExecAllocator(context.Background(), options...)
	t.Cleanup(stop)
	browser, end := chromedp.NewContext(allocator)
	t.Cleanup(end)
	if err := chromedp.Do(browser); err != nil {
		t.Fatalf("start chromium: %v; scripts/servers.sh install chromium installs it", err)
	}
	return browser
}

// newTab opens a tab that shows nothing yet. When the test ends, the browser must have asked no other host,
// and its console must have nothing but what is expected, such as "503".
func newTab(t *testing.T, browser context.Context, w *harness.World, expected ...string) *tab {
	t.Helper()
	tb := &tab{App: w.Start(t), world: w, t: t}
	ctx, end := chromedp.NewContext(browser, chromedp.WithNewBrowserContext())
	t.Cleanup(end)
	tb.ctx = ctx
	harness.Must(t, chromedp.Do(ctx))
	harness.Must(t, chromedp.Listen(ctx, tb.record))
	t.Cleanup(func() { tb.inspect(expected) })
	return tb
}

func (tb *tab) record(event any) {
	tb.mu.Lock()
	defer tb.mu.Unlock()
	switch e := event.(type) {
	case *runtime.EventExceptionThrown:
		details := e.ExceptionDetails
		tb.messages = append(tb.messages, fmt.Sprintf("%s %+v", details.Text, details.Exception))
	case *runtime.EventConsoleAPICalled:
		tb.messages = append(tb.messages, fmt.Sprint("console.", e.Type))
	case *log.EventEntryAdded:
		tb.messages = append(tb.messages, e.Entry.Text)
	case *network.EventRequestWillBeSent:
		tb.requests = append(tb.requests, e.Request.URL)
	}
}

func (tb *tab) inspect(expected []string) {
	tb.mu.Lock()
	defer tb.mu.Unlock()
	for _, message := range tb.messages {
		if !slices.ContainsFunc(expected, func(part string) bool { return strings.Contains(message, part) }) {
			tb.t.Errorf("in the browser's console: %s", message)
		}
	}
	for _, address := range tb.requests {
		u, err := url.Parse(address)
		if err != nil || u.Hostname() != "127.0.0.1" && u.Scheme != "data" {
			tb.t.Errorf("the browser asked for %s", address)
		}
	}
	if len(tb.requests) == 0 {
		tb.t.Error("no request was recorded")
	}
}

// do does something in the tab.
func (tb *tab) do(actions ...chromedp.Action[chromedp.Void]) {
	tb.t.Helper()
	ctx, cancel := context.WithTimeout(tb.ctx, patience)
	defer cancel()
	harness.Must(tb.t, chromedp.Do(ctx, actions...))
}

// phone makes the window that of a phone.
func (tb *tab) phone() {
	tb.t.Helper()
	options := []chromedp.EmulateViewportOption{
		chromedp.EmulateMobile, chromedp.EmulateTouch, chromedp.EmulatePortrait,
	}
	tb.do(chromedp.EmulateViewport(390, 844, options...))
}

// visit shows the page with this fragment in its address, and waits for its first list.
func (tb *tab) visit(fragment string) {
	tb.t.Helper()
	tb.do(chromedp.Navigate(tb.URL + "/" + fragment))
	await(tb, `document.querySelector('#range').textContent !== ''`, true)
}

func (tb *tab) click(selector string) {
	tb.t.Helper()
	tb.do(chromedp.Click(chromedp.CSS(selector), chromedp.NodeVisible))
}

// write replaces what a field holds.
func (tb *tab) write(selector, text string) {
	tb.t.Helper()
	tb.do(chromedp.Focus(chromedp.CSS(selector)))
	eval[any](tb, fmt.Sprintf(`document.querySelector(%q).select()`, selector))
	tb.do(chromedp.KeyEvent(text))
}

// alt presses a key together with Alt, where the focus is.
func (tb *tab) alt(key string) {
	tb.t.Helper()
	tb.do(chromedp.KeyEvent(key, chromedp.KeyModifiers(kb.ModifierAlt)))
}

// box is where an element is in the window: its middle.
type box struct{ X, Y float64 }

func (tb *tab) middle(selector string) box {
	tb.t.Helper()
	const script = `(r => ({ X: r.x + r.width / 2, Y: r.y + r.height / 2 }))` +
		`(document.querySelector(%q).getBoundingClientRect())`
	return eval[box](tb, fmt.Sprintf(script, selector))
}

// drag drags a good by its grip to the middle of another.
func (tb *tab) drag(id, target int) {
	tb.t.Helper()
	from, to := tb.middle(fmt.Sprintf("#good-%d .grip", id)), tb.middle(fmt.Sprintf("#good-%d", target))
	tb.hold(from, to)
	tb.do(chromedp.MouseEvent(input.DispatchMouseEventTypeMouseReleased, from.X, to.Y, chromedp.ButtonLeft))
}

// hold drags without letting go.
func (tb *tab) hold(from, to box) {
	tb.t.Helper()
	tb.do(chromedp.MouseEvent(input.DispatchMouseEventTypeMousePressed, from.X, from.Y, chromedp.ButtonLeft))
	const steps = 8
	for i := range steps + 1 {
		y := from.Y + (to.Y-from.Y)*float64(i)/steps
		tb.do(chromedp.MouseEvent(input.DispatchMouseEventTypeMouseMoved, from.X, y, chromedp.ButtonLeft))
	}
}

// eval returns the value of an expression of JavaScript.
func eval[T any](tb *tab, expression string) T {
	tb.t.Helper()
	ctx, cancel := context.WithTimeout(tb.ctx, patience)
	defer cancel()
	v, err := chromedp.Run(ctx, chromedp.Evaluate[T](expression))
	if err != nil {
		tb.t.Fatalf("%s: %v", expression, err)
	}
	return v
}

// cpu runs a script and returns the processor time that the page's thread took meanwhile, which depends
// less on other work on the machine than time does.
func (tb *tab) cpu(script string) time.Duration {
	tb.t.Helper()
	params := performance.EnableParams{TimeDomain: performance.EnableTimeDomainThreadTicks}
	_, err := chromedp.Call(tb.ctx, performance.Enable, params)
	harness.Must(tb.t, err)
	busy := func() time.Duration {
		result, err := chromedp.Call(tb.ctx, performance.GetMetrics, cdp.Empty{})
		harness.Must(tb.t, err)
		for _, m := range result.Metrics {
			if m.Name == "TaskDuration" {
				return time.Duration(m.Value * float64(time.Second))
			}
		}
		tb.t.Fatal("the browser has no TaskDuration")
		return 0
	}
	before := busy()
	eval[any](tb, script)
	return busy() - before
}

// await waits until an expression of JavaScript has this value.
func await[T any](tb *tab, expression string, want T) {
	tb.t.Helper()
	harness.AwaitEqual(tb.t, patience, func() T { return eval[T](tb, expression) }, want, "%s", expression)
}

// awaitText waits until an element has this text.
func (tb *tab) awaitText(selector, want string) {
	tb.t.Helper()
	await(tb, fmt.Sprintf(`document.querySelector(%q)?.textContent ?? ''`, selector), want)
}

// awaitNames waits until the list shows these names, in this order.
func (tb *tab) awaitNames(want ...string) {
	tb.t.Helper()
	await(tb, `[...document.querySelectorAll('#list .name')].map(name => name.textContent)`, want)
}

// focused is the row that has the focus.
const focused = `document.activeElement.closest('#list > li')?.id ?? ''`
