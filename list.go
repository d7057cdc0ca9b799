package main

import (
	"database/sql"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/lib/pq"
)

const (
	maxLimit = 1000
	// maxRead limits the goods, and so the memory, of one exchange with the stores.
	maxRead = 1000
)

// listRequest asks for limit goods from the position offset on; both are at
// least 1.
type listRequest struct {
	limit, offset int32
}

func (q listRequest) apart() any { return nil }

// readPages answers a batch of lists. Equal requests share one reply.
func (s *service) readPages(requests []listRequest) ([]result[[]byte], error) {
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
	results := make([]result[[]byte], len(requests))
	for i, q := range requests {
		results[i].answer = replies[q]
	}
	return results, nil
}

// readTogether puts the replies of pages into replies. Each reply is one
// moment of the whole list: meta and the versions come from one statement, and
// a version never changes. A page with a good that is not cached is read
// again, whole, in one statement of its own.
func (s *service) readTogether(pages []listRequest, replies map[listRequest][]byte) error {
	v, err := s.readVersions(pages)
	if err != nil {
		return fmt.Errorf("read versions: %w", err)
	}
	v.goods = s.cache.get(v.keys)
	var rest []listRequest
	for _, q := range pages {
		if goods := v.page(q); slices.ContainsFunc(goods, isMissing) {
			rest = append(rest, q)
		} else {
			replies[q] = pageJSON(q, v, goods)
		}
	}
	if len(rest) == 0 {
		return nil
	}
	if v, err = s.readWhole(rest); err != nil {
		return fmt.Errorf("read goods: %w", err)
	}
	for _, q := range rest {
		replies[q] = pageJSON(q, v, v.page(q))
	}
	s.cache.put(v.keys, v.goods)
	return nil
}

func isMissing(good []byte) bool { return good == nil }

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
		for n := range q.limit {
			v.positions = append(v.positions, q.offset+n)
		}
	}
	if len(pages) > 1 {
		slices.Sort(v.positions)
		v.positions = slices.Compact(v.positions)
	}
	return v
}

func (v *view) page(q listRequest) [][]byte {
	begin, _ := slices.BinarySearch(v.positions, q.offset)
	return v.goods[min(begin, len(v.goods)):min(begin+int(q.limit), len(v.goods))]
}

// = ANY keeps its plan; a range would fall to a sequential scan once the plan
// is a generic one.
const readVersions = `
SELECT m.total, m.removed, ARRAY(
    SELECT g.id::bigint << 32 | g.version
    FROM goods AS g
    WHERE g.priority = ANY ($1)
    ORDER BY g.priority)
FROM meta AS m`

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

const readGoods = `
SELECT m.total, m.removed, ` + goodColumns + `
FROM meta AS m, goods AS g
WHERE g.priority = ANY ($1)
ORDER BY g.priority`

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
func pageJSON(q listRequest, v *view, goods [][]byte) []byte {
	size := 128 // for the rest
	for _, g := range goods {
		size += len(g) + 1
	}
	b := append(make([]byte, 0, size), `{"meta":{"total":`...)
	b = strconv.AppendInt(b, v.total, 10)
	b = append(b, `,"removed":`...)
	b = strconv.AppendInt(b, v.removed, 10)
	b = append(b, `,"limit":`...)
	b = strconv.AppendInt(b, int64(q.limit), 10)
	b = append(b, `,"offset":`...)
	b = strconv.AppendInt(b, int64(q.offset), 10)
	b = append(b, `},"goods":[`...)
	for i, g := range goods {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, g...)
	}
	return append(b, "]}\n"...)
}
