package main

import (
	"context"
	"database/sql"
	_ "embed"
	"fmt"
	"log/slog"
	"slices"
	"sync"

	"github.com/lib/pq"
)

const (
	maxLimit      = 1000 // goods on one page
	maxBatchGoods = 1000 // goods that one statement of a batch asks for; a batch of more is read in parts
	// snapshotAttempts is how often a batch is sent while the database moves to another server. After the
	// last, each request is retried alone, as after any failure.
	snapshotAttempts = 3
)

// listRequest asks for limit goods from the position offset on, which is counted from 1.
type listRequest struct {
	projectID     int32 // 0: the list of all goods
	limit, offset int32
	maxBytes      int // of the page: a larger one is a replyTooLargeError
}

func (q listRequest) conflictKey() any { return nil }

// List returns a page as JSON, with the counts of all goods, or of those of one project. It shows the list as
// it was at one moment after the request arrived. The caller must call release when the page has been sent.
// Failures: errCampaignNotFound.
func (s *service) List(ctx context.Context, q listRequest) (page []byte, release func(), err error) {
	p := s.allGoods
	if q.projectID != 0 {
		p = s.projectGoods
	}
	return s.replies.build(ctx, func(ctx context.Context, maxBytes int, reserved bool) ([]byte, error) {
		q.maxBytes = maxBytes
		if reserved {
			return p.largeBatcher.do(ctx, q)
		}
		return p.batcher.do(ctx, q)
	})
}

// pageReader reads the pages of one kind of list, with two queries that take the same arguments.
type pageReader struct {
	db           *database
	cache        *cache
	versionsSQL  string
	goodsSQL     string
	building     *sync.Mutex // a large page: see replyMemory
	batcher      *batcher[listRequest, []byte]
	largeBatcher *batcher[listRequest, []byte] // for pages whose memory is reserved
}

//go:embed sql/queries/list_versions.sql
var listVersionsSQL string

//go:embed sql/queries/list_goods.sql
var listGoodsSQL string

//go:embed sql/queries/project_versions.sql
var projectVersionsSQL string

//go:embed sql/queries/project_goods.sql
var projectGoodsSQL string

func newPageReader(name, versionsSQL, goodsSQL string, s *service, metrics *metrics,
	log *slog.Logger) *pageReader {
	p := &pageReader{
		db:          s.db,
		cache:       s.cache,
		versionsSQL: versionsSQL,
		goodsSQL:    goodsSQL,
		building:    s.replies.buildingList,
	}
	p.batcher = newBatcher(name, batchLimit, p.read, metrics, log)
	p.largeBatcher = newBatcher("large "+name, batchLimit, p.readOne, metrics, log)
	return p
}

// read answers a batch of lists. Equal requests share one page.
func (p *pageReader) read(requests []listRequest, results []result[[]byte], _ bool) error {
	answers := map[listRequest]*result[[]byte]{}
	var distinct []listRequest
	for _, q := range requests {
		if answers[q] == nil {
			answers[q] = &result[[]byte]{}
			distinct = append(distinct, q)
		}
	}
	for len(distinct) > 0 {
		n := countWithin(distinct, maxBatchGoods)
		if err := p.readTogether(distinct[:n], answers); err != nil {
			return err
		}
		distinct = distinct[n:]
	}
	for i, q := range requests {
		results[i] = *answers[q]
	}
	return nil
}

// readOne answers the first request, and those that are equal, and leaves the rest to the next batch:
// otherwise the first large page would stay in memory until the last one is read.
func (p *pageReader) readOne(requests []listRequest, results []result[[]byte], _ bool) error {
	p.building.Lock()
	defer p.building.Unlock()
	answers := map[listRequest]*result[[]byte]{requests[0]: {}}
	if err := p.readTogether(requests[:1], answers); err != nil {
		return err
	}
	answerEqual(requests, results, *answers[requests[0]])
	return nil
}

// countWithin returns how many of the first requests, one at least, ask for no more than most goods together.
func countWithin(requests []listRequest, most int32) int {
	sum := int32(0)
	for i, q := range requests {
		sum += q.limit
		if i > 0 && sum > most {
			return i
		}
	}
	return len(requests)
}

// snapshot is one page at one moment.
type snapshot struct {
	exists         bool // the project does
	total, removed int64
	bytes          int64 // of the goods: measured by readGoods; by readVersions estimated, or 0 for up to ten
	keys           []key
	goods          [][]byte // JSON, one for each key; nil where it is not known
}

func (s *snapshot) exceeds(maxBytes int) bool { return s.bytes > int64(maxBytes) }

// readTogether puts the answers to requests, which are all different, into answers. Each page is one
// moment: the counts and the versions come from one statement, and the content of a version never changes.
// Where a good is not cached, the page is read again, whole, in one statement of its own.
func (p *pageReader) readTogether(requests []listRequest, answers map[listRequest]*result[[]byte]) error {
	for range snapshotAttempts {
		// A key names a version in one database only: the one whose id is the same before and after the
		// query.
		serverID := p.db.id()
		snapshots, err := p.readVersions(requests)
		if err != nil {
			return fmt.Errorf("read versions: %w", err)
		}
		if p.db.id() != serverID {
			continue
		}
		missing := p.answerCached(serverID, requests, snapshots, answers)
		if len(missing) == 0 {
			return nil
		}
		if err := p.readGoods(missing, answers); err != nil {
			return fmt.Errorf("read goods: %w", err)
		}
		return nil
	}
	return errServerChanged
}

// arguments are those of both queries: the project, and the first and the last position, of each page.
func arguments(requests []listRequest) []any {
	var projects pq.Int32Array
	var first, last pq.Int64Array
	for _, q := range requests {
		projects = append(projects, q.projectID)
		first = append(first, int64(q.offset))
		last = append(last, int64(q.offset)+int64(q.limit)-1)
	}
	return []any{projects, first, last}
}

// readVersions reads which versions are on the pages.
func (p *pageReader) readVersions(requests []listRequest) ([]snapshot, error) {
	snapshots := make([]snapshot, len(requests))
	err := p.db.query(p.versionsSQL, arguments(requests), func(rows *sql.Rows) error {
		var n int
		s := snapshot{exists: true}
		if err := rows.Scan(&n, &s.total, &s.removed, &s.bytes, (*pq.Int64Array)(&s.keys)); err != nil {
			return err
		}
		snapshots[n-1] = s
		return nil
	})
	return snapshots, err
}

// answerCached answers the requests that need no other goods than the cache has, and returns the rest.
func (p *pageReader) answerCached(serverID string, requests []listRequest, snapshots []snapshot,
	answers map[listRequest]*result[[]byte]) (missing []listRequest) {
	var keys []key
	for i := range snapshots {
		s := &snapshots[i]
		if s.exceeds(requests[i].maxBytes) {
			s.keys = nil // it is answered with an error below: its goods are not needed
		}
		keys = append(keys, s.keys...)
	}
	goods := p.cache.get(serverID, keys)
	for i, q := range requests {
		s := &snapshots[i]
		s.goods = goods[:len(s.keys)]
		goods = goods[len(s.keys):]
		switch {
		case !s.exists:
			answers[q].err = errCampaignNotFound
		case s.exceeds(q.maxBytes):
			answers[q].err = replyTooLargeError(s.bytes)
		case slices.ContainsFunc(s.goods, func(text []byte) bool { return text == nil }):
			missing = append(missing, q)
		default:
			answers[q].answer, answers[q].err = q.page(s)
		}
	}
	return missing
}

// readGoods reads pages whole, in one statement, answers them, and lets the cache have the goods. Pages must
// not be empty: the counts come with each good, so an empty page would have none.
func (p *pageReader) readGoods(requests []listRequest, answers map[listRequest]*result[[]byte]) error {
	serverID := p.db.id()
	snapshots := make([]snapshot, len(requests))
	err := p.db.query(p.goodsSQL, arguments(requests), func(rows *sql.Rows) error {
		var n int
		var total, removed int64
		var g good
		if err := rows.Scan(append([]any{&n, &total, &removed}, g.fields()...)...); err != nil {
			return err
		}
		s := &snapshots[n-1]
		s.total = total
		s.removed = removed
		s.keys = append(s.keys, g.key())
		text := encodeJSON(&g)
		s.bytes += int64(len(text)) + 1
		if !s.exceeds(requests[n-1].maxBytes) { // a page that is too large is only measured
			s.goods = append(s.goods, text)
		}
		return nil
	})
	if err != nil {
		return err
	}
	sameServer := p.db.id() == serverID // so the keys name what was read
	for i, q := range requests {
		s := &snapshots[i]
		if len(s.keys) == 0 { // it had goods a moment ago: they went to another project, or were lost
			answers[q].err = errServerChanged
			continue
		}
		if s.exceeds(q.maxBytes) {
			answers[q].err = replyTooLargeError(s.bytes)
			continue
		}
		if sameServer && s.bytes <= smallReply { // larger ones would fill Redis, and the queue to it
			p.cache.put(serverID, s.keys, s.goods)
		}
		answers[q].answer, answers[q].err = q.page(s)
	}
	return nil
}

// page returns the reply to q.
func (q listRequest) page(s *snapshot) ([]byte, error) {
	// Positions have no gap, so the counts tell how many goods a page must have.
	want := min(max(s.total-int64(q.offset)+1, 0), int64(q.limit))
	if int64(len(s.goods)) != want {
		return nil, fmt.Errorf("the page from %d has %d goods, but should have %d of %d",
			q.offset, len(s.goods), want, s.total)
	}
	size := 0
	for _, text := range s.goods {
		size += len(text) + 1
	}
	if size > q.maxBytes {
		return nil, replyTooLargeError(size)
	}
	const metaSize = 128 // at most
	page := make([]byte, 0, metaSize+size)
	page = fmt.Appendf(page, `{"meta":{"total":%d,"removed":%d,"limit":%d,"offset":%d},"goods":[`,
		s.total, s.removed, q.limit, q.offset)
	for i, text := range s.goods {
		if i > 0 {
			page = append(page, ',')
		}
		page = append(page, text...)
	}
	return append(page, "]}\n"...), nil
}
