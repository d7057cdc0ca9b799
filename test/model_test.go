package test

import (
	"slices"

	"github.com/anishathalye/porcupine"
)

// ask is a call of a client.
type ask struct {
	call    string
	project int // of the good; of a list 0 means the list of all goods
	id      int
	to      int    // of a move
	name    string // of a create or an update; nothing else has it
	version int    // in If-Match, unless 0
	first   int    // position that a list asks for
	last    int    // the same
}

// isRead tells whether a call changes nothing.
func (q ask) isRead() bool { return q.call == "list" || q.call == "get" }

// answer is what came of it. Its exported fields are the JSON of every reply.
type answer struct {
	status int // 0: none, so it may or may not have had its effect
	item
	Priorities []place
	Meta       struct{ Total, Removed int }
	Goods      []item
}

type place struct{ ID, Priority int }

// item is a good, and one of the model's list.
type item struct {
	ID        int // 0: its create was not answered
	ProjectID int
	Name      string
	Priority  int
	Removed   bool
	version   int // 0: not told
}

// count is how many goods come before those of the model.
type count struct{ goods, removed int }

// modelOf says what each call does to the end of the list, and what it must answer. What comes before is
// left alone; before has its counts, of all goods and of each project. A state is a []item. A call without
// an answer may come after all others, as if it had no effect.
func modelOf(end []item, before map[int]count) porcupine.Model {
	return porcupine.Model{
		Init:  func() any { return end },
		Equal: func(a, b any) bool { return slices.Equal(a.([]item), b.([]item)) },
		Step: func(state, input, output any) (bool, any) {
			list, q, r := state.([]item), input.(ask), output.(answer)
			if q.call == "list" {
				return see(list, before[q.project], q, r)
			}
			next, want := apply(list, q, r.ID)
			right := want.status == r.status && want.item == r.item &&
				slices.Equal(want.Priorities, r.Priorities)
			return right || r.status == 0, next
		},
	}
}

// apply returns the list after a call for one good, and what that must answer. A create makes the good
// created.
func apply(list []item, q ask, created int) (next []item, want answer) {
	first := list[0].Priority
	next = slices.Clone(list)
	if q.call == "create" {
		want.status = 201
		want.item = item{
			ID:        created,
			ProjectID: q.project,
			Name:      q.name,
			Priority:  first + len(list),
			version:   1,
		}
		return append(next, want.item), want
	}
	at := slices.IndexFunc(list, func(i item) bool { return i.ID == q.id })
	switch {
	case at < 0, list[at].Removed && q.call != "get":
		want.status = 404
		return list, want
	case q.version != 0 && q.version != list[at].version:
		want.status = 412
		return list, want
	}
	want.status = 200
	switch q.call {
	case "get":
		want.item = next[at]
	case "update":
		next[at].Name = q.name
		next[at].version++
		want.item = next[at]
	case "remove":
		next[at].Removed = true
		next[at].version++
		want.item = item{ID: q.id, Removed: true}
	case "move":
		to := min(q.to-first, len(list)-1)
		next = slices.Insert(slices.Delete(next, at, at+1), to, list[at])
		for i := min(at, to); i <= max(at, to); i++ {
			if at != to {
				next[i].version++
			}
			next[i].Priority = first + i
			want.Priorities = append(want.Priorities, place{next[i].ID, first + i})
		}
	}
	return next, want
}

// see tells whether a page shows the list as it is. It returns the list, with the ids of goods whose create
// was not answered.
func see(list []item, before count, q ask, page answer) (bool, []item) {
	next := slices.Clone(list)
	var shown []*item // goods of next in the list that was asked for
	removed := before.removed
	for i := range next {
		good := &next[i]
		if q.project != 0 && q.project != good.ProjectID {
			continue
		}
		shown = append(shown, good)
		if good.Removed {
			removed++
		}
	}
	from := min(q.first-1-before.goods, len(shown))
	to := min(q.last-before.goods, len(shown))
	if page.status != 200 || page.Meta.Total != before.goods+len(shown) || page.Meta.Removed != removed ||
		len(page.Goods) != to-from {
		return false, nil
	}
	for i, got := range page.Goods {
		good := shown[from+i]
		if good.ID == 0 {
			good.ID = got.ID
		}
		want := *good
		want.version = 0
		if got != want {
			return false, nil
		}
	}
	return true, next
}
