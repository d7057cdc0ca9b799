package test

import (
	"encoding/json"
	"fmt"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"goods/test/harness"
)

const ifMatch = "If-Match: "

// Which replies have an ETag, and which.
func TestETag(t *testing.T) {
	w, a := started(t)
	etag := func(want string, status int, call call, header ...string) {
		t.Helper()
		r := a.Call(t, call.method, call.path, call.body, header...)
		got := fmt.Sprint(r.Status, " ", r.Header["Etag"])
		harness.Equal(t, got, fmt.Sprint(status, " ", want), "%s %s", call.method, call.path)
	}
	const key = keyHeader + "key"
	etag(`["1"]`, 201, calls[0], key)
	etag(`["2"]`, 200, calls[1])
	etag(`["2"]`, 200, calls[0], key) // the good as it is now
	etag(`["2"]`, 200, calls[6])
	etag(`[]`, 200, calls[2])
	etag(`["2"]`, 200, calls[6]) // the move to where it is made no version
	etag(`[]`, 200, calls[4])
	etag(`["3"]`, 200, calls[1]) // also an update that changes no text is a write
	etag(`[]`, 200, calls[3])
	etag(`["4"]`, 200, calls[6])
	etag(`[]`, 404, calls[1])
	harness.Equal(t, w.Settled(t, 15*time.Second), 4, "events")
}

// A write with If-Match is made if the good has that version, and changes nothing otherwise.
func TestIfMatch(t *testing.T) {
	w, a := started(t)
	w.Exec(t, `INSERT INTO campaigns (name) VALUES ('second')`)
	a.Stock(t, 4)
	state := func() string {
		return harness.One[string](t, w, `SELECT json_agg(g ORDER BY id)::text FROM goods AS g`)
	}
	writes := func(id int) []call {
		return []call{
			{"PATCH", "/goods/update" + target(id), `{"name":"new","description":"new"}`},
			{"PATCH", "/goods/reprioritize" + target(id), `{"newPriority":1}`},
			{"PATCH", "/goods/reprioritize" + target(id), `{"newPriority":2}`}, // where good 2 is
			{"DELETE", "/goods/remove" + target(id), ""},
		}
	}
	// changed sends writes of good 2 that must be refused.
	changed := func(etags ...string) {
		t.Helper()
		before := state()
		for _, etag := range etags {
			for _, write := range writes(2) {
				refused(t, a, 12, write.method, write.path, write.body, ifMatch+etag)
			}
		}
		harness.Equal(t, state(), before, "all goods after refused writes")
	}
	changed(`"0"`, `"01"`, `"2"`, `"12"`, `"2147483647"`)
	events := 4

	ok(t, a, "PATCH", "/goods/update"+target(2), someName, ifMatch+`"1"`)
	changed(`"1"`, `"3"`)
	ok(t, a, "PATCH", "/goods/update"+target(2), someName, ifMatch+"*")
	ok(t, a, "PATCH", "/goods/update"+target(2), someName)
	events += 3
	changed(`"2"`, `"3"`)
	ok(t, a, "PATCH", "/goods/reprioritize"+target(2), `{"newPriority":2}`, ifMatch+`"4"`) // no new version
	ok(t, a, "PATCH", "/goods/reprioritize"+target(2), `{"newPriority":3}`, ifMatch+`"4"`)
	ok(t, a, "PATCH", "/goods/reprioritize"+target(2), `{"newPriority":2}`, ifMatch+"*")
	events += 4
	changed(`"4"`, `"5"`)

	// The move of another shifts it, which is a version; one that goes past it is none.
	ok(t, a, "PATCH", "/goods/reprioritize"+target(3), `{"newPriority":4}`)
	events += 2
	ok(t, a, "PATCH", "/goods/update"+target(2), someName, ifMatch+`"6"`)
	ok(t, a, "PATCH", "/goods/reprioritize"+target(4), somePlace)
	events += 4
	changed(`"7"`)
	good, etag := get(t, a, 2)
	harness.Equal(t, fmt.Sprint(good.Priority, " ", etag), `3 "8"`, "position and ETag of the shifted good")

	// A good that is missing is missing, whatever version is asked for.
	ok(t, a, "DELETE", "/goods/remove"+target(2), "", ifMatch+`"8"`)
	events++
	for _, etag := range []string{`"8"`, `"9"`, "*"} {
		for _, id := range []int{2, 9} {
			for _, write := range writes(id) {
				refused(t, a, 3, write.method, write.path, write.body, ifMatch+etag)
			}
		}
		for _, write := range writes(1) {
			path := write.path[:len(write.path)-1] + "2" // of project 2
			refused(t, a, 3, write.method, path, write.body, ifMatch+etag)
		}
	}
	// Other calls do not look at it.
	refused(t, a, 4, "POST", "/goods/create?projectId=3", someName, ifMatch+"bad")
	ok(t, a, "GET", "/goods/get"+target(2), "", ifMatch+`"1"`)
	harness.Equal(t, w.Settled(t, 15*time.Second), events, "events")
}

// Of several writes that name the same version of a good, at most one is made, on whatever replica and in
// whatever batch.
func TestOneOfManyMatches(t *testing.T) {
	w, a := started(t, "EVENTS_BATCH=50")
	replicas := []*harness.App{a, w.Start(t, "EVENTS_BATCH=50")}
	const goods, clients, rounds = 3, 12, 15
	a.Stock(t, goods)
	for round := range rounds {
		var writes [goods + 1][2]call // of each good: an update, and a move to another position
		var etags [goods + 1]string
		for id := 1; id <= goods; id++ {
			good, etag := get(t, a, id)
			etags[id] = ifMatch + etag
			move := fmt.Sprintf(`{"newPriority":%d}`, 1+good.Priority%goods)
			writes[id][0] = call{"PATCH", "/goods/update" + target(id), someName}
			writes[id][1] = call{"PATCH", "/goods/reprioritize" + target(id), move}
		}
		var made [goods + 1]atomic.Int64
		harness.Together(goods*clients, func(i int) {
			id := 1 + i%goods
			write := writes[id][0]
			if round%2 == 1 && i%4 == 0 {
				write = writes[id][1]
			}
			r := replicas[i/goods%2].Call(t, write.method, write.path, write.body, etags[id])
			switch r.Status {
			case 200:
				made[id].Add(1)
			case 412:
			default:
				t.Errorf("%s %s: got %d %s", write.method, write.path, r.Status, r.Body)
			}
		})
		all := int64(0)
		for id := 1; id <= goods; id++ {
			n := made[id].Load()
			all += n
			if n > 1 || n == 0 && round%2 == 0 { // without moves, nothing else makes a version
				t.Errorf("round %d: %d writes of good %d with %s were made, want one", round, n, id, etags[id])
			}
		}
		if all == 0 {
			t.Errorf("round %d: no write was made", round)
		}
	}
	w.Settled(t, 15*time.Second)
}

// Clients that read a number, add one and write it back with If-Match lose no addition, while others move the
// goods.
func TestNoLostUpdate(t *testing.T) {
	w, a := started(t, "EVENTS_BATCH=50")
	replicas := []*harness.App{a, w.Start(t, "EVENTS_BATCH=50")}
	const clients, each = 16, 6
	for range 3 {
		a.Create(t, "0")
	}
	var conflicts, moves, done atomic.Int64
	harness.Together(clients+2, func(i int) {
		replica := replicas[i%2]
		if i >= clients {
			for n := 0; done.Load() < clients; n++ {
				body := fmt.Sprintf(`{"newPriority":%d}`, 1+n%3)
				ok(t, replica, "PATCH", "/goods/reprioritize"+target(2+i%2), body)
				moves.Add(1)
			}
			return
		}
		defer done.Add(1)
		for range each {
			for {
				seen := replica.Call(t, "GET", "/goods/get"+target(1), "")
				var good harness.Good
				harness.Must(t, json.Unmarshal([]byte(seen.Body), &good))
				number, err := strconv.Atoi(good.Name)
				harness.Must(t, err)
				body := fmt.Sprintf(`{"name":"%d"}`, number+1)
				r := replica.Call(t, "PATCH", "/goods/update"+target(1), body, ifMatch+seen.Header.Get("ETag"))
				if r.Status == 200 {
					break
				}
				harness.Equal(t, r.Status, 412, "status of a refused update")
				conflicts.Add(1)
			}
		}
	})
	good, _ := get(t, a, 1)
	harness.Equal(t, good.Name, fmt.Sprint(clients*each), "the number after all additions")
	if conflicts.Load() == 0 || moves.Load() == 0 {
		t.Errorf("%d conflicts and %d moves: nothing was tested", conflicts.Load(), moves.Load())
	}
	t.Logf("%d additions, %d conflicts, %d moves", clients*each, conflicts.Load(), moves.Load())
	w.Settled(t, 30*time.Second)
}
