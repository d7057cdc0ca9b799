package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/ClickHouse/clickhouse-go/v2"
	"github.com/lib/pq"
)

// variables are all there is to configure. Each parse stores a valid value.
var variables = []struct {
	name, fallback, help string
	parse                func(c *config, value string) error
}{
	{"HTTP_ADDR", ":8080", "address to listen on, host:port", func(c *config, v string) error {
		c.addr = v
		_, port, err := net.SplitHostPort(v)
		if n, e := strconv.Atoi(port); err != nil || e != nil || n < 0 || n > 65535 {
			return errors.New("is not an address such as :8080, with a port up to 65535")
		}
		return nil
	}},
	{"POSTGRES_URL", "postgres://goods:goods@localhost:5432/goods?sslmode=disable", "the database of the goods", func(c *config, v string) error {
		c.postgres = v // may name several hosts, or a socket, which no other URL can
		if _, err := pq.NewConfig(v); err != nil || !strings.HasPrefix(v, "postgres://") && !strings.HasPrefix(v, "postgresql://") {
			return errors.New("is not a usable postgres://host:port URL")
		}
		return nil
	}},
	{"REDIS_URL", "redis://localhost:6379/0", "the cache", func(c *config, v string) error {
		c.redis = v
		err := validURL(v, nil, "redis", "rediss")
		if u, _ := url.Parse(v); err == nil && strings.Trim(u.Path, "/0123456789") != "" {
			return errors.New("must end with the number of a database, such as /0")
		}
		return err
	}},
	{"NATS_URL", "nats://localhost:4222", "carries the events; several servers with commas", func(c *config, v string) error {
		c.nats = v
		for server := range strings.SplitSeq(v, ",") {
			if err := validURL(strings.TrimSpace(server), nil, "nats", "tls"); err != nil {
				return err
			}
		}
		return nil
	}},
	{"CLICKHOUSE_URL", "clickhouse://localhost:9000/default", "the log of the events; native protocol", func(c *config, v string) (err error) {
		if c.clickhouse, err = clickhouse.ParseDSN(v); err == nil {
			for _, server := range c.clickhouse.Addr {
				_, _, portErr := net.SplitHostPort(server)
				err = errors.Join(err, portErr) // the driver knows no default
			}
		}
		return validURL(v, err, "clickhouse")
	}},
	{"EVENTS_BATCH", "5", "events in one INSERT into ClickHouse, 1 to 1000", func(c *config, v string) (err error) {
		c.eventsBatch, err = number(v, 1, 1000)
		return err
	}},
	{"NATS_REPLICAS", "1", "replicas of the stream, when the service creates it, 1 to 5", func(c *config, v string) (err error) {
		c.natsReplicas, err = number(v, 1, 5)
		return err
	}},
	{"NAMESPACE", "goods", "prefix of Redis keys and NATS names, to share those servers", func(c *config, v string) error {
		c.namespace = v
		if !regexp.MustCompile(`^[a-z][a-z0-9_-]{0,31}$`).MatchString(v) {
			return errors.New("must be a lower-case letter, then up to 31 letters, digits, - and _")
		}
		return nil
	}},
	{"LOG_LEVEL", "info", "debug, info, warn or error", func(c *config, v string) error {
		if c.logLevel.UnmarshalText([]byte(v)) != nil {
			return errors.New("must be debug, info, warn or error")
		}
		return nil
	}},
}

type config struct {
	addr, postgres, redis, nats string
	clickhouse                  *clickhouse.Options
	eventsBatch, natsReplicas   int
	namespace                   string
	logLevel                    slog.Level
}

// validURL checks a URL's scheme and host. Its error never quotes the value,
// which may hold a password.
func validURL(value string, err error, schemes ...string) error {
	u, parseErr := url.Parse(value)
	if err == nil && parseErr == nil && u.Hostname() != "" {
		for _, s := range schemes {
			if u.Scheme == s {
				return nil
			}
		}
	}
	return fmt.Errorf("is not a usable %s://host:port URL", schemes[0])
}

func number(value string, least, most int) (int, error) {
	n, err := strconv.Atoi(value)
	if err != nil || n < least || n > most {
		return 0, fmt.Errorf("must be an integer from %d to %d", least, most)
	}
	return n, nil
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
		if err := v.parse(c, value); err != nil {
			bad = append(bad, v.name+" "+err.Error())
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
