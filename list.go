package main

import (
	"database/sql"
	_ "embed"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

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
	for _, q := range pages {
		if slices.ContainsFunc(v.page(q), func(good []byte) bool { return good == nil }) {
			rest = append(rest, q)
		} else {
			replies[q] = v.pageJSON(q)
		}
	}
	if len(rest) == 0 {
		return nil
	}
	if v, err = s.readWhole(rest); err != nil {
		return fmt.Errorf("read goods: %w", err)
	}
	for _, q := range rest {
		replies[q] = v.pageJSON(q)
	}
	s.cache.put(v.keys, v.goods)
	return nil
}

// view is a moment of the list: all goods at some positions.
type view struct {
	total, removed int64
	positions      pq.Int32Array // in order, also past the end
	keys           []key         // of the positions up to the end
	goods          [][]byte      // their JSON, nil where it is missing
}

func newView(pages []listRequest) *view {
	v := &view{}
	for _, q := range pages {
		for n := int32(0); n < q.limit && q.offset <= math.MaxInt32-n; n++ {
			v.positions = append(v.positions, q.offset+n)
		}
	}
	slices.Sort(v.positions)
	v.positions = slices.Compact(v.positions)
	return v
}

func (v *view) page(q listRequest) [][]byte {
	begin, _ := slices.BinarySearch(v.positions, q.offset)
	return v.goods[min(begin, len(v.goods)):min(begin+int(q.limit), len(v.goods))]
}

//go:embed sql/queries/versions.sql
var readVersions string

// readVersions reads what stands at the positions of pages.
func (s *service) readVersions(pages []listRequest) (*view, error) {
	v := newView(pages)
	var array []byte
	err := s.db.query(nil, readVersions, []any{v.positions}, func(rows *sql.Rows) error { return rows.Scan(&v.total, &v.removed, &array) })
	for text := range strings.SplitSeq(strings.Trim(string(array), "{}"), ",") {
		if n, bad := strconv.ParseInt(text, 10, 64); bad == nil { // else the array is empty
			v.keys = append(v.keys, key(n))
		}
	}
	return v, err
}

//go:embed sql/queries/page.sql
var readGoods string

// readWhole reads the goods of pages that are not empty.
func (s *service) readWhole(pages []listRequest) (*view, error) {
	v := newView(pages)
	return v, s.db.query(nil, readGoods, []any{v.positions}, func(rows *sql.Rows) error {
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
func (v *view) pageJSON(q listRequest) []byte {
	page := v.page(q)
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
