// Goods is an HTTP service that keeps an ordered list of goods for projects.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"regexp"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"

	_ "embed"

	"github.com/ClickHouse/clickhouse-go/v2"
	"github.com/lib/pq"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	slowLimit     = time.Minute            // for a statement of a long move
	startPatience = time.Minute            // for Postgres to answer at the start
	unreadyFirst  = 500 * time.Millisecond // between a 503 on /readyz and the end of listening
	stopPatience  = 8 * time.Second        // for the requests in flight at the end
)

func main() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400) // a tenth more lists a second, for some 10 MB
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	err := run(ctx, os.Args[1:], os.Getenv, os.Stdout)
	if err != nil {
		fmt.Fprintln(os.Stderr, "goods:", err)
		os.Exit(1)
	}
}

// variables are all there is to configure. Each parse stores a valid value.
var variables = []struct {
	name, fallback, help string
	parse                func(c *config, value string) error
}{
	{"HTTP_ADDR", ":8080", "address to listen on, host:port", func(c *config, v string) error {
		c.addr = v
		_, port, err := net.SplitHostPort(v)
		if n, e := strconv.Atoi(port); err != nil || e != nil || n < 0 || n > 65535 {
			return errors.New("is not an address such as :8080")
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
	{"NATS_URL", "nats://localhost:4222", "the road of the events; several servers with commas", func(c *config, v string) error {
		c.nats = v
		for server := range strings.SplitSeq(v, ",") {
			if err := validURL(strings.TrimSpace(server), nil, "nats", "tls"); err != nil {
				return err
			}
		}
		return nil
	}},
	{"CLICKHOUSE_URL", "clickhouse://localhost:9000/default", "the log of the events; native protocol", func(c *config, v string) (err error) {
		c.clickhouse, err = clickhouse.ParseDSN(v)
		return validURL(v, err, "clickhouse")
	}},
	{"EVENTS_BATCH", "5", "events in one INSERT into ClickHouse, 1 to 1000", func(c *config, v string) (err error) {
		c.eventsBatch, err = number(v, 1, 1000)
		return err
	}},
	{"NATS_REPLICAS", "1", "replicas of the stream, when the service creates it", func(c *config, v string) (err error) {
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

// run is the program: args without its name, and the environment. It returns
// when the command is done or, to serve, when ctx ends.
func run(ctx context.Context, args []string, getenv func(string) string, stdout io.Writer) error {
	command := strings.Join(args, " ")
	switch command {
	case "-h", "-help", "--help", "help":
		usage(stdout)
		return nil
	case "version", "-version", "--version":
		fmt.Fprintln(stdout, version())
		return nil
	}
	cfg, err := readConfig(getenv)
	if err != nil {
		return err
	}
	log := newLog(stdout, cfg.logLevel)
	switch command {
	case "":
		return serve(ctx, cfg, log)
	case "healthcheck":
		return healthcheck(ctx, cfg)
	case "migrate postgres":
		return preparePostgres(ctx, cfg, log)
	case "migrate clickhouse":
		conn, err := openClickHouse(cfg)
		if err != nil {
			return err
		}
		defer conn.Close()
		return migrateClickHouse(ctx, conn, migrations, log)
	}
	return fmt.Errorf("unknown command %q: see goods -h", command)
}

// newLog writes text to a terminal and JSON to everything else.
func newLog(w io.Writer, level slog.Level) *slog.Logger {
	options := &slog.HandlerOptions{Level: level}
	if f, ok := w.(*os.File); ok {
		if info, err := f.Stat(); err == nil && info.Mode()&os.ModeCharDevice != 0 {
			return slog.New(slog.NewTextHandler(w, options))
		}
	}
	return slog.New(slog.NewJSONHandler(w, options))
}

func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "goods (unknown version)"
	}
	text := "goods " + info.Main.Version
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			text += " " + s.Value
		}
	}
	return text + " " + info.GoVersion
}

func healthcheck(ctx context.Context, cfg *config) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	host, port, _ := net.SplitHostPort(cfg.addr)
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "localhost"
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+net.JoinHostPort(host, port)+"/healthz", nil)
	if err != nil {
		return err
	}
	reply, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer reply.Body.Close()
	if reply.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answers %s", request.URL, reply.Status)
	}
	return nil
}

// preparePostgres waits for the server and applies its migrations.
func preparePostgres(ctx context.Context, cfg *config, log *slog.Logger) error {
	db, err := openPostgres(cfg.postgres, answerWithin)
	if err != nil {
		return err
	}
	defer closeSoon(db)
	if err := awaitPostgres(ctx, db, startPatience); err != nil {
		server, _ := pq.NewConfig(cfg.postgres)
		return fmt.Errorf("POSTGRES_URL: %s:%d/%s: %w", server.Host, server.Port, server.Database, err)
	}
	patient, err := openPostgres(cfg.postgres, time.Hour) // a migration may take its time
	if err != nil {
		return err
	}
	defer closeSoon(patient)
	return migratePostgres(ctx, patient, migrations, log)
}

// closeSoon closes c, but does not wait long for a server that is frozen.
func closeSoon(c io.Closer) {
	done := make(chan struct{})
	go func() { _ = c.Close(); close(done) }()
	select {
	case <-done:
	case <-time.After(time.Second):
	}
}

// openNATS returns a connection that is made, and made again, in the
// background. Only a bad URL is an error.
func openNATS(url string, log *slog.Logger) (*nats.Conn, error) {
	return nats.Connect(url,
		nats.Name("goods"),
		nats.RetryOnFailedConnect(true),
		nats.MaxReconnects(-1),
		nats.ReconnectWait(500*time.Millisecond),
		nats.ReconnectBufSize(-1), // what was not sent is still in the outbox
		nats.Timeout(2*time.Second),
		nats.PingInterval(time.Second), // a frozen server is left within three seconds
		nats.MaxPingsOutstanding(2),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
			log.Debug("nats", "err", err)
		}))
}

func openClickHouse(cfg *config) (clickhouse.Conn, error) {
	options := *cfg.clickhouse
	options.DialTimeout = 2 * time.Second
	options.ReadTimeout = eventTimeout // the default is five minutes
	options.MaxOpenConns, options.MaxIdleConns = 4, 2
	return clickhouse.Open(&options)
}

// serve runs the service until ctx ends, and then ends it in order: new
// requests are turned away, those in flight are answered, and what moves
// events stops where it is; the next start goes on from there.
func serve(ctx context.Context, cfg *config, log *slog.Logger) error {
	listener, err := net.Listen("tcp", cfg.addr)
	if err != nil {
		return fmt.Errorf("HTTP_ADDR: %w", err)
	}
	defer listener.Close()
	if err := preparePostgres(ctx, cfg, log); err != nil {
		return err
	}
	db, err := openPostgres(cfg.postgres, answerWithin)
	if err != nil {
		return err
	}
	defer closeSoon(db)
	slow, err := openPostgres(cfg.postgres, slowLimit)
	if err != nil {
		return err
	}
	defer closeSoon(slow)
	loose, err := openPostgres(cfg.postgres, eventTimeout, "synchronous_commit=off")
	if err != nil {
		return err
	}
	defer closeSoon(loose)
	nc, err := openNATS(cfg.nats, log)
	if err != nil {
		return fmt.Errorf("NATS_URL: %w", err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc, jetstream.WithPublishAsyncTimeout(lostAckAfter))
	if err != nil {
		return err
	}
	ch, err := openClickHouse(cfg)
	if err != nil {
		return fmt.Errorf("CLICKHOUSE_URL: %w", err)
	}
	defer closeSoon(ch)

	counts := newMetrics(db)
	health := newHealth(log)
	events := &pipeline{
		db: loose, nats: nc, js: js, clickhouse: ch,
		stream: strings.ToUpper(cfg.namespace), replicas: cfg.natsReplicas, batch: cfg.eventsBatch,
		log: log, counts: counts, natsUp: health.nats, chUp: health.clickhouse,
		nudge: make(chan struct{}, 1),
	}
	s := &service{
		db: db, slow: slow, wake: events.wake, log: log, counts: counts, health: health,
	}
	s.cache = newCache(cfg.redis, cfg.namespace, s.raiseEpoch, health.redis, counts)
	// Whoever served before may have died between a commit and its cache.
	if err := s.raiseEpoch(ctx); err != nil {
		return err
	}
	s.start()
	defer s.close()

	background, stop := context.WithCancel(context.Background())
	var tasks sync.WaitGroup
	defer tasks.Wait()
	defer stop()
	tasks.Go(func() { events.relay(background) })
	tasks.Go(func() { events.drain(background) })
	watch := func(d *dependency, ping func(context.Context) error) {
		tasks.Go(func() { every(background, time.Second, func(ctx context.Context) { d.report("ping", ping(ctx)) }) })
	}
	watch(health.postgres, func(ctx context.Context) error { return ping(ctx, db) })
	watch(health.redis, s.cache.ping)
	watch(health.nats, nc.FlushWithContext)
	watch(health.clickhouse, ch.Ping)
	tasks.Go(func() { every(background, time.Second, s.settleDoubt) })
	tasks.Go(func() { every(background, 5*time.Second, func(ctx context.Context) { counts.sample(ctx, events) }) })

	server := &http.Server{
		Handler:                      s.newHandler(s.routes()),
		ReadHeaderTimeout:            5 * time.Second,
		ReadTimeout:                  10 * time.Second,
		WriteTimeout:                 30 * time.Second,
		IdleTimeout:                  2 * time.Minute,
		MaxHeaderBytes:               16 << 10,
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	log.Info("listening", "addr", listener.Addr().String(), "version", version())
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	log.Info("shutting down")
	s.closing.Store(true)
	pause(background, unreadyFirst)
	last, cancel := context.WithTimeout(context.Background(), stopPatience)
	defer cancel()
	if err := server.Shutdown(last); err != nil {
		log.Warn("requests were still in flight at the end", "err", err)
		server.Close()
	}
	return nil
}

// every calls f at once and then again after each interval, until ctx ends.
// A call has no longer than the interval.
func every(ctx context.Context, interval time.Duration, f func(ctx context.Context)) {
	for ctx.Err() == nil {
		limited, cancel := context.WithTimeout(ctx, interval)
		f(limited)
		cancel()
		pause(ctx, interval)
	}
}

//go:embed openapi.yaml
var openAPI []byte

// routes are the API, in its order.
func (s *service) routes() []route {
	return []route{
		{http.MethodPost, "/goods/create", s.create},
		{http.MethodPatch, "/goods/update", s.update},
		{http.MethodPatch, "/goods/reprioritize", s.reprioritize},
		{http.MethodDelete, "/goods/remove", s.remove},
		{http.MethodGet, "/goods/list", s.list},
		{http.MethodGet, "/healthz", func(w http.ResponseWriter, r *http.Request) error {
			return writeJSON(w, http.StatusOK, map[string]string{"status": "ok"})
		}},
		{http.MethodGet, "/readyz", func(w http.ResponseWriter, r *http.Request) error {
			status := http.StatusOK
			if s.closing.Load() || !s.health.postgres.up() {
				status = http.StatusServiceUnavailable
			}
			return writeJSON(w, status, s.health)
		}},
		{http.MethodGet, "/metrics", func(w http.ResponseWriter, r *http.Request) error {
			w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
			return s.counts.write(w, s.health)
		}},
		{http.MethodGet, "/openapi.yaml", func(w http.ResponseWriter, r *http.Request) error {
			w.Header().Set("Content-Type", "application/yaml")
			_, err := w.Write(openAPI)
			return err
		}},
	}
}
