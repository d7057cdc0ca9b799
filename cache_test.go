package main

import (
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// localCache is a cache without Redis: what is written there waits forever.
func localCache() *cache {
	writes := make(chan redisCommands, cacheMaxWrites)
	return &cache{namespace: "test", metrics: newMetrics(nil), writes: writes}
}

// What the process holds itself is a minute old at most, has a bounded size, and is of one database.
func TestLocalGoods(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := localCache()
		var keys []key
		var goods [][]byte
		for id := range int32(100) {
			for version := range int32(3) {
				keys = append(keys, newKey(1+id, 1+version))
				goods = append(goods, fmt.Appendf(nil, "good %d in version %d", 1+id, 1+version))
			}
		}
		held := func(serverID string) (n int) {
			for i, good := range c.getLocal(serverID, keys) {
				switch string(good) {
				case string(goods[i]):
					n++
				case "":
				default:
					t.Errorf("got %q, want %q or nothing", good, goods[i])
				}
			}
			return n
		}
		check := func(serverID string, least, most int, when string) {
			t.Helper()
			if n := held(serverID); n < least || n > most {
				t.Errorf("%s: got %d goods, want %d to %d", when, n, least, most)
			}
		}
		check("one", 0, 0, "before any was kept")
		c.putLocal("one", keys, goods)
		const most = 300
		check("one", most*9/10, most, "afterwards") // some share a slot
		time.Sleep(cacheTTL - time.Second)
		check("one", most*9/10, most, "a second before they are forgotten")
		c.putLocal("one", keys[:3], goods[:3]) // this makes no other good younger
		time.Sleep(2 * time.Second)
		check("one", 0, 0, "when they are forgotten")

		c.putLocal("one", keys, goods)
		check("two", 0, 0, "in another database")
		c.putLocal("one", keys, goods) // was read before the service got that database
		check("two", 0, 0, "in another database, after goods of the first")
		check("one", 0, 0, "in the first database again")

		largest, larger := make([]byte, localMaxSize), make([]byte, localMaxSize+1)
		c.putLocal("one", keys[:2], [][]byte{largest, larger})
		kept := c.getLocal("one", keys[:2])
		if len(kept[0]) != localMaxSize || kept[1] != nil {
			t.Errorf("kept %d and %d bytes, want %d and none", len(kept[0]), len(kept[1]), localMaxSize)
		}
	})
}

// Goods are not mixed up, however many lists need them at once.
func TestLocalGoodsAtOnce(t *testing.T) {
	c := localCache()
	var running sync.WaitGroup
	for range 8 {
		running.Go(func() {
			for n := range int32(2000) {
				keys := []key{newKey(1, 1+n), newKey(2, 1+n)}
				goods := [][]byte{fmt.Appendf(nil, "1:%d", 1+n), fmt.Appendf(nil, "2:%d", 1+n)}
				c.putLocal("one", keys, goods)
				for i, good := range c.getLocal("one", keys) {
					if good != nil && string(good) != string(goods[i]) {
						t.Errorf("got %q, want %q or nothing", good, goods[i])
					}
				}
			}
		})
	}
	running.Wait()
}

// Nobody waits for a Redis that takes nothing.
func TestWritesThatRedisDoesNotTake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := localCache()
		keys := []key{newKey(1, 1)}
		done := make(chan bool)
		go func() {
			for range 2 * cacheMaxWrites {
				c.put("one", keys, [][]byte{[]byte("good")})
				c.dropShared("one", keys)
			}
			close(done)
		}()
		synctest.Wait()
		select {
		case <-done:
		default:
			t.Errorf("%d writes are waited for", 4*cacheMaxWrites)
			for range 4 * cacheMaxWrites {
				<-c.writes
			}
		}
	})
}
