package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// only is an environment of nothing but the given variables.
func only(variables ...string) func(string) string {
	return (&world{}).getenv(variables...)
}

func TestHelpAndVersion(t *testing.T) {
	for _, command := range []string{"-h", "-help", "--help", "help"} {
		var out bytes.Buffer
		must(t, run(context.Background(), []string{command}, only("HTTP_ADDR=nonsense"), &out))
		for _, part := range []string{"goods migrate postgres ", "goods migrate clickhouse ", "goods healthcheck ", "goods version "} {
			if !strings.Contains(out.String(), "\n  "+part) {
				t.Errorf("%s: got no line for %q in:\n%s", command, part, out.String())
			}
		}
		for _, v := range variables {
			if line := lineWith(out.String(), "  "+v.name+" "); !strings.Contains(line, " "+v.fallback+" ") || !strings.HasSuffix(line, v.help) {
				t.Errorf("%s: got %q for %s, want its default and what it is", command, line, v.name)
			}
		}
	}
	for _, command := range []string{"version", "-version", "--version"} {
		var out bytes.Buffer
		must(t, run(context.Background(), []string{command}, only("HTTP_ADDR=nonsense"), &out))
		if got := out.String(); !strings.HasPrefix(got, "goods ") || !strings.Contains(got, " go1.") || strings.Count(got, "\n") != 1 {
			t.Errorf("%s: got %q, want one line with the version, and Go's", command, got)
		}
	}
	c, err := readConfig(only())
	if err != nil || c.addr != ":8080" || c.eventsBatch != 5 || c.natsReplicas != 1 || c.namespace != "goods" {
		t.Errorf("without variables: got %+v, %v, want the defaults", c, err)
	}
}

func lineWith(text, part string) string {
	for line := range strings.Lines(text) {
		if strings.Contains(line, part) {
			return strings.TrimSuffix(line, "\n")
		}
	}
	return ""
}

func TestBadVariables(t *testing.T) {
	const address = "HTTP_ADDR is not an address such as :8080, with a port up to 65535"
	const postgres = "POSTGRES_URL is not a usable postgres://host:port URL"
	const redis = "REDIS_URL is not a usable redis://host:port URL"
	const nats = "NATS_URL is not a usable nats://host:port URL"
	const clickhouse = "CLICKHOUSE_URL is not a usable clickhouse://host:port URL"
	const namespace = "NAMESPACE must be a lower-case letter, then up to 31 letters, digits, - and _"
	for _, test := range []struct{ variable, want string }{
		{"HTTP_ADDR=8080", address},
		{"HTTP_ADDR=localhost", address},
		{"HTTP_ADDR=:http", address},
		{"HTTP_ADDR=:65536", address},
		{"HTTP_ADDR=http://:8080", address},
		{"POSTGRES_URL=localhost", postgres},
		{"POSTGRES_URL=mysql://goods:s3cret@localhost/goods", postgres},
		{"POSTGRES_URL=postgres://goods:s3cret@localhost:port/goods", postgres},
		{"POSTGRES_URL=postgres://goods:s3cret%@localhost/goods", postgres},
		{"POSTGRES_URL=postgres://goods:s3cret@localhost/goods?sslmode=perhaps", postgres},
		{"REDIS_URL=127.0.0.1:6379", redis},
		{"REDIS_URL=http://:s3cret@localhost", redis},
		{"REDIS_URL=redis://:s3cret%zz@localhost", redis},
		{"REDIS_URL=redis://:s3cret@localhost/one", "REDIS_URL must end with the number of a database, such as /0"},
		{"NATS_URL=localhost:4222", nats},
		{"NATS_URL=nats://goods:s3cret@localhost, amqp://localhost", nats},
		{"NATS_URL=nats://goods:s3cret@localhost,", nats},
		{"CLICKHOUSE_URL=localhost:9000", clickhouse},
		{"CLICKHOUSE_URL=http://goods:s3cret@localhost:8123", clickhouse},
		{"CLICKHOUSE_URL=clickhouse://goods:s3cret@localhost?dial_timeout=soon", clickhouse},
		{"EVENTS_BATCH=0", "EVENTS_BATCH must be an integer from 1 to 1000"},
		{"EVENTS_BATCH=1001", "EVENTS_BATCH must be an integer from 1 to 1000"},
		{"EVENTS_BATCH=five", "EVENTS_BATCH must be an integer from 1 to 1000"},
		{"NATS_REPLICAS=6", "NATS_REPLICAS must be an integer from 1 to 5"},
		{"NAMESPACE=Goods", namespace},
		{"NAMESPACE=goods.eu", namespace},
		{"NAMESPACE=" + strings.Repeat("x", 33), namespace},
		{"LOG_LEVEL=loud", "LOG_LEVEL must be debug, info, warn or error"},
	} {
		for _, command := range [][]string{nil, {"healthcheck"}, {"migrate", "postgres"}, {"migrate", "clickhouse"}} {
			var out bytes.Buffer
			if err := run(context.Background(), command, only(test.variable), &out); err == nil || err.Error() != test.want || out.Len() > 0 {
				t.Errorf("goods %v with %s: got %v and %q, want %s", command, test.variable, err, out.String(), test.want)
			}
		}
	}
	all := only("HTTP_ADDR=x", "POSTGRES_URL=x", "REDIS_URL=x", "NATS_URL=x", "CLICKHOUSE_URL=x", "EVENTS_BATCH=x", "NATS_REPLICAS=x", "NAMESPACE=X", "LOG_LEVEL=x")
	want := strings.Join([]string{address, postgres, redis, nats, clickhouse, "EVENTS_BATCH must be an integer from 1 to 1000",
		"NATS_REPLICAS must be an integer from 1 to 5", namespace, "LOG_LEVEL must be debug, info, warn or error"}, "; ")
	if err := run(context.Background(), nil, all, &bytes.Buffer{}); err == nil || err.Error() != want {
		t.Errorf("all variables bad: got %v, want %s", err, want)
	}
}

// TestProgram runs goods as its users do, up to each failure at its start.
func TestProgram(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer taken.Close()
	server, err := url.Parse(w.env["POSTGRES_URL"])
	must(t, err)
	host := "postgres://goods:s3cret@" + server.Host
	self, err := os.Executable()
	must(t, err)
	for _, test := range []struct {
		args, variable, want string
	}{
		{"serve", "", `unknown command "serve": see goods -h`},
		{"migrate", "", `unknown command "migrate": see goods -h`},
		{"migrate redis", "", `unknown command "migrate redis": see goods -h`},
		{"healthcheck now", "", `unknown command "healthcheck now": see goods -h`},
		{"", "LOG_LEVEL=x", "LOG_LEVEL must be debug, info, warn or error"},
		{"", "HTTP_ADDR=" + taken.Addr().String(), "HTTP_ADDR: listen tcp " + taken.Addr().String() + ": bind: address already in use"},
		{"", "HTTP_ADDR=192.0.2.1:80", "HTTP_ADDR: listen tcp 192.0.2.1:80: bind: cannot assign requested address"},
		{"", "POSTGRES_URL=" + host + "/goods?sslmode=disable", "POSTGRES_URL: " + server.Host + `/goods: pq: password authentication failed for user "goods" (28P01)`},
		{"migrate postgres", "POSTGRES_URL=" + host + "/goods?sslmode=disable", "POSTGRES_URL: " + server.Host + `/goods: pq: password authentication failed for user "goods" (28P01)`},
		{"", "POSTGRES_URL=" + withPath(t, w.env["POSTGRES_URL"], "nowhere"), "POSTGRES_URL: " + server.Host + `/nowhere: pq: database "nowhere" does not exist (3D000)`},
		{"healthcheck", "HTTP_ADDR=127.0.0.1:1", `Get "http://127.0.0.1:1/healthz": dial tcp 127.0.0.1:1: connect: connection refused`},
	} {
		cmd := exec.Command(self, strings.Fields(test.args)...)
		cmd.Env = []string{asProgram + "=1", test.variable}
		for _, v := range variables {
			if !strings.HasPrefix(test.variable, v.name+"=") {
				cmd.Env = append(cmd.Env, v.name+"="+w.env[v.name])
			}
		}
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		must(t, cmd.Start())
		kill := time.AfterFunc(10*time.Second, func() { _ = cmd.Process.Kill() })
		err := cmd.Wait()
		kill.Stop()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 1 || stderr.String() != "goods: "+test.want+"\n" || stdout.Len() > 0 {
			t.Errorf("%s goods %s: got %v, %q and %q, want status 1 and %q", test.variable, test.args, err, stdout.String(), stderr.String(), test.want)
		}
	}
}

func TestAwaitPostgres(t *testing.T) {
	db, err := openPostgres("postgres://goods:s3cret@127.0.0.1:1/goods", answerWithin)
	must(t, err)
	defer db.Close()
	const refused = "dial tcp 127.0.0.1:1: connect: connection refused"
	if err := awaitPostgres(context.Background(), db, 500*time.Millisecond, slog.New(slog.DiscardHandler)); err == nil || !strings.HasPrefix(err.Error(), "no answer in ") || !strings.HasSuffix(err.Error(), "s: "+refused) {
		t.Errorf("got %v, want no answer in 500ms: %s", err, refused)
	}
	ctx, cancel := context.WithCancel(context.Background())
	time.AfterFunc(100*time.Millisecond, cancel)
	if err := awaitPostgres(ctx, db, time.Hour, slog.New(slog.DiscardHandler)); err == nil || !strings.HasSuffix(err.Error(), refused) && !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want the end of the context or %s", err, refused)
	}
}

func TestHealthcheck(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.start(t)
	_, port, err := net.SplitHostPort(strings.TrimPrefix(a.url, "http://"))
	must(t, err)
	for _, host := range []string{"127.0.0.1", "localhost", "", "0.0.0.0", "[::]"} {
		if err := run(context.Background(), []string{"healthcheck"}, w.getenv("HTTP_ADDR="+host+":"+port), &bytes.Buffer{}); err != nil {
			t.Errorf("HTTP_ADDR=%s:%s: %v", host, port, err)
		}
	}
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer silent.Close()
	start := time.Now()
	err = run(context.Background(), []string{"healthcheck"}, w.getenv("HTTP_ADDR="+silent.Addr().String()), &bytes.Buffer{})
	if took := time.Since(start); err == nil || took > 4*time.Second {
		t.Errorf("silent server: got %v after %v", err, took)
	}
	must(t, a.stop())
	if err := run(context.Background(), []string{"healthcheck"}, w.getenv(fmt.Sprintf("HTTP_ADDR=127.0.0.1:%s", port)), &bytes.Buffer{}); err == nil {
		t.Error("healthcheck succeeds after the end of the service")
	}
}
