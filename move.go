package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/http"
	"time"
)

// longMove is how many places a reprioritize may span in a call's usual time.
const longMove = 5_000

// place is where a good stands.
type place struct {
	ID       int32 `json:"id"`
	Priority int32 `json:"priority"`
}

// errLongMove means that a move spans more goods than its caller allows.
var errLongMove = errors.New("move too long")

func (s *service) reprioritize(w http.ResponseWriter, r *http.Request) error {
	in, err := readInput(w, r, "newPriority")
	if err != nil {
		return err
	}
	t, to := in.target(), in.integer("newPriority")
	if err := in.fault(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), answerWithin)
	defer cancel()
	places, err := s.move(ctx, s.db, t, to, longMove)
	if errors.Is(err, errLongMove) {
		ctx, cancel := context.WithTimeout(r.Context(), slowLimit)
		defer cancel()
		_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(2 * slowLimit))
		places, err = s.move(ctx, s.slow, t, to, maxInt32)
	}
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, struct {
		Priorities []place `json:"priorities"`
	}{places})
}

const findPlace = `
SELECT priority, (SELECT max(priority) FROM goods)
FROM goods
WHERE id = $1
  AND project_id = $2`

// The subquery sees each row as it is once it has been locked.
const lockRange = `
SELECT bool_or(removed) FILTER (WHERE id = $3)
FROM (
    SELECT id, removed
    FROM goods
    WHERE priority BETWEEN $1 AND $2
    ORDER BY id
    FOR UPDATE
) AS locked`

const rotateRange = `
UPDATE goods
SET priority = CASE WHEN id = $3 THEN $4 ELSE priority + $5 END
WHERE priority BETWEEN $1 AND $2
RETURNING id, priority`

// move puts a good in the place to, or the last one, and returns every good
// that has a new place, in the new order; or the good alone if none has. It
// refuses to move more than most goods.
func (s *service) move(ctx context.Context, db *database, t target, to, most int) ([]place, error) {
	select {
	case s.moving <- struct{}{}:
		defer func() { <-s.moving }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	var places []place
	err := s.write(ctx, db, func(tx *sql.Tx) ([]int, error) {
		if _, err := tx.ExecContext(ctx, `SELECT lock_priorities()`); err != nil {
			return nil, fmt.Errorf("lock priorities: %w", err)
		}
		var from, last int
		err := db.queryRow(ctx, tx, findPlace, []any{t.id, t.projectID}, &from, &last)
		if errors.Is(err, sql.ErrNoRows) {
			return nil, errGoodNotFound
		}
		if err != nil {
			return nil, fmt.Errorf("find place: %w", err)
		}
		to = min(to, last)
		low, high, step := from, to, -1
		if to < from {
			low, high, step = to, from, 1
		}
		if high-low >= most {
			return nil, errLongMove
		}
		var removed bool
		if err := db.queryRow(ctx, tx, lockRange, []any{low, high, t.id}, &removed); err != nil {
			return nil, fmt.Errorf("lock range: %w", err)
		}
		if removed {
			return nil, errGoodNotFound
		}
		if to == from {
			places = []place{{t.id, int32(to)}}
			return nil, nil
		}
		rows, err := db.query(ctx, tx, rotateRange, low, high, t.id, to, step)
		if err != nil {
			return nil, fmt.Errorf("rotate range: %w", err)
		}
		defer rows.Close()
		places = make([]place, high-low+1)
		for rows.Next() {
			var p place
			if err := rows.Scan(&p.ID, &p.Priority); err != nil {
				return nil, fmt.Errorf("rotate range: %w", err)
			}
			places[int(p.Priority)-low] = p
		}
		positions := make([]int, len(places))
		for i := range positions {
			positions[i] = low + i
		}
		return positions, rows.Err()
	})
	return places, err
}
