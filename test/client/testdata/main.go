// A user of the generated client: it creates, repeats, lists, and is refused.
package main

import (
	"context"
	"log"
	"os"
)

func main() {
	ctx := context.Background()
	client, err := NewClientWithResponses(os.Args[1])
	want(err == nil, "a client", err)

	key := "a key"
	once := &CreateGoodParams{ProjectId: 1, IdempotencyKey: &key}
	made, err := client.CreateGoodWithResponse(ctx, once, NewGood{Name: "Hammer"})
	want(err == nil && made.JSON201 != nil && made.JSON201.Name == "Hammer", "a good", made, err)
	again, err := client.CreateGoodWithResponse(ctx, once, NewGood{Name: "Hammer"})
	want(err == nil && again.JSON200 != nil && *again.JSON200 == *made.JSON201, "the same good", again, err)
	other, err := client.CreateGoodWithResponse(ctx, once, NewGood{Name: "Saw"})
	want(err == nil && other.JSON422 != nil && other.JSON422.Code == 9, "code 9", other, err)

	limit := int32(5)
	list, err := client.ListGoodsWithResponse(ctx, &ListGoodsParams{Limit: &limit})
	want(err == nil && list.JSON200 != nil && len(list.JSON200.Goods) == 1 && list.JSON200.Goods[0] == *made.JSON201, "one good", list, err)

	blank, err := client.CreateGoodWithResponse(ctx, &CreateGoodParams{ProjectId: 1}, NewGood{Name: " "})
	want(err == nil && blank.JSON400 != nil && blank.JSON400.Details["name"] != "", "what is wrong with the name", blank, err)
}

func want(ok bool, what string, got ...any) {
	if !ok {
		log.Fatalf("want %s, got %+v", what, got)
	}
}
