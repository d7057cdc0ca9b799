package main

import (
	"context"
	"database/sql"
	"fmt"

	"github.com/lib/pq"
)

const (
	// maxSpan is how many positions one move may go: it renumbers as many goods, and the moved one. Creates
	// and other moves wait meanwhile, and all of it has to end within statementTimeout: 10,000 take a
	// quarter of a second on two quiet cores, so a machine may be ten times slower.
	maxSpan = 10_000
	// A batch of moves renumbers at most maxBatchSpan goods; its first move is always made, the rest waits
	// for the next batch. Creates wait for moves, so the limit is lower while this replica has creates.
	maxBatchSpan              = 300
	maxBatchSpanBesideCreates = 4
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

	lockRangeSQL = `
SELECT lock_range($1, $2, $3, $4)`
)

// moveGoods leaves out a move over goods that another transaction has locked, so that it does not hold up the
// others: they, and all creates, wait for the lock of the priorities. A request that is retried alone waits
// for its goods twice: in a query of its own, which keeps no lock, so that the long wait holds up nobody; and
// then inside move_goods, which has the lock of the priorities, for the few that were locked in between.
func (s *service) moveGoods(requests []moveRequest, results []result[[]position], alone bool) error {
	if alone {
		q := requests[0]
		args := []any{q.ID, q.ProjectID, q.Priority, maxSpan}
		if err := s.db.query(lockRangeSQL, args, ignoreRow); err != nil {
			return fmt.Errorf("wait for goods: %w", err)
		}
	}
	batchSpan := maxBatchSpan
	if s.creates.busy() {
		batchSpan = maxBatchSpanBesideCreates
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
