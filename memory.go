package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// The memory for replies that are being sent is bounded, however many clients ask and however slowly they
// read. A reply of up to freeReply bytes needs no reservation: it costs its connection no more than the
// buffers that it has anyway.
const (
	freeReply    = 16 << 10
	smallReply   = 256 << 10 // limit of the first try, for which no memory is reserved
	mediumReply  = 1 << 20
	mediumMemory = 32 << 20 // for replies of up to mediumReply: large ones do not hold them up
	largeMemory  = 64 << 20 // for the rest; the largest page has 62 MB
	memoryUnit   = 64 << 10
	// reserveTimeout is how long a reply that is built already waits for its memory.
	reserveTimeout = time.Millisecond
)

// memory is an amount of memory that replies share. All methods may be called concurrently.
type memory struct {
	used chan struct{} // has an element for each unit in use
	// turn is held by the one caller that takes units: two callers with a part each would wait forever.
	turn chan struct{}
	// newcomers is held by one first-time caller until it has its units; the others wait for newcomers before
	// they wait for turn. A caller that comes again, as its reply turned out to be larger, waits for turn
	// only, and so has one of them before it at most.
	newcomers chan struct{}
}

func newMemory(bytes int) *memory {
	return &memory{
		used:      make(chan struct{}, bytes/memoryUnit),
		turn:      make(chan struct{}, 1),
		newcomers: make(chan struct{}, 1),
	}
}

// reserve waits for so many bytes, in the order of the calls; with again, before first-time callers. It fails
// with errNoMemory when ctx ends. The caller must call release, once, when it no longer needs them.
func (m *memory) reserve(ctx context.Context, bytes int, again bool) (release func(), err error) {
	if !again {
		if err := enter(ctx, m.newcomers); err != nil {
			return nil, err
		}
		defer func() { <-m.newcomers }()
	}
	if err := enter(ctx, m.turn); err != nil {
		return nil, err
	}
	defer func() { <-m.turn }()
	units := min((bytes+memoryUnit-1)/memoryUnit, cap(m.used))
	for n := range units {
		if err := enter(ctx, m.used); err != nil {
			m.free(n)
			return nil, err
		}
	}
	return func() { m.free(units) }, nil
}

// enter waits for room in c. It fails with errNoMemory when ctx ends.
func enter(ctx context.Context, c chan struct{}) error {
	select {
	case c <- struct{}{}:
		return nil
	case <-ctx.Done():
		return errNoMemory
	}
}

func (m *memory) free(units int) {
	for range units {
		<-m.used
	}
}

// replyMemory is the memory of all replies.
type replyMemory struct {
	medium, large *memory
	// buildingList is locked while a large list is built. Two batchers and their retries build them, and go
	// on when their caller has left and has given back its memory. Histories need no lock: see readHistory.
	buildingList *sync.Mutex
}

func newReplyMemory() replyMemory {
	return replyMemory{
		medium:       newMemory(mediumMemory),
		large:        newMemory(largeMemory),
		buildingList: &sync.Mutex{},
	}
}

// reserve is memory.reserve, for a reply of so many bytes.
func (m replyMemory) reserve(ctx context.Context, bytes int, again bool) (release func(), err error) {
	switch {
	case bytes <= freeReply:
		return func() {}, nil
	case bytes <= mediumReply:
		return m.medium.reserve(ctx, bytes, again)
	default:
		return m.large.reserve(ctx, bytes, again)
	}
}

// replyTooLargeError is the error of a reply that would be larger than allowed: its size in bytes.
type replyTooLargeError int

// withEscapes adds an eighth, for the escapes of JSON, which an estimate does not count.
func (e replyTooLargeError) withEscapes() int { return int(e) + int(e)/8 }

func (e replyTooLargeError) Error() string { return fmt.Sprintf("the reply has %d bytes", int(e)) }

// builder makes a reply of at most maxBytes, or returns a replyTooLargeError. reserved says that there is
// memory for it.
type builder func(ctx context.Context, maxBytes int, reserved bool) ([]byte, error)

// build returns a reply. One that is not small has its memory reserved. While that has to wait, no reply is
// held: it is built anew afterwards. All of it ends within requestTimeout. The caller must call release when
// the reply has been sent; after an error, there is nothing to release.
func (m replyMemory) build(ctx context.Context, read builder) (reply []byte, release func(), err error) {
	deadline := time.Now().Add(requestTimeout)
	reply, err = read(ctx, smallReply, false)
	if tooLarge, ok := errors.AsType[replyTooLargeError](err); ok {
		return m.buildReserved(ctx, deadline, tooLarge.withEscapes(), read)
	}
	if err != nil {
		return nil, nil, err
	}
	if len(reply) <= freeReply {
		return reply, func() {}, nil
	}
	short, cancel := context.WithTimeout(ctx, reserveTimeout)
	release, err = m.reserve(short, len(reply), false)
	cancel()
	if err != nil { // the reply is dropped here
		return m.buildReserved(ctx, deadline, smallReply, read)
	}
	return reply, release, nil
}

// buildReserved reserves need bytes, and builds the reply then. Where the reply turns out to be larger, it
// does both again, before those that wait for the first time: else each of many that were estimated too low
// would be built once, and none would have the time for a second attempt.
func (m replyMemory) buildReserved(ctx context.Context, deadline time.Time, need int, read builder) (
	reply []byte, release func(), err error) {
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	for again := false; ; again = true {
		release, err = m.reserve(ctx, need, again)
		if err != nil {
			return nil, nil, err
		}
		reply, err = read(ctx, need, true)
		if err == nil {
			return reply, release, nil
		}
		release()
		tooLarge, ok := errors.AsType[replyTooLargeError](err)
		if !ok {
			return nil, nil, err
		}
		need = tooLarge.withEscapes()
	}
}
