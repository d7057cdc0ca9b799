package main

import (
	"errors"
	"testing"
)

// The pages that are read together have no more goods than memory allows, and as many as it does: one
// statement for each page would be slow.
func TestCountWithin(t *testing.T) {
	for _, test := range []struct {
		limits []int32
		want   int
	}{
		{[]int32{10}, 1},
		{[]int32{1000}, 1},
		{[]int32{10, 10, 10}, 3},
		{[]int32{500, 500, 1}, 2},
		{[]int32{500, 501}, 1},
		{[]int32{1000, 1}, 1},
		{[]int32{1000, 1000, 1000}, 1},
	} {
		var requests []listRequest
		for _, limit := range test.limits {
			requests = append(requests, listRequest{limit: limit})
		}
		if got := countWithin(requests, 1000); got != test.want {
			t.Errorf("of pages of %d goods: got %d, want %d", test.limits, got, test.want)
		}
	}
}

// What is cached may be longer than its estimate. A page is never longer than it may be, and never has fewer
// goods than it should.
func TestPageOfCachedGoods(t *testing.T) {
	q := listRequest{limit: 10, offset: 2, maxBytes: 12}
	s := &snapshot{total: 4, removed: 1, goods: [][]byte{[]byte("one"), []byte("two"), []byte("3rd")}}
	const want = `{"meta":{"total":4,"removed":1,"limit":10,"offset":2},"goods":[one,two,3rd]}` + "\n"
	if page, err := q.page(s); string(page) != want || err != nil {
		t.Errorf("got %q, %v, want %q", page, err, want)
	}
	s.goods[2] = []byte("third")
	page, err := q.page(s)
	if tooLarge, ok := errors.AsType[replyTooLargeError](err); !ok || tooLarge != 14 {
		t.Errorf("got %q, %v, want that 14 bytes are too large", page, err)
	}
	s.goods = s.goods[:2]
	if page, err := q.page(s); err == nil {
		t.Errorf("got %q with two goods of three, want an error", page)
	}
}
