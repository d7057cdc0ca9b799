package bench

import (
	"fmt"
	"math/rand/v2"
)

// projectPageAt is a page of the list of project 1, which all goods belong to.
func projectPageAt(offset int) string {
	return fmt.Sprint("GET /goods/list?projectId=1&limit=10&offset=", offset)
}

// reads measures what clients read besides the list of all goods.
func (b *bench) reads() {
	const deep = 90_000
	lone := row{
		what:   "one get alone, p50",
		with:   "one hot list alone",
		number: p50,
		limit:  1,
		atMost: true,
		because: "Of two calls that Postgres answers with one statement each, that of a single good should not " +
			"be the slower one.",
		short: "it reads the good itself, where the list reads versions only, and has the goods at hand.",
	}
	gets := row{
		what:   "get, at random over 100,000 goods",
		with:   "a bare net/http handler that writes the same bytes",
		number: rate,
		limit:  0.5,
		short:  "each good is looked up in Postgres, and is another one.",
	}
	hot := row{
		what:    "hot list of a project",
		with:    "hot list",
		number:  rate,
		because: "They differ in the statement: the first position of the page is looked up.",
	}
	deepPage := row{
		what:    "page at 90,000 of 100,000 of a project, alone, p50",
		with:    "its first page, alone",
		number:  p50,
		limit:   10,
		atMost:  true,
		unit:    " ms",
		because: "The index is read up to the page.",
		short:   "Postgres takes so long to read 90,000 entries of the index.",
	}
	undisturbed := row{
		what:    "hot list, beside a client that reads such pages, p50",
		with:    "hot list, beside one that reads first pages",
		number:  p50,
		limit:   2,
		atMost:  true,
		because: "A list that waited for such a page would take ten times as long. They share the cores.",
		short:   "the other client's pages take a core.",
	}
	s, hand := b.site(goods), b.reference()
	random := several(10_000, func(int) string { return getOf(1 + rand.IntN(goods)) })
	beside := func(other string) sample {
		stop := b.load(s, 1, other)
		defer stop()
		return b.send(s, conns, 1, pageAt(1))
	}
	for range rounds {
		b.add(lone, b.ask(s, 1, 1, getOf(1)), b.ask(s, 1, 1, pageAt(1)))
		b.add(gets, b.ask(s, conns, 1, random...), b.ask(hand, conns, 1, "GET /bare/good"))
		b.add(hot, b.ask(s, conns, 1, projectPageAt(1)), b.ask(s, conns, 1, pageAt(1)))
		b.add(deepPage, b.ask(s, 1, 1, projectPageAt(deep)), b.ask(s, 1, 1, projectPageAt(1)))
		b.add(undisturbed, beside(projectPageAt(deep)), beside(projectPageAt(1)))
	}
}
