package test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"goods/test/harness"
)

// A body that arrives slowly, but in time, takes nothing of the time that the call itself may take.
func TestSlowBody(t *testing.T) {
	w, a := started(t)
	conn, err := net.Dial("tcp", a.Host())
	harness.Must(t, err)
	defer conn.Close()
	_, err = fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: goods\r\nContent-Length: %d\r\n\r\n%s",
		create, len(someName), someName[:4])
	harness.Must(t, err)
	begin := time.Now()
	<-time.After(3900 * time.Millisecond)
	tx := w.Hold(t, `SELECT lock_priorities()`)
	_, err = io.WriteString(conn, someName[4:])
	harness.Must(t, err)
	awaitLock(t, w)
	<-time.After(5300*time.Millisecond - time.Since(begin)) // a body has five seconds
	harness.Must(t, tx.Rollback())
	harness.Must(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	harness.Must(t, err)
	harness.Equal(t, response.StatusCode, 201, "status")
	harness.Equal(t, value(t, a, "goods_http_requests_total", `value:"499"`), 0.0, "clients that went away")
	harness.Equal(t, w.Settled(t, 15*time.Second), 1, "events")
}

// A client that sends a body all the same, after the reply to a call that needs none, can still read that
// reply.
func TestBodyAfterReply(t *testing.T) {
	_, a := started(t)
	a.Create(t, "one")
	for _, call := range []struct {
		request, header string
		status          int
	}{
		{"GET /goods/list", "", 200},
		{"GET /goods/get" + target(1), "", 200},
		{"DELETE /goods/remove" + target(1), "", 200},
		{"POST /nowhere", "", 404},
		{"PUT /goods/list", "", 405},
		{"POST " + create, "Origin: http://shop.example\r\n", 403},
	} {
		const length = 50_000
		head := fmt.Sprintf("%s HTTP/1.1\r\nHost: goods\r\nContent-Length: %d\r\n%s\r\n",
			call.request, length, call.header)
		var status int
		var err error
		for range 3 { // the body has half a second, which a busy machine may not grant it
			status, err = sendBodyLate(t, a, head, strings.Repeat("x", length))
			if err == nil {
				break
			}
		}
		if err != nil || status != call.status {
			t.Errorf("%s: got %d, %v, want %d and the whole reply", call.request, status, err, call.status)
		}
	}
}

// sendBodyLate sends the body of a request once its reply has begun, and then reads the rest of that.
func sendBodyLate(t *testing.T, a *harness.App, head, body string) (status int, err error) {
	t.Helper()
	conn, err := net.Dial("tcp", a.Host())
	harness.Must(t, err)
	defer conn.Close()
	harness.Must(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
	_, err = io.WriteString(conn, head)
	harness.Must(t, err)
	begun := make([]byte, 1)
	if _, err := io.ReadFull(conn, begun); err != nil {
		return 0, err
	}
	_, _ = io.WriteString(conn, body) // an error shows below
	<-time.After(50 * time.Millisecond)
	reply := io.MultiReader(strings.NewReader(string(begun)), conn)
	response, err := http.ReadResponse(bufio.NewReader(reply), nil)
	if err != nil {
		return 0, err
	}
	_, err = io.Copy(io.Discard, response.Body)
	return response.StatusCode, err
}
