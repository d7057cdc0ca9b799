package main

import (
	"database/sql"
	_ "embed"
	"fmt"
	"slices"

	"github.com/lib/pq"
)

const (
	maxLimit = 1000
	maxRead  = 1000 // goods, and so memory, of one exchange with the stores
)

// listRequest asks for limit goods from the position offset on, both from 1.
type listRequest struct{ limit, offset int32 }

func (q listRequest) apart() any { return nil }

// readPages answers a batch of lists. Equal requests share one reply.
func (s *service) readPages(requests []listRequest) ([]result[[]byte], error) {
	results := make([]result[[]byte], len(requests))
	replies := map[listRequest][]byte{}
	var pages []listRequest
	size := int32(0)
	for i, q := range requests {
		if _, ok := replies[q]; !ok {
			replies[q] = nil
			pages = append(pages, q)
			size += q.limit
		}
		if last := i == len(requests)-1; last || size+requests[i+1].limit > maxRead {
			if err := s.readTogether(pages, replies); err != nil {
				return nil, err
			}
			pages, size = nil, 0
		}
	}
	for i, q := range requests {
		results[i].answer = replies[q]
	}
	return results, nil
}

// readTogether puts the replies of pages into replies. Each reply is one moment of the whole list: meta and the
// versions come from one statement, and a version never changes. A page with a good that is not cached is read again,
// whole, in one statement of its own.
func (s *service) readTogether(pages []listRequest, replies map[listRequest][]byte) error {
	v, err := s.readVersions(pages)
	if err != nil {
		return fmt.Errorf("read versions: %w", err)
	}
	v.goods = s.cache.get(v.keys)
	var rest []listRequest
	err = v.each(func(q listRequest, goods [][]byte) {
		if slices.ContainsFunc(goods, func(good []byte) bool { return good == nil }) {
			rest = append(rest, q)
		} else {
			replies[q] = v.pageJSON(q, goods)
		}
	})
	if err != nil || len(rest) == 0 {
		return err
	}
	if v, err = s.readWhole(rest); err != nil {
		return fmt.Errorf("read goods: %w", err)
	}
	s.cache.put(v.keys, v.goods)
	return v.each(func(q listRequest, goods [][]byte) { replies[q] = v.pageJSON(q, goods) })
}

// view is one moment of the list, at some pages.
type view struct {
	pages          []listRequest
	total, removed int64
	keys           []key    // of the goods on the pages, one page after the other
	goods          [][]byte // their JSON, nil where it is missing
}

// each calls f with every page and its goods. Positions have no gap, so the total tells where a page ends.
func (v *view) each(f func(q listRequest, goods [][]byte)) error {
	rest := v.goods
	for _, q := range v.pages {
		n := min(max(v.total-int64(q.offset)+1, 0), int64(q.limit))
		if n > int64(len(rest)) {
			return fmt.Errorf("meta counts %d goods, but not all of them have a position", v.total)
		}
		f(q, rest[:n])
		rest = rest[n:]
	}
	return nil
}

// ranges are the first and the last position of each page, as the queries take them.
func ranges(pages []listRequest) []any {
	var first, last pq.Int64Array
	for _, q := range pages {
		first, last = append(first, int64(q.offset)), append(last, int64(q.offset)+int64(q.limit)-1)
	}
	return []any{first, last}
}

//go:embed sql/queries/versions.sql
var readVersions string

// readVersions reads what stands at the positions of pages.
func (s *service) readVersions(pages []listRequest) (*view, error) {
	v := &view{pages: pages}
	return v, s.db.query(nil, readVersions, ranges(pages), func(rows *sql.Rows) error {
		return rows.Scan(&v.total, &v.removed, (*pq.Int64Array)(&v.keys))
	})
}

//go:embed sql/queries/page.sql
var readGoods string

// readWhole reads the goods of pages that are not empty.
func (s *service) readWhole(pages []listRequest) (*view, error) {
	v := &view{pages: pages}
	return v, s.db.query(nil, readGoods, ranges(pages), func(rows *sql.Rows) error {
		var g good
		if err := rows.Scan(append([]any{&v.total, &v.removed}, g.fields()...)...); err != nil {
			return err
		}
		text, err := encodeJSON(&g)
		v.keys, v.goods = append(v.keys, newKey(g.ID, g.version)), append(v.goods, text)
		return err
	})
}

// pageJSON puts a reply together.
func (v *view) pageJSON(q listRequest, page [][]byte) []byte {
	size := 128 // for meta
	for _, good := range page {
		size += len(good) + 1
	}
	b := make([]byte, 0, size)
	b = fmt.Appendf(b, `{"meta":{"total":%d,"removed":%d,"limit":%d,"offset":%d},"goods":[`, v.total, v.removed, q.limit, q.offset)
	for i, good := range page {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, good...)
	}
	return append(b, "]}\n"...)
}
