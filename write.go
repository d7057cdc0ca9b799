package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"
)

const (
	// maxDrop is how many positions are deleted from the cache one by one; of
	// more, raising the epoch is the cheaper way.
	maxDrop = 10_000
	// doubtLife is longer than a transaction that lost its client may live on.
	doubtLife = answerWithin + time.Second
)

// write runs f in one transaction of db, and then makes what it wrote visible:
// before write returns, no list of any replica will show the goods at the
// positions that f returns as they were. When that, or the transaction itself,
// ends in doubt, the error is errOutcomeUnknown, and see settleDoubt.
func (s *service) write(ctx context.Context, db *database, f func(tx *sql.Tx) ([]int, error)) error {
	var positions []int
	err := inTx(ctx, db, func(tx *sql.Tx) (err error) {
		positions, err = f(tx)
		return err
	})
	if err == nil {
		s.wake()
		if err = s.uncache(positions); err != nil {
			err = fmt.Errorf("%w: %w", errOutcomeUnknown, err)
		}
	}
	if errors.Is(err, errOutcomeUnknown) {
		s.doubtAt.Store(time.Now().UnixNano())
	}
	return err
}

// uncache makes sure that no list shows what the cache holds for positions.
func (s *service) uncache(positions []int) error {
	if len(positions) == 0 {
		return nil
	}
	// The caller may be out of time, but the write stands, and must be seen.
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if len(positions) <= maxDrop {
		// After the commit: readers of a later epoch than this have seen it.
		guess := s.cache.epoch.Load()
		dropped := s.cache.drop(ctx, guess, positions)
		var total, removed, epoch int64
		err := s.db.queryRow(ctx, nil, readMeta, nil, &total, &removed, &epoch)
		dropErr := dropped()
		if err != nil {
			return fmt.Errorf("read meta: %w", err)
		}
		if epoch != guess {
			s.cache.epoch.Store(epoch)
			dropErr = s.cache.drop(ctx, epoch, positions)()
		}
		if dropErr == nil {
			return nil
		}
	}
	return s.raiseEpoch(ctx)
}

// The clock keeps an epoch from coming back with an old copy of the database.
const raiseEpoch = `
UPDATE meta
SET cache_epoch = greatest(cache_epoch + 1, extract(epoch FROM clock_timestamp())::bigint)`

// raiseEpoch puts everything that is cached out of reach, for every replica.
func (s *service) raiseEpoch(ctx context.Context) error {
	_, err := s.db.ExecContext(ctx, raiseEpoch) // to repeat it is harmless
	if err != nil {
		return fmt.Errorf("raise cache epoch: %w", err)
	}
	return nil
}

// settleDoubt raises the epoch once a write that was left in doubt can no
// longer be committed behind it. Until then this replica does not use the
// cache. It is called every second.
func (s *service) settleDoubt(ctx context.Context) {
	at := s.doubtAt.Load()
	if at == 0 || time.Since(time.Unix(0, at)) < doubtLife {
		return
	}
	if s.raiseEpoch(ctx) == nil {
		s.doubtAt.CompareAndSwap(at, 0)
	}
}
