package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"runtime/debug"
	"strconv"
	"strings"
	"time"
)

// reply is what a handler answers.
type reply struct {
	status  int
	body    any    // []byte is written as it is, anything else as JSON
	release func() // is called when the reply has been written, unless it is nil
}

// adapt makes an http.Handler of a handler: it writes the reply, and counts and logs the request once.
func (a *api) adapt(metrics *routeMetrics, h handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		id := requestID(r)
		w.Header().Set("X-Request-Id", id)
		w.Header().Set("Cache-Control", "no-store") // or a cache on the way serves old lists
		w.Header().Set("X-Content-Type-Options", "nosniff")
		if a.closing.Load() {
			w.Header().Set("Connection", "close") // the next request needs another replica
		}
		answer, err := a.serve(h, w, r)
		if answer.release != nil {
			defer answer.release()
		}
		if err != nil {
			answer.status, answer.body = a.failed(w, r, id, err)
		}
		// A body that is still on its way may have ended the context (see ignoreBody), which then says
		// nothing about the client.
		bodyArrived := ignoreBody(w, r) && answer.status != http.StatusRequestTimeout
		write(w, answer)
		status := answer.status
		if bodyArrived && errors.Is(r.Context().Err(), context.Canceled) {
			status = statusClientGone // before the reply, or while it read it
		}
		took := time.Since(start)
		metrics.observe(status, took)
		if a.log.Enabled(r.Context(), slog.LevelDebug) { // spares the arguments in the usual case
			a.log.Debug("request", "id", id, "method", r.Method, "path", r.URL.Path, "status", status,
				"seconds", took.Seconds(), "err", err)
		}
	})
}

// statusClientGone is counted for requests whose client does not wait for the reply. nginx has the same.
const statusClientGone = 499

// requestID returns the client's X-Request-Id, or a new one.
func requestID(r *http.Request) string {
	id := r.Header.Get("X-Request-Id")
	if id == "" || len(id) > 128 || !printable(id) || strings.Contains(id, " ") {
		return strconv.FormatUint(rand.Uint64(), 36)
	}
	return id
}

// serve runs a handler, unless the request comes from a page of another origin. It turns a panic into an
// error.
func (a *api) serve(h handler, w http.ResponseWriter, r *http.Request) (answer reply, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	if a.origins.Check(r) != nil {
		return reply{}, errCrossOrigin
	}
	answer, err = h(w, r)
	if err == nil && strings.HasPrefix(r.URL.Path, "/goods/") {
		a.outageOf(r).report(nil)
	}
	return answer, err
}

// outageOf returns where it is noted whether calls like r get 503.
func (a *api) outageOf(r *http.Request) *stateLog {
	if r.URL.Path == "/goods/history" {
		return a.historyOutage
	}
	return a.outage
}

// failed returns the reply to a request that failed with err, which it logs unless it is the client's own.
func (a *api) failed(w http.ResponseWriter, r *http.Request, id string, err error) (status int, body any) {
	f, ok := errors.AsType[*failure](err)
	switch {
	case ok:
	case unavailable(err):
		f = errUnavailable
	default:
		f = errInternal
		a.log.Error("request failed", "id", id, "method", r.Method, "path", r.URL.Path, "err", err)
	}
	switch f {
	case errUnavailable:
		w.Header().Set("Retry-After", "1")
		if r.Context().Err() == nil { // a client that left early is no outage
			a.outageOf(r).report(err)
		}
	case errBodyTimeout, errTooLarge:
		closeAfterReply(w)
	}
	return f.Status, f
}

// write writes a whole reply. An error means that the client has left, and is ignored.
func write(w http.ResponseWriter, r reply) {
	body, ok := r.body.([]byte)
	if !ok {
		body = append(encodeJSON(r.body), '\n')
	}
	if w.Header().Get("Content-Type") == "" {
		w.Header().Set("Content-Type", "application/json")
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(r.status)
	_, _ = w.Write(body)
}

// contentSecurityPolicy allows the page its one style and its one script, known by their hashes, and
// requests to this service; nothing else.
func contentSecurityPolicy(page []byte) string {
	hash := func(element string) string {
		_, rest, _ := bytes.Cut(page, []byte("<"+element+">"))
		text, _, _ := bytes.Cut(rest, []byte("</"+element+">"))
		sum := sha256.Sum256(text)
		return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
	}
	return "default-src 'none'; connect-src 'self'; img-src data:; style-src " + hash("style") +
		"; script-src " + hash("script") + "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}
