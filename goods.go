package main

import (
	"bytes"
	"context"
	"database/sql"
	_ "embed"
	"encoding/json"
	"fmt"
	"log/slog"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// good is one version of one row of goods. Its JSON is what clients see; isGood relies on the order of the
// fields.
type good struct {
	ID          int32     `json:"id"`
	ProjectID   int32     `json:"projectId"`
	Name        string    `json:"name"`
	Description string    `json:"description"`
	Priority    int32     `json:"priority"`
	Removed     bool      `json:"removed"`
	CreatedAt   timestamp `json:"createdAt"`
	version     int32
}

// fields returns where to scan a row of goods. Every query that reads whole goods names these columns in
// this order.
func (g *good) fields() []any {
	return []any{
		&g.ID,
		&g.ProjectID,
		&g.Name,
		&g.Description,
		&g.Priority,
		&g.Removed,
		&g.CreatedAt.Time,
		&g.version,
	}
}

func (g *good) key() key { return newKey(g.ID, g.version) }

// timestamp is a time that is written in UTC, with all six digits of the microseconds.
type timestamp struct{ time.Time }

func (t timestamp) MarshalJSON() ([]byte, error) {
	return t.UTC().AppendFormat(nil, `"2006-01-02T15:04:05.000000Z"`), nil
}

// encodeJSON is json.Marshal without the escapes that only HTML needs. It panics on what encoding/json
// cannot encode: the service has only strings, numbers, booleans, times, and structs, slices and maps of
// them.
func encodeJSON(v any) []byte {
	var b bytes.Buffer
	encoder := json.NewEncoder(&b)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(v); err != nil {
		panic(err)
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n"))
}

// service has the operations of the API. Each joins a batch and ends within requestTimeout. An error is a
// *failure, or else a 503 if unavailable(err), and a 500 if not. All methods may be called concurrently.
type service struct {
	db        *database
	cache     *cache
	events    *eventLog
	replies   replyMemory
	wakeRelay func() // says that there are new events

	creates      *batcher[createRequest, created]
	edits        *batcher[editRequest, good]
	moves        *batcher[moveRequest, []position]
	gets         *batcher[getRequest, good]
	allGoods     *pageReader
	projectGoods *pageReader

	histories, largeHistories *batcher[historyRequest, []byte]
}

const (
	batchLimit = 64 // requests in one batch
	// batchers are those that use Postgres: create, edit, reprioritize, get, and small and large lists of
	// all goods and of a project.
	batchers = 8
	// requestConns are enough for every batcher to run a batch and retry requests alone, and for a ping.
	requestConns = batchers*(1+loneRequests) + 1
)

func newService(db *database, cache *cache, events *eventLog, wakeRelay func(), metrics *metrics,
	log *slog.Logger) *service {
	s := &service{db: db, cache: cache, events: events, replies: newReplyMemory(), wakeRelay: wakeRelay}
	s.creates = newBatcher("create", batchLimit, s.createGoods, metrics, log)
	s.edits = newBatcher("edit", batchLimit, s.editGoods, metrics, log)
	s.moves = newBatcher("reprioritize", batchLimit, s.moveGoods, metrics, log)
	s.gets = newBatcher("get", batchLimit, s.getGoods, metrics, log)
	s.histories = newBatcher("history", batchLimit, s.readHistory, metrics, log)
	s.largeHistories = newBatcher("large history", batchLimit, s.readHistory, metrics, log)
	s.allGoods = newPageReader("list", listVersionsSQL, listGoodsSQL, s, metrics, log)
	s.projectGoods = newPageReader("project list", projectVersionsSQL, projectGoodsSQL, s, metrics, log)
	return s
}

// createRequest makes a good, once for each key that is not empty. Its JSON is what create_goods.sql takes.
type createRequest struct {
	ProjectID   int32  `json:"project_id"`
	Name        string `json:"name"`
	Description string `json:"description"`
	Key         string `json:"key,omitempty"`
}

// conflictKey keeps requests with the same key out of one batch: the second then finds the good of the first.
func (q createRequest) conflictKey() any {
	if q.Key == "" {
		return nil
	}
	type projectAndKey struct {
		projectID int32
		key       string
	}
	return projectAndKey{q.ProjectID, q.Key}
}

// created is the good of a create.
type created struct {
	good
	repeated bool // the key made the good before
}

// Create makes a good at the end of the list. With a key that made a good before, it returns that good as
// it is now instead. Failures: errCampaignNotFound, errKeyReused.
func (s *service) Create(ctx context.Context, q createRequest) (created, error) {
	return s.creates.do(ctx, q)
}

//go:embed sql/queries/create_goods.sql
var createGoodsSQL string

// createAttempts is how often a batch is sent. An attempt fails when another transaction commits one of its
// keys while it waits for the lock of the priorities; the next attempt finds that good. After the last,
// each request is retried alone.
const createAttempts = 3

func (s *service) createGoods(requests []createRequest, results []result[created], _ bool) error {
	var err error
	for range createAttempts {
		err = s.createOnce(requests, results)
		e := pq.As(err, pqerror.UniqueViolation)
		if e == nil || e.Constraint != "goods_idempotency_key" {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("create goods: %w", err)
	}
	s.wakeRelay()
	return nil
}

func (s *service) createOnce(requests []createRequest, results []result[created]) error {
	for i := range results {
		results[i] = result[created]{err: errCampaignNotFound} // unless there is a row for it
	}
	return s.db.inTx(func(tx transaction) error {
		return tx.query(createGoodsSQL, []any{string(encodeJSON(requests))}, func(rows *sql.Rows) error {
			var n int
			var same bool
			var c created
			if err := rows.Scan(append([]any{&n, &c.repeated, &same}, c.fields()...)...); err != nil {
				return err
			}
			results[n-1] = result[created]{answer: c}
			if !same {
				results[n-1].err = errKeyReused
			}
			return nil
		})
	})
}

// editRequest changes one good. Its JSON is what edit_goods.sql takes.
type editRequest struct {
	ID          int32   `json:"id"`
	ProjectID   int32   `json:"project_id"`
	Name        *string `json:"name"`        // nil leaves it
	Description *string `json:"description"` // nil leaves it
	Removed     bool    `json:"removed"`
	Version     *int32  `json:"version"` // that the good must have, unless nil
}

// conflictKey keeps two requests for one good out of a batch: one statement changes a row once. The id is
// enough: all projects have their ids from one sequence.
func (q editRequest) conflictKey() any { return q.ID }

// Update changes the name, and the description unless that is nil. It returns the good as it is then.
// Failures: errGoodNotFound, errGoodChanged.
func (s *service) Update(ctx context.Context, q editRequest) (good, error) {
	return s.edits.do(ctx, q)
}

// Remove marks a good as removed: it stays in the list, where moves of other goods still shift it, and no
// call can name it to change it any more. Failures: errGoodNotFound, errGoodChanged.
func (s *service) Remove(ctx context.Context, q editRequest) (good, error) {
	q.Removed = true
	return s.edits.do(ctx, q)
}

//go:embed sql/queries/edit_goods.sql
var editGoodsSQL string

const lockGoodSQL = `
SELECT id
FROM goods
WHERE id = $1
  AND project_id = $2
FOR UPDATE`

// editGoods leaves out what another transaction has locked, so that one such good does not hold up the
// others. A request that is retried alone waits for the lock first: the query does not skip a lock of its own
// transaction.
func (s *service) editGoods(requests []editRequest, results []result[good], alone bool) error {
	var before, after []key
	var goods [][]byte
	serverID := s.db.id() // before the transaction: see below
	err := s.db.inTx(func(tx transaction) error {
		if alone {
			q := requests[0]
			if err := tx.query(lockGoodSQL, []any{q.ID, q.ProjectID}, ignoreRow); err != nil {
				return err
			}
		}
		return tx.query(editGoodsSQL, []any{string(encodeJSON(requests))}, func(rows *sql.Rows) error {
			var n int
			var outcome string
			var g good // empty unless it was edited
			if err := rows.Scan(append([]any{&n, &outcome}, g.fields()...)...); err != nil {
				return err
			}
			r := &results[n-1]
			switch outcome {
			case "edited":
				r.answer = g
				before = append(before, newKey(g.ID, g.version-1))
				after = append(after, g.key())
				goods = append(goods, encodeJSON(&g))
			case "changed":
				r.err = errGoodChanged
			case "missing":
				r.err = errGoodNotFound
			case "locked":
				r.err = errLeftOut
				if alone { // the good was not there yet when the lock was asked for
					r.err = errLocked
				}
			default:
				return fmt.Errorf("unknown outcome %q", outcome)
			}
			return nil
		})
	})
	if err != nil {
		return fmt.Errorf("edit goods: %w", err)
	}
	s.wakeRelay()
	// Unless the database has moved to another server meanwhile: there, the same versions may have other
	// content (see database.serverID).
	if s.db.id() == serverID {
		s.cache.putLocal(serverID, after, goods) // the next list needs them
		s.cache.dropShared(serverID, before)
	}
	return nil
}

// getRequest asks for one good.
type getRequest struct{ id, projectID int32 }

func (q getRequest) conflictKey() any { return nil }

// Get returns a good, also a removed one. Failures: errGoodNotFound.
func (s *service) Get(ctx context.Context, q getRequest) (good, error) {
	return s.gets.do(ctx, q)
}

//go:embed sql/queries/get_goods.sql
var getGoodsSQL string

func (s *service) getGoods(requests []getRequest, results []result[good], _ bool) error {
	ids := make(pq.Int32Array, len(requests))
	projects := make(pq.Int32Array, len(requests))
	for i, q := range requests {
		ids[i] = q.id
		projects[i] = q.projectID
		results[i].err = errGoodNotFound // unless there is a row for it
	}
	err := s.db.query(getGoodsSQL, []any{ids, projects}, func(rows *sql.Rows) error {
		var n int
		var g good
		if err := rows.Scan(append([]any{&n}, g.fields()...)...); err != nil {
			return err
		}
		results[n-1] = result[good]{answer: g}
		return nil
	})
	if err != nil {
		return fmt.Errorf("get goods: %w", err)
	}
	return nil
}
