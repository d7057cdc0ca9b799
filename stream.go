package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	natsTimeout  = 2 * time.Second // for one answer of NATS
	streamLimit  = 1_000_000       // messages; past it NATS refuses, and events wait in the outbox
	messageLimit = 500_000         // bytes, or what the server allows if that is less
)

// stream is the service's stream in NATS: a work queue of messages, each of them a JSON array of events.
// NATS may lose everything: an event stays in the outbox until ClickHouse holds it. All methods may be
// called concurrently.
type stream struct {
	conn      *nats.Conn
	js        jetstream.JetStream
	namespace string
	replicas  int
	metrics   *metrics
	log       *slog.Logger

	mu        sync.Mutex      // guards what follows
	owner     string          // the database whose events the stream is for, "" until prepare is called
	lastError error           // the last one since the connection was made; without a connection, the reason
	noted     map[string]bool // the errors that were logged since
}

// openStream returns the stream of a namespace. It is connected to NATS, and again after each failure, in the
// background. Only a bad URL is an error.
func openStream(url, namespace string, replicas int, metrics *metrics, log *slog.Logger) (*stream, error) {
	s := &stream{namespace: namespace, replicas: replicas, metrics: metrics, log: log}
	s.noted = map[string]bool{}
	conn, err := nats.Connect(url,
		nats.Name("goods"),
		nats.RetryOnFailedConnect(true),
		nats.MaxReconnects(-1),
		nats.IgnoreAuthErrorAbort(), // a password may be corrected
		nats.ReconnectWait(500*time.Millisecond),
		nats.ReconnectBufSize(-1), // what was not sent is still in the outbox
		nats.Timeout(natsTimeout),
		nats.FlusherTimeout(natsTimeout), // the default is a minute, for a frozen server that takes no bytes
		nats.PingInterval(time.Second),   // a frozen server is left within three seconds
		nats.MaxPingsOutstanding(2),
		nats.ConnectHandler(func(*nats.Conn) { s.forgetErrors() }),
		nats.ReconnectHandler(func(*nats.Conn) { s.forgetErrors() }),
		nats.ReconnectErrHandler(func(_ *nats.Conn, err error) { s.noteError(err) }),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) { s.noteError(err) }),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { s.noteError(err) }))
	if err != nil {
		return nil, errors.New("NATS_URL cannot be used") // err may have a password in it
	}
	js, err := jetstream.New(conn, jetstream.WithPublishAsyncTimeout(natsTimeout))
	if err != nil {
		return nil, err
	}
	s.conn = conn
	s.js = js
	return s, nil
}

// noteError logs why the connection fails, or what NATS does not permit: each reason once, until there is a
// new connection.
func (s *stream) noteError(err error) {
	if err == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lastError = err
	if !s.noted[err.Error()] {
		s.noted[err.Error()] = true
		s.log.Warn("nats connection", "err", err)
	}
}

func (s *stream) forgetErrors() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lastError = nil
	clear(s.noted)
}

func (s *stream) name() string    { return strings.ToUpper(s.namespace) }
func (s *stream) subject() string { return s.namespace + ".events" }

// connected returns an error while there is no connection, with the reason.
func (s *stream) connected() error {
	if s.conn.IsConnected() {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lastError != nil {
		return fmt.Errorf("%w: %w", nats.ErrDisconnected, s.lastError)
	}
	return nats.ErrDisconnected
}

// ownerPrefix begins the description of a stream. The rest is the owner.
const ownerPrefix = "goods of the database "

func (s *stream) config(owner string) jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name:        s.name(),
		Description: ownerPrefix + owner,
		Subjects:    []string{s.subject()},
		Retention:   jetstream.WorkQueuePolicy,
		Discard:     jetstream.DiscardNew,
		Storage:     jetstream.FileStorage,
		MaxMsgs:     streamLimit,
		Replicas:    s.replicas,
	}
}

// checkOurs returns an error if a stream of our name belongs to another application, or has the events of
// another database, which would get into our history. Nothing of that stream is changed.
func (s *stream) checkOurs(found jetstream.StreamConfig) error {
	if found.Retention != jetstream.WorkQueuePolicy || !slices.Equal(found.Subjects, []string{s.subject()}) {
		return fmt.Errorf("the stream %s belongs to another application (its subjects are %s): "+
			"set NAMESPACE to another name", s.name(), strings.Join(found.Subjects, ", "))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	owner, known := strings.CutPrefix(found.Description, ownerPrefix)
	if known && s.owner != "" && owner != s.owner {
		return fmt.Errorf("the stream %s has the events of another database, %s (ours is %s): set NAMESPACE "+
			"to another name, or delete the stream if that database is no longer used",
			s.name(), owner, s.owner)
	}
	return nil
}

// prepare makes the stream what it has to be, for the events of the database owner, and reports whether it
// had to be created.
func (s *stream) prepare(owner string) (created bool, err error) {
	s.mu.Lock()
	s.owner = owner
	s.mu.Unlock()
	if err := s.connected(); err != nil {
		return false, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), natsTimeout)
	defer cancel()
	found, err := s.js.Stream(ctx, s.name())
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		_, err = s.js.CreateStream(ctx, s.config(owner))
		return err == nil, err
	}
	if err != nil {
		return false, err
	}
	if err := s.checkOurs(found.CachedInfo().Config); err != nil {
		return false, err
	}
	updated, err := s.js.UpdateStream(ctx, s.config(owner))
	if err != nil {
		return false, err
	}
	if s.replicas > 1 && updated.CachedInfo().Cluster == nil { // which NATS accepts, and keeps one replica
		return false, fmt.Errorf("NATS_REPLICAS is %d, but NATS is no cluster", s.replicas)
	}
	return false, nil
}

// ping reports whether the stream can be used. It also tells the metrics how many messages are in it.
func (s *stream) ping(ctx context.Context) error {
	if err := s.connected(); err != nil {
		return err
	}
	found, err := s.js.Stream(ctx, s.name())
	if err != nil {
		return err
	}
	info := found.CachedInfo()
	s.metrics.backlog.Store(int64(info.State.Msgs))
	return s.checkOurs(info.Config)
}

// maxMessage returns how many bytes a message may have.
func (s *stream) maxMessage() int {
	const header = 512 // is enough for ours
	return min(messageLimit, int(s.conn.MaxPayload())-header)
}
