package test

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"goods/test/harness"
)

// More clients than TestLinearizability has, so that batches are large. Half of the calls are about the
// same few goods, and all clients that create use the same keys, each of which makes one good.
func TestManyClients(t *testing.T) {
	w, a := started(t, "EVENTS_BATCH=50")
	replicas := []*harness.App{a, w.Start(t, "EVENTS_BATCH=50")}
	const goods, clients, each = 60, 32, 15
	const maxRepeated = clients * each / 10
	makeGoods(t, w, goods)
	var ids sync.Map // key -> the good that it made
	var made, removed, repeated atomic.Int64
	harness.Together(clients, func(i int) {
		for n := range each {
			call := calls[i%4]
			if call.method == "DELETE" && n < 10 {
				call = calls[1] // so that there is something to write before
			}
			id := 1 + rand.IntN(goods)
			if n%2 == 0 {
				id = 1 + rand.IntN(3)
			}
			path := strings.Replace(call.path, target(1), target(id), 1)
			key := fmt.Sprint(n, "-", i/16) // half of the clients share it: a batch has several
			body := strings.NewReplacer("1", fmt.Sprint(1+rand.IntN(2*goods)), "x", key).Replace(call.body)
			r := replicas[i/4%2].Call(t, call.method, path, body, keyHeader+key)
			// On a busy machine some calls take too long. All of these can be repeated.
			for r.Status == 503 && repeated.Add(1) < maxRepeated {
				r = replicas[i/4%2].Call(t, call.method, path, body, keyHeader+key)
			}
			switch {
			case call.method == "POST" && r.Status <= 201:
				if r.Status == 201 {
					made.Add(1)
				}
				var g harness.Good
				harness.Must(t, json.Unmarshal([]byte(r.Body), &g))
				first, _ := ids.LoadOrStore(key, g.ID)
				harness.Equal(t, []any{g.ID, g.Name}, []any{first, key}, "the good of key %s", key)
			case call.method == "DELETE" && r.Status == 200:
				removed.Add(1)
			case call.method == "POST" || r.Status != 200 && r.Status != 404: // which a removed one is
				t.Errorf("%s %s: got %d %s", path, body, r.Status, r.Body)
			}
		}
	})
	l := replicas[0].List(t, 1, 1)
	harness.Equal(t, l.Meta.Total, goods+2*each, "goods")
	if n := repeated.Load(); n > 0 {
		t.Logf("%d calls were repeated, so how often each has had its effect is not known", n)
	} else {
		harness.Equal(t, []int64{made.Load(), removed.Load()}, []int64{2 * each, int64(l.Meta.Removed)},
			"creates and removals that were answered as such")
	}
	if events := w.Settled(t, 30*time.Second); events < l.Meta.Total+l.Meta.Removed+100 {
		t.Errorf("got %d events for %d goods, %d of them removed: hardly any update or move",
			events, l.Meta.Total, l.Meta.Removed)
	}
}

// insist makes a call until it gets something else than 503. On a busy machine, a call may take longer than
// it may, and may have been made when it gets 503. repeated says that it was made more than once.
func insist(t testing.TB, a *harness.App, method, path, body string, header ...string) (
	r harness.Reply, repeated bool) {
	t.Helper()
	calls := 0
	harness.Eventually(t, time.Minute, func() error {
		calls++
		r = a.Call(t, method, path, body, header...)
		if r.Status == 503 {
			return fmt.Errorf("%s %s: got 503 %d times", method, path, calls)
		}
		return nil
	})
	return r, calls > 1
}

// A move renumbers at most 10,000 goods within a request's time, and says so of a longer one.
func TestLongMove(t *testing.T) {
	w, a := started(t, "EVENTS_BATCH=1000")
	const most = 10_000
	makeGoods(t, w, most+2)
	details := refused(t, a, 2, "PATCH", "/goods/reprioritize"+target(most+2), somePlace)
	told := has(details["newPriority"], fmt.Sprint("at ", most+2, " goes ", most, " between 2 ", 2*most+2))
	harness.Equal(t, told, true, "the position and the limit are in the details %v", details)
	r, repeated := insist(t, a, "PATCH", "/goods/reprioritize"+target(most+1), somePlace)
	var moved answer
	harness.Must(t, json.Unmarshal([]byte(r.Body), &moved))
	harness.Equal(t, []any{r.Status, moved.Priorities[0]}, []any{200, place{most + 1, 1}},
		"status and first place")
	if places := moved.Priorities; !repeated {
		harness.Equal(t, []any{len(places), places[1], places[most]},
			[]any{most + 1, place{1, 2}, place{most, most + 1}}, "places")
	}
	end := a.List(t, 2, most+1).Goods
	harness.Equal(t, []int{end[0].ID, end[1].ID}, []int{most, most + 2}, "the end of the list")
}

// Moves that renumber many goods do not travel together, so that creates get their turn between them.
func TestLargeMovesTakeTurns(t *testing.T) {
	w, a := started(t, "EVENTS_BATCH=1000")
	const span, movers = 200, 12
	makeGoods(t, w, 2*span)
	// One move waits for this lock, and the others wait for the end of its batch.
	tx := w.Hold(t, `SELECT lock_priorities()`)
	time.AfterFunc(500*time.Millisecond, func() { _ = tx.Rollback() })
	harness.Together(movers, func(i int) {
		id, to := span+1+i, 1+i
		body := fmt.Sprintf(`{"newPriority":%d}`, to)
		moved := harness.Want[answer](t, a, 200, "PATCH", "/goods/reprioritize"+target(id), body).Priorities
		if len(moved) <= span || moved[0] != (place{id, to}) {
			t.Errorf("move of %d to %d: got %d places, the first %v", id, to, len(moved), moved[:min(1, len(moved))])
		}
	})
	batches := func() float64 { return value(t, a, "goods_batch_size", `value:"reprioritize"`) }
	harness.AwaitEqual(t, 10*time.Second, batches, movers, "batches of moves")
	w.Settled(t, 15*time.Second)
}

// Moves and creates wait for each other, and who asks for a good that is locked elsewhere waits for it. None
// may hold up, or take what is needed by, any other call, however often it is repeated: one that was held up
// would take 2.6 seconds, the limit for locks, or get 503.
func TestCallsThatWait(t *testing.T) {
	w, a := started(t, "EVENTS_BATCH=50")
	makeGoods(t, w, 12)
	const moves, edits, others = 32, 8, 4
	// quick makes other calls until the time is over, and returns what nine of ten took at most.
	quick := func(i int, until time.Time) (p90 time.Duration) {
		var took []time.Duration
		for n := 0; n == 0 || time.Now().Before(until); n++ {
			asked := time.Now()
			if i%2 == 0 {
				a.List(t, 10, 1)
			} else {
				ok(t, a, "PATCH", "/goods/update"+target(2+n%11), someName)
			}
			took = append(took, time.Since(asked))
		}
		slices.Sort(took)
		return took[len(took)*9/10]
	}
	var alone, beside [others]time.Duration
	until := time.Now().Add(time.Second)
	harness.Together(others, func(i int) { alone[i] = quick(i, until) })

	tx := w.Hold(t, `SELECT lock_priorities(); SELECT FROM goods WHERE id = 1 FOR UPDATE`)
	until = time.Now().Add(8 * time.Second)
	harness.Together(others+moves+edits, func(i int) {
		if i < others {
			beside[i] = quick(i, until)
			return
		}
		for time.Now().Before(until) {
			switch {
			case i < others+edits:
				refused(t, a, 8, "PATCH", calls[1].path, someName)
				<-time.After(20 * time.Millisecond)
			case i%4 == 0:
				refused(t, a, 8, "POST", create, someName)
			default:
				refused(t, a, 8, "PATCH", calls[2].path, somePlace)
			}
		}
	})
	t.Logf("nine of ten calls took at most %v alone, and %v while other calls wait", alone, beside)
	for i := range others {
		if limit := time.Second + 3*alone[i]; beside[i] > limit {
			t.Errorf("one of ten calls took %v or more while other calls wait, want %v", beside[i], limit)
		}
	}
	harness.Must(t, tx.Rollback())
	ok(t, a, "PATCH", calls[2].path, `{"newPriority":5}`)
	ok(t, a, "PATCH", calls[1].path, someName)
	w.Settled(t, 15*time.Second)
}

// Creates that travel together get a good each, or a refusal of their own.
func TestCreatesTogether(t *testing.T) {
	w, a := started(t)
	w.Exec(t, `INSERT INTO campaigns (name) VALUES ('second')`)
	const known = keyHeader + "known"
	before := harness.Want[harness.Good](t, a, 201, "POST", create, someName, known)
	// One create waits for this lock, and the others form batches.
	tx := w.Hold(t, `SELECT lock_priorities()`)
	time.AfterFunc(500*time.Millisecond, func() { _ = tx.Rollback() })
	var newKey atomic.Int64 // created with it
	harness.Together(48, func(i int) {
		name := fmt.Sprint(i)
		body := fmt.Sprintf(`{"name":%q}`, name)
		switch i % 6 {
		case 0:
			refused(t, a, 4, "POST", "/goods/create?projectId=3", body)
		case 1:
			refused(t, a, 9, "POST", create, body, known)
		case 2:
			again := harness.Want[harness.Good](t, a, 200, "POST", create, someName, known)
			harness.Equal(t, again, before, "repeated")
		case 3:
			if r := a.Call(t, "POST", create, someName, keyHeader+"new"); r.Status == 201 {
				newKey.Add(1)
			} else {
				harness.Equal(t, r.Status, 200, "status of a create with the new key")
			}
		default:
			project := i%6 - 3
			path := fmt.Sprint("/goods/create?projectId=", project)
			good := harness.Want[harness.Good](t, a, 201, "POST", path, body)
			harness.Equal(t, []any{good.Name, good.ProjectID}, []any{name, project}, "name and project")
		}
	})
	harness.Equal(t, newKey.Load(), 1, "goods that the new key made")
	harness.Equal(t, w.Settled(t, 15*time.Second), 1+1+16, "events")
	// An INSERT that Postgres refuses, such as one of the same key twice, takes ids all the same.
	last := harness.One[int](t, w, `SELECT max(id) FROM goods`)
	harness.Equal(t, last, 1+1+16, "the last id, if Postgres has refused nothing")
}

// A call for a good that another transaction has locked waits for it, and holds up nobody: no create, and
// no call for another good.
func TestLockedGood(t *testing.T) {
	t.Parallel()
	for name, waiting := range map[string]call{
		"update":                       {"PATCH", "/goods/update" + target(2), someName},
		"remove":                       {"DELETE", "/goods/remove" + target(2), ""},
		"move":                         {"PATCH", "/goods/reprioritize" + target(2), `{"newPriority":3}`},
		"move of another good past it": {"PATCH", "/goods/reprioritize" + target(3), somePlace},
	} {
		t.Run(name, func(t *testing.T) {
			w, a := started(t)
			makeGoods(t, w, 12)
			// others makes one call of each kind, and returns how long they took together.
			others := func(id int) time.Duration {
				begin := time.Now()
				a.Create(t, "another")
				ok(t, a, "PATCH", "/goods/update"+target(id), someName)
				ok(t, a, "PATCH", "/goods/update"+target(1), someName) // a move past it, and more, may wait
				ok(t, a, "PATCH", "/goods/reprioritize"+target(12), fmt.Sprintf(`{"newPriority":%d}`, id+1))
				ok(t, a, "DELETE", "/goods/remove"+target(id), "")
				return time.Since(begin)
			}
			alone := others(7)
			tx := w.Hold(t, `SELECT FROM goods WHERE id = 2 FOR UPDATE`)
			var running sync.WaitGroup
			running.Go(func() {
				r := a.Call(t, waiting.method, waiting.path, waiting.body)
				if r.Status != 200 && r.Status != 503 { // where the others take that long
					t.Errorf("got %d %s, want 200", r.Status, r.Body)
				}
			})
			awaitRowLock(t, w, 1)
			beside := others(5)
			harness.Must(t, tx.Rollback())
			running.Wait()
			if limit := time.Second + 3*alone; beside > limit {
				t.Errorf("the others took %v, want %v: alone they took %v", beside, limit, alone)
			}
			w.Settled(t, 15*time.Second)
		})
	}
}

// A good can be changed between the moment when a move finds it and the moment when the move locks it. The
// move then finds it anew.
func TestMoveOfChangedGood(t *testing.T) {
	w, a := started(t)
	a.Stock(t, 5)
	// Statements that change priorities wait for the lock of this key when they begin: it is held below.
	w.Exec(t, `
CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS
$$
BEGIN
    PERFORM pg_advisory_xact_lock(42);
    RETURN NULL;
END
$$;
CREATE TRIGGER wait
    BEFORE UPDATE OF priority ON goods
    FOR EACH STATEMENT EXECUTE FUNCTION wait()`)
	for id, test := range map[int]struct {
		change string
		code   int
	}{
		3: {`UPDATE goods SET removed = true WHERE id = 3`, 3},
		4: {`UPDATE goods SET name = 'changed' WHERE id = 4`, 12},
	} {
		tx := w.Hold(t, `SELECT pg_advisory_xact_lock(42)`)
		var running sync.WaitGroup
		running.Go(func() {
			refused(t, a, test.code, "PATCH", "/goods/reprioritize"+target(id), somePlace, ifMatch+`"1"`)
		})
		awaitLock(t, w)
		w.Exec(t, test.change)
		harness.Must(t, tx.Rollback())
		running.Wait()
	}
	harness.Equal(t, w.Settled(t, 15*time.Second), 5+2, "events")
}
