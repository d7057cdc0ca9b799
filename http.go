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
	errInternal      = &failure{500, 1, "errors.internal", none}
	errRouteNotFound = &failure{404, 5, "errors.route.notFound", none}
	errMethod        = &failure{405, 6, "errors.method.notAllowed", none}
	errUnavailable   = &failure{503, 8, "errors.service.unavailable", none}
)

//go:embed openapi.yaml
var openAPI []byte

type api struct {
	service *service
	health  *health
	counts  *metrics
	closing atomic.Bool // the service is shutting down
	log     *slog.Logger
}

// handler serves one route. The reply is JSON already, or becomes it; an error becomes the reply.
type handler func(w http.ResponseWriter, r *http.Request) (status int, reply any, err error)

// routes returns the API, with JSON errors for every other request.
func (a *api) routes() http.Handler {
	mux := http.NewServeMux()
	known := map[string]bool{}
	handle := func(method, path string, h handler) {
		known[path] = true
		counts := a.counts.route(path)
		mux.Handle(method+" "+path, a.answer(counts, h))
		mux.Handle(path, a.answer(counts, func(w http.ResponseWriter, _ *http.Request) (int, any, error) {
			w.Header().Set("Allow", strings.Replace(method, "GET", "GET, HEAD", 1))
			return 0, nil, errMethod
		}))
	}
	handle("POST", "/goods/create", a.create)
	handle("PATCH", "/goods/update", a.update)
	handle("PATCH", "/goods/reprioritize", a.reprioritize)
	handle("DELETE", "/goods/remove", a.remove)
	handle("GET", "/goods/list", a.list)
	handle("GET", "/healthz", func(http.ResponseWriter, *http.Request) (int, any, error) {
		return http.StatusOK, map[string]string{"status": "ok"}, nil
	})
	handle("GET", "/readyz", func(http.ResponseWriter, *http.Request) (int, any, error) {
		if a.closing.Load() || !a.health.up("postgres") {
			return http.StatusServiceUnavailable, a.health.report(), nil
		}
		return http.StatusOK, a.health.report(), nil
	})
	handle("GET", "/metrics", func(w http.ResponseWriter, _ *http.Request) (int, any, error) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		return http.StatusOK, a.counts.text(a.health), nil
	})
	handle("GET", "/openapi.yaml", func(w http.ResponseWriter, _ *http.Request) (int, any, error) {
		w.Header().Set("Content-Type", "application/yaml")
		return http.StatusOK, openAPI, nil
	})
	unknown := a.answer(a.counts.route("other"), func(http.ResponseWriter, *http.Request) (int, any, error) { return 0, nil, errRouteNotFound })
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !known[r.URL.EscapedPath()] { // paths are exact: the mux would redirect one that it can clean
			unknown.ServeHTTP(w, r)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

func (a *api) create(w http.ResponseWriter, r *http.Request) (int, any, error) {
	in := readInput(w, r, "name", "description")
	q := createRequest{ProjectID: in.number("projectId", 0, maxInt32), Key: in.idempotencyKey(r.Header)}
	name, description := in.name(), in.text("description", maxDescription)
	if err := in.fault(); err != nil {
		return 0, nil, err
	}
	q.Name = *name
	if description != nil {
		q.Description = *description
	}
	created, err := a.service.creates.do(r.Context(), q)
	if created.repeated {
		return http.StatusOK, &created.good, err
	}
	return http.StatusCreated, &created.good, err
}

func (a *api) update(w http.ResponseWriter, r *http.Request) (int, any, error) {
	in := readInput(w, r, "name", "description")
	q := editRequest{ID: in.number("id", 0, maxInt32), ProjectID: in.number("projectId", 0, maxInt32),
		Name: in.name(), Description: in.text("description", maxDescription)}
	if err := in.fault(); err != nil {
		return 0, nil, err
	}
	g, err := a.service.edits.do(r.Context(), q)
	return http.StatusOK, &g, err
}

func (a *api) reprioritize(w http.ResponseWriter, r *http.Request) (int, any, error) {
	in := readInput(w, r, "newPriority")
	q := moveRequest{in.number("id", 0, maxInt32), in.number("projectId", 0, maxInt32), in.integer("newPriority")}
	if err := in.fault(); err != nil {
		return 0, nil, err
	}
	places, err := a.service.moves.do(r.Context(), q)
	return http.StatusOK, map[string][]place{"priorities": places}, err
}

func (a *api) remove(w http.ResponseWriter, r *http.Request) (int, any, error) {
	in := readInput(w, r)
	q := editRequest{ID: in.number("id", 0, maxInt32), ProjectID: in.number("projectId", 0, maxInt32), Removed: true}
	if err := in.fault(); err != nil {
		return 0, nil, err
	}
	g, err := a.service.edits.do(r.Context(), q)
	return http.StatusOK, struct {
		ID         int32 `json:"id"`
		CampaignID int32 `json:"campaignId"`
		Removed    bool  `json:"removed"`
	}{g.ID, g.ProjectID, g.Removed}, err
}

func (a *api) list(w http.ResponseWriter, r *http.Request) (int, any, error) {
	in := readInput(w, r)
	q := listRequest{in.number("limit", 10, maxLimit), in.number("offset", 1, maxInt32)}
	if err := in.fault(); err != nil {
		return 0, nil, err
	}
	page, err := a.service.lists.do(r.Context(), q)
	return http.StatusOK, page, err
}

// answer adapts a handler: it writes the reply, and counts and logs the request once.
func (a *api) answer(counts *routeMetrics, h handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		id := r.Header.Get("X-Request-Id")
		if id == "" || len(id) > 128 || !printable(id) || strings.Contains(id, " ") {
			id = strconv.FormatUint(rand.Uint64(), 36)
		}
		w.Header().Set("X-Request-Id", id)
		w.Header()["Content-Type"] = jsonType // unless the handler has another
		status, reply, err := h.safely(w, r)
		if err != nil {
			f := errInternal
			if !errors.As(err, &f) && unavailable(err) {
				f = errUnavailable
				w.Header().Set("Retry-After", "1")
			} else if f == errInternal {
				a.log.Error("request failed", "id", id, "method", r.Method, "path", r.URL.Path, "err", err)
			}
			status, reply = f.Status, f
		}
		body, ok := reply.([]byte)
		if !ok {
			body, _ = encodeJSON(reply) // of texts and numbers: cannot fail
			body = append(body, '\n')
		}
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		w.WriteHeader(status)
		_, _ = w.Write(body) // its errors are the client's
		if errors.Is(r.Context().Err(), context.Canceled) {
			status = 499 // the client has gone, or is very slow: the reply is hardly read
		}
		took := time.Since(start).Seconds()
		counts.latency.observe(took)
		counts.statuses[status].Add(1)
		if a.log.Enabled(r.Context(), slog.LevelDebug) { // or its values would be made for nothing
			a.log.Debug("request", "id", id, "method", r.Method, "path", r.URL.Path, "status", status, "seconds", took, "err", err)
		}
	})
}

var jsonType = []string{"application/json"}

// safely turns a panic into an error.
func (h handler) safely(w http.ResponseWriter, r *http.Request) (status int, reply any, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return h(w, r)
}
