package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/gomodule/redigo/redis"
)

const (
	cacheLife    = 60 * time.Second       // of a good
	leaseLife    = 5 * time.Second        // longer than a read of Postgres may take
	cacheTimeout = 200 * time.Millisecond // for one exchange with Redis
	cachePause   = time.Second            // after a failure Redis is left alone
	cacheChunk   = 100                    // goods in one command: a page of large ones takes several
)

var errCachePaused = errors.New("redis failed a moment ago")

// cache keeps goods in Redis one by one, each under its position, as the JSON
// that a list sends.
//
// It can not serve what was overwritten. A reader that misses leaves a lease
// in the key before it reads Postgres, and fills only where its own lease
// still stands; a writer deletes the keys after its commit and before its
// answer, and with them every lease older than the commit. A writer that can
// not delete raises the epoch in Postgres instead: keys carry the epoch that
// the list has just read there, so the whole cache is out of reach at once,
// for every replica. The epoch is also raised whenever another Redis answers
// than before: it may have come back with old data.
//
// Redis is optional: every error means that Postgres answers. All methods may
// be called concurrently.
type cache struct {
	pool   *redis.Pool
	prefix string
	raise  func(context.Context) error // raises the epoch
	health *dependency
	counts *metrics
	// epoch is the one last seen in Postgres: a guess, checked by every list.
	epoch atomic.Int64
	// server is the run_id of the Redis last connected to.
	server atomic.Value
	// failedAt, in Unix nanoseconds, is when an exchange with Redis failed last.
	failedAt atomic.Int64
}

// fillSource sets KEYS[i] to ARGV[i+2] for ARGV[2] milliseconds wherever the
// lease ARGV[1] still stands, and returns how many that were.
const fillSource = `
local filled = 0
for i, key in ipairs(KEYS) do
	if redis.call('GET', key) == ARGV[1] then
		redis.call('SET', key, ARGV[i + 2], 'PX', ARGV[2])
		filled = filled + 1
	end
end
return filled`

var fillScript = redis.NewScript(-1, fillSource)

func newCache(url, namespace string, raise func(context.Context) error, health *dependency, counts *metrics) *cache {
	c := &cache{prefix: namespace + ":", raise: raise, health: health, counts: counts}
	c.pool = &redis.Pool{
		DialContext: func(ctx context.Context) (redis.Conn, error) {
			conn, err := redis.DialURLContext(ctx, url,
				redis.DialConnectTimeout(cacheTimeout),
				redis.DialReadTimeout(cacheTimeout),
				redis.DialWriteTimeout(cacheTimeout))
			if err != nil {
				return nil, err
			}
			if err := c.recognise(ctx, conn); err != nil {
				conn.Close()
				return nil, err
			}
			return conn, nil
		},
		// A connection older than the last failure may lead to a server that
		// is gone: better a new one than a failure for each of them.
		TestOnBorrow: func(_ redis.Conn, used time.Time) error {
			if used.UnixNano() < c.failedAt.Load() {
				return errCachePaused
			}
			return nil
		},
		MaxIdle:     16,
		IdleTimeout: time.Minute,
	}
	return c
}

func (c *cache) key(epoch int64, position int) string {
	b := make([]byte, 0, 48)
	b = append(b, c.prefix...)
	b = strconv.AppendInt(b, epoch, 10)
	b = append(b, ':')
	return string(strconv.AppendInt(b, int64(position), 10))
}

// keys are those of positions, as the arguments of as many commands as keep
// each of them short.
func (c *cache) keys(epoch int64, positions []int) [][]any {
	var commands [][]any
	for chunk := range slices.Chunk(positions, cacheChunk) {
		keys := make([]any, len(chunk))
		for i, p := range chunk {
			keys[i] = c.key(epoch, p)
		}
		commands = append(commands, keys)
	}
	return commands
}

// recognise raises the epoch if conn leads to another Redis than before: one
// that was started again, or a replica that has taken over, may hold what a
// writer has deleted.
func (c *cache) recognise(ctx context.Context, conn redis.Conn) error {
	info, err := redis.String(conn.Do("INFO", "server"))
	if err != nil {
		return err
	}
	_, rest, _ := strings.Cut(info, "run_id:")
	id, _, _ := strings.Cut(rest, "\r\n")
	if id == c.server.Load() {
		return nil
	}
	if err := c.raise(ctx); err != nil {
		return err
	}
	c.server.Store(id)
	return nil
}

// read asks Redis what it holds for each position. The function it returns
// must be called once, and waits for the answer: the good's JSON; what is no
// good (a lease) as it is; nil where there is nothing.
func (c *cache) read(ctx context.Context, epoch int64, positions []int) (answer func() ([][]byte, error)) {
	replies := c.send(ctx, "MGET", c.keys(epoch, positions))
	return func() ([][]byte, error) {
		all, err := replies()
		values := make([][]byte, 0, len(positions))
		for i := 0; i < len(all) && err == nil; i++ {
			var some [][]byte
			some, err = redis.ByteSlices(all[i], nil)
			values = append(values, some...)
		}
		if err == nil && len(values) != len(positions) {
			err = fmt.Errorf("mget: %d values for %d keys", len(values), len(positions))
		}
		return values, err
	}
}

// isGood tells a good's JSON from a lease, and from what others may have
// left under the key.
func isGood(value []byte) bool {
	return bytes.HasPrefix(value, goodPrefix) && bytes.HasSuffix(value, goodSuffix)
}

// lease is the right to fill some positions with what Postgres says later.
type lease struct {
	token     string
	epoch     int64
	positions []int
}

// lease takes the positions that nobody holds. It must be called before the
// goods are read from Postgres.
func (c *cache) lease(ctx context.Context, epoch int64, positions []int) (lease, error) {
	l := lease{token: "lease:" + rand.Text(), epoch: epoch}
	commands := make([][]any, len(positions))
	for i, p := range positions {
		commands[i] = []any{c.key(epoch, p), l.token, "NX", "PX", leaseLife.Milliseconds()}
	}
	replies, err := c.send(ctx, "SET", commands)()
	for i, reply := range replies {
		if reply != nil {
			l.positions = append(l.positions, positions[i])
		}
	}
	return l, err
}

// fill stores goods, by position, wherever the lease still stands.
func (c *cache) fill(ctx context.Context, l lease, goods map[int][]byte) error {
	conn, err := c.conn(ctx)
	if err != nil {
		return err
	}
	for chunk := range slices.Chunk(l.positions, cacheChunk) {
		var keys, values []any
		for _, p := range chunk {
			if good, ok := goods[p]; ok {
				keys = append(keys, c.key(l.epoch, p))
				values = append(values, good)
			}
		}
		args := slices.Concat([]any{len(keys)}, keys, []any{l.token, cacheLife.Milliseconds()}, values)
		var filled int
		if filled, err = redis.Int(fillScript.Do(conn, args...)); err != nil {
			break
		}
		c.counts.cacheRefused.Add(int64(len(keys) - filled))
	}
	return c.release(conn, err)
}

// drop deletes the goods at positions and every lease on them. The function it
// returns must be called once, and waits for the end; after an error the
// caller must raise the epoch.
func (c *cache) drop(ctx context.Context, epoch int64, positions []int) (done func() error) {
	replies := c.send(ctx, "UNLINK", c.keys(epoch, positions))
	return func() error {
		_, err := replies()
		return err
	}
}

// ping reports whether Redis takes a write, whatever went wrong a moment ago.
func (c *cache) ping(ctx context.Context) error {
	conn, err := c.pool.GetContext(ctx)
	if err != nil {
		return c.result(err)
	}
	_, err = conn.Do("SET", c.prefix+"ping", "", "PX", 1000)
	return c.release(conn, err)
}

// send has Redis run a command once for each list of arguments. The function
// it returns must be called once, and waits for the replies.
func (c *cache) send(ctx context.Context, command string, arguments [][]any) (replies func() ([]any, error)) {
	conn, err := c.conn(ctx)
	if err != nil {
		return func() ([]any, error) { return nil, err }
	}
	for i := 0; i < len(arguments) && err == nil; i++ {
		err = conn.Send(command, arguments[i]...)
	}
	if err == nil {
		err = conn.Flush()
	}
	return func() ([]any, error) {
		var all []any
		for len(all) < len(arguments) && err == nil {
			var reply any
			if reply, err = conn.Receive(); err == nil {
				all = append(all, reply)
			}
		}
		return all, c.release(conn, err)
	}
}

func (c *cache) conn(ctx context.Context) (redis.Conn, error) {
	if time.Since(time.Unix(0, c.failedAt.Load())) < cachePause {
		return nil, errCachePaused
	}
	conn, err := c.pool.GetContext(ctx)
	if err != nil {
		return nil, c.result(err)
	}
	return conn, nil
}

func (c *cache) release(conn redis.Conn, err error) error {
	conn.Close()
	return c.result(err)
}

// result notes how an exchange went, and passes its error on.
func (c *cache) result(err error) error {
	if err != nil {
		c.counts.cacheErrors.Add(1)
		c.failedAt.Store(time.Now().UnixNano())
		err = fmt.Errorf("redis: %w", err)
	}
	c.health.report("cache", err)
	return err
}
