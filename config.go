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

// variables are all there is to configure. Each parse stores the value, and
// tells whether it is valid. The complaint never quotes it: it may hold a password.
var variables = []struct {
	name, fallback, help, complaint string
	parse                           func(c *config, v string) bool
}{
	{"HTTP_ADDR", ":8080", "address to listen on, host:port", "is not an address such as :8080, with a port up to 65535", func(c *config, v string) bool {
		c.addr = v
		_, port, err := net.SplitHostPort(v)
		_, bad := strconv.ParseUint(port, 10, 16)
		return err == nil && bad == nil
	}},
	{"POSTGRES_URL", "postgres://goods:goods@localhost:5432/goods?sslmode=disable", "the database of the goods", "is not a usable postgres://host:port URL", func(c *config, v string) bool {
		c.postgres = v // may name several hosts, or a socket, which no other URL can
		_, err := pq.NewConfig(v)
		return err == nil && (strings.HasPrefix(v, "postgres://") || strings.HasPrefix(v, "postgresql://"))
	}},
	{"REDIS_URL", "redis://localhost:6379/0", "the cache", "is not a usable redis://host:port/number URL", func(c *config, v string) bool {
		c.redis = v
		u := parseURL(v, "redis", "rediss")
		return u != nil && strings.Trim(u.Path, "/0123456789") == ""
	}},
	{"NATS_URL", "nats://localhost:4222", "carries the events; several servers with commas", "is not a usable nats://host:port URL", func(c *config, v string) bool {
		c.nats = v
		return !slices.ContainsFunc(strings.Split(v, ","), func(server string) bool { return parseURL(strings.TrimSpace(server), "nats", "tls") == nil })
	}},
	{"CLICKHOUSE_URL", "clickhouse://localhost:9000/default", "the log of the events; also http:// and https://", "is not a usable clickhouse://host:port URL", func(c *config, v string) bool {
		var err error
		if c.clickhouse, err = clickhouse.ParseDSN(v); err != nil || parseURL(v, "clickhouse", "http", "https") == nil {
			return false
		}
		return !slices.ContainsFunc(c.clickhouse.Addr, func(server string) bool { // the driver knows no default port
			_, _, err := net.SplitHostPort(server)
			return err != nil
		})
	}},
	{"EVENTS_BATCH", "5", "events in one INSERT into ClickHouse, 1 to 1000", "must be an integer from 1 to 1000", func(c *config, v string) (ok bool) {
		c.eventsBatch, ok = number(v, 1000)
		return ok
	}},
	{"NATS_REPLICAS", "1", "replicas of the stream, 1 to 5", "must be an integer from 1 to 5", func(c *config, v string) (ok bool) {
		c.natsReplicas, ok = number(v, 5)
		return ok
	}},
	{"NAMESPACE", "goods", "prefix of Redis keys and NATS names, to share those servers", "must be a lower-case letter, then up to 31 letters, digits, - and _", func(c *config, v string) bool {
		c.namespace = v
		return regexp.MustCompile(`^[a-z][a-z0-9_-]{0,31}$`).MatchString(v)
	}},
	{"LOG_LEVEL", "info", "debug, info, warn or error", "must be debug, info, warn or error", func(c *config, v string) bool {
		return c.logLevel.UnmarshalText([]byte(v)) == nil
	}},
}

// parseURL returns nil for what is no URL with a host and one of the schemes.
func parseURL(value string, schemes ...string) *url.URL {
	u, err := url.Parse(value)
	if err != nil || u.Hostname() == "" || !slices.Contains(schemes, u.Scheme) {
		return nil
	}
	return u
}

func number(value string, most int) (n int, ok bool) {
	n, err := strconv.Atoi(value)
	return n, err == nil && n >= 1 && n <= most
}

// readConfig reports every bad variable at once.
func readConfig(getenv func(string) string) (*config, error) {
	c := &config{}
	var bad []string
	for _, v := range variables {
		value := getenv(v.name)
		if value == "" {
			value = v.fallback
		}
		if !v.parse(c, value) {
			bad = append(bad, v.name+" "+v.complaint)
		}
	}
	if len(bad) > 0 {
		return nil, errors.New(strings.Join(bad, "; "))
	}
	return c, nil
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
