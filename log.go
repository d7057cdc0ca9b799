package main

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

const (
	logQueue        = 1000 // lines that wait to be written
	logFlushTimeout = time.Second
)

// logWriter writes lines in the background, so that nothing waits for whoever reads the log: lines that do
// not fit into its queue are dropped, and counted in the log later. It may be used concurrently.
type logWriter struct {
	lines   chan []byte // nil is the end; it is not closed, as lines may still come
	dropped atomic.Int64
	ended   chan struct{} // closed when the last line has been written
}

func newLogWriter(w io.Writer) *logWriter {
	l := &logWriter{lines: make(chan []byte, logQueue), ended: make(chan struct{})}
	go func() {
		defer close(l.ended)
		for line := range l.lines {
			if n := l.dropped.Swap(0); n > 0 {
				fmt.Fprintf(w, `{"level":"WARN","msg":"log lines dropped","lines":%d}`+"\n", n)
			}
			if line == nil {
				return
			}
			_, _ = w.Write(line) // fails when the reader has ended, which is no reason not to serve
		}
	}()
	return l
}

// Write queues a line, or drops it when the queue is full. It never waits and never fails.
func (l *logWriter) Write(line []byte) (int, error) {
	select {
	case l.lines <- bytes.Clone(line):
	default:
		l.dropped.Add(1)
	}
	return len(line), nil
}

// flush writes what is queued, for logFlushTimeout at most. Nothing is written afterwards.
func (l *logWriter) flush() {
	timeout := time.After(logFlushTimeout)
	select {
	case l.lines <- nil:
	case <-timeout:
		return
	}
	select {
	case <-l.ended:
	case <-timeout:
	}
}

// newLog returns a logger that writes text when w leads to a terminal, and JSON otherwise.
func newLog(w io.Writer, terminal bool, level slog.Level) *slog.Logger {
	options := &slog.HandlerOptions{Level: level}
	if terminal {
		return slog.New(slog.NewTextHandler(w, options))
	}
	return slog.New(slog.NewJSONHandler(w, options))
}

// isTerminal reports whether w is a terminal.
func isTerminal(w io.Writer) bool {
	file, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := file.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// stateLog logs the first failure, with its cause, and the recovery: the first success that has no failure
// within quiet before it. It may be used concurrently.
type stateLog struct {
	log   *slog.Logger
	name  string
	quiet time.Duration

	failing atomic.Bool // is read without mu, so that a success costs nothing
	mu      sync.Mutex  // guards what follows, and changes of failing
	last    time.Time   // the last failure
}

func (s *stateLog) report(err error) {
	if err == nil && !s.failing.Load() {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		if !s.failing.Swap(true) {
			s.log.Warn("failing", "name", s.name, "err", err)
		}
		s.last = time.Now()
		return
	}
	if time.Since(s.last) >= s.quiet && s.failing.Swap(false) {
		s.log.Info("recovered", "name", s.name)
	}
}
