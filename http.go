package main

import (
	_ "embed"
	"log/slog"
	"net/http"
	"strconv"
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
	policy  string // Content-Security-Policy of the page
	// Replies of 503: to calls that Postgres answers, and to those that ClickHouse does.
	outage, historyOutage *stateLog
	closing               atomic.Bool // set by serveHTTP at the end: /readyz and every reply say so
}

// quietEnd is for how long no request may fail before an outage counts as over.
const quietEnd = 5 * time.Second

func newAPI(service *service, health *health, metrics *metrics, log *slog.Logger) *api {
	return &api{
		service:       service,
		health:        health,
		metrics:       metrics,
		log:           log,
		origins:       http.NewCrossOriginProtection(),
		policy:        contentSecurityPolicy(pageHTML),
		outage:        &stateLog{log: log, name: "requests", quiet: quietEnd},
		historyOutage: &stateLog{log: log, name: "history", quiet: quietEnd},
	}
}

// handler serves one route. An error becomes the reply.
type handler func(w http.ResponseWriter, r *http.Request) (reply, error)

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
		metrics := a.metrics.addRoute(route.path)
		mux.Handle(route.method+" "+pattern, a.adapt(metrics, route.handle))
		mux.Handle(pattern, a.adapt(metrics, methodNotAllowed(route.method)))
	}
	notFound := a.adapt(a.metrics.addRoute("other"), routeNotFound)
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
	moved, err := a.service.Move(r.Context(), q)
	if err != nil {
		return reply{}, err
	}
	return reply{status: http.StatusOK, body: struct {
		Priorities []position `json:"priorities"`
	}{moved}}, nil
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
	if err != nil {
		return reply{}, err
	}
	return reply{status: http.StatusOK, body: page, release: release}, nil
}

func (a *api) get(w http.ResponseWriter, r *http.Request) (reply, error) {
	in := readInput(r)
	id, projectID := in.good()
	if err := in.err(); err != nil {
		return reply{}, err
	}
	g, err := a.service.Get(r.Context(), getRequest{id: id, projectID: projectID})
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
	if err != nil {
		return reply{}, err
	}
	return reply{status: http.StatusOK, body: page, release: release}, nil
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

func setETag(w http.ResponseWriter, g good) {
	w.Header().Set("ETag", `"`+strconv.Itoa(int(g.version))+`"`)
}
