// A user of the generated client: it creates, repeats, lists, gets, changes what it has seen, and is refused.
package main

import (
	"context"
	"log"
	"os"
	"time"
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
	want(
		err == nil && list.JSON200 != nil && len(list.JSON200.Goods) == 1 && list.JSON200.Goods[0] == *made.JSON201,
		"one good",
		list,
		err,
	)
	project := int32(1)
	list, err = client.ListGoodsWithResponse(ctx, &ListGoodsParams{ProjectId: &project})
	want(err == nil && list.JSON200 != nil && list.JSON200.Meta.Total == 1, "one good of the project", list, err)
	project = 2
	list, err = client.ListGoodsWithResponse(ctx, &ListGoodsParams{ProjectId: &project})
	want(err == nil && list.JSON404 != nil && list.JSON404.Code == 4, "code 4", list, err)

	id := made.JSON201.Id
	got, err := client.GetGoodWithResponse(ctx, &GetGoodParams{Id: id, ProjectId: 1})
	want(err == nil && got.JSON200 != nil && *got.JSON200 == *made.JSON201, "the good", got, err)
	seen := got.HTTPResponse.Header.Get("ETag")
	change := &UpdateGoodParams{Id: id, ProjectId: 1, IfMatch: &seen}
	changed, err := client.UpdateGoodWithResponse(ctx, change, GoodUpdate{Name: "Claw hammer"})
	want(
		err == nil && changed.JSON200 != nil && changed.JSON200.Name == "Claw hammer",
		"a new name",
		changed,
		err,
	)
	late, err := client.UpdateGoodWithResponse(ctx, change, GoodUpdate{Name: "Mallet"})
	want(err == nil && late.JSON412 != nil && late.JSON412.Code == 12, "code 12", late, err)

	// ClickHouse has both versions a moment later.
	deadline := time.Now().Add(15 * time.Second)
	var versions []GoodVersion
	for len(versions) < 2 && time.Now().Before(deadline) {
		history, err := client.GetGoodHistoryWithResponse(ctx, &GetGoodHistoryParams{Id: id, ProjectId: 1})
		want(err == nil && history.JSON200 != nil, "a history", history, err)
		versions = history.JSON200.Versions
		<-time.After(50 * time.Millisecond)
	}
	want(
		len(versions) == 2 && versions[0].Name == "Claw hammer" && versions[1].Version == 1,
		"both versions",
		versions,
	)

	blank, err := client.CreateGoodWithResponse(ctx, &CreateGoodParams{ProjectId: 1}, NewGood{Name: " "})
	want(
		err == nil && blank.JSON400 != nil && blank.JSON400.Details["name"] != "",
		"what is wrong with the name",
		blank,
		err,
	)
}

func want(ok bool, what string, got ...any) {
	if !ok {
		log.Fatalf("want %s, got %+v", what, got)
	}
}
