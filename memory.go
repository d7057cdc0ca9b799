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
	// used counts. turn is held while counting up, so that two callers never wait for each other's units.
	// first is held by a caller's first attempt while it waits for turn, so that one who comes again has
	// only one such before him.
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
	// building is held while a large reply is built. A caller that leaves gives its memory back at once,
	// but what it has asked for is finished: so there is one such reply at most.
	building *sync.Mutex
}

func newReplyMemory() replyMemory {
	return replyMemory{
		medium:   newMemory(mediumMemory),
		large:    newMemory(largeMemory),
		building: &sync.Mutex{},
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

func (e errReplyTooLarge) Error() string { return fmt.Sprintf("the reply has %d bytes", int(e)) }

// builder makes a reply of at most maxBytes, or returns errReplyTooLarge. reserved says that there is
// memory for it.
type builder func(ctx context.Context, maxBytes int, reserved bool) ([]byte, error)

// build returns a reply. One that is not small has its memory reserved: if that has to wait, the reply is
// built anew afterwards rather than held meanwhile. All of it ends within requestTimeout. The caller must
// call release when the reply has been sent; after an error, there is nothing to release.
func (m replyMemory) build(ctx context.Context, build builder) (reply []byte, release func(), err error) {
	start := time.Now()
	reply, err = build(ctx, smallReply, false)
	need := len(reply)
	if err == nil && need <= freeReply {
		return reply, func() {}, nil
	}
	if err == nil {
		moment, cancel := context.WithTimeout(ctx, reserveTimeout)
		defer cancel()
		release, err = m.reserve(moment, need, false)
		if err == nil {
			return reply, release, nil
		}
		reply = nil
		err = nil
		need = smallReply // what it was built within
	}
	ctx, cancel := context.WithDeadline(ctx, start.Add(requestTimeout))
	defer cancel()
	again := false
	for {
		if tooLarge, ok := errors.AsType[errReplyTooLarge](err); ok {
			need = int(tooLarge) + int(tooLarge)/8 // for escapes, which are not counted beforehand
		} else if err != nil {
			return nil, nil, err
		}
		release, err = m.reserve(ctx, need, again)
		if err != nil {
			return nil, nil, err
		}
		reply, err = build(ctx, need, true)
		if err == nil {
			return reply, release, nil
		}
		release()
		again = true
	}
}
