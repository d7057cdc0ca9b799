package faults

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"goods/test/harness"
)

const (
	memoryLimit  = "GOMEMLIMIT=420MiB" // as in compose.yaml
	memoryBound  = 512 << 10           // KiB, as in compose.yaml
	heapAtRest   = 64 << 20            // bytes
	readers      = 64
	readFor      = 10 * time.Second
	readAtOnce   = 1 << 20                // bytes
	readPause    = 100 * time.Millisecond // after each of them
	writeTimeout = 30 * time.Second       // of the service, for one reply
	longest      = 10_000                 // characters of a description
	largeGoods   = 1000 + readers         // in project 1, so that each reader has a page of its own
	smallGoods   = 100                    // in project 2, after them
)

// The longest characters, in UTF-8 and, as an escape, in JSON.
const fourBytes, escaped = "😀", "\u0001"

// TestMemory has slow clients read the largest replies beside clients of everything else. The service must
// not take more memory than its container has, and must not let the others wait.
func TestMemory(t *testing.T) {
	for _, c := range []struct{ name, description string }{
		{"lists of the longest texts", strings.Repeat(fourBytes, longest)},
		{"lists of texts that JSON escapes", strings.Repeat(escaped, longest)},
		{"lists of a megabyte", strings.Repeat(fourBytes, longest/50)},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, a := startLarge(t, c.description)
			crowd(t, a, func(reader int) string {
				return fmt.Sprint("/goods/list?limit=1000&offset=", 1+reader)
			})
		})
	}
	t.Run("histories of the longest texts", func(t *testing.T) {
		const histories = 2
		description := strings.Repeat(fourBytes, longest)
		w, a := startLarge(t, description)
		harness.Must(t, w.ClickHouse.Exec(context.Background(), `
INSERT INTO goods_log (Id, ProjectId, Name, Description, Priority, Removed, EventTime, Version)
SELECT 1 + number % ?, 1, 'good', ?, 1, 0, now(), 1 + intDiv(number, ?)
FROM (SELECT number FROM system.numbers LIMIT ?)`, histories, description, histories, 1000*histories))
		crowd(t, a, func(reader int) string {
			return fmt.Sprint("/goods/history?limit=1000&projectId=1&id=", 1+reader%histories)
		})
	})
}

// crowd lets slow clients read pages.
func crowd(t *testing.T, a *harness.App, page func(reader int) string) {
	t.Helper()
	var ended atomic.Bool
	var statuses [600]atomic.Int64 // of the pages
	var took []time.Duration       // of the calls beside
	var running sync.WaitGroup
	for i := range readers {
		running.Go(func() { readSlowly(t, a, page(i), &ended, &statuses) })
	}
	running.Go(func() { took = callBeside(t, a, &ended) })
	<-time.After(readFor)
	ended.Store(true)
	running.Wait()

	slices.Sort(took)
	p99 := took[len(took)*99/100]
	peak := memory(t, a, "VmHWM")
	t.Logf("%d pages and %d 503; beside them %d calls, p99 %v, slowest %v; at most %d MiB of memory",
		statuses[200].Load(), statuses[503].Load(), len(took), p99, took[len(took)-1], peak>>10)
	if statuses[200].Load() == 0 {
		t.Error("no reader got a page")
	}
	if p99 > time.Second {
		t.Errorf("p99 of the calls beside is %v, want 1s at most", p99)
	}
	if peak > memoryBound {
		t.Errorf("the service took %d KiB of memory, want %d at most", peak, memoryBound)
	}
	works(t, a, page(0))
}

// A reply that its client does not read holds its memory for as long as it may take to write it.
func TestMemoryOfUnreadReply(t *testing.T) {
	_, a := startLarge(t, strings.Repeat(fourBytes, longest))
	const page = "/goods/list?limit=1000"
	begin := time.Now()
	c, response := request(t, a, page)
	defer c.Close()
	harness.Equal(t, response.StatusCode, 200, "the reply that is not read")
	harness.Equal(t, a.Call(t, "GET", page, "").Status, 503, "the next reply that does not fit")
	harness.Eventually(t, writeTimeout+callWithin, func() error {
		r, err := a.Try("GET", page, "")
		if err == nil && r.Status != 200 {
			err = fmt.Errorf("got %d", r.Status)
		}
		return err
	})
	if freed := time.Since(begin); freed < writeTimeout/2 {
		t.Errorf("memory was there after %v: the first reply had not filled it", freed)
	}
	_, err := io.Copy(io.Discard, response.Body)
	harness.Equal(t, err, io.ErrUnexpectedEOF, "the end of the reply that is not read")
	works(t, a, page)
}

// A container's limit counts what the kernel holds of a reply, which the service has then forgotten.
func TestMemoryOfUnreadReplies(t *testing.T) {
	const clients, most = 2 * readers, 256 << 10 // bytes of a reply that the kernel may hold
	_, a := startLarge(t, strings.Repeat(fourBytes, longest/50))
	const page = "/goods/list?limit=1000"
	conns := make([]net.Conn, clients)
	var statuses [600]atomic.Int64
	harness.Together(clients, func(i int) {
		c, response := request(t, a, page)
		conns[i] = c
		statuses[response.StatusCode].Add(1)
	})
	largest, sum := 0, 0
	for _, queued := range sendQueues(t, a) {
		largest = max(largest, queued)
		sum += queued
	}
	t.Logf("%d pages and %d 503; the kernel holds %d KiB of them, the service %d",
		statuses[200].Load(), statuses[503].Load(), sum>>10, memory(t, a, "VmRSS"))
	if largest > most {
		t.Errorf("the kernel holds %d bytes of a reply, want %d at most", largest, most)
	}
	for _, c := range conns {
		c.Close()
	}
	works(t, a, page)
}

// startLarge starts a service with goods that have this description, and then small ones.
func startLarge(t *testing.T, description string) (*harness.World, *harness.App) {
	t.Helper()
	w := harness.NewWorld(t)
	w.Unchecked = true // to compare 40 MB with openapi.yaml takes long
	a := w.Start(t, memoryLimit, "LOG_LEVEL=info", "EVENTS_BATCH=50")
	harness.Eventually(t, 10*time.Second, a.Ready)

	tx, err := w.DB.Begin()
	harness.Must(t, err)
	// Without the triggers, so that these goods are no events.
	_, err = tx.Exec(`SET LOCAL session_replication_role = replica`)
	harness.Must(t, err)
	_, err = tx.Exec(`INSERT INTO campaigns (name) VALUES ('small goods')`)
	harness.Must(t, err)
	_, err = tx.Exec(`
INSERT INTO goods (project_id, name, description, priority)
SELECT CASE WHEN n <= $1 THEN 1 ELSE 2 END, 'good ' || n, CASE WHEN n <= $1 THEN $3::text ELSE '' END, n
FROM generate_series(1, $1::integer + $2::integer) AS n`, largeGoods, smallGoods, description)
	harness.Must(t, err)
	_, err = tx.Exec(`
INSERT INTO project_meta (project_id, total)
SELECT project_id, count(*)
FROM goods
GROUP BY project_id
ON CONFLICT (project_id) DO UPDATE SET total = EXCLUDED.total`)
	harness.Must(t, err)
	_, err = tx.Exec(`UPDATE meta SET total = (SELECT count(*) FROM goods)`)
	harness.Must(t, err)
	harness.Must(t, tx.Commit())
	return w, a
}

// request sends a GET on a connection of its own, which takes little of the reply at a time. The reply must
// begin in time.
func request(t testing.TB, a *harness.App, path string) (net.Conn, *http.Response) {
	t.Helper()
	begin := time.Now()
	c, err := dial(a)
	harness.Must(t, err)
	harness.Must(t, c.(*net.TCPConn).SetReadBuffer(64<<10))
	harness.Must(t, c.SetDeadline(begin.Add(2*callWithin)))
	fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: goods\r\n\r\n", path)
	response, err := http.ReadResponse(bufio.NewReader(c), nil)
	harness.Must(t, err)
	if took := time.Since(begin); took > callWithin {
		t.Errorf("%s: got %d after %v, want an answer within %v", path, response.StatusCode, took, callWithin)
	}
	harness.Must(t, c.SetDeadline(time.Time{}))
	return c, response
}

// readSlowly reads a page again and again, slowly.
func readSlowly(t testing.TB, a *harness.App, path string, ended *atomic.Bool, statuses *[600]atomic.Int64) {
	for !ended.Load() {
		c, response := request(t, a, path)
		if response.StatusCode != 200 && response.StatusCode != 503 {
			t.Errorf("%s: got %d", path, response.StatusCode)
		}
		statuses[response.StatusCode].Add(1)
		for !ended.Load() {
			_, err := io.CopyN(io.Discard, response.Body, readAtOnce)
			if err == io.EOF {
				break
			}
			harness.Must(t, err)
			<-time.After(readPause)
		}
		c.Close()
	}
}

// callBeside makes calls that need little memory, each of which must succeed, and returns how long they took.
func callBeside(t testing.TB, a *harness.App, ended *atomic.Bool) (took []time.Duration) {
	var mu sync.Mutex // guards took
	longText := fmt.Sprintf(`{"name":"large","description":%q}`, strings.Repeat(fourBytes, longest))
	harness.Together(8, func(i int) {
		small := fmt.Sprint("?projectId=2&id=", largeGoods+1+i)
		large := fmt.Sprint("?projectId=1&id=", 1+i)
		for n := 0; !ended.Load(); n++ {
			name := text(fmt.Sprint("updated ", n))
			place := fmt.Sprintf(`{"newPriority":%d}`, largeGoods+1+n%10)
			for _, call := range []struct{ method, path, body string }{
				{"POST", "/goods/create?projectId=2", text("created")},
				{"PATCH", "/goods/update" + small, name},
				{"PATCH", "/goods/update" + large, longText},
				{"PATCH", "/goods/reprioritize" + small, place},
				{"GET", "/goods/list?projectId=2", ""},
				{"GET", fmt.Sprint("/goods/list?offset=", largeGoods+1), ""},
				{"GET", "/goods/get" + small, ""},
			} {
				begin := time.Now()
				r := a.Call(t, call.method, call.path, call.body)
				if !good(r.Status) {
					t.Errorf("%s %s: got %d %s", call.method, call.path, r.Status, r.Body)
				}
				mu.Lock()
				took = append(took, time.Since(begin))
				mu.Unlock()
			}
			<-time.After(pace / 10)
		}
	})
	return took
}

// works checks that the service serves a large page, and has freed what it had needed.
func works(t testing.TB, a *harness.App, page string) {
	t.Helper()
	harness.Eventually(t, 2*callWithin, func() error {
		r, err := a.Try("GET", page, "")
		if err == nil && (r.Status != 200 || len(r.Body) < 1000*longest/50) {
			err = fmt.Errorf("%s: got %d with %d bytes", page, r.Status, len(r.Body))
		}
		return err
	})
	harness.Eventually(t, 10*time.Second, func() error {
		for range 20 { // so that there is garbage, and its collection
			a.Call(t, "GET", "/goods/list?projectId=2&limit=1000", "")
		}
		var heap float64
		for line := range strings.Lines(a.Call(t, "GET", "/metrics", "").Body) {
			_, _ = fmt.Sscanf(line, "go_memstats_heap_alloc_bytes %g", &heap)
		}
		if heap > heapAtRest {
			return fmt.Errorf("the service has %g bytes, want %d at most", heap, heapAtRest)
		}
		return nil
	})
}

// memory returns an amount of memory of the service's process, in KiB, as Linux names it.
func memory(t testing.TB, a *harness.App, name string) (kib int) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", a.Process.Pid))
	harness.Must(t, err)
	_, rest, _ := strings.Cut(string(text), name+":")
	_, err = fmt.Sscan(rest, &kib)
	harness.Must(t, err)
	return kib
}

// sendQueues returns how many bytes each connection of the service has sent that its client has not taken.
func sendQueues(t testing.TB, a *harness.App) (queued []int) {
	t.Helper()
	_, port, err := net.SplitHostPort(a.Host())
	harness.Must(t, err)
	number, err := strconv.Atoi(port)
	harness.Must(t, err)
	local := fmt.Sprintf("0100007F:%04X", number) // 127.0.0.1
	table, err := os.ReadFile("/proc/net/tcp")
	harness.Must(t, err)
	for line := range strings.Lines(string(table)) {
		fields := strings.Fields(line) // number, local address, remote address, state, queues
		if fields[1] != local {
			continue
		}
		send, _, _ := strings.Cut(fields[4], ":")
		n, err := strconv.ParseInt(send, 16, 64)
		harness.Must(t, err)
		queued = append(queued, int(n))
	}
	return queued
}
