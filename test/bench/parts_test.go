package bench

import (
	"database/sql"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"syscall"
	"time"

	"goods/test/harness"
)

// updates are of the first half of the goods: the second is there to be removed.
func updates(goods int) []request {
	return several(10_000, func(int) request { return updateOf(1 + rand.IntN(goods/2)) })
}

func (b *bench) hotReply() string { return b.site(goods).app.Call(b, "GET", pageAt(1).path, "").Body }

func (b *bench) lists() {
	s, large, bare := b.site(goods), b.site(1_000_000), b.serve(reference{Body: b.hotReply()})
	floor := row{with: "a bare net/http handler that writes the same bytes", compare: rates, short: "see where the cores spend their time"}
	hot, warm, cold, mix := floor, floor, floor, floor
	hot.what, hot.limit = "hot list: one page of 10", 0.7
	hot.because = "it is the least that a reply of this size costs in Go; on top, a batch of lists shares one statement of Postgres, so that each is current"
	warm.what, warm.limit = "random pages of 10, cached", 0.35
	cold.what, cold.limit = "random pages of 10, nothing cached", 0.25
	mix.what, mix.limit = "90 % hot list, 10 % updates", 0.45
	pages := several(10_000, func(int) request { return pageAt(1 + rand.IntN(goods-10)) })
	mixed := several(1000, func(i int) request {
		if i%10 == 9 {
			return updateOf(1 + rand.IntN(goods/2))
		}
		return pageAt(1)
	})
	unasked := several(100_000, func(i int) request { return pageAt(1 + 10*i) })
	rand.Shuffle(len(unasked), func(i, j int) { unasked[i], unasked[j] = unasked[j], unasked[i] })
	b.ask(bare, 1, pageAt(1))
	b.ask(s.target(), 1, pageAt(1))
	for round := range rounds {
		for offset := 1; offset <= goods; offset += 1000 { // whatever has left the cache meanwhile
			s.app.List(b, 1000, offset)
		}
		ref := b.ask(bare, 2, pageAt(1))
		got := b.ask(s.target(), 2, pageAt(1))
		b.add(hot, got, ref)
		b.earlier("hot list", got, pageAt(1))
		b.add(warm, b.ask(s.target(), 2, pages...), ref)
		share := len(unasked) / rounds
		got = b.ask(large.target(), 2, unasked[round*share:(round+1)*share]...)
		if int(2*got.rate) > share {
			b.Error("some pages that should not be cached were asked for twice")
		}
		b.add(cold, got, ref)
		b.add(mix, b.ask(s.target(), 2, mixed...), ref)
		b.drained(s.World, 500)
	}
}

// growth shows what more goods, connections and replicas cost or gain.
func (b *bench) growth() {
	bySize, byCrowd, byReplicas := &figure{title: "goods"}, &figure{title: "connections"}, &figure{title: "replicas"}
	b.figures = append(b.figures, bySize, byCrowd, byReplicas)
	s, bare := b.site(goods), []target{b.serve(reference{Body: b.hotReply()})}
	at := []target{s.target()}
	for range 2 {
		more := b.start(s.World)
		at = append(at, target{more.URL, more.Process.Pid})
		defer more.Stop()
	}
	for range rounds {
		for _, n := range []int{1000, goods, 1_000_000} {
			s := b.site(n)
			for _, load := range []struct {
				name     string
				requests []request
			}{
				{"last page", []request{pageAt(n - 9)}}, {"update", updates(n)}, {"move by one", []request{moveOf(n/2, n/2+1), moveOf(n/2, n/2)}},
			} {
				bySize.add(load.name, n, b.ask(s.target(), 1, load.requests...))
				b.drained(s.World, 500)
			}
		}
		for _, n := range []int{1, 8, 64, 256} {
			byCrowd.add("bare handler", n, b.wrk(bare, n, 1, pageAt(1)))
			b.hotAndWrites(byCrowd, n, at[:1], n)
		}
		for n := range at {
			b.hotAndWrites(byReplicas, n+1, at[:n+1], conns)
		}
	}
}

func (b *bench) hotAndWrites(f *figure, x int, at []target, conns int) {
	f.add("hot list", x, b.wrk(at, conns, 1, pageAt(1)))
	f.add("update", x, b.wrk(at, conns, 1, updates(goods)...))
	b.drained(b.site(goods).World, 500)
	f.add("create", x, b.wrk(at, conns, 1, create))
	b.drained(b.site(goods).World, 500)
}

// writes compares the service with clients that go straight to Postgres.
func (b *bench) writes() {
	s := b.site(goods)
	db := b.stocked(goods, "").DB // with the same triggers, but nobody drains its outbox
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
	locked := func(id int, change *sql.Stmt) error {
		tx, err := db.Begin()
		if err != nil {
			return err
		}
		defer tx.Rollback() // does nothing after a commit
		if err := tx.Stmt(lock).QueryRow(id).Scan(&id); err != nil {
			return fmt.Errorf("good %d: %w", id, err)
		}
		if _, err := tx.Stmt(change).Exec(id); err != nil {
			return err
		}
		return tx.Commit()
	}
	straight := row{what: "update", with: "BEGIN, SELECT … FOR UPDATE, UPDATE, COMMIT, straight to Postgres", limit: 2.5, compare: rates,
		because: "it is what a client without the service sends, with the same schema, triggers and connections; it has no HTTP, and nobody carries its events anywhere: both is to its advantage",
		short:   "see where the cores spend their time"}
	creates, removes := straight, straight
	creates.what, creates.with, creates.limit = "create", "one INSERT a transaction, straight to Postgres", 7
	removes.what, removes.with, removes.limit = "remove", "the same, but UPDATE … SET removed", 0
	for range rounds {
		ref := b.direct(2, func(int) error {
			_, err := insert.Exec("created good")
			return err
		})
		got := b.ask(s.target(), 2, create)
		b.drained(s.World, 500)
		b.add(creates, got, ref)
		b.earlier("create", got, create)
		ref = b.direct(2, func(int) error { return locked(1+rand.IntN(goods/2), rename) })
		got = b.ask(s.target(), 2, updates(goods)...)
		b.drained(s.World, 500)
		b.add(straight, got, ref)
		b.earlier("update", got, updates(goods)...)
	}
	const share = goods / 2 / rounds // of the goods, for one round of removes
	for round := range rounds {
		first := goods/2 + round*share
		ref := b.direct(1, func(n int) error { return locked(first+n, remove) })
		b.add(removes, b.ask(s.target(), 1, several(share, func(i int) request {
			return request{"DELETE", fmt.Sprintf("/goods/remove?id=%d&projectId=1", first+i+1), ""}
		})...), ref)
		b.drained(s.World, 500)
	}
}

// alone compares one request at a time with its statements sent by hand.
func (b *bench) alone() {
	s := b.site(goods)
	hand := b.serve(reference{Body: b.hotReply(), Postgres: s.Env["POSTGRES_URL"], // the same database: its outbox is drained for both
		List: b.statement("readVersions"), Lock: b.statement("lockPriorities"), Create: b.statement("createGoods"), Update: b.statement("editGood")})
	for _, one := range []struct {
		what, with string
		request    request
	}{
		{"one list alone, p50", "its statement", pageAt(1)},
		{"one create alone, p50", "its BEGIN, lock, INSERT, COMMIT", create},
		{"one update alone, p50", "its BEGIN, lock-and-change, COMMIT", updateOf(1)},
	} {
		// More and shorter rounds, each beginning with the other: the difference is small.
		for round := range rounds + 2 {
			var samples [2]sample
			for turn := range 2 {
				side := (round + turn) % 2
				samples[side] = b.wrk([]target{[]target{hand, s.target()}[side]}, 1, 1, one.request)
				b.drained(s.World, 500)
			}
			b.add(row{what: one.what, with: one.with + ", sent by hand from a bare net/http handler", limit: 1.05, atMost: true, compare: p50s,
				because: "both have HTTP, database/sql, lib/pq and the same database, whose events are drained; what differs is what the service adds",
				short:   "see where the cores spend their time"}, samples[1], samples[0])
		}
	}
}

// events measures the way of the events to ClickHouse, from a full outbox.
func (b *bench) events() {
	worlds := []*harness.World{b.stocked(40_000, "")}
	if b.before != nil {
		worlds = append(worlds, b.stocked(40_000, b.before.Program))
	}
	b.memo += " Events a second from a full outbox to ClickHouse:"
	for _, batch := range []struct{ size, events int }{{5, 4000}, {500, 40_000}} {
		var own []sample
		for range rounds {
			var got []sample
			for _, w := range worlds {
				w.Exec(b, fmt.Sprintf(`UPDATE goods SET name = name WHERE id <= %d`, batch.events))
				a := w.Start(b, "LOG_LEVEL=info", fmt.Sprint("EVENTS_BATCH=", batch.size))
				start := time.Now()
				b.drained(w, 0)
				got = append(got, sample{rate: float64(batch.events) / time.Since(start).Seconds()})
				harness.Must(b, a.Stop())
			}
			own = append(own, got[0])
			if b.before != nil {
				b.add(row{what: fmt.Sprintf("events/s, %d in one INSERT", batch.size), with: theBuildBefore, limit: 1, compare: rates,
					short: "this build is slower here, unless the spread is on both sides of 1"}, got[0], got[1])
			}
		}
		s := spreadOf(own, rateOf)
		b.memo += fmt.Sprintf(" %.0f (%.0f to %.0f) with EVENTS_BATCH=%d.", s.median, s.low, s.high, batch.size)
	}
}

// memory tells what a service holds that has only started, and the largest of
// all that were measured.
func (b *bench) memory() {
	w := harness.NewWorld(b)
	resident := func(a *harness.App) (kb float64) {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", a.Process.Pid))
		harness.Must(b, err)
		_, rest, _ := strings.Cut(string(status), "VmRSS:")
		_, err = fmt.Sscan(rest, &kb)
		harness.Must(b, err)
		return kb
	}
	most := 0.0
	for _, a := range b.apps {
		if a.Process.Signal(syscall.Signal(0)) == nil {
			most = max(most, resident(a))
		}
	}
	b.memo += fmt.Sprintf(" The service holds %.0f MB of memory at rest, and %.0f MB after all this.", resident(b.start(w))/1024, most/1024)
}
