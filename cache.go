package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/gomodule/redigo/redis"
)

const (
	cacheTTL     = time.Minute            // a good is kept for so long, in Redis and in the process
	cacheTimeout = 200 * time.Millisecond // for each step of an exchange with Redis
	cachePause   = time.Second            // Redis is left alone for so long after a failure
	cacheChunk   = 100                    // keys of one MGET: 1,000 large goods in one take too long
	cacheFormat  = 1                      // of the JSON of a good: another format gets other keys

	cacheWriters   = 4  // goroutines that write to Redis
	cacheMaxWrites = 64 // writes that wait for them: goods of smallReply, or keys of a move; more are dropped
	// cacheConns are enough for every batcher of lists, for the writers, and for a ping.
	cacheConns = 4*(1+loneRequests) + cacheWriters + 1

	localBits    = 14      // 1<<localBits goods are kept in the process itself
	localMaxSize = 1 << 10 // bytes; larger goods are in Redis only
)

// key names one version of one good: its id, and the version in the lower 32 bits. The content of a version
// never changes, so what is cached under a key cannot be stale.
type key = int64

func newKey(id, version int32) key { return int64(id)<<32 | int64(version) }

// cache keeps versions of goods, as the JSON that a list sends: what small pages read is in Redis, for all
// replicas; the last small goods that were read or edited are in the process, too, which makes hot lists a
// seventh faster. Errors of Redis count as misses, and open a circuit breaker. All methods may be called
// concurrently.
type cache struct {
	pool      *redis.Pool
	namespace string
	metrics   *metrics
	writes    chan redisCommands // in the background
	breaker   breaker

	mu       sync.Mutex // guards what follows
	local    [1 << localBits]localGood
	serverID string    // the database that local belongs to
	emptied  time.Time // when local was emptied: what is in it is not older
}

// localGood is one slot of cache.local: the last good whose key hashed to it.
type localGood struct {
	key  key
	json []byte
}

// redisCommands is one command with several lists of arguments: it is sent once for each of them.
type redisCommands struct {
	command string
	args    [][]any
}

func newCache(url, namespace string, metrics *metrics) *cache {
	c := &cache{namespace: namespace, metrics: metrics, writes: make(chan redisCommands, cacheMaxWrites)}
	c.pool = &redis.Pool{
		MaxActive:   cacheConns,
		MaxIdle:     cacheConns,
		IdleTimeout: time.Minute,
		Dial:        func() (redis.Conn, error) { return dialRedis(url) },
		// After a failure the idle connections may lead to a server that is gone. Replacing them all is
		// better than a failure, and a pause of the breaker, for each.
		TestOnBorrow: func(_ redis.Conn, lastUsed time.Time) error {
			if c.breaker.failedSince(lastUsed) {
				return errors.New("older than a failure")
			}
			return nil
		},
	}
	for range cacheWriters {
		go func() {
			for w := range c.writes {
				c.run(w.command, w.args)
			}
		}()
	}
	return c
}

func dialRedis(url string) (redis.Conn, error) {
	return redis.DialURL(url,
		redis.DialConnectTimeout(cacheTimeout),
		redis.DialTLSHandshakeTimeout(cacheTimeout),
		redis.DialReadTimeout(cacheTimeout),
		redis.DialWriteTimeout(cacheTimeout))
}

// breaker is a circuit breaker: it is open for cachePause after each failure, and closed afterwards.
type breaker struct {
	mu     sync.Mutex
	failed time.Time
}

func (b *breaker) fail() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.failed = time.Now()
}

func (b *breaker) open() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return time.Since(b.failed) < cachePause
}

func (b *breaker) failedSince(t time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.failed.After(t)
}

// get returns the JSON of each good, nil where it is not cached. The caller must not change it. serverID
// says in which database the keys name versions.
func (c *cache) get(serverID string, keys []key) [][]byte {
	goods := c.getLocal(serverID, keys)
	var missing []int // indexes of keys
	for i, text := range goods {
		if text == nil {
			missing = append(missing, i)
		}
	}
	misses := len(missing)
	if misses > 0 {
		misses -= c.getShared(serverID, keys, missing, goods)
	}
	c.metrics.cacheHits.Add(int64(len(keys) - misses))
	c.metrics.cacheMisses.Add(int64(misses))
	return goods
}

// getLocal returns what the process itself has.
func (c *cache) getLocal(serverID string, keys []key) [][]byte {
	goods := make([][]byte, len(keys))
	c.mu.Lock()
	defer c.mu.Unlock()
	// Emptied as a whole, every cacheTTL, so that what no list asks for any more does not stay: a time for
	// each entry would cost more.
	if c.serverID != serverID || time.Since(c.emptied) > cacheTTL {
		clear(c.local[:])
		c.serverID = serverID
		c.emptied = time.Now()
	}
	for i, k := range keys {
		if entry := c.slot(k); entry.key == k {
			goods[i] = entry.json
		}
	}
	return goods
}

// slot returns where a good with this key is kept in the process. The multiplication spreads neighbours.
func (c *cache) slot(k key) *localGood {
	const oddRatio = 0x9E3779B97F4A7C15 // 2^64 divided by the golden ratio
	return &c.local[uint64(k)*oddRatio>>(64-localBits)]
}

// getShared puts what Redis has of the missing goods, which are indexes of keys, into goods, and returns
// how many they are.
func (c *cache) getShared(serverID string, keys []key, missing []int, goods [][]byte) int {
	var commands [][]any
	for chunk := range slices.Chunk(missing, cacheChunk) {
		var names []any
		for _, i := range chunk {
			names = append(names, c.redisKey(serverID, keys[i]))
		}
		commands = append(commands, names)
	}
	found := 0
	for n, reply := range c.run("MGET", commands) {
		values, err := redis.ByteSlices(reply, nil)
		if err != nil || len(values) != len(commands[n]) { // a broken proxy may do that
			c.fail()
			break
		}
		for j, value := range values {
			i := missing[n*cacheChunk+j]
			if isGood(value, keys[i]) {
				goods[i] = value
				found++
			}
		}
	}
	if found > 0 {
		c.putLocal(serverID, keys, goods)
	}
	return found
}

// isGood reports whether value looks like the JSON of the good that k names: Redis may hold anything. It
// relies on the order of the fields of type good: the id comes first, and a time last.
func isGood(value []byte, k key) bool {
	start := strconv.AppendInt([]byte(`{"id":`), k>>32, 10)
	start = append(start, `,"projectId":`...)
	return bytes.HasPrefix(value, start) && bytes.HasSuffix(value, []byte(`Z"}`))
}

// putLocal stores goods in the process. Those that are nil are left out. The caller must not change them
// afterwards.
func (c *cache) putLocal(serverID string, keys []key, goods [][]byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.serverID != serverID {
		return
	}
	for i, k := range keys {
		if goods[i] != nil && len(goods[i]) <= localMaxSize {
			*c.slot(k) = localGood{key: k, json: goods[i]}
		}
	}
}

// put stores goods, in Redis in the background. The caller must not change them afterwards.
func (c *cache) put(serverID string, keys []key, goods [][]byte) {
	c.putLocal(serverID, keys, goods)
	var commands [][]any
	for i, k := range keys {
		commands = append(commands, []any{c.redisKey(serverID, k), goods[i], "EX", int(cacheTTL.Seconds())})
	}
	c.runLater("SET", commands)
}

// dropShared deletes goods that no list asks for any more from Redis, in the background. That only frees
// memory of Redis before their cacheTTL ends. What the process has of them does no harm.
func (c *cache) dropShared(serverID string, keys []key) {
	var commands [][]any
	for _, k := range keys {
		commands = append(commands, []any{c.redisKey(serverID, k)})
	}
	c.runLater("UNLINK", commands)
}

// redisKey returns NAMESPACE:FORMAT-SERVER:ID:VERSION.
func (c *cache) redisKey(serverID string, k key) string {
	b := make([]byte, 0, 96)
	b = append(b, c.namespace...)
	b = append(b, ':')
	b = strconv.AppendInt(b, cacheFormat, 10)
	b = append(b, '-')
	b = append(b, serverID...)
	b = append(b, ':')
	b = strconv.AppendInt(b, k>>32, 10)
	b = append(b, ':')
	b = strconv.AppendInt(b, k&(1<<32-1), 10)
	return string(b)
}

// ping runs the commands that the cache needs, also while the breaker is open. It ignores ctx: each step has
// cacheTimeout.
func (c *cache) ping(context.Context) error {
	first := fmt.Sprintf("%s:%d:ping1", c.namespace, cacheFormat)
	second := fmt.Sprintf("%s:%d:ping2", c.namespace, cacheFormat)
	for _, w := range []redisCommands{
		{"SET", [][]any{{first, "", "EX", 1}}},
		{"MGET", [][]any{{first, second}}}, // a cluster refuses keys of two slots
		{"UNLINK", [][]any{{first}}},
	} {
		if _, err := c.exchange(w.command, w.args); err != nil {
			return err
		}
	}
	return nil
}

// runLater has a command run in the background, once for each list of arguments; or not at all, when Redis
// is slower than the writes come.
func (c *cache) runLater(command string, args [][]any) {
	if len(args) == 0 {
		return
	}
	select {
	case c.writes <- redisCommands{command: command, args: args}:
	default:
	}
}

// run has Redis run a command once for each list of arguments. It returns no replies if Redis fails, or
// failed a moment ago.
func (c *cache) run(command string, args [][]any) []any {
	if c.breaker.open() {
		return nil
	}
	replies, err := c.exchange(command, args)
	if err != nil {
		c.fail()
		return nil
	}
	return replies
}

// fail notes a failure of Redis.
func (c *cache) fail() {
	c.metrics.cacheErrors.Add(1)
	c.breaker.fail()
}

// exchange sends a command once for each list of arguments, and then reads all replies.
func (c *cache) exchange(command string, args [][]any) ([]any, error) {
	conn := c.pool.Get()
	defer conn.Close()
	for _, a := range args {
		if err := conn.Send(command, a...); err != nil {
			return nil, err
		}
	}
	if err := conn.Flush(); err != nil {
		return nil, err
	}
	replies := make([]any, 0, len(args))
	for range args {
		reply, err := conn.Receive()
		if err != nil {
			return nil, err
		}
		replies = append(replies, reply)
	}
	return replies, nil
}
