package bench

import (
	"database/sql"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"

	"goods/test/harness"
)

const create = `POST /goods/create?projectId=1 {"name":"created good"}`

func pageAt(offset int) string { return fmt.Sprint("GET /goods/list?limit=10&offset=", offset) }

func getOf(id int) string { return fmt.Sprint("GET /goods/get?projectId=1&id=", id) }

func moveOf(id, to int) string {
	return fmt.Sprintf(`PATCH /goods/reprioritize?id=%d&projectId=1 {"newPriority":%d}`, id, to)
}

// pathOf returns the path of a request of GET.
func pathOf(request string) string { return strings.TrimPrefix(request, "GET ") }

func updateOf(id int) string {
	return fmt.Sprintf(`PATCH /goods/update?id=%d&projectId=1 {"name":"updated good"}`, id)
}

func removalOf(id int) string { return fmt.Sprintf("DELETE /goods/remove?id=%d&projectId=1", id) }

func several(n int, f func(i int) string) []string {
	all := make([]string, n)
	for i := range all {
		all[i] = f(i)
	}
	return all
}

func longPageAt(offset int) string { return fmt.Sprint("GET /goods/list?limit=1000&offset=", offset) }

// updates are of the first half of the goods: the second is there to be removed.
func updates(goods int) []string {
	return several(10_000, func(int) string { return updateOf(1 + rand.IntN(goods/2)) })
}

func (b *bench) lists() {
	const (
		bare  = "GET /bare"
		floor = "a bare net/http handler that writes the same bytes"
	)
	hot := row{
		what:   "hot list: one page of 10",
		with:   floor,
		number: rate,
		limit:  0.7,
		because: "The least that a reply of this size costs in Go. On top, a batch of lists shares one " +
			"statement of Postgres, so that each is current.",
		short: "in the service's profile net/http, the kernel and the scheduler have 77 %; parsing, " +
			"headers, metrics and the wait for the batch 15 %; the batch and its statement 8 %. To reach the " +
			"goal, the last two would have to cost half.",
	}
	warm := row{
		what:   "random pages of 10, cached",
		with:   floor,
		number: rate,
		limit:  0.35,
		short: "beyond the hot list's costs, a page here has ten positions of its own to look up in Postgres, " +
			"and most of its goods to fetch from Redis.",
	}
	cold := row{
		what:   "random pages of 10, nothing cached",
		with:   floor,
		number: rate,
		limit:  0.25,
		short: "client, Postgres and Redis take three fifths of what the goal allows, with ten goods to read, " +
			"and ten to store. A page waits for three exchanges, one after the other, and a quarter of the " +
			"cores with it.",
	}
	mix := row{
		what:   "90 % hot list, 10 % updates",
		with:   floor,
		number: rate,
		limit:  0.45,
		short: "only six updates at a time make small batches, so each takes a greater share of a commit, and " +
			"of the lists' time.",
	}
	fill := several(goods/1000, func(i int) string { return longPageAt(1 + 1000*i) })
	pages := several(10_000, func(int) string { return pageAt(1 + rand.IntN(goods-10)) })
	mixed := append(slices.Repeat([]string{pageAt(1)}, 900), updates(goods)[:100]...)
	unasked := several(large/10, func(i int) string { return pageAt(1 + 10*i) })
	for _, requests := range [][]string{mixed, unasked} {
		rand.Shuffle(len(requests), func(i, j int) { requests[i], requests[j] = requests[j], requests[i] })
	}
	s, many, hand := b.site(goods), b.site(large), b.reference()
	b.ask(hand, conns, 1, bare)
	compare := func(r row, with *site, requests ...string) sample {
		ref := b.ask(hand, conns, 1, bare)
		got := b.ask(with, conns, 1, requests...)
		b.add(r, got, ref)
		return got
	}
	both := func(r row, requests ...string) {
		got := compare(r, s, requests...)
		b.earlier(r.what, goods, got, func(before *site) sample {
			return b.ask(before, conns, 1, requests...)
		})
	}
	for round := range rounds {
		b.ask(s, 4, 1, fill...)
		if b.before != "" {
			b.ask(b.siteOf(goods, b.before), 4, 1, fill...)
		}
		both(hot, pageAt(1))
		both(warm, pages...)
		both(mix, mixed...)
		long := b.ask(s, conns, 1, longPageAt(1))
		b.earlier("hot list: one page of 1,000", goods, long, func(before *site) sample {
			return b.ask(before, conns, 1, longPageAt(1))
		})
		share := len(unasked) / rounds
		if got := compare(cold, many, unasked[round*share:(round+1)*share]...); int(got.rate) > share {
			b.Error("some pages that should not be cached were asked for twice")
		}
	}
}

// growth shows what more goods, connections and replicas cost or gain.
func (b *bench) growth() {
	f := b.figure("goods", 1000, goods, large)
	for range 3 {
		for _, n := range f.x {
			s := b.site(n)
			f.add("last page", n, b.ask(s, conns, 1, pageAt(n-9)))
			f.add("update", n, b.ask(s, conns, 1, updates(n)...))
			f.add("move by one", n, b.ask(s, conns, 1, moveOf(n/2, n/2+1), moveOf(n/2, n/2)))
		}
	}
	all := func(x int, s *site, conns int) {
		f.add("hot list", x, b.ask(s, conns, 1, pageAt(1)))
		f.add("update", x, b.ask(s, conns, 1, updates(goods)...))
		f.add("create", x, b.ask(s, conns, 1, create))
	}
	s, hand := b.site(goods), b.reference()
	f = b.figure("connections", 1, 8, 64, 256)
	for range 3 {
		for _, n := range f.x {
			all(n, s, n)
			f.add("bare handler", n, b.ask(hand, n, 1, "GET /bare"))
		}
	}
	f = b.figure("replicas", 1, 2, 3)
	replicas := []*harness.App{s.apps[0], b.start(s.World), b.start(s.World)}
	for range 3 {
		for _, n := range f.x {
			all(n, &site{s.World, replicas[:n]}, conns)
		}
	}
}

// writes compares the service with clients that go straight to Postgres.
func (b *bench) writes() {
	straight := row{
		what:   "update",
		with:   "BEGIN, SELECT … FOR UPDATE, UPDATE, COMMIT, straight to Postgres",
		number: rate,
		limit:  2.5,
		because: "What a client without the service sends, with the same schema, triggers and " +
			"connections. It has no HTTP, and nobody carries its events anywhere: both are in its favour.",
		short: "the reference has all of the cores, too.",
	}
	creates := row{
		what:   "create",
		with:   "one INSERT a transaction, straight to Postgres",
		number: rate,
		limit:  7,
		short: "the reference waits for its own commits with the cores half idle. The service has them busy, " +
			"of which client, service, NATS and ClickHouse take more than half.",
	}
	removes := row{what: "remove", with: "the same as for update, but SET removed", number: rate}
	s := b.site(goods)
	db := b.stocked(goods, "").DB // with the same triggers, but nobody publishes its events
	db.SetMaxOpenConns(conns)
	db.SetMaxIdleConns(conns)
	prepare := func(query string) *sql.Stmt {
		stmt, err := db.Prepare(query)
		harness.Must(b, err)
		return stmt
	}
	insert := prepare(`INSERT INTO goods (project_id, name, description) VALUES (1, $1, '')`)
	lock := prepare(`SELECT id FROM goods WHERE id = $1 AND project_id = 1 AND NOT removed FOR UPDATE`)
	rename := prepare(`UPDATE goods SET name = 'updated good' WHERE id = $1`)
	remove := prepare(`UPDATE goods SET removed = true WHERE id = $1`)
	locked := func(id int, change *sql.Stmt) {
		tx, err := db.Begin()
		harness.Must(b, err)
		harness.Must(b, tx.Stmt(lock).QueryRow(id).Scan(&id))
		_, err = tx.Stmt(change).Exec(id)
		harness.Must(b, err)
		harness.Must(b, tx.Commit())
	}
	both := func(r row, ref sample, requests ...string) {
		got := b.ask(s, conns, 1, requests...)
		b.add(r, got, ref)
		b.earlier(r.what, goods, got, func(before *site) sample {
			return b.ask(before, conns, 1, requests...)
		})
	}
	for range rounds {
		both(straight, b.direct(1, func(int) { locked(1+rand.IntN(goods/2), rename) }), updates(goods)...)
		both(creates, b.direct(1, func(int) {
			_, err := insert.Exec("created good")
			harness.Must(b, err)
		}), create)
	}
	const share = goods / 4 // more than one round of removes takes; the last are goods that were created above
	for round := range 3 {
		first := goods/2 + round*share
		ref := b.direct(1, func(n int) { locked(first+n, remove) })
		both(removes, ref, several(share, func(i int) string { return removalOf(first + i + 1) })...)
	}
}

// alone compares one request at a time with its statements sent by hand.
func (b *bench) alone() {
	sides := []*site{b.reference(), b.site(goods)} // with one database: its events are stored for both
	r := row{
		number: p50,
		atMost: true,
		because: "Both have HTTP, database/sql, lib/pq and the same database, whose events are stored. What " +
			"differs is what the service adds.",
		short: "to hand a request to the goroutine of its batch, and back, takes a tenth; parsing, headers " +
			"and metrics, and for writes the relay, are the rest. A caller cannot run its own request: nobody " +
			"would release it in time.",
	}
	for _, one := range []struct {
		what, with string
		limit      float64
		requests   []string
	}{
		{"list", "its statement", 1.05, []string{pageAt(1)}},
		{"create", "its BEGIN, lock-and-INSERT, COMMIT", 1.05, []string{create}},
		{"update", "its BEGIN, lock-and-change, COMMIT", 1.05, []string{updateOf(1)}},
		{"move", "its BEGIN, lock, find, rotate, COMMIT", 1.2, []string{moveOf(1, 2), moveOf(1, 1)}},
	} {
		r.what = "one " + one.what + " alone, p50"
		r.with = one.with + ", sent by hand from a bare net/http handler"
		r.limit = one.limit
		for round := range rounds { // each begins with the other: the difference is small
			var samples [2]sample
			for _, side := range []int{round % 2, 1 - round%2} {
				samples[side] = b.ask(sides[side], 1, 1, one.requests...)
			}
			b.add(r, samples[1], samples[0])
		}
		r.because = ""
	}
}
