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
	s.creates = newBatcher("create", 64, s.createAll, counts, log)
	s.edits = newBatcher("edit", 64, s.editGoods, counts, log)
	s.moves = newBatcher("reprioritize", 1, s.moveGood, counts, log)
	s.lists = newBatcher("list", 64, s.readPages, counts, log)
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

// A request whose key is known yields its good, one for a project that does
// not exist yields nothing, and the others a new good, in their order. A key
// that is null finds nothing at once.
const createGoods = `
WITH request AS (
    SELECT project_id, name, description, nullif(key, '') AS key, nullif(digest, '') AS digest, n
    FROM unnest($1::integer[], $2::text[], $3::text[], $4::text[], $5::text[]) WITH ORDINALITY
        AS r (project_id, name, description, key, digest, n)
), known AS MATERIALIZED (
    SELECT r.n, g.request_digest = r.digest AS same, ` + goodColumns + `
    FROM request AS r
    JOIN goods AS g ON g.project_id = r.project_id AND g.idempotency_key = r.key
), inserted AS (
    INSERT INTO goods AS g (project_id, name, description, priority, idempotency_key, request_digest)
    SELECT r.project_id, r.name, r.description,
           (SELECT coalesce(max(priority), 0) FROM goods) + row_number() OVER (ORDER BY r.n), r.key, r.digest
    FROM request AS r
    JOIN campaigns AS c ON c.id = r.project_id
    WHERE r.n NOT IN (SELECT n FROM known)
    ORDER BY r.n
    RETURNING 0 AS n, true AS same, ` + goodColumns + `
)
SELECT * FROM known
UNION ALL
SELECT * FROM inserted
ORDER BY n, priority`

func (s *service) createAll(requests []createRequest) ([]result[createResult], error) {
	results := make([]result[createResult], len(requests))
	var projects pq.Int32Array
	var names, descriptions, keys, digests pq.StringArray
	for _, q := range requests {
		projects, names, descriptions = append(projects, q.projectID), append(names, q.name), append(descriptions, q.description)
		keys, digests = append(keys, q.key), append(digests, q.digest())
	}
	err := s.write(func(tx *sql.Tx) error {
		// A statement of its own: the next one sees what was committed meanwhile.
		if _, err := tx.Exec(lockPriorities); err != nil {
			return err
		}
		var fresh []good
		err := s.db.query(tx, createGoods, []any{projects, names, descriptions, keys, digests}, func(rows *sql.Rows) error {
			var n int
			var same bool
			var g good
			err := rows.Scan(append([]any{&n, &same}, g.fields()...)...)
			switch {
			case n == 0:
				fresh = append(fresh, g)
			case same:
				results[n-1].answer = createResult{g, true}
			default:
				results[n-1].err = errKeyReused
			}
			return err
		})
		for i, q := range requests {
			if r := &results[i]; r.err != nil || r.answer.repeated {
				continue
			} else if len(fresh) > 0 && fresh[0].ProjectID == q.projectID {
				r.answer.good, fresh = fresh[0], fresh[1:]
			} else {
				r.err = errCampaignNotFound
			}
		}
		return err
	})
	return results, err
}

// editRequest changes one good.
type editRequest struct {
	id, projectID int32
	name          string  // empty leaves it
	description   *string // nil leaves it
	remove        bool
}

func (q editRequest) apart() any { return q.id } // one statement changes a row once

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

func (s *service) editGoods(requests []editRequest) ([]result[good], error) {
	query, notFound := editGood, error(errGoodNotFound)
	if len(requests) > 1 {
		query, notFound = editGoods, errTryAlone
	}
	results := make([]result[good], len(requests))
	index := make(map[int32]int, len(requests)) // by id
	var ids, projects pq.Int32Array
	var names, descriptions pq.StringArray
	var describe, remove pq.BoolArray
	for i, q := range requests {
		index[q.id], results[i].err = i, notFound // unless a row says otherwise
		ids, projects, names, remove = append(ids, q.id), append(projects, q.projectID), append(names, q.name), append(remove, q.remove)
		if descriptions, describe = append(descriptions, ""), append(describe, q.description != nil); q.description != nil {
			descriptions[i] = *q.description
		}
	}
	var old, keys []key
	var texts [][]byte
	err := s.write(func(tx *sql.Tx) error {
		return s.db.query(tx, query, []any{ids, projects, names, descriptions, describe, remove}, func(rows *sql.Rows) error {
			var g good
			if err := rows.Scan(g.fields()...); err != nil {
				return err
			}
			results[index[g.ID]] = result[good]{answer: g}
			old, keys = append(old, newKey(g.ID, g.version-1)), append(keys, newKey(g.ID, g.version))
			text, err := encodeJSON(&g)
			texts = append(texts, text)
			return err
		})
	})
	if err != nil {
		return nil, fmt.Errorf("edit goods: %w", err)
	}
	s.cache.keep(keys, texts) // a list wants them next
	s.cache.drop(old)
	return results, nil
}
