package main

import (
	"context"
	"database/sql"
	_ "embed"
	"fmt"
	"time"

	"github.com/lib/pq"
)

const (
	// maxSpan is how many positions one move may go: it renumbers as many goods, and the moved one. Creates
	// and other moves wait meanwhile, and all of it has to end within statementTimeout: 10,000 take a
	// quarter of a second on two quiet cores, so a machine may be ten times slower.
	maxSpan = 10_000
	// A batch of moves renumbers at most maxBatchSpan goods, or what the first move that it makes needs; moves
	// past that wait for the next batch.
	maxBatchSpan = 300
	// Creates wait for a batch of moves, and share the cores with it. While this replica has creates to answer,
	// the limit is lower, and a pause comes before each batch: moves that came as fast as they can would take
	// a fifth of the creates away.
	maxBatchSpanBesideCreates = 12
	pauseBesideCreates        = 4 * time.Millisecond
)

// position says where a good is in the list.
type position struct {
	ID       int32 `json:"id"`
	Priority int32 `json:"priority"`
}

// moveRequest moves a good to another position. Its JSON is what move_goods takes.
type moveRequest struct {
	ID        int32  `json:"id"`
	ProjectID int32  `json:"project_id"`
	Priority  int32  `json:"priority"` // past the end means the end
	Version   *int32 `json:"version"`  // that the good must have, unless nil
}

func (q moveRequest) conflictKey() any { return nil }

// Move moves a good. It returns every good whose priority changed, in the new order, or the good alone if
// none did. Failures: errGoodNotFound, errGoodChanged, and invalid for a move that is too long.
func (s *service) Move(ctx context.Context, q moveRequest) ([]position, error) {
	return s.moves.do(ctx, q)
}

const (
	moveGoodsSQL = `
SELECT n, outcome, first_position, keys
FROM move_goods($1, $2, $3, $4)`

	lockGoodsSQL = `
SELECT id
FROM goods
WHERE id = ANY ($1)
ORDER BY id
FOR UPDATE`
)

//go:embed sql/queries/locked_goods.sql
var lockedGoodsSQL string

// moveGoods leaves out a move over goods that another transaction has locked, so that it does not hold up the
// others: they, and all creates, wait for the lock of the priorities. A request that is retried alone waits
// for its goods twice: first without that lock, in awaitRange; and then inside move_goods, which has it, for
// the few goods that were locked in between.
func (s *service) moveGoods(requests []moveRequest, results []result[[]position], alone bool) error {
	if alone {
		if err := s.awaitRange(requests[0]); err != nil {
			return fmt.Errorf("wait for goods: %w", err)
		}
	}
	batchSpan := maxBatchSpan
	if s.creates.busy() {
		batchSpan = maxBatchSpanBesideCreates
		time.Sleep(pauseBesideCreates)
	}
	for i := range results {
		results[i].err = errNextBatch // unless there is a row for it
	}
	var replaced []key
	err := s.db.inTx(func(tx transaction) error {
		args := []any{string(encodeJSON(requests)), maxSpan, batchSpan, alone}
		return tx.query(moveGoodsSQL, args, func(rows *sql.Rows) error {
			var n int
			var outcome string
			var first sql.Null[int32]
			var keys pq.Int64Array
			if err := rows.Scan(&n, &outcome, &first, &keys); err != nil {
				return err
			}
			r := &results[n-1]
			r.err = nil // it was run
			switch outcome {
			case "moved":
				r.answer = positions(first.V, keys)
				if len(keys) > 1 { // one alone is the moved good itself, which has not changed
					for _, k := range keys {
						replaced = append(replaced, newKey(int32(k>>32), int32(k)-1))
					}
				}
			case "missing":
				r.err = errGoodNotFound
			case "changed":
				r.err = errGoodChanged
			case "too long":
				r.err = tooLong(first.V)
			case "locked":
				r.err = errLeftOut
			default:
				return fmt.Errorf("unknown outcome %q", outcome)
			}
			return nil
		})
	})
	if err != nil {
		return fmt.Errorf("move goods: %w", err)
	}
	s.wakeRelay()
	// Unlike in editGoods, a database that has moved to another server does no harm here: what is dropped is
	// read again.
	s.cache.dropShared(s.db.id(), replaced)
	return nil
}

// awaitRange waits for the goods that a move would renumber and that another transaction has locked. It locks
// no other good while it waits, so nobody has to wait for it who would not wait anyway.
func (s *service) awaitRange(q moveRequest) error {
	var locked pq.Int32Array
	args := []any{q.ID, q.ProjectID, q.Priority, maxSpan}
	err := s.db.query(lockedGoodsSQL, args, func(rows *sql.Rows) error { return rows.Scan(&locked) })
	if err != nil || len(locked) == 0 {
		return err
	}
	return s.db.query(lockGoodsSQL, []any{locked}, ignoreRow)
}

// positions returns the goods of keys, of which the first is at the position first.
func positions(first int32, keys []key) []position {
	list := make([]position, len(keys))
	for i, k := range keys {
		list[i] = position{ID: int32(k >> 32), Priority: first + int32(i)}
	}
	return list
}

// tooLong returns the failure of a move from a position to one that is too far away.
func tooLong(from int32) *failure {
	return invalid(map[string]string{"newPriority": fmt.Sprintf(
		"is too far away: the good is at %d, and one move goes %d positions at most, to between %d and %d",
		from, maxSpan, max(1, from-maxSpan), int64(from)+maxSpan)})
}
