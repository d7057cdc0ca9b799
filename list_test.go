package main

import "testing"

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
