package main

import (
	"cmp"
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

	"github.com/ClickHouse/clickhouse-go/v2"
	"github.com/gomodule/redigo/redis"
	"github.com/lib/pq"
)

// config is what the environment says.
type config struct {
	addr         string // to listen on
	postgres     string // URL
	redis        string // URL
	nats         string // URLs, with commas
	clickhouse   *clickhouse.Options
	eventsBatch  int
	natsReplicas int
	namespace    string
	logLevel     slog.Level
}

// variable is one of the environment.
type variable struct {
	name, fallback string
	help           string // says what it must be
	read           func(c *config, value string) error
}

// errUnfit is the error of a value that is not as the variable's help says.
var errUnfit = errors.New("unfit")

// variables are all there is to configure.
var variables = []variable{
	{
		name:     "HTTP_ADDR",
		fallback: "127.0.0.1:8080",
		help:     "the address to listen on, host:port; :8080 is every address of this machine",
		read: func(c *config, value string) error {
			c.addr = value
			_, port, err := net.SplitHostPort(value)
			if err != nil {
				return err
			}
			_, err = strconv.ParseUint(port, 10, 16)
			return err
		},
	},
	{
		name:     "POSTGRES_URL",
		fallback: "postgres://goods:goods@localhost:5432/goods?sslmode=disable",
		help: "the database of the goods, a URL such as postgres://user:password@host:port/database, " +
			"or ://host1,host2/database?port=5432,5433",
		read: func(c *config, value string) error {
			c.postgres = value
			return checkPostgresURL(value)
		},
	},
	{
		name:     "REDIS_URL",
		fallback: "redis://localhost:6379/0",
		help:     "the cache, a URL such as redis://user:password@host:6379/0, or rediss:// for TLS",
		read: func(c *config, value string) error {
			c.redis = value
			return checkRedisURL(value)
		},
	},
	{
		name:     "NATS_URL",
		fallback: "nats://localhost:4222",
		help:     "carries the events, URLs such as nats://user:password@host:4222, or tls://, with commas",
		read: func(c *config, value string) error {
			c.nats = value
			return checkNATSURL(value)
		},
	},
	{
		name:     "CLICKHOUSE_URL",
		fallback: "clickhouse://localhost:9000/default",
		help:     "the log of the events, a URL such as clickhouse://user:password@host:9000/database, or https://",
		read:     readClickHouseURL,
	},
	{
		name:     "EVENTS_BATCH",
		fallback: "5",
		help:     "the events in one INSERT into ClickHouse, 1 to 1000",
		read: func(c *config, value string) (err error) {
			c.eventsBatch, err = parseWithin(value, 1000)
			return err
		},
	},
	{
		name:     "NATS_REPLICAS",
		fallback: "1",
		help:     "the replicas of the stream, 1 to 5",
		read: func(c *config, value string) (err error) {
			c.natsReplicas, err = parseWithin(value, 5)
			return err
		},
	},
	{
		name:     "NAMESPACE",
		fallback: "goods",
		help:     "a prefix of Redis keys and NATS names: a lower-case letter, then up to 31 of a-z, 0-9, - and _",
		read: func(c *config, value string) error {
			c.namespace = value
			if !namespacePattern.MatchString(value) {
				return errUnfit
			}
			return nil
		},
	},
	{
		name:     "LOG_LEVEL",
		fallback: "info",
		help:     "debug, info, warn or error",
		read: func(c *config, value string) error {
			return c.logLevel.UnmarshalText([]byte(value))
		},
	},
}

var namespacePattern = regexp.MustCompile(`^[a-z][a-z0-9_-]{0,31}$`)

func parseWithin(value string, most int) (int, error) {
	n, err := strconv.Atoi(value)
	if err != nil {
		return 0, err
	}
	if n < 1 || n > most {
		return 0, errUnfit
	}
	return n, nil
}

// readConfig reports every bad variable at once, and never a value: it may hold a password. White space
// around values is dropped: a secret from a file often ends with a line break.
func readConfig(getenv func(string) string) (*config, error) {
	c := &config{}
	var bad []string
	// lib/pq reads PG… variables as well. It names the one that it refuses, and its value, which is no
	// secret.
	_, libpqErr := pq.NewConfig("postgres://")
	for _, v := range variables {
		if v.name == "POSTGRES_URL" && libpqErr != nil {
			bad = append(bad, libpqErr.Error())
			continue
		}
		value := cmp.Or(strings.TrimSpace(getenv(v.name)), v.fallback)
		if v.read(c, value) != nil { // whose text may have the value in it
			bad = append(bad, v.fault())
		}
	}
	if len(bad) > 0 {
		return nil, errors.New(strings.Join(bad, "; "))
	}
	return c, nil
}

// fault says what a bad value should have been.
func (v variable) fault() string {
	text := v.name + " must be " + v.help
	if strings.HasSuffix(v.name, "_URL") {
		text += " (special characters in a user or password have to be percent-encoded)"
	}
	return text
}

// checkURL returns an error unless value has one of these schemes and could be a URL. An @ after the host is a sign of
// a password with a special character, which has cut the user and the password off.
func checkURL(value string, schemes ...string) error {
	scheme, rest, _ := strings.Cut(value, "://")
	if !slices.Contains(schemes, scheme) || strings.Contains(rest, "#") {
		return errUnfit
	}
	end := strings.IndexAny(rest, "/?")
	if end < 0 {
		return nil
	}
	_, query, _ := strings.Cut(rest[end:], "?")
	_, err := url.ParseQuery(query)
	if err != nil || strings.Contains(rest[end:], "@") {
		return errUnfit
	}
	return nil
}

func checkPostgresURL(value string) error {
	if err := checkURL(value, "postgres", "postgresql"); err != nil {
		return err
	}
	u, err := url.Parse(value)
	if err != nil {
		return err
	}
	if strings.Contains(u.Hostname(), ",") && strings.Contains(u.Hostname(), ":") {
		return errUnfit // lib/pq would take all but the last port for a part of the host
	}
	_, err = pq.NewConfig(value)
	return err
}

// errNotDialled ends a connection before it is made, when its URL has been read.
var errNotDialled = errors.New("not dialled")

func checkRedisURL(value string) error {
	if err := checkURL(value, "redis", "rediss"); err != nil {
		return err
	}
	u, err := url.Parse(value)
	if err != nil {
		return err
	}
	if u.RawQuery != "" || !hostFits(u) { // redigo would ignore a query, such as ?db=2, and guess a host
		return errUnfit
	}
	refuse := func(string, string) (net.Conn, error) { return nil, errNotDialled }
	_, err = redis.DialURL(value, redis.DialNetDial(refuse))
	if errors.Is(err, errNotDialled) {
		return nil
	}
	return err
}

func checkNATSURL(value string) error {
	for server := range strings.SplitSeq(value, ",") {
		server = strings.TrimSpace(server)
		if err := checkURL(server, "nats", "tls"); err != nil {
			return err
		}
		u, err := url.Parse(server)
		if err != nil {
			return err
		}
		if strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || !hostFits(u) {
			return errUnfit
		}
	}
	return nil
}

// hostFits reports whether a URL has a host, and if it has a port, one that there is.
func hostFits(u *url.URL) bool {
	if u.Hostname() == "" || strings.Contains(u.Host, ",") {
		return false
	}
	if u.Port() == "" {
		return !strings.HasSuffix(u.Host, ":")
	}
	_, err := strconv.ParseUint(u.Port(), 10, 16)
	return err == nil
}

func readClickHouseURL(c *config, value string) error {
	if err := checkURL(value, "clickhouse", "http", "https"); err != nil {
		return err
	}
	if strings.HasPrefix(value, "https:") && !strings.Contains(value, "secure=") {
		separator := "?"
		if strings.Contains(value, "?") {
			separator = "&"
		}
		value += separator + "secure=true" // which the driver asks for
	}
	options, err := clickhouse.ParseDSN(value)
	if err != nil {
		return err
	}
	for _, address := range options.Addr {
		host, port, err := net.SplitHostPort(address)
		if err != nil || host == "" {
			return errUnfit
		}
		if _, err := strconv.ParseUint(port, 10, 16); err != nil {
			return err
		}
	}
	c.clickhouse = options
	return nil
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
	for _, v := range variables {
		fmt.Fprintf(w, "  %s=%s\n      %s\n", v.name, v.fallback, v.help)
	}
}
