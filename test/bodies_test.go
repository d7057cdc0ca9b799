package test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"goods/test/harness"
)

// A body that a call does not need may come late: the call is made, and its client, which sends the body
// before it reads, gets the whole reply.
func TestBodyAfterReply(t *testing.T) {
	w, a := started(t, nowhere)
	w.Exec(t, `
INSERT INTO goods (project_id, name, description)
SELECT 1, n::text, repeat('日', 10000)
FROM generate_series(1, 30) AS n`)
	for _, call := range []struct {
		request, header string
		status          int
	}{
		{"GET /goods/list?limit=30", "", 200},
		{"GET /goods/get" + target(1), "", 200},
		{"DELETE /goods/remove" + target(1), "", 200},
		{"POST /nowhere", "", 404},
		{"PUT /goods/list", "", 405},
		{"POST " + create, "Origin: http://shop.example\r\n", 403},
	} {
		const length = 50_000
		head := fmt.Sprintf("%s HTTP/1.1\r\nHost: goods\r\nContent-Length: %d\r\n%s\r\n",
			call.request, length, call.header)
		status, err := sendBodyLate(t, a, head, strings.Repeat("x", length))
		if err != nil || status != call.status {
			t.Errorf("%s: got %d, %v, want %d and the whole reply", call.request, status, err, call.status)
		}
	}
	harness.Equal(t, a.List(t, 1, 1).Goods[0].Removed, true, "the first good is removed")
}

// sendBodyLate sends the body of a request once its reply has begun, and then reads the rest of that.
func sendBodyLate(t *testing.T, a *harness.App, head, body string) (status int, err error) {
	t.Helper()
	conn, err := net.Dial("tcp", a.Host())
	harness.Must(t, err)
	defer conn.Close()
	harness.Must(t, conn.(*net.TCPConn).SetReadBuffer(16<<10)) // or the kernel would read the reply before
	harness.Must(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
	_, err = io.WriteString(conn, head)
	harness.Must(t, err)
	begun := make([]byte, 1)
	_, err = io.ReadFull(conn, begun)
	harness.Must(t, err)
	if _, err := io.WriteString(conn, body); err != nil {
		return 0, err
	}
	reply := io.MultiReader(bytes.NewReader(begun), conn)
	response, err := http.ReadResponse(bufio.NewReader(reply), nil)
	if err != nil {
		return 0, err
	}
	_, err = io.Copy(io.Discard, response.Body)
	return response.StatusCode, err
}
