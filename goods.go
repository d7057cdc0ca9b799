package main

import (
	"context"
	"database/sql"
	"fmt"
	"log/slog"
	"math"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/lib/pq"
)

const (
	maxInt32       = math.MaxInt32
	maxName        = 255
	maxDescription = 10_000
)

// good is one row of goods, as clients see it.
type good struct {
	ID          int32     `json:"id"`
	ProjectID   int32     `json:"projectId"`
	Name        string    `json:"name"`
	Description string    `json:"description"`
	Priority    int32     `json:"priority"`
	Removed     bool      `json:"removed"`
	CreatedAt   timestamp `json:"createdAt"`
}

// The JSON of a good begins and ends like this.
var goodPrefix, goodSuffix = []byte(`{"id":`), []byte(`Z"}`)

// timestamp is a time in UTC with microseconds, all six digits written.
type timestamp struct{ time.Time }

func (t timestamp) MarshalJSON() ([]byte, error) {
	return t.UTC().AppendFormat(nil, `"2006-01-02T15:04:05.000000Z"`), nil
}

// goodColumns is what scanGoods expects.
const goodColumns = `id, project_id, name, description, priority, removed, created_at`

// scanGoods reads and closes rows.
func scanGoods(rows *sql.Rows, err error) ([]good, error) {
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var goods []good
	for rows.Next() {
		var g good
		if err := rows.Scan(&g.ID, &g.ProjectID, &g.Name, &g.Description, &g.Priority, &g.Removed, &g.CreatedAt.Time); err != nil {
			return nil, err
		}
		goods = append(goods, g)
	}
	return goods, rows.Err()
}

// service answers the API's calls. Its batchers serve until close.
type service struct {
	db     *database
	slow   *database // the same, with more patience: for long moves
	cache  *cache
	wake   func() // tells the relay that something was written
	log    *slog.Logger
	counts *metrics
	health *health

	lists   batcher[listRequest, []byte]
	creates batcher[createRequest, good]
	updates batcher[updateRequest, good]
	removes batcher[target, good]

	// doubtAt is when a write was left whose outcome, or effect on the cache,
	// is not known, in Unix nanoseconds: see write.
	doubtAt atomic.Int64
	// moving holds one token for the only move that runs: they would wait for
	// each other in Postgres, and hold all its connections meanwhile.
	moving  chan struct{}
	closing atomic.Bool
}

// start makes the batchers ready. Each runs one batch at a time: while it waits
// for a store, the next one gathers, and more would only be smaller.
func (s *service) start() {
	s.moving = make(chan struct{}, 1)
	const most = 64
	startBatcher(s, &s.lists, "list", most, s.readPages)
	startBatcher(s, &s.creates, "create", most, s.insertGoods)
	startBatcher(s, &s.updates, "update", most, s.updateGoods)
	startBatcher(s, &s.removes, "remove", most, s.removeGoods)
}

func startBatcher[Q, A any](s *service, b *batcher[Q, A], name string, limit int, run func(context.Context, []Q) ([]result[A], error)) {
	b.name, b.limit, b.run = name, limit, run
	b.sizes, b.log = s.counts.batch(name), s.log
}

// close ends the batchers. It must come after the last request.
func (s *service) close() {
	s.lists.close()
	s.creates.close()
	s.updates.close()
	s.removes.close()
}

type createRequest struct {
	projectID   int32
	name        string
	description string
}

func (s *service) create(w http.ResponseWriter, r *http.Request) error {
	in, err := readInput(w, r, "name", "description")
	if err != nil {
		return err
	}
	q := createRequest{projectID: int32(in.number("projectId", maxInt32)), name: in.name()}
	if d := in.text("description", maxDescription); d != nil {
		q.description = *d
	}
	if err := in.fault(); err != nil {
		return err
	}
	g, err := s.creates.do(r.Context(), q)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusCreated, g)
}

// A request for a project that does not exist yields no row. The rows are
// inserted, and returned, in the order of the requests.
const insertGoods = `
INSERT INTO goods (project_id, name, description)
SELECT c.id, r.name, r.description
FROM unnest($1::integer[], $2::text[], $3::text[]) WITH ORDINALITY AS r (project_id, name, description, n)
JOIN campaigns AS c ON c.id = r.project_id
ORDER BY r.n
RETURNING ` + goodColumns

func (s *service) insertGoods(ctx context.Context, requests []createRequest) ([]result[good], error) {
	projects := make([]int32, len(requests))
	names := make([]string, len(requests))
	descriptions := make([]string, len(requests))
	for i, q := range requests {
		projects[i], names[i], descriptions[i] = q.projectID, q.name, q.description
	}
	results := make([]result[good], len(requests))
	err := s.write(ctx, s.db, func(tx *sql.Tx) ([]int, error) {
		goods, err := scanGoods(s.db.query(ctx, tx, insertGoods, pq.Array(projects), pq.Array(names), pq.Array(descriptions)))
		if err != nil {
			return nil, fmt.Errorf("insert goods: %w", err)
		}
		for i, q := range requests {
			if len(goods) > 0 && goods[0].ProjectID == q.projectID {
				results[i].answer, goods = goods[0], goods[1:]
			} else {
				results[i].err = errCampaignNotFound
			}
		}
		return nil, nil // nothing can be cached of a place that did not exist
	})
	return results, err
}

// target names the good that a request is about.
type target struct {
	id        int32
	projectID int32
}

// readTarget reads the query of a call about one good.
func (in *input) target() target {
	return target{int32(in.number("id", maxInt32)), int32(in.number("projectId", maxInt32))}
}

type updateRequest struct {
	target
	name        string
	description *string // nil leaves it
}

func (s *service) update(w http.ResponseWriter, r *http.Request) error {
	in, err := readInput(w, r, "name", "description")
	if err != nil {
		return err
	}
	q := updateRequest{in.target(), in.name(), in.text("description", maxDescription)}
	if err := in.fault(); err != nil {
		return err
	}
	g, err := s.updates.do(r.Context(), q)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, g)
}

const updateGoods = `
UPDATE goods AS g
SET name = r.name,
    description = coalesce(r.description, g.description)
FROM unnest($1::integer[], $2::text[], $3::text[]) AS r (id, name, description)
WHERE g.id = r.id
RETURNING g.id, g.project_id, g.name, g.description, g.priority, g.removed, g.created_at`

func (s *service) updateGoods(ctx context.Context, requests []updateRequest) ([]result[good], error) {
	targets := make([]target, len(requests))
	for i, q := range requests {
		targets[i] = q.target
	}
	return s.edit(ctx, targets, func(tx *sql.Tx, turn []int) (*sql.Rows, error) {
		ids := make([]int32, len(turn))
		names := make([]string, len(turn))
		descriptions := make([]*string, len(turn))
		for i, n := range turn {
			ids[i], names[i], descriptions[i] = requests[n].id, requests[n].name, requests[n].description
		}
		return s.db.query(ctx, tx, updateGoods, pq.Array(ids), pq.Array(names), pq.Array(descriptions))
	})
}

func (s *service) remove(w http.ResponseWriter, r *http.Request) error {
	in, err := readInput(w, r)
	if err != nil {
		return err
	}
	q := in.target()
	if err := in.fault(); err != nil {
		return err
	}
	g, err := s.removes.do(r.Context(), q)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, struct {
		ID         int32 `json:"id"`
		CampaignID int32 `json:"campaignId"`
		Removed    bool  `json:"removed"`
	}{g.ID, g.ProjectID, g.Removed})
}

const removeGoods = `
UPDATE goods
SET removed = true
WHERE id = ANY ($1)
RETURNING ` + goodColumns

func (s *service) removeGoods(ctx context.Context, targets []target) ([]result[good], error) {
	return s.edit(ctx, targets, func(tx *sql.Tx, turn []int) (*sql.Rows, error) {
		ids := make([]int32, len(turn))
		for i, n := range turn {
			ids[i] = targets[n].id
		}
		return s.db.query(ctx, tx, removeGoods, pq.Array(ids))
	})
}

// Goods are always locked in the order of their ids, here and in a move, so
// that transactions wait for each other in one direction only.
const lockGoods = `
SELECT ` + goodColumns + `
FROM goods
WHERE id = ANY ($1)
ORDER BY id
FOR UPDATE`

// edit locks the targets, and has apply change them in one transaction. A good
// that is named more than once is changed in as many turns: apply gets the
// indexes of targets for one turn and returns the changed rows.
func (s *service) edit(ctx context.Context, targets []target, apply func(tx *sql.Tx, turn []int) (*sql.Rows, error)) ([]result[good], error) {
	ids := make([]int32, len(targets))
	left := make([]int, len(targets))
	for i, t := range targets {
		ids[i], left[i] = t.id, i
	}
	results := make([]result[good], len(targets))
	err := s.write(ctx, s.db, func(tx *sql.Tx) ([]int, error) {
		// In company, nobody waits for a good that somebody else has locked:
		// what is not found may be that, and is looked for alone.
		lock, notFound := lockGoods, errGoodNotFound
		if len(targets) > 1 {
			lock, notFound = lockGoods+` SKIP LOCKED`, errTryAlone
		}
		goods, err := scanGoods(s.db.query(ctx, tx, lock, pq.Array(ids)))
		if err != nil {
			return nil, fmt.Errorf("lock goods: %w", err)
		}
		locked := make(map[int32]good, len(goods))
		for _, g := range goods {
			locked[g.ID] = g
		}
		var positions []int
		for len(left) > 0 {
			var turn, later []int
			named := map[int32]bool{}
			for _, i := range left {
				t := targets[i]
				if g, ok := locked[t.id]; !ok {
					results[i].err = notFound
				} else if g.ProjectID != t.projectID || g.Removed {
					results[i].err = errGoodNotFound
				} else if named[t.id] {
					later = append(later, i)
				} else {
					named[t.id] = true
					turn = append(turn, i)
				}
			}
			if len(turn) == 0 {
				break
			}
			changed, err := scanGoods(apply(tx, turn))
			if err != nil {
				return nil, fmt.Errorf("change goods: %w", err)
			}
			if len(changed) != len(turn) {
				return nil, fmt.Errorf("changed %d of %d goods", len(changed), len(turn))
			}
			for _, g := range changed {
				locked[g.ID] = g
				positions = append(positions, int(g.Priority))
			}
			for _, i := range turn {
				results[i].answer = locked[targets[i].id]
			}
			left = later
		}
		return positions, nil
	})
	return results, err
}
