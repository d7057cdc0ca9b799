package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"time"

	"github.com/lib/pq"
)

// failure is an error that a client is told about. Every other error is
// internal, and its cause goes to the log only.
type failure struct {
	status  int // of HTTP
	code    int
	message string
	details map[string]string // what is wrong with each bad field
}

func (f *failure) Error() string { return fmt.Sprint(f.message, " ", f.details) }

var (
	errGoodNotFound     = &failure{status: 404, code: 3, message: "errors.good.notFound"}
	errCampaignNotFound = &failure{status: 404, code: 4, message: "errors.campaign.notFound"}
	errKeyReused        = &failure{status: 422, code: 9, message: "errors.request.keyReused"}
)

// invalid is the failure of a request with these bad fields.
func invalid(details map[string]string) error {
	return &failure{status: 400, code: 2, message: "errors.request.invalid", details: details}
}

// good is one version of one row of goods.
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

// timestamp is a time in UTC with microseconds, all six digits written.
type timestamp struct{ time.Time }

func (t timestamp) MarshalJSON() ([]byte, error) {
	return t.UTC().AppendFormat(nil, `"2006-01-02T15:04:05.000000Z"`), nil
}

// encodeJSON is json.Marshal without the escapes that only HTML needs.
func encodeJSON(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

// goodColumns are the columns of g that fields points at.
const goodColumns = `g.id, g.project_id, g.name, g.description, g.priority, g.removed, g.created_at, g.version`

func (g *good) fields() []any {
	return []any{&g.ID, &g.ProjectID, &g.Name, &g.Description, &g.Priority, &g.Removed, &g.CreatedAt.Time, &g.version}
}

// scanGoods reads and closes rows of goodColumns.
func scanGoods(rows *sql.Rows, err error) ([]good, error) {
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var goods []good
	for rows.Next() {
		var g good
		if err := rows.Scan(g.fields()...); err != nil {
			return nil, err
		}
		goods = append(goods, g)
	}
	return goods, rows.Err()
}

// service does what the API says. Its methods may be called concurrently; they
// return a *failure, or an error that is the service's own.
type service struct {
	db    *database
	cache *cache
	wake  func() // tells the relay that something was written

	creates *batcher[createRequest, createResult]
	edits   *batcher[editRequest, good]
	moves   *batcher[moveRequest, []place]
	lists   *batcher[listRequest, []byte]
}

func newService(db *database, cache *cache, wake func(), counts *metrics, log *slog.Logger) *service {
	s := &service{db: db, cache: cache, wake: wake}
	s.creates = newBatcher("create", 64, createRequest.apart, s.createAll, counts, log)
	s.edits = newBatcher("edit", 64, editRequest.apart, s.editAll, counts, log)
	s.moves = newBatcher("reprioritize", 1, nil, s.moveGood, counts, log)
	s.lists = newBatcher("list", 64, nil, s.readPages, counts, log)
	return s
}

// write runs f in one transaction, and wakes the relay.
func (s *service) write(f func(tx *sql.Tx) error) error {
	err := s.db.inTx(f)
	if err == nil {
		s.wake()
	}
	return err
}

// createRequest makes a good, once for each key that is not empty.
type createRequest struct {
	projectID         int32
	name, description string
	key               string
}

// apart keeps requests with the same key out of one batch: the second then
// finds the good of the first.
func (q createRequest) apart() any {
	if q.key == "" {
		return nil
	}
	return [2]any{q.projectID, q.key}
}

// digest tells requests with the same key but other content apart.
func (q createRequest) digest() string {
	if q.key == "" {
		return ""
	}
	sum := sha256.Sum256([]byte(q.name + "\x00" + q.description)) // U+0000 is in no text
	return hex.EncodeToString(sum[:])
}

type createResult struct {
	good
	repeated bool // the key made the good before
}

func (s *service) create(ctx context.Context, q createRequest) (createResult, error) {
	return s.creates.do(ctx, q)
}

const lockPriorities = `SELECT lock_priorities()`

const findKeys = `
SELECT r.n - 1, g.request_digest = r.digest, ` + goodColumns + `
FROM unnest($1::integer[], $2::text[], $3::text[]) WITH ORDINALITY AS r (project_id, key, digest, n)
JOIN goods AS g ON g.project_id = r.project_id AND g.idempotency_key = r.key`

// A request for a project that does not exist yields no row. The rows are
// inserted, and returned, in the order of the requests.
const insertGoods = `
INSERT INTO goods AS g (project_id, name, description, priority, idempotency_key, request_digest)
SELECT c.id, r.name, r.description,
       (SELECT coalesce(max(priority), 0) FROM goods) + row_number() OVER (ORDER BY r.n),
       nullif(r.key, ''), nullif(r.digest, '')
FROM unnest($1::integer[], $2::text[], $3::text[], $4::text[], $5::text[]) WITH ORDINALITY
    AS r (project_id, key, digest, name, description, n)
JOIN campaigns AS c ON c.id = r.project_id
ORDER BY r.n
RETURNING ` + goodColumns

func (s *service) createAll(requests []createRequest) ([]result[createResult], error) {
	results := make([]result[createResult], len(requests))
	err := s.write(func(tx *sql.Tx) error {
		// Before the statements that look: what they see is then the last there is.
		if _, err := tx.Exec(lockPriorities); err != nil {
			return fmt.Errorf("lock priorities: %w", err)
		}
		if err := s.findKnown(tx, requests, results); err != nil {
			return fmt.Errorf("find keys: %w", err)
		}
		var left []int
		var projects pq.Int32Array
		var keys, digests, names, descriptions pq.StringArray
		for i, q := range requests {
			if results[i].answer.ID != 0 || results[i].err != nil {
				continue
			}
			left, projects, keys, digests = append(left, i), append(projects, q.projectID), append(keys, q.key), append(digests, q.digest())
			names, descriptions = append(names, q.name), append(descriptions, q.description)
		}
		if len(left) == 0 {
			return nil
		}
		rows, err := s.db.query(tx, insertGoods, projects, keys, digests, names, descriptions)
		goods, err := scanGoods(rows, err)
		if err != nil {
			return fmt.Errorf("insert goods: %w", err)
		}
		for _, i := range left {
			if len(goods) > 0 && goods[0].ProjectID == requests[i].projectID {
				results[i].answer.good, goods = goods[0], goods[1:]
			} else {
				results[i].err = errCampaignNotFound
			}
		}
		return nil
	})
	return results, err
}

// findKnown answers the requests whose key has made a good before.
func (s *service) findKnown(tx *sql.Tx, requests []createRequest, results []result[createResult]) error {
	var index []int
	var projects pq.Int32Array
	var keys, digests pq.StringArray
	for i, q := range requests {
		if q.key != "" {
			index, projects, keys, digests = append(index, i), append(projects, q.projectID), append(keys, q.key), append(digests, q.digest())
		}
	}
	if len(index) == 0 {
		return nil
	}
	rows, err := s.db.query(tx, findKeys, projects, keys, digests)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var n int
		var same bool
		var g good
		if err := rows.Scan(append([]any{&n, &same}, g.fields()...)...); err != nil {
			return err
		}
		if same {
			results[index[n]].answer = createResult{g, true}
		} else {
			results[index[n]].err = errKeyReused
		}
	}
	return rows.Err()
}

// editRequest changes one good.
type editRequest struct {
	id, projectID int32
	name          string  // empty leaves it
	description   *string // nil leaves it
	remove        bool
}

func (q editRequest) apart() any { return q.id }

// edit returns the good as it has become.
func (s *service) edit(ctx context.Context, q editRequest) (good, error) { return s.edits.do(ctx, q) }

// Rows are always locked in the order of their ids, here and in a move, so
// that transactions wait for each other in one direction only.
const lockGoods = `
WITH request AS (
    SELECT *
    FROM unnest($1::integer[], $2::integer[], $3::text[], $4::text[], $5::boolean[], $6::boolean[])
        AS r (id, project_id, name, description, describe, remove)
), locked AS MATERIALIZED (
    SELECT g.id
    FROM goods AS g
    JOIN request AS r ON r.id = g.id AND r.project_id = g.project_id
    WHERE NOT g.removed
    ORDER BY g.id
    FOR UPDATE OF g`

const changeGoods = `
)
UPDATE goods AS g
SET name = coalesce(nullif(r.name, ''), g.name),
    description = CASE WHEN r.describe THEN r.description ELSE g.description END,
    removed = r.remove,
    version = g.version + 1
FROM locked
JOIN request AS r ON r.id = locked.id
WHERE g.id = locked.id
RETURNING ` + goodColumns

// In company, nobody waits for a good that another transaction has locked:
// what is not found may be that, and is tried alone.
const (
	editGood  = lockGoods + changeGoods
	editGoods = lockGoods + ` SKIP LOCKED` + changeGoods
)

func (s *service) editAll(requests []editRequest) ([]result[good], error) {
	var ids, projects pq.Int32Array
	var names, descriptions pq.StringArray
	var describe, remove pq.BoolArray
	for _, q := range requests {
		description := ""
		if q.description != nil {
			description = *q.description
		}
		ids, projects, names, descriptions = append(ids, q.id), append(projects, q.projectID), append(names, q.name), append(descriptions, description)
		describe, remove = append(describe, q.description != nil), append(remove, q.remove)
	}
	query, notFound := editGood, error(errGoodNotFound)
	if len(requests) > 1 {
		query, notFound = editGoods, errTryAlone
	}
	var goods []good
	err := s.write(func(tx *sql.Tx) (err error) {
		rows, err := s.db.query(tx, query, ids, projects, names, descriptions, describe, remove)
		if goods, err = scanGoods(rows, err); err != nil {
			return fmt.Errorf("edit goods: %w", err)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	changed := make(map[int32]good, len(goods))
	for _, g := range goods {
		changed[g.ID] = g
	}
	results := make([]result[good], len(requests))
	for i, q := range requests {
		var ok bool
		if results[i].answer, ok = changed[q.id]; !ok {
			results[i].err = notFound
		}
	}
	s.cache.replace(goods)
	return results, nil
}
