package main

import (
	"context"
	"fmt"
	"net/http"
	"strconv"

	"github.com/lib/pq"
)

const (
	maxLimit = 1000
	// maxRead bounds the goods, and so the memory, of one exchange with the stores.
	maxRead = maxLimit
)

type listRequest struct {
	limit  int
	offset int // the position of the first good, from 1
}

func (s *service) list(w http.ResponseWriter, r *http.Request) error {
	in, err := readInput(w, r)
	if err != nil {
		return err
	}
	q := listRequest{in.numberOr("limit", 10, maxLimit), in.numberOr("offset", 1, maxInt32)}
	if err := in.fault(); err != nil {
		return err
	}
	page, err := s.lists.do(r.Context(), q)
	if err != nil {
		return err
	}
	writeBody(w, http.StatusOK, page)
	return nil
}

// readPages answers a batch of lists with their replies. Equal requests share
// one, which nobody may change.
func (s *service) readPages(ctx context.Context, requests []listRequest) ([]result[[]byte], error) {
	results := make([]result[[]byte], len(requests))
	for begin := 0; begin < len(requests); {
		end, size := begin+1, requests[begin].limit
		for end < len(requests) && size+requests[end].limit <= maxRead {
			size += requests[end].limit
			end++
		}
		if err := s.readTogether(ctx, requests[begin:end], results[begin:end]); err != nil {
			return nil, err
		}
		begin = end
	}
	return results, nil
}

const readMeta = `
SELECT total, removed, cache_epoch
FROM meta`

// readTogether reads the counts from Postgres and the goods of all pages from
// Redis, at the same time, and then what was missing from Postgres.
func (s *service) readTogether(ctx context.Context, requests []listRequest, results []result[[]byte]) error {
	pages := make(map[listRequest]int, len(requests)) // to where its positions begin
	var positions []int
	for _, q := range requests {
		if _, ok := pages[q]; ok {
			continue
		}
		pages[q] = len(positions)
		for p := q.offset; p < q.offset+q.limit; p++ {
			positions = append(positions, p)
		}
	}
	guess := s.cache.epoch.Load()
	receive := s.cache.read(ctx, guess, positions)
	var total, removed, epoch int64
	err := s.db.queryRow(ctx, nil, readMeta, nil, &total, &removed, &epoch)
	values, cacheErr := receive()
	if err != nil {
		return fmt.Errorf("read meta: %w", err)
	}
	if epoch != guess {
		s.cache.epoch.Store(epoch)
		values, cacheErr = s.cache.read(ctx, epoch, positions)()
	}
	useCache := cacheErr == nil && s.doubtAt.Load() == 0
	if !useCache {
		values = make([][]byte, len(positions))
	}
	if err := s.fillGaps(ctx, epoch, total, positions, values, useCache); err != nil {
		return err
	}
	replies := make(map[listRequest][]byte, len(pages))
	for i, q := range requests {
		if replies[q] == nil {
			replies[q] = pageJSON(q, total, removed, values[pages[q]:][:q.limit])
		}
		results[i].answer = replies[q]
	}
	return nil
}

// pageJSON puts the reply together. Places without a good are left out.
func pageJSON(q listRequest, total, removed int64, goods [][]byte) []byte {
	size := 128 // for the rest
	for _, g := range goods {
		size += len(g) + 1
	}
	b := append(make([]byte, 0, size), `{"meta":{"total":`...)
	b = strconv.AppendInt(b, total, 10)
	b = append(b, `,"removed":`...)
	b = strconv.AppendInt(b, removed, 10)
	b = append(b, `,"limit":`...)
	b = strconv.AppendInt(b, int64(q.limit), 10)
	b = append(b, `,"offset":`...)
	b = strconv.AppendInt(b, int64(q.offset), 10)
	b = append(b, `},"goods":[`...)
	empty := len(b)
	for _, g := range goods {
		if g != nil && len(b) > empty {
			b = append(b, ',')
		}
		b = append(b, g...)
	}
	return append(b, "]}\n"...)
}

const readGoods = `
SELECT ` + goodColumns + `
FROM goods
WHERE priority = ANY ($1)`

// fillGaps replaces each value that is not a good by the good that Postgres
// has at its position, up to the last position, and caches it where the lease
// allows.
func (s *service) fillGaps(ctx context.Context, epoch, last int64, positions []int, values [][]byte, useCache bool) error {
	var missing, free []int // positions to read; those of them that nobody holds a lease on
	hits := 0
	for i, p := range positions {
		switch {
		case int64(p) > last:
			values[i] = nil
		case isGood(values[i]):
			hits++
		default:
			missing = append(missing, p)
			if values[i] == nil {
				free = append(free, p)
			}
			values[i] = nil
		}
	}
	if useCache {
		s.counts.cacheMisses.Add(int64(len(missing)))
		s.counts.cacheHits.Add(int64(hits))
	}
	if len(missing) == 0 {
		return nil
	}
	var l lease
	if useCache {
		l, _ = s.cache.lease(ctx, epoch, free) // without it, nothing is filled
	}
	goods, err := scanGoods(s.db.query(ctx, nil, readGoods, pq.Array(missing)))
	if err != nil {
		return fmt.Errorf("read goods: %w", err)
	}
	encoded := make(map[int][]byte, len(goods))
	for _, g := range goods {
		b, err := encodeJSON(g)
		if err != nil {
			return err
		}
		encoded[int(g.Priority)] = b
	}
	for i, p := range positions {
		if values[i] == nil {
			values[i] = encoded[p]
		}
	}
	if len(l.positions) > 0 {
		_ = s.cache.fill(ctx, l, encoded) // the next list tries again
	}
	return nil
}
