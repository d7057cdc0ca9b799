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
	smallReply   = 256 << 10 // what lists first try to answer with
	mediumReply  = 1 << 20
	mediumMemory = 32 << 20 // for replies of up to mediumReply: large ones do not hold them up
	largeMemory  = 64 << 20 // for the rest; the largest page has 62 MB
	memoryUnit   = 64 << 10
	// reserveTimeout is how long a reply that is built already waits for its memory.
	reserveTimeout = time.Millisecond
)

// memory is an amount of memory that replies share. All methods may be called concurrently.
type memory struct {
	// used has an element for each unit in use. turn is held by the one caller that is taking units: two
	// that each have a part would wait for each other forever. first is held as well by a caller that has
	// not waited before: only one such caller competes for turn, so a caller that comes again waits for at
	// most one of them.
	first, turn, used chan struct{}
}

func newMemory(bytes int) *memory {
	return &memory{
		first: make(chan struct{}, 1),
		turn:  make(chan struct{}, 1),
		used:  make(chan struct{}, bytes/memoryUnit),
	}
}

// reserve waits for so many bytes, in the order of the calls; with again, before those that have not waited
// yet. It fails with errNoMemory when ctx ends. The caller must call release when it no longer needs them.
func (m *memory) reserve(ctx context.Context, bytes int, again bool) (release func(), err error) {
	if !again {
		if err := enter(ctx, m.first); err != nil {
			return nil, err
		}
		defer func() { <-m.first }()
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
	return sync.OnceFunc(func() { m.free(units) }), nil
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
	// A caller that leaves gives its memory back at once, but what it has asked for is finished. Each of
	// these is held while a large reply is built, so there is one such list and one such history at most.
	buildingList, buildingHistory *sync.Mutex
}

func newReplyMemory() replyMemory {
	return replyMemory{
		medium:          newMemory(mediumMemory),
		large:           newMemory(largeMemory),
		buildingList:    &sync.Mutex{},
		buildingHistory: &sync.Mutex{},
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

// errReplyTooLarge is the error of a reply that has more bytes than it may have: so many.
type errReplyTooLarge int

// withEscapes adds an eighth, for the escapes of JSON, which an estimate does not count.
func (e errReplyTooLarge) withEscapes() int { return int(e) + int(e)/8 }

func (e errReplyTooLarge) Error() string { return fmt.Sprintf("the reply has %d bytes", int(e)) }

// builder makes a reply of at most maxBytes, or returns errReplyTooLarge. reserved says that there is
// memory for it.
type builder func(ctx context.Context, maxBytes int, reserved bool) ([]byte, error)

// build returns a reply. One that is not small has its memory reserved: if that has to wait, the reply is
// built anew afterwards rather than held meanwhile. All of it ends within requestTimeout. The caller must
// call release when the reply has been sent; after an error, there is nothing to release.
func (m replyMemory) build(ctx context.Context, build builder) (reply []byte, release func(), err error) {
	deadline := time.Now().Add(requestTimeout)
	reply, err = build(ctx, smallReply, false)
	need := smallReply
	tooLarge, ok := errors.AsType[errReplyTooLarge](err)
	switch {
	case ok:
		need = tooLarge.withEscapes()
	case err != nil:
		return nil, nil, err
	case len(reply) <= freeReply:
		return reply, func() {}, nil
	default:
		moment, cancel := context.WithTimeout(ctx, reserveTimeout)
		release, err = m.reserve(moment, len(reply), false)
		cancel()
		if err == nil {
			return reply, release, nil
		}
		reply = nil // it is built anew when there is memory
	}
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	again := false
	for {
		release, err = m.reserve(ctx, need, again)
		if err != nil {
			return nil, nil, err
		}
		reply, err = build(ctx, need, true)
		if err == nil {
			return reply, release, nil
		}
		release()
		tooLarge, ok := errors.AsType[errReplyTooLarge](err)
		if !ok {
			return nil, nil, err
		}
		need = tooLarge.withEscapes()
		again = true
	}
}
