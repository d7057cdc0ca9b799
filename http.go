package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"runtime/debug"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// The failures that only HTTP knows.
var (
	errInternal      = &failure{status: http.StatusInternalServerError, code: 1, message: "errors.internal"}
	errRouteNotFound = &failure{status: http.StatusNotFound, code: 5, message: "errors.route.notFound"}
	errMethod        = &failure{status: http.StatusMethodNotAllowed, code: 6, message: "errors.method.notAllowed"}
	errTooLarge      = &failure{status: http.StatusRequestEntityTooLarge, code: 7, message: "errors.request.tooLarge"}
	errUnavailable   = &failure{status: http.StatusServiceUnavailable, code: 8, message: "errors.service.unavailable"}
)

//go:embed openapi.yaml
var openAPI []byte

// api serves the service over HTTP.
type api struct {
	service *service
	health  *health
	counts  *metrics
	closing atomic.Bool // the service is shutting down
	log     *slog.Logger
}

// handler serves one route. An error becomes the reply.
type handler func(w http.ResponseWriter, r *http.Request) error

// routes returns the API, with JSON errors for every other request.
func (a *api) routes() http.Handler {
	mux := http.NewServeMux()
	known := map[string]bool{}
	handle := func(method, path string, h handler) {
		known[path] = true
		counts := a.counts.route(path)
		mux.Handle(method+" "+path, a.answer(counts, h))
		mux.Handle(path, a.answer(counts, func(w http.ResponseWriter, _ *http.Request) error {
			w.Header().Set("Allow", strings.Replace(method, "GET", "GET, HEAD", 1))
			return errMethod
		}))
	}
	handle("POST", "/goods/create", a.create)
	handle("PATCH", "/goods/update", a.update)
	handle("PATCH", "/goods/reprioritize", a.reprioritize)
	handle("DELETE", "/goods/remove", a.remove)
	handle("GET", "/goods/list", a.list)
	handle("GET", "/healthz", func(w http.ResponseWriter, _ *http.Request) error {
		return writeJSON(w, http.StatusOK, map[string]string{"status": "ok"}, nil)
	})
	handle("GET", "/readyz", func(w http.ResponseWriter, _ *http.Request) error {
		status := http.StatusOK
		if a.closing.Load() || !a.health.up("postgres") {
			status = http.StatusServiceUnavailable
		}
		return writeJSON(w, status, a.health, nil)
	})
	handle("GET", "/metrics", func(w http.ResponseWriter, _ *http.Request) error {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		return a.counts.write(w, a.health)
	})
	handle("GET", "/openapi.yaml", func(w http.ResponseWriter, _ *http.Request) error {
		w.Header().Set("Content-Type", "application/yaml")
		_, err := w.Write(openAPI)
		return err
	})
	unknown := a.answer(a.counts.route("other"), func(http.ResponseWriter, *http.Request) error { return errRouteNotFound })
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !known[r.URL.EscapedPath()] { // paths are exact: the mux would redirect one that it can clean
			unknown.ServeHTTP(w, r)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

func (a *api) create(w http.ResponseWriter, r *http.Request) error {
	in := readInput(w, r, "name", "description")
	q := createRequest{ProjectID: in.number("projectId"), Key: in.idempotencyKey(r.Header)}
	name, description := in.name(), in.text("description", maxDescription)
	if err := in.fault(); err != nil {
		return err
	}
	q.Name = *name
	if description != nil {
		q.Description = *description
	}
	created, err := a.service.creates.do(r.Context(), q)
	status := http.StatusCreated
	if created.repeated {
		status = http.StatusOK
	}
	return writeJSON(w, status, &created.good, err)
}

func (a *api) update(w http.ResponseWriter, r *http.Request) error {
	in := readInput(w, r, "name", "description")
	q := editRequest{ID: in.number("id"), ProjectID: in.number("projectId"), Name: in.name(), Description: in.text("description", maxDescription)}
	if err := in.fault(); err != nil {
		return err
	}
	g, err := a.service.edits.do(r.Context(), q)
	return writeJSON(w, http.StatusOK, &g, err)
}

func (a *api) reprioritize(w http.ResponseWriter, r *http.Request) error {
	in := readInput(w, r, "newPriority")
	q := moveRequest{in.number("id"), in.number("projectId"), in.integer("newPriority")}
	if err := in.fault(); err != nil {
		return err
	}
	places, err := a.service.moves.do(r.Context(), q)
	return writeJSON(w, http.StatusOK, map[string][]place{"priorities": places}, err)
}

func (a *api) remove(w http.ResponseWriter, r *http.Request) error {
	in := readInput(w, r)
	q := editRequest{ID: in.number("id"), ProjectID: in.number("projectId"), Removed: true}
	if err := in.fault(); err != nil {
		return err
	}
	g, err := a.service.edits.do(r.Context(), q)
	return writeJSON(w, http.StatusOK, struct {
		ID         int32 `json:"id"`
		CampaignID int32 `json:"campaignId"`
		Removed    bool  `json:"removed"`
	}{g.ID, g.ProjectID, g.Removed}, err)
}

func (a *api) list(w http.ResponseWriter, r *http.Request) error {
	in := readInput(w, r)
	q := listRequest{in.numberOr("limit", 10, maxLimit), in.numberOr("offset", 1, maxInt32)}
	if err := in.fault(); err != nil {
		return err
	}
	page, err := a.service.lists.do(r.Context(), q)
	if err == nil {
		writeBody(w, http.StatusOK, page)
	}
	return err
}

// answer adapts a handler: it turns its error, or panic, into a reply, and
// counts and logs the request once.
func (a *api) answer(counts *routeMetrics, h handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		id := requestID(r)
		w.Header().Set("X-Request-Id", id)
		reply := &recorder{ResponseWriter: w, status: http.StatusOK}
		err := h.safely(reply, r)
		if err != nil {
			a.writeError(reply, r, id, err)
		}
		if errors.Is(r.Context().Err(), context.Canceled) {
			reply.status = 499 // the client has gone, or is very slow: the reply is hardly read
		}
		took := time.Since(start).Seconds()
		counts.latency.observe(took)
		counts.statuses[reply.status].Add(1)
		if a.log.Enabled(r.Context(), slog.LevelDebug) { // or its values would be made for nothing
			a.log.Debug("request", "id", id, "method", r.Method, "path", r.URL.Path, "status", reply.status, "seconds", took, "err", err)
		}
	})
}

// safely turns a panic into an error.
func (h handler) safely(w http.ResponseWriter, r *http.Request) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return h(w, r)
}

func (a *api) writeError(w http.ResponseWriter, r *http.Request, id string, err error) {
	var f *failure
	switch {
	case errors.As(err, &f):
	case unavailable(err):
		f = errUnavailable
		w.Header().Set("Retry-After", "1")
	default:
		f = errInternal
		a.log.Error("request failed", "id", id, "method", r.Method, "path", r.URL.Path, "err", err)
	}
	details := f.details
	if details == nil {
		details = map[string]string{}
	}
	_ = writeJSON(w, f.status, struct {
		Code    int               `json:"code"`
		Message string            `json:"message"`
		Details map[string]string `json:"details"`
	}{f.code, f.message, details}, nil)
}

// recorder remembers the status of a reply.
type recorder struct {
	http.ResponseWriter
	status int
}

func (r *recorder) WriteHeader(status int) {
	r.status = status
	r.ResponseWriter.WriteHeader(status)
}

// Unwrap lets MaxBytesReader reach the connection.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

// requestID returns the caller's X-Request-Id if it is fit for a log, else a
// new one.
func requestID(r *http.Request) string {
	id := r.Header.Get("X-Request-Id")
	if id == "" || len(id) > 128 || strings.ContainsFunc(id, func(c rune) bool { return c <= ' ' || c > '~' }) {
		id = strconv.FormatUint(rand.Uint64(), 36)
	}
	return id
}

// writeJSON writes v, or returns err if there is one. It encodes v before it
// writes anything.
func writeJSON(w http.ResponseWriter, status int, v any, err error) error {
	if err != nil {
		return err
	}
	body, err := encodeJSON(v)
	if err == nil {
		writeBody(w, status, append(body, '\n'))
	}
	return err
}

var jsonType = []string{"application/json"}

// writeBody sends a reply that is JSON already. Its errors are the client's.
func writeBody(w http.ResponseWriter, status int, body []byte) {
	w.Header()["Content-Type"] = jsonType
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	_, _ = w.Write(body)
}
