package test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"goods/test/harness"
)

const keyHeader = "Idempotency-Key: "

func TestKeyMakesOneGood(t *testing.T) {
	w, a := started(t)
	w.Exec(t, `INSERT INTO campaigns (name) VALUES ('second')`)
	a.Stock(t, 1)
	const body, key = `{"name":"a","description":"d"}`, keyHeader + "order 66 ~!"
	want := harness.Want[harness.Good](t, a, 201, "POST", create, body, key)
	again := func() {
		t.Helper()
		harness.Equal(t, harness.Want[harness.Good](t, a, 200, "POST", create, body, key), want, "repeated")
	}
	again()
	want = harness.Want[harness.Good](t, a, 200, "PATCH", "/goods/update"+target(2), `{"name":"b"}`)
	again()
	ok(t, a, "PATCH", "/goods/reprioritize"+target(2), somePlace)
	want.Priority = 1
	again()
	ok(t, a, "DELETE", "/goods/remove"+target(2), "")
	want.Removed = true
	again()
	for _, other := range []string{
		`{"name":"b","description":"d"}`, `{"name":"a","description":"e"}`, `{"name":"a"}`, `{"name":"ad"}`,
	} {
		refused(t, a, 9, "POST", create, other, key)
	}
	again()
	// Other keys, and other projects, make other goods.
	for key, path := range map[string]string{
		keyHeader + strings.Repeat("k", 255): create,
		keyHeader + "Order 66 ~!":            create,
		key:                                  "/goods/create?projectId=2",
	} {
		made := harness.Want[harness.Good](t, a, 201, "POST", path, body, key)
		again := harness.Want[harness.Good](t, a, 200, "POST", path, body, key)
		harness.Equal(t, again, made, "repeated with %.40s", key)
	}
	// A request that failed does not use its key up.
	refused(t, a, 4, "POST", "/goods/create?projectId=3", body, key)
	w.Exec(t, `INSERT INTO campaigns (name) VALUES ('third')`)
	harness.Want[harness.Good](t, a, 201, "POST", "/goods/create?projectId=3", body, key)
	harness.Equal(t, w.Settled(t, 15*time.Second), 6+4, "events") // six creates, and the move renumbered two
}

// Two replicas get the same keys at the same time, several in a batch.
func TestKeysThatMeet(t *testing.T) {
	w, a := started(t, "EVENTS_BATCH=50")
	replicas := []*harness.App{a, w.Start(t, "EVENTS_BATCH=50")}
	a.Stock(t, 1)
	harness.Together(32, func(i int) {
		for n := range 20 {
			key := fmt.Sprint(i/2, n)
			if r := replicas[i%2].Call(t, "POST", create, `{"name":"`+key+`"}`, keyHeader+key); r.Status > 201 {
				t.Errorf("key %s: got %d %s", key, r.Status, r.Body)
			}
		}
	})
	harness.Equal(t, a.List(t, 1, 1).Meta.Total, 1+16*20, "goods")
	w.Settled(t, 15*time.Second)
}

// The connection breaks at the COMMIT of a write: before Postgres has it, or before the service hears of
// it. The client gets 503 and the service does not repeat it; the client may.
func TestCommitOfUnknownOutcome(t *testing.T) {
	t.Parallel()
	for sent, delivered := range []bool{false, true} {
		for _, call := range calls[:4] {
			t.Run(fmt.Sprint(call.path[7:13], " delivered ", delivered), func(t *testing.T) {
				t.Parallel()
				w := harness.NewWorld(t)
				p := w.NewProxy(t, "POSTGRES_URL")
				// Without NATS the relay is quiet: only requests commit.
				a := w.Start(t, "NATS_URL=nats://127.0.0.1:1")
				makeGoods(t, w, 3)
				// The call has its connections, and its time is for its COMMIT, on a busy machine as well.
				insist(t, a, call.method, strings.Replace(call.path, target(1), target(2), 1), call.body)
				list := func() harness.Reply {
					r, _ := insist(t, a, "GET", "/goods/list", "")
					return r
				}
				list() // is cached now
				state := func() (goods []item) {
					text := harness.One[[]byte](t, w, `
SELECT json_agg(json_build_object('ID', id, 'ProjectID', project_id, 'Name', name, 'Priority', priority,
    'Removed', removed) ORDER BY priority)
FROM goods`)
					harness.Must(t, json.Unmarshal(text, &goods))
					return goods
				}
				before := state()
				commit := []byte("COMMIT\x00") // in the request and in the reply
				var commits atomic.Int64
				p.Spoil(func(to net.Conn, part []byte) error {
					if !bytes.Contains(part, commit) {
						return harness.Forward(to, part)
					}
					if commits.Add(1); delivered {
						_ = harness.Forward(to, part)
					}
					return io.ErrClosedPipe
				}, func(to net.Conn, part []byte) error {
					if bytes.Contains(part, commit) {
						return io.ErrClosedPipe // the reply must not slip through before the connection ends
					}
					return harness.Forward(to, part)
				})
				const key = keyHeader + "once"
				body := strings.Replace(call.body, "1", "3", 1) // a move that moves
				refused(t, a, 8, call.method, call.path, body, key)
				p.Pass()
				harness.Equal(t, commits.Load(), 1, "commits")
				changed := func() bool { return !slices.Equal(state(), before) }
				harness.AwaitEqual(t, 10*time.Second, changed, delivered, "a change in Postgres")
				done := state()
				// Whichever it was, the cache must not hide it.
				var listed answer
				harness.Must(t, json.Unmarshal([]byte(list().Body), &listed))
				harness.Equal(t, listed.Goods, done, "list")
				statuses := map[string][]int{"POST": {201, 200}, "PATCH": {200, 200}, "DELETE": {200, 404}}
				status := statuses[call.method][sent]
				if r, again := insist(t, a, call.method, call.path, body, key); !again {
					harness.Equal(t, r.Status, status, "status when it was repeated")
				}
				if delivered {
					harness.Equal(t, state(), done, "after it was repeated")
				}
				w.Start(t)
				w.Settled(t, 15*time.Second)
			})
		}
	}
}
