package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gomodule/redigo/redis"
)

const (
	cacheLife    = 60                     // seconds that a good is kept
	cacheTimeout = 200 * time.Millisecond // for one exchange with Redis
	cachePause   = time.Second            // after a failure Redis is left alone
	cacheChunk   = 100                    // goods in one MGET: a page of large ones takes several
	cacheFormat  = 1                      // of the JSON of a good: another one gets other keys
	localSlots   = 1 << 14                // goods that the process itself holds
	localMax     = 1 << 10                // bytes of each of them
)

// key names one version of one good: its id, and the version in the lower 32 bits. A version never changes, so what
// is cached under a key cannot be stale.
type key = int64

func newKey(id, version int32) key { return int64(id)<<32 | int64(version) }

// cache keeps versions of goods, as the JSON that a list sends: some in the process itself, and in Redis what all
// replicas share. What fails there is missing here. All methods may be called concurrently.
type cache struct {
	pool     *redis.Pool
	prefix   string
	counts   *metrics
	failedAt atomic.Int64 // when an exchange with Redis failed last, in Unix nanoseconds

	mu      sync.Mutex // guards what follows
	local   [localSlots]slot
	emptied time.Time // the last time that local was
}

// slot holds the last good with a key that belongs here.
type slot struct {
	key  key
	good []byte
}

func (c *cache) slot(k key) *slot { return &c.local[uint64(k)*0x9E3779B97F4A7C15>>(64-14)] }

func newCache(url, namespace string, counts *metrics) *cache {
	c := &cache{prefix: fmt.Sprintf("%s:%d:", namespace, cacheFormat), counts: counts}
	c.pool = &redis.Pool{
		MaxIdle:     8,
		IdleTimeout: time.Minute,
		Dial: func() (redis.Conn, error) {
			return redis.DialURL(url, redis.DialConnectTimeout(cacheTimeout), redis.DialReadTimeout(cacheTimeout), redis.DialWriteTimeout(cacheTimeout))
		},
		// A connection older than the last failure may lead to a server that is gone: better a new one than a failure
		// for each of them.
		TestOnBorrow: func(_ redis.Conn, used time.Time) error {
			if used.UnixNano() < c.failedAt.Load() {
				return errors.New("older than a failure")
			}
			return nil
		},
	}
	return c
}

// get returns the JSON of each good, nil where it is missing. Nobody may change it.
func (c *cache) get(keys []key) [][]byte {
	goods := make([][]byte, len(keys))
	var missing []int // indexes of keys
	var commands [][]any
	c.mu.Lock()
	if time.Since(c.emptied) > cacheLife*time.Second {
		clear(c.local[:])
		c.emptied = time.Now()
	}
	for i, k := range keys {
		if s := c.slot(k); s.key == k {
			goods[i] = s.good
		} else {
			missing = append(missing, i)
		}
	}
	c.mu.Unlock()
	for n, i := range missing {
		if n%cacheChunk == 0 {
			commands = append(commands, nil)
		}
		commands[n/cacheChunk] = append(commands[n/cacheChunk], c.name(keys[i]))
	}
	misses := len(missing)
	for n, reply := range c.do("MGET", commands) {
		texts, _ := redis.ByteSlices(reply, nil)
		for j, text := range texts {
			if i := missing[n*cacheChunk+j]; isGood(text, keys[i]) {
				goods[i] = text
				misses--
			}
		}
	}
	if misses < len(missing) {
		c.keep(keys, goods)
	}
	c.counts.cacheHits.Add(int64(len(keys) - misses))
	c.counts.cacheMisses.Add(int64(misses))
	return goods
}

// isGood tells the JSON of a good from what others may have left under its key.
func isGood(text []byte, k key) bool {
	rest, ok := bytes.CutPrefix(text, strconv.AppendInt([]byte(`{"id":`), k>>32, 10))
	return ok && bytes.HasPrefix(rest, []byte(`,"projectId":`)) && bytes.HasSuffix(rest, []byte(`Z"}`))
}

// keep holds goods in the process, for a minute at most, as Redis does.
func (c *cache) keep(keys []key, goods [][]byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, k := range keys {
		if goods[i] != nil && len(goods[i]) <= localMax {
			*c.slot(k) = slot{k, goods[i]}
		}
	}
}

// put stores goods. Redis gets them in the background.
func (c *cache) put(keys []key, goods [][]byte) {
	c.keep(keys, goods)
	var commands [][]any
	for i, k := range keys {
		commands = append(commands, []any{c.name(k), goods[i], "EX", cacheLife})
	}
	go c.do("SET", commands)
}

// drop deletes goods from Redis in the background. Nobody asks for them any more: it only frees memory early.
func (c *cache) drop(keys []key) {
	var commands [][]any
	for _, k := range keys {
		commands = append(commands, []any{c.name(k)})
	}
	go c.do("UNLINK", commands)
}

func (c *cache) name(k key) string {
	b := append(make([]byte, 0, 64), c.prefix...)
	b = append(strconv.AppendInt(b, k>>32, 10), ':')
	return string(strconv.AppendInt(b, k&(1<<32-1), 10))
}

// ping reports whether Redis takes a write, whatever went wrong a moment ago.
func (c *cache) ping(context.Context) error {
	_, err := c.exchange("SET", [][]any{{c.prefix + "ping", "", "EX", 1}})
	return err
}

// do has Redis run a command once for each list of arguments, and returns no replies if Redis fails, or failed a
// moment ago.
func (c *cache) do(command string, arguments [][]any) []any {
	if len(arguments) == 0 || time.Since(time.Unix(0, c.failedAt.Load())) < cachePause {
		return nil
	}
	replies, err := c.exchange(command, arguments)
	if err != nil {
		c.counts.cacheErrors.Add(1)
		c.failedAt.Store(time.Now().UnixNano())
	}
	return replies
}

func (c *cache) exchange(command string, arguments [][]any) (replies []any, err error) {
	conn := c.pool.Get()
	defer conn.Close()
	for _, a := range arguments {
		_ = conn.Send(command, a...) // its error stays with the connection
	}
	err = conn.Flush()
	for range arguments {
		if err == nil {
			var reply any
			reply, err = conn.Receive()
			replies = append(replies, reply)
		}
	}
	return replies, err
}
