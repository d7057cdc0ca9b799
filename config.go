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

// variables are all there is to configure, with what a value must be.
var variables = []struct{ name, fallback, help string }{
	{"HTTP_ADDR", "127.0.0.1:8080", "the address to listen on, host:port; " +
		":8080 is every address of this machine"},
	{"POSTGRES_URL", "postgres://goods:goods@localhost:5432/goods?sslmode=disable",
		"the database of goods, a URL such as postgres://user:password@host:5432/database " +
			"or ://host1,host2/db?port=5432,5433"},
	{"REDIS_URL", "redis://localhost:6379/0", "the cache, " +
		"a URL such as redis://user:password@host:6379/0, or rediss:// for TLS"},
	{"NATS_URL", "nats://localhost:4222", "the servers that carry the events, " +
		"a URL such as nats://user:password@host:4222, or tls://, or several with commas"},
	{"CLICKHOUSE_URL", "clickhouse://localhost:9000/default", "the log of the events, " +
		"a URL such as clickhouse://user:password@host:9000/database or https://host:8443/database"},
	{"EVENTS_BATCH", "5", "the number of events in one INSERT into ClickHouse, 1 to 1000"},
	{"NATS_REPLICAS", "1", "the number of replicas of the stream, 1 to 5"},
	{"NAMESPACE", "goods", "a prefix of Redis keys and NATS names: " +
		"a letter of a-z, then up to 31 of a-z, 0-9, - and _"},
	{"LOG_LEVEL", "info", "the least level that is logged: debug, info, warn or error"},
}

// errUnfit is the error of a value that is not what its variable's help says.
var errUnfit = errors.New("unfit")

// readConfig reports every bad variable at once, and never a value: it may hold a password. White space
// around values is dropped: a secret from a file often ends with a line break.
func readConfig(getenv func(string) string) (*config, error) {
	// lib/pq also reads PG… variables, such as PGSSLMODE. Its error names the bad one and its value, and may
	// be shown: those that it refuses hold no secrets.
	if _, err := pq.NewConfig("postgres://user@host/"); err != nil {
		return nil, err
	}
	c := &config{}
	var bad []string
	for _, v := range variables {
		value := cmp.Or(strings.TrimSpace(getenv(v.name)), v.fallback)
		if c.set(v.name, value) == nil { // an error's text may have the value in it
			continue
		}
		text := v.name + " is not valid: it is " + v.help
		if strings.HasSuffix(v.name, "_URL") {
			text += " (special characters in a user or password have to be percent-encoded, " +
				"and no parameter may be unknown)"
		}
		bad = append(bad, text)
	}
	if len(bad) > 0 {
		return nil, errors.New(strings.Join(bad, "; "))
	}
	return c, nil
}

// set checks and keeps one value. Where the client library has a parser of URLs, that one decides.
func (c *config) set(name, value string) (err error) {
	switch name {
	case "HTTP_ADDR":
		c.addr = value
		return checkAddress(value)
	case "POSTGRES_URL":
		c.postgres = value
		return checkPostgresURL(value)
	case "REDIS_URL":
		c.redis = value
		return checkRedisURL(value)
	case "NATS_URL":
		c.nats = value
		return checkNATSURL(value)
	case "CLICKHOUSE_URL":
		c.clickhouse, err = parseClickHouseURL(value)
		return err
	case "EVENTS_BATCH":
		c.eventsBatch, err = parseWithin(value, 1000)
		return err
	case "NATS_REPLICAS":
		c.natsReplicas, err = parseWithin(value, 5)
		return err
	case "NAMESPACE":
		c.namespace = value
		return checkNamespace(value)
	case "LOG_LEVEL":
		return c.logLevel.UnmarshalText([]byte(value))
	default:
		return errUnfit
	}
}

// parseWithin parses an integer from 1 to most.
func parseWithin(value string, most int) (int, error) {
	n, err := strconv.Atoi(value)
	if err == nil && (n < 1 || n > most) {
		err = errUnfit
	}
	return n, err
}

var namespacePattern = regexp.MustCompile(`^[a-z][a-z0-9_-]{0,31}$`)

func checkNamespace(value string) error {
	if !namespacePattern.MatchString(value) {
		return errUnfit
	}
	return nil
}

// checkAddress returns an error unless value is host:port.
func checkAddress(value string) error {
	_, port, err := net.SplitHostPort(value)
	if err != nil {
		return err
	}
	_, err = strconv.ParseUint(port, 10, 16)
	return err
}

// parseURL parses a URL with one of these schemes. An @ in the path or the query means that the password has
// a / or ? that was not percent-encoded: url.Parse then takes its rest for a path or a query.
func parseURL(value string, schemes ...string) (*url.URL, error) {
	u, err := url.Parse(value)
	if err != nil {
		return nil, err
	}
	if _, err := url.ParseQuery(u.RawQuery); err != nil {
		return nil, err
	}
	if !slices.Contains(schemes, u.Scheme) || strings.Contains(u.Path+u.RawQuery, "@") || u.Fragment != "" {
		return nil, errUnfit
	}
	return u, nil
}

func checkPostgresURL(value string) error {
	u, err := parseURL(value, "postgres", "postgresql")
	if err != nil {
		return err
	}
	if strings.Contains(u.Hostname(), ",") && strings.Contains(u.Hostname(), ":") {
		return errUnfit // lib/pq would take all but the last port for a part of the host
	}
	_, err = pq.NewConfig(value)
	return err
}

// errNotDialled says that redis.DialURL has accepted the URL and would now dial.
var errNotDialled = errors.New("not dialled")

func checkRedisURL(value string) error {
	u, err := parseURL(value, "redis", "rediss")
	if err != nil {
		return err
	}
	if u.RawQuery != "" || !oneHost(u) { // redigo would ignore a query, such as ?db=2, and guess a host
		return errUnfit
	}
	refuse := func(string, string) (net.Conn, error) { return nil, errNotDialled }
	if _, err := redis.DialURL(value, redis.DialNetDial(refuse)); !errors.Is(err, errNotDialled) {
		return err
	}
	return nil
}

func checkNATSURL(value string) error {
	for server := range strings.SplitSeq(value, ",") {
		u, err := parseURL(strings.TrimSpace(server), "nats", "tls")
		if err != nil {
			return err
		}
		if strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || !oneHost(u) {
			return errUnfit
		}
	}
	return nil
}

// oneHost reports whether a URL has exactly one host, and a valid port if any.
func oneHost(u *url.URL) bool {
	if u.Hostname() == "" || strings.Contains(u.Host, ",") {
		return false
	}
	if u.Port() == "" {
		return !strings.HasSuffix(u.Host, ":")
	}
	return checkAddress(u.Host) == nil
}

// otherHostsPattern matches each host of a URL after the first, with its comma.
var otherHostsPattern = regexp.MustCompile(`,[^@/?]*`)

func parseClickHouseURL(value string) (*clickhouse.Options, error) {
	single := otherHostsPattern.ReplaceAllString(value, "") // url.Parse takes one host only
	u, err := parseURL(single, "clickhouse", "http", "https")
	if err != nil {
		return nil, err
	}
	if u.Scheme == "https" && !u.Query().Has("secure") { // without secure the driver refuses https
		separator := "?"
		if u.RawQuery != "" {
			separator = "&"
		}
		value += separator + "secure=true"
	}
	options, err := clickhouse.ParseDSN(value)
	if err != nil {
		return nil, err
	}
	for _, address := range options.Addr {
		if err := checkAddress(address); err != nil || strings.HasPrefix(address, ":") {
			return nil, errUnfit
		}
	}
	return options, nil
}

func usage(w io.Writer) {
	fmt.Fprint(w, `goods keeps an ordered list of goods for projects, over HTTP.

  goods                      serve
  goods migrate postgres     apply the migrations of Postgres, and end
  goods migrate clickhouse   apply the migrations of ClickHouse, and end
  goods healthcheck          succeed if the service on HTTP_ADDR is up
  goods version              print the version
  goods help                 print this

Environment variables, with their defaults:

`)
	for _, v := range variables {
		help := strings.ReplaceAll(v.help, ", a URL", ",\n      a URL") // one line has 100 columns at most
		fmt.Fprintf(w, "  %s=%s\n      %s\n", v.name, v.fallback, help)
	}
}
