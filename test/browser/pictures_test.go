package browser

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"

	"goods/test/harness"
)

// shelf is what the pictures show.
var shelf = []struct{ name, description string }{
	{"Claw hammer", "500 g, ash handle"},
	{"Japanese pull saw", ""},
	{"Cordless drill", "18 V, two batteries.\nThe charger is in the left drawer."},
	{"Spirit level", "60 cm"},
	{"Wood glue", "Opened in March"},
	{"Chisel set", "6, 12, 18 and 24 mm, sharpened to 25°"},
	{"Hand plane", ""},
	{"Clamps", "Eight of them, four long and four short"},
	{"Sanding block", ""},
	{"Marking gauge", "Brass wear plates"},
	{"Dovetail jig", ""},
	{"Workbench vice", "Bolted to the front left leg"},
}

// pictures saves what the page looks like in the folder that SCREENSHOTS names.
func pictures(t *testing.T, browser context.Context) {
	w := harness.NewWorld(t)
	proxy := w.NewProxy(t, "POSTGRES_URL")
	tb := newTab(t, browser, w, "400", "404", "503")
	tb.do(chromedp.EmulateViewport(1200, 800))
	tb.visit("")
	await(tb, upServers, 4)
	tb.picture("empty")
	for _, g := range shelf {
		body, _ := json.Marshal(map[string]string{"name": g.name, "description": g.description})
		harness.Want[harness.Good](t, tb.App, 201, "POST", "/goods/create?projectId=1", string(body))
	}
	tb.other("DELETE", "remove", 5, "")
	tb.other("PATCH", "update", 3, `{"name":"Cordless drill driver"}`)
	tb.other("PATCH", "reprioritize", 3, `{"newPriority":1}`)
	tb.other("PATCH", "update", 3,
		`{"name":"Cordless drill driver","description":"18 V, two batteries.\nThe charger is in the van."}`)
	tb.other("PATCH", "reprioritize", 3, `{"newPriority":2}`)
	tb.visit("")
	tb.awaitText("#good-3 .grip", "2")
	await(tb, upServers, 4)
	tb.picture("goods")

	tb.hold(tb.middle("#good-6 .grip"), tb.middle("#good-2"))
	tb.picture("drag")
	tb.do(chromedp.MouseEvent("mouseReleased", 0, 0, chromedp.ButtonLeft))
	tb.awaitText("#said", "Chisel set is at position 3; others that made room: 3")

	tb.click("#good-3 [data-do=history]")
	await(tb, `document.querySelectorAll('aside li').length`, 5)
	tb.picture("history")
	tb.media("dark")
	tb.picture("dark")
	tb.click("#good-2 .name")
	tb.do(chromedp.WaitVisible(chromedp.CSS("#good-2 form")))
	tb.click("#close")
	tb.picture("dark-edit")
	tb.media("light")

	tb.write("#good-2 [name=name]", " ")
	tb.do(chromedp.KeyEvent(kb.Enter))
	tb.awaitText("#good-2 [name=name] + .fault", "must not be blank")
	tb.write("#create [name=name]", "Bench hook")
	tb.write("#create [name=projectId]", "77"+kb.Enter)
	tb.awaitText("#create [name=projectId] + .fault", "There is no such project.")
	tb.click("#good-1 [data-do=remove]")
	tb.do(chromedp.WaitVisible(chromedp.CSS("#good-1 form")))
	tb.picture("errors")
	tb.click("#good-1 [data-do=close]")
	tb.click("#good-2 [data-do=close]")
	tb.write("#create [name=projectId]", "1")
	proxy.Shut()
	tb.click("#create .main")
	tb.awaitText("#create .note", "The service cannot do that now. Trying again…")
	tb.awaitText("#filter .note", "The service cannot do that now. Trying again…")
	tb.picture("postgres")
	proxy.Pass()
	tb.awaitText("#create .note", "")

	tb.phone()
	tb.visit("#limit=20")
	await(tb, upServers, 4)
	tb.picture("phone")
	at := tb.middle("#good-3")
	tb.do(chromedp.TapXY(at.X+120, at.Y))
	tb.picture("phone-row")
	tb.click("#good-3 [data-do=history]")
	await(tb, `document.querySelectorAll('aside li').length > 4`, true)
	tb.picture("phone-history")

	tb.do(chromedp.EmulateViewport(1920, 1080))
	w.Exec(t, `INSERT INTO goods (project_id, name, description)
		SELECT 1, 'Screw no. ' || n, repeat('Countersunk, zinc plated. ', n % 9)
		FROM generate_series(1, 1500) AS n`)
	tb.visit("#limit=1000")
	await(tb, `list.children.length`, 1000)
	eval[any](tb, `scrollTo(0, 20000)`)
	tb.picture("thousand")
}

const upServers = `document.querySelectorAll('#servers [title=up]').length`

// media makes the system's setting "light" or "dark".
func (tb *tab) media(scheme string) {
	tb.t.Helper()
	_, err := chromedp.Call(tb.ctx, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
		Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}},
	})
	harness.Must(tb.t, err)
}

func (tb *tab) picture(name string) {
	tb.t.Helper()
	png, err := chromedp.Run(tb.ctx, chromedp.CaptureScreenshot())
	harness.Must(tb.t, err)
	harness.Must(tb.t, os.WriteFile(filepath.Join(os.Getenv("SCREENSHOTS"), name+".png"), png, 0o644))
}
