package main

import (
	"bytes"
	"database/sql"
	_ "embed"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// failure is an error that a client is told about, as JSON. Every other error is internal, for the log only.
type failure struct {
	Status  int               `json:"-"` // of HTTP
	Code    int               `json:"code"`
	Message string            `json:"message"`
	Details map[string]string `json:"details"` // what is wrong with each bad field
}

func (f *failure) Error() string { return fmt.Sprint(f.Message, " ", f.Details) }

var (
	none                = map[string]string{}
	errGoodNotFound     = &failure{404, 3, "errors.good.notFound", none}
	errCampaignNotFound = &failure{404, 4, "errors.campaign.notFound", none}
	errKeyReused        = &failure{422, 9, "errors.request.keyReused", none}
)

// invalid is the failure of a request with these bad fields.
func invalid(details map[string]string) error {
	return &failure{400, 2, "errors.request.invalid", details}
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

// fields are where a row of goods goes, in the order of the queries' columns.
func (g *good) fields() []any {
	return []any{&g.ID, &g.ProjectID, &g.Name, &g.Description, &g.Priority, &g.Removed, &g.CreatedAt.Time, &g.version}
}

// service does what the API says, each call in a batch. An error is a *failure, or the service's own.
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
	s.edits = newBatcher("edit", 64, s.editAll, counts, log)
	s.moves = newBatcher("reprioritize", 1, s.moveGood, counts, log)
	s.lists = newBatcher("list", 64, s.readPages, counts, log)
	return s
}

// createRequest makes a good, once for each key that is not empty. The fields are columns of a batch, which travels
// to Postgres as one JSON text.
type createRequest struct {
	ProjectID   int32  `json:"project_id"`
	Name        string `json:"name"`
	Description string `json:"description"`
	Key         string `json:"key,omitempty"`
}

// apart keeps requests with the same key out of one batch: the second then finds the good of the first.
func (q createRequest) apart() any {
	if q.Key == "" {
		return nil
	}
	return createRequest{ProjectID: q.ProjectID, Key: q.Key}
}

type createResult struct {
	good
	repeated bool // the key made the good before
}

//go:embed sql/queries/create.sql
var createGoods string

func (s *service) createAll(requests []createRequest) ([]result[createResult], error) {
	results := make([]result[createResult], len(requests))
	batch, _ := json.Marshal(requests) // of texts and numbers: cannot fail
	err := s.db.inTx(func(tx *sql.Tx) error {
		var fresh []good
		err := s.db.query(tx, createGoods, []any{string(batch)}, func(rows *sql.Rows) error {
			var n int
			var same bool
			var g good
			err := rows.Scan(append([]any{&n, &same}, g.fields()...)...)
			if n == 0 {
				fresh = append(fresh, g)
			} else if results[n-1].answer = (createResult{g, true}); !same {
				results[n-1].err = errKeyReused
			}
			return err
		})
		for i, q := range requests {
			if r := &results[i]; r.err != nil || r.answer.repeated {
				continue
			} else if len(fresh) > 0 && fresh[0].ProjectID == q.ProjectID {
				r.answer.good, fresh = fresh[0], fresh[1:]
			} else {
				r.err = errCampaignNotFound
			}
		}
		return err
	})
	if e := pq.As(err, pqerror.UniqueViolation); e != nil && e.Constraint == "goods_idempotency_key" {
		return s.createAll(requests) // another transaction used a key while this one waited for the lock: now it is known
	}
	s.wake()
	return results, err
}

// editRequest changes one good.
type editRequest struct {
	ID          int32   `json:"id"`
	ProjectID   int32   `json:"project_id"`
	Name        *string `json:"name"`        // nil leaves it
	Description *string `json:"description"` // nil leaves it
	Removed     bool    `json:"removed"`
}

func (q editRequest) apart() any { return q.ID } // one statement changes a row once

//go:embed sql/queries/edit.sql
var editGood string

// In company, nobody waits for a good that is locked elsewhere: what is not found may be that, and is tried alone.
var editGoods = strings.Replace(editGood, "FOR UPDATE OF g", "FOR UPDATE OF g SKIP LOCKED", 1)

func (s *service) editAll(requests []editRequest) ([]result[good], error) {
	query, notFound := editGood, error(errGoodNotFound)
	if len(requests) > 1 {
		query, notFound = editGoods, errTryAlone
	}
	results := make([]result[good], len(requests))
	index := make(map[int32]int, len(requests)) // by id
	for i, q := range requests {
		index[q.ID], results[i].err = i, notFound // unless a row says otherwise
	}
	var old, keys []key
	var texts [][]byte
	batch, _ := json.Marshal(requests) // of texts and numbers: cannot fail
	err := s.db.inTx(func(tx *sql.Tx) error {
		return s.db.query(tx, query, []any{string(batch)}, func(rows *sql.Rows) error {
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
	s.wake()
	s.cache.keep(keys, texts) // a list wants them next
	s.cache.drop(old)
	return results, nil
}
