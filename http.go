package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
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

//go:embed openapi.yaml
var openAPIDocument []byte

//go:embed page.html
var pageHTML []byte

// api serves the service's operations over HTTP.
type api struct {
	service *service
	health  *health
	metrics *metrics
	log     *slog.Logger
	origins *http.CrossOriginProtection
	policy  string      // Content-Security-Policy of the page
	failing runOfErrors // 503
	closing atomic.Bool // the service is shutting down
}

func newAPI(service *service, health *health, metrics *metrics, log *slog.Logger) *api {
	return &api{
		service: service,
		health:  health,
		metrics: metrics,
		log:     log,
		origins: http.NewCrossOriginProtection(),
		policy:  contentSecurityPolicy(pageHTML),
		failing: runOfErrors{state: stateLog{log: log, name: "requests"}},
	}
}

// handler serves one route. An error becomes the reply.
type handler func(w http.ResponseWriter, r *http.Request) (reply, error)

// reply is what a handler answers.
type reply struct {
	status  int
	body    any    // []byte is written as it is, anything else as JSON
	release func() // is called when the reply has been written, unless it is nil
}

// routes returns the API, with JSON errors for every other request.
func (a *api) routes() http.Handler {
	routes := []struct {
		method, path string
		handle       handler
	}{
		{"POST", "/goods/create", a.create},
		{"PATCH", "/goods/update", a.update},
		{"PATCH", "/goods/reprioritize", a.reprioritize},
		{"DELETE", "/goods/remove", a.remove},
		{"GET", "/goods/list", a.list},
		{"GET", "/goods/get", a.get},
		{"GET", "/goods/history", a.history},
		{"GET", "/", a.page},
		{"GET", "/healthz", a.healthz},
		{"GET", "/readyz", a.readyz},
		{"GET", "/metrics", a.writeMetrics},
		{"GET", "/openapi.yaml", a.openAPI},
	}
	mux := http.NewServeMux()
	known := map[string]bool{}
	for _, route := range routes {
		known[route.path] = true
		pattern := route.path
		if pattern == "/" {
			pattern = "/{$}" // or it would match every path
		}
		metrics := a.metrics.route(route.path)
		mux.Handle(route.method+" "+pattern, a.adapt(metrics, route.handle))
		mux.Handle(pattern, a.adapt(metrics, methodNotAllowed(route.method)))
	}
	notFound := a.adapt(a.metrics.route("other"), routeNotFound)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// Paths are exact: the mux would redirect one that it can clean.
		if !known[r.URL.EscapedPath()] {
			notFound.ServeHTTP(w, r)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

func methodNotAllowed(method string) handler {
	allow := method
	if method == "GET" {
		allow = "GET, HEAD"
	}
	return func(w http.ResponseWriter, _ *http.Request) (reply, error) {
		w.Header().Set("Allow", allow)
		return reply{}, errMethodNotAllowed
	}
}

func routeNotFound(http.ResponseWriter, *http.Request) (reply, error) {
	return reply{}, errRouteNotFound
}

func (a *api) create(w http.ResponseWriter, r *http.Request) (reply, error) {
	in := readInputWithBody(w, r, "name", "description")
	q := createRequest{ProjectID: in.required("projectId"), Key: in.idempotencyKey()}
	name := in.name()
	description := in.description()
	if err := in.err(); err != nil {
		return reply{}, err
	}
	q.Name = *name
	if description != nil {
		q.Description = *description
	}
	c, err := a.service.Create(r.Context(), q)
	if err != nil {
		return reply{}, err
	}
	setETag(w, c.good)
	if c.repeated {
		return reply{status: http.StatusOK, body: &c.good}, nil
	}
	return reply{status: http.StatusCreated, body: &c.good}, nil
}

func (a *api) update(w http.ResponseWriter, r *http.Request) (reply, error) {
	in := readInputWithBody(w, r, "name", "description")
	q := editRequest{Name: in.name(), Description: in.description(), Version: in.ifMatch()}
	q.ID, q.ProjectID = in.good()
	if err := in.err(); err != nil {
		return reply{}, err
	}
	g, err := a.service.Update(r.Context(), q)
	if err != nil {
		return reply{}, err
	}
	setETag(w, g)
	return reply{status: http.StatusOK, body: &g}, nil
}

func (a *api) reprioritize(w http.ResponseWriter, r *http.Request) (reply, error) {
	in := readInputWithBody(w, r, "newPriority")
	q := moveRequest{Priority: in.integer("newPriority"), Version: in.ifMatch()}
	q.ID, q.ProjectID = in.good()
	if err := in.err(); err != nil {
		return reply{}, err
	}
	positions, err := a.service.Move(r.Context(), q)
	if err != nil {
		return reply{}, err
	}
	return reply{status: http.StatusOK, body: struct {
		Priorities []position `json:"priorities"`
	}{positions}}, nil
}

func (a *api) remove(w http.ResponseWriter, r *http.Request) (reply, error) {
	in := readInput(r)
	q := editRequest{Version: in.ifMatch()}
	q.ID, q.ProjectID = in.good()
	if err := in.err(); err != nil {
		return reply{}, err
	}
	g, err := a.service.Remove(r.Context(), q)
	if err != nil {
		return reply{}, err
	}
	return reply{status: http.StatusOK, body: struct {
		ID         int32 `json:"id"`
		CampaignID int32 `json:"campaignId"`
		Removed    bool  `json:"removed"`
	}{g.ID, g.ProjectID, g.Removed}}, nil
}

func (a *api) list(_ http.ResponseWriter, r *http.Request) (reply, error) {
	in := readInput(r)
	q := listRequest{
		projectID: in.optional("projectId", 0, maxInt32),
		limit:     in.optional("limit", 10, maxLimit),
		offset:    in.optional("offset", 1, maxInt32),
	}
	if err := in.err(); err != nil {
		return reply{}, err
	}
	page, release, err := a.service.List(r.Context(), q)
	return reply{status: http.StatusOK, body: page, release: release}, err
}

func (a *api) get(w http.ResponseWriter, r *http.Request) (reply, error) {
	in := readInput(r)
	id, projectID := in.good()
	if err := in.err(); err != nil {
		return reply{}, err
	}
	g, err := a.service.Get(r.Context(), getRequest{id, projectID})
	if err != nil {
		return reply{}, err
	}
	setETag(w, g)
	return reply{status: http.StatusOK, body: &g}, nil
}

func (a *api) history(_ http.ResponseWriter, r *http.Request) (reply, error) {
	in := readInput(r)
	q := historyRequest{limit: in.optional("limit", 10, maxLimit), offset: in.optional("offset", 1, maxInt32)}
	q.id, q.projectID = in.good()
	if err := in.err(); err != nil {
		return reply{}, err
	}
	page, release, err := a.service.History(r.Context(), q)
	return reply{status: http.StatusOK, body: page, release: release}, err
}

func (a *api) page(w http.ResponseWriter, _ *http.Request) (reply, error) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Security-Policy", a.policy)
	w.Header().Set("Referrer-Policy", "no-referrer")
	return reply{status: http.StatusOK, body: pageHTML}, nil
}

func (a *api) healthz(http.ResponseWriter, *http.Request) (reply, error) {
	return reply{status: http.StatusOK, body: map[string]string{"status": "ok"}}, nil
}

func (a *api) readyz(http.ResponseWriter, *http.Request) (reply, error) {
	status := http.StatusOK
	if a.closing.Load() || !a.health.up("postgres") {
		status = http.StatusServiceUnavailable
	}
	return reply{status: status, body: a.health.report()}, nil
}

func (a *api) writeMetrics(w http.ResponseWriter, _ *http.Request) (reply, error) {
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	return reply{status: http.StatusOK, body: a.metrics.text(a.health)}, nil
}

func (a *api) openAPI(w http.ResponseWriter, _ *http.Request) (reply, error) {
	w.Header().Set("Content-Type", "application/yaml")
	return reply{status: http.StatusOK, body: openAPIDocument}, nil
}

// contentSecurityPolicy lets the page be what it is, talk to this service, and nothing else: its one style
// and its one script are known by their hashes.
func contentSecurityPolicy(page []byte) string {
	hash := func(element string) string {
		_, rest, _ := bytes.Cut(page, []byte("<"+element+">"))
		text, _, _ := bytes.Cut(rest, []byte("</"+element+">"))
		sum := sha256.Sum256(text)
		return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
	}
	return "default-src 'none'; connect-src 'self'; style-src " + hash("style") + "; script-src " + hash("script") +
		"; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}

func setETag(w http.ResponseWriter, g good) {
	w.Header().Set("ETag", `"`+strconv.Itoa(int(g.version))+`"`)
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
			w.Header().Set("Connection", "close") // the next request would find nobody
		}
		reply, err := a.serve(h, w, r)
		if reply.release != nil {
			defer reply.release()
		}
		if err != nil {
			reply.status, reply.body = a.failed(w, r, id, err)
		}
		write(w, reply)
		status := reply.status
		if errors.Is(r.Context().Err(), context.Canceled) {
			status = statusClientGone // or very slow: the reply is not read
		}
		took := time.Since(start)
		metrics.observe(status, took)
		if a.log.Enabled(r.Context(), slog.LevelDebug) { // or the values would be made for nothing
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
	if r.ContentLength != 0 && (r.Method == "GET" || r.Method == "HEAD" || r.Method == "DELETE") {
		ignoreBody(w, r)
	}
	answer, err = h(w, r)
	if err == nil && strings.HasPrefix(r.URL.Path, "/goods/") {
		a.failing.succeeded()
	}
	return answer, err
}

// failed returns the reply to a request that failed with err, which it logs unless it is the client's own.
func (a *api) failed(w http.ResponseWriter, r *http.Request, id string, err error) (status int, body any) {
	var f *failure
	switch {
	case errors.As(err, &f):
	case unavailable(err):
		f = errUnavailable
	default:
		f = errInternal
		a.log.Error("request failed", "id", id, "method", r.Method, "path", r.URL.Path, "err", err)
	}
	switch f {
	case errUnavailable:
		w.Header().Set("Retry-After", "1")
		if r.Context().Err() == nil { // else the client has only left
			a.failing.failed(err)
		}
	case errBodyTimeout, errTooLarge:
		w.Header().Set("Connection", "close") // the rest of the body is not read
	}
	return f.Status, f
}

// write writes a reply whole. Its errors are the client's business.
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
