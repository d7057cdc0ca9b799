package bench

import (
	"math/rand/v2"

	"goods/test/harness"
)

const (
	pairs    = 128  // of neighbours that change places: more than there are clients, so each move moves
	shuffled = 1000 // goods that are moved at random
)

// step returns the n-th of the moves by one: of which good, and to which position. First all go down the
// list, then all go back.
func step(n int) (id, to int) {
	id = 2*shuffled + 300*(n%pairs) // of the first half, which is never removed
	return id, id + (1 - n/pairs%2)
}

// moves compares moves with clients that go straight to Postgres, and with the build before.
func (b *bench) moves() {
	byOne := row{
		what:   "move by one",
		with:   "BEGIN, lock, find, rotate, COMMIT, straight to Postgres",
		number: rate,
		limit:  5,
		because: "What a client without the service sends, as for an update. It holds the lock of the " +
			"priorities from its second exchange to its last.",
		short: "the reference has all of the cores, too.",
	}
	random := row{what: "random moves over 1,000 goods", number: rate, limit: 1.5}
	steps := several(2*pairs, func(i int) string { return moveOf(step(i)) })
	jumps := several(10_000, func(int) string { return moveOf(1+rand.IntN(shuffled), 1+rand.IntN(shuffled)) })
	s := b.site(goods)
	db := b.stocked(goods, "").DB
	db.SetMaxOpenConns(conns)
	db.SetMaxIdleConns(conns)
	hand, err := newMover(db)
	harness.Must(b, err)
	for range rounds {
		ref := b.direct(1, func(n int) { harness.Must(b, hand.move(step(n))) })
		got := b.ask(s, conns, 1, steps...)
		b.add(byOne, got, ref)
		b.earlier(byOne.what, goods, got, func(before *site) sample {
			return b.ask(before, conns, 1, steps...)
		})
	}
	beside := func(at *site, moves []string) sample {
		b.stored(at.World, 500)
		stop := b.load(at, conns/2, moves...)
		creates := b.send(at, conns/2, 2, create)
		stop()
		b.stored(at.World, 500)
		return creates
	}
	for range 3 {
		const seconds = 3
		got := b.ask(s, conns, seconds, jumps...) // none is refused
		b.earlierRow(random, goods, got, func(before *site) sample {
			refs := b.send(before, conns, seconds, jumps...)
			b.stored(before.World, 500)
			b.Logf("the build before refused %.0f %% of the random moves", 100*refs.refused)
			return refs
		})
		for _, moves := range []struct {
			what     string
			requests []string
		}{{"create, beside moves by one", steps}, {"create, beside random moves", jumps}} {
			r := row{what: moves.what, number: p99, limit: 1, atMost: true}
			b.earlierRow(r, goods, beside(s, moves.requests), func(before *site) sample {
				return beside(before, moves.requests)
			})
		}
	}
}
