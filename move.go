package main

import (
	"database/sql"
	_ "embed"
	"errors"
	"fmt"
)

// maxMove limits the goods that one move renumbers, so that it ends within a request's time, and those who create
// meanwhile get theirs.
const maxMove = 20_000

// place is where a good stands.
type place struct {
	ID       int32 `json:"id"`
	Priority int32 `json:"priority"`
}

// moveRequest puts a good in the place to, or the last one. The answer is every good that has a new place, in the new
// order; or the good alone if none has.
type moveRequest struct {
	id, projectID, to int32
}

func (q moveRequest) apart() any { return nil }

//go:embed sql/queries/place.sql
var findPlace string

//go:embed sql/queries/rotate.sql
var rotateGoods string

func (s *service) moveGood(requests []moveRequest) ([]result[[]place], error) {
	q := requests[0]
	var places []place
	var replaced []key
	err := s.db.inTx(func(tx *sql.Tx) error {
		var from, last int32
		err := s.db.query(tx, findPlace, []any{q.id, q.projectID}, func(rows *sql.Rows) error { return rows.Scan(&from, &last) })
		if err == nil && from == 0 {
			return errGoodNotFound
		}
		if err != nil {
			return err
		}
		to := min(q.to, last)
		low, high, step := from, to, -1
		switch {
		case to == from:
			places = []place{{q.id, to}}
			return nil
		case to < from:
			low, high, step = to, from, 1
		}
		if high-low > maxMove {
			return invalid(map[string]string{"newPriority": fmt.Sprintf(
				"is %d places away from %d: a move spans at most %d, go there in steps", high-low, from, maxMove)})
		}
		places = make([]place, high-low+1)
		return s.db.query(tx, rotateGoods, []any{low, high, q.id, to, step}, func(rows *sql.Rows) error {
			var p place
			var version int32
			err := rows.Scan(&p.ID, &p.Priority, &version)
			places[p.Priority-low], replaced = p, append(replaced, newKey(p.ID, version-1))
			return err
		})
	})
	s.wake()
	var f *failure
	if errors.As(err, &f) {
		return []result[[]place]{{err: f}}, nil // to try again would change nothing
	}
	if err != nil {
		return nil, fmt.Errorf("move good: %w", err)
	}
	s.cache.drop(replaced)
	return []result[[]place]{{answer: places}}, nil
}
