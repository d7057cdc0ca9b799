package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/ClickHouse/clickhouse-go/v2"
	"github.com/lib/pq"
)

type config struct {
	addr, postgres, redis, nats, namespace string
	clickhouse                             *clickhouse.Options
	eventsBatch, natsReplicas              int
	logLevel                               slog.Level
}

// variables are all there is to configure. A value must match the pattern.
var variables = []struct {
	name, fallback, help string
	pattern              *regexp.Regexp
}{
	{"HTTP_ADDR", ":8080", "the address to listen on, host:port", regexp.MustCompile(`^.*:\d{1,5}$`)},
	{"POSTGRES_URL", "postgres://goods:goods@localhost:5432/goods?sslmode=disable", "a postgres:// URL, the database of the goods", regexp.MustCompile(`^postgres(ql)?://`)},
	{"REDIS_URL", "redis://localhost:6379/0", "a redis:// or rediss://host:port/number URL, the cache", regexp.MustCompile(`^rediss?://[^/]+(/\d*)?$`)},
	{"NATS_URL", "nats://localhost:4222", "nats:// or tls://host:port URLs with commas, the road of the events", regexp.MustCompile(`^(nats|tls)://[^/,]+/?(, *(nats|tls)://[^/,]+/?)*$`)},
	{"CLICKHOUSE_URL", "clickhouse://localhost:9000/default", "a clickhouse://, http:// or https://host:port/database URL, the log of the events", regexp.MustCompile(`^(clickhouse|https?)://[^/]+`)},
	{"EVENTS_BATCH", "5", "1 to 1000, the events in one INSERT into ClickHouse", regexp.MustCompile(`^([1-9]\d{0,2}|1000)$`)},
	{"NATS_REPLICAS", "1", "1 to 5, the replicas of the stream", regexp.MustCompile(`^[1-5]$`)},
	{"NAMESPACE", "goods", "a prefix of Redis keys and NATS names: a lower-case letter, then up to 31 letters, digits, - and _", regexp.MustCompile(`^[a-z][a-z0-9_-]{0,31}$`)},
	{"LOG_LEVEL", "info", "debug, info, warn or error", regexp.MustCompile(`^(?i)(debug|info|warn|error)$`)},
}

// readConfig reports every bad variable at once, and never a value: it may
// hold a password.
func readConfig(getenv func(string) string) (*config, error) {
	values := map[string]string{}
	var bad []string
	for _, v := range variables {
		values[v.name] = getenv(v.name)
		if values[v.name] == "" {
			values[v.name] = v.fallback
		}
		if !v.pattern.MatchString(values[v.name]) || !usable(v.name, values[v.name]) {
			bad = append(bad, v.name+" must be "+v.help)
		}
	}
	if len(bad) > 0 {
		return nil, errors.New(strings.Join(bad, "; "))
	}
	c := &config{addr: values["HTTP_ADDR"], postgres: values["POSTGRES_URL"], redis: values["REDIS_URL"], nats: values["NATS_URL"], namespace: values["NAMESPACE"]}
	c.clickhouse, _ = clickhouse.ParseDSN(values["CLICKHOUSE_URL"])
	c.eventsBatch, _ = strconv.Atoi(values["EVENTS_BATCH"])
	c.natsReplicas, _ = strconv.Atoi(values["NATS_REPLICAS"])
	return c, c.logLevel.UnmarshalText([]byte(values["LOG_LEVEL"]))
}

// usable asks those who will parse a value whether they can.
func usable(name, value string) bool {
	switch name {
	case "HTTP_ADDR":
		_, port, err := net.SplitHostPort(value)
		_, bad := strconv.ParseUint(port, 10, 16)
		return err == nil && bad == nil
	case "POSTGRES_URL":
		_, err := pq.NewConfig(value)
		return err == nil
	case "REDIS_URL", "NATS_URL":
		return !slices.ContainsFunc(strings.Split(value, ","), func(server string) bool {
			u, err := url.Parse(strings.TrimSpace(server))
			return err != nil || u.Hostname() == ""
		})
	case "CLICKHOUSE_URL":
		options, err := clickhouse.ParseDSN(value)
		return err == nil && !slices.ContainsFunc(options.Addr, func(server string) bool { // the driver knows no default port
			_, port, err := net.SplitHostPort(server)
			return err != nil || port == ""
		})
	}
	return true
}

func usage(w io.Writer) {
	fmt.Fprint(w, `goods keeps an ordered list of goods for projects, over HTTP.

  goods                      serve
  goods migrate postgres     apply the migrations of Postgres, and end
  goods migrate clickhouse   apply the migrations of ClickHouse, and end
  goods healthcheck          succeed if the service on HTTP_ADDR is up
  goods version              print the version

Environment variables and their defaults:

`)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, v := range variables {
		fmt.Fprintf(t, "  %s\t%s\t%s\n", v.name, v.fallback, v.help)
	}
	t.Flush()
}
