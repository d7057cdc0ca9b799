package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"regexp"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/ClickHouse/clickhouse-go/v2"
	"github.com/lib/pq"
)

// version is set by the linker.
var version = "(devel)"

type config struct {
	addr, postgres, redis, nats, namespace string
	clickhouse                             *clickhouse.Options
	eventsBatch, natsReplicas              int
	logLevel                               slog.Level
}

// variables are all there is to configure. A value must match its pattern.
var variables = []struct {
	name, fallback, help string
	pattern              *regexp.Regexp
}{
	{"HTTP_ADDR", ":8080", "the address to listen on, host:port", regexp.MustCompile(`^[^ ]*:\d{1,5}$`)},
	{"POSTGRES_URL", "postgres://goods:goods@localhost:5432/goods?sslmode=disable", "a postgres://host:port/database URL, several hosts as host,host/database?port=port,port, the database of the goods",
		regexp.MustCompile(`^postgres(ql)?://([^@/?]*@)?([^:/?,]*(:\d+)?|\[[^]]*\](:\d+)?|[^:/?]*)([/?]|$)`)},
	{"REDIS_URL", "redis://localhost:6379/0", "a redis:// or rediss://host:port/number URL, the cache", regexp.MustCompile(`^rediss?://[^/ ]+(/\d*)?$`)},
	{"NATS_URL", "nats://localhost:4222", "nats:// or tls://host:port URLs with commas, the road of the events", regexp.MustCompile(`^(nats|tls)://[^/, ]+/?(, *(nats|tls)://[^/, ]+/?)*$`)},
	{"CLICKHOUSE_URL", "clickhouse://localhost:9000/default", "a clickhouse://, http:// or https://host:port/database URL, the log of the events",
		regexp.MustCompile(`^(clickhouse|https?)://([^@/ ]*@)?[^:/, ]+:\d+(,[^:/, ]+:\d+)*([/?]|$)`)},
	{"EVENTS_BATCH", "5", "1 to 1000, the events in one INSERT into ClickHouse", regexp.MustCompile(`^([1-9]\d{0,2}|1000)$`)},
	{"NATS_REPLICAS", "1", "1 to 5, the replicas of the stream", regexp.MustCompile(`^[1-5]$`)},
	{"NAMESPACE", "goods", "a prefix of Redis keys and NATS names: a lower-case letter, then up to 31 letters, digits, - and _", regexp.MustCompile(`^[a-z][a-z0-9_-]{0,31}$`)},
	{"LOG_LEVEL", "info", "debug, info, warn or error", regexp.MustCompile(`^(?i)(debug|info|warn|error)$`)},
}

// readConfig reports every bad variable at once, and never a value: it may hold a password.
func readConfig(getenv func(string) string) (*config, error) {
	values := map[string]string{}
	var bad []string
	c := &config{}
	for _, v := range variables {
		value := getenv(v.name)
		if value == "" {
			value = v.fallback
		}
		var err error
		switch v.name { // those who will parse these two say whether they can
		case "POSTGRES_URL":
			_, err = pq.NewConfig(value)
		case "CLICKHOUSE_URL":
			c.clickhouse, err = clickhouse.ParseDSN(value)
		}
		if err != nil || !v.pattern.MatchString(value) {
			bad = append(bad, v.name+" must be "+v.help)
		}
		values[v.name] = value
	}
	if len(bad) > 0 {
		return nil, errors.New(strings.Join(bad, "; "))
	}
	c.addr, c.postgres, c.redis, c.nats, c.namespace = values["HTTP_ADDR"], values["POSTGRES_URL"], values["REDIS_URL"], values["NATS_URL"], values["NAMESPACE"]
	c.eventsBatch, _ = strconv.Atoi(values["EVENTS_BATCH"])
	c.natsReplicas, _ = strconv.Atoi(values["NATS_REPLICAS"])
	return c, c.logLevel.UnmarshalText([]byte(values["LOG_LEVEL"]))
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
