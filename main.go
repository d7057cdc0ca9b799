// Goods is an HTTP service that keeps an ordered list of goods for projects.
package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
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
		err := preparePostgres(ctx, cfg, log)
		if err == nil {
			fmt.Fprintln(stdout, "postgres is up to date")
		}
		return err
	case "migrate clickhouse":
		conn, err := openClickHouse(cfg)
		if err != nil {
			return err
		}
		defer conn.Close()
		err = migrateClickHouse(ctx, conn, migrations, log)
		if err == nil {
			fmt.Fprintln(stdout, "clickhouse is up to date")
		}
		return err
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
	if err := awaitPostgres(ctx, db, startPatience, log); err != nil {
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
	js, err := jetstream.New(nc, jetstream.WithPublishAsyncTimeout(natsTimeout))
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
		tasks.Go(func() {
			every(background, time.Second, func(ctx context.Context) {
				if err := ping(ctx); background.Err() == nil {
					d.report("ping", err)
				}
			})
		})
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
