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
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	statementTimeout = 3500 * time.Millisecond // for what a request does in Postgres
	startTimeout     = time.Minute             // for Postgres to answer at the start
	drainDelay       = 500 * time.Millisecond  // between a 503 on /readyz and the end of listening
	shutdownTimeout  = 10 * time.Second        // for the requests in flight
)

func main() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400) // a tenth more lists a second, for some 10 MB
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	if err := run(ctx, os.Args[1:], os.Getenv, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "goods:", err)
		os.Exit(1)
	}
}

// run is the program: args without its name, and the environment. It returns when the command is done or, to serve,
// when ctx ends.
func run(ctx context.Context, args []string, getenv func(string) string, stdout io.Writer) error {
	command := strings.Join(args, " ")
	switch command {
	case "-h", "-help", "--help", "help":
		usage(stdout)
		return nil
	case "version", "-version", "--version":
		fmt.Fprintln(stdout, "goods", version, runtime.Version())
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
		return healthcheck(cfg.addr)
	case "migrate postgres":
		err = preparePostgres(ctx, cfg, log)
	case "migrate clickhouse":
		err = migrateClickHouse(ctx, openClickHouse(cfg))
	default:
		err = fmt.Errorf("unknown command %q: see goods -h", command)
	}
	if err == nil {
		fmt.Fprintln(stdout, strings.TrimPrefix(command, "migrate "), "is up to date")
	}
	return err
}

// newLog writes text to a terminal and JSON to everything else.
func newLog(w io.Writer, level slog.Level) *slog.Logger {
	options := &slog.HandlerOptions{Level: level}
	if info, err := os.Stdout.Stat(); w == os.Stdout && err == nil && info.Mode()&os.ModeCharDevice != 0 {
		return slog.New(slog.NewTextHandler(w, options))
	}
	return slog.New(slog.NewJSONHandler(w, options))
}

// healthcheck succeeds if the service that listens on addr is up.
func healthcheck(addr string) error {
	client := &http.Client{Timeout: 3 * time.Second}
	reply, err := client.Get("http://" + addr + "/healthz")
	if err == nil && reply.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s answers %s", addr, reply.Status)
	}
	return err
}

// preparePostgres waits for the server and applies its migrations.
func preparePostgres(ctx context.Context, cfg *config, log *slog.Logger) error {
	db, err := openPostgres(cfg.postgres, 1, time.Hour, nil) // a migration may take its time
	if err != nil {
		return err
	}
	defer db.Close()
	if err := awaitPostgres(ctx, db, startTimeout, log); err != nil {
		return fmt.Errorf("POSTGRES_URL: %w", err)
	}
	return migratePostgres(db, migrations, log)
}

// openNATS returns a connection that is made, and made again, in the background. Only a bad URL is an error.
func openNATS(url string, log *slog.Logger) (*nats.Conn, error) {
	return nats.Connect(url,
		nats.Name("goods"),
		nats.RetryOnFailedConnect(true),
		nats.MaxReconnects(-1),
		nats.ReconnectWait(500*time.Millisecond),
		nats.ReconnectBufSize(-1), // what was not sent is still in the outbox
		nats.Timeout(natsTimeout),
		nats.PingInterval(time.Second), // a frozen server is left within three seconds
		nats.MaxPingsOutstanding(2),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { log.Debug("nats", "err", err) }))
}

// openClickHouse returns a pool, which connects when it is used.
func openClickHouse(cfg *config) clickhouse.Conn {
	options := *cfg.clickhouse
	options.DialTimeout = 2 * time.Second
	options.ReadTimeout = eventTimeout // the default is five minutes
	options.MaxOpenConns, options.MaxIdleConns = 4, 2
	conn, _ := clickhouse.Open(&options) // fails only without options
	return conn
}

// serve runs the service until ctx ends. It listens once Postgres is migrated. At the end the requests in flight are
// answered; what moves events just stops where it is, as in a crash, and the next start goes on from there.
func serve(ctx context.Context, cfg *config, log *slog.Logger) error {
	if err := preparePostgres(ctx, cfg, log); err != nil {
		return err
	}
	db, dbErr := openPostgres(cfg.postgres, 16, statementTimeout, nil)
	loose, looseErr := openPostgres(cfg.postgres, 4, eventTimeout, map[string]string{"synchronous_commit": "off"})
	nc, natsErr := openNATS(cfg.nats, log)
	if err := errors.Join(dbErr, looseErr, natsErr); err != nil {
		return err
	}
	js, err := jetstream.New(nc, jetstream.WithPublishAsyncTimeout(natsTimeout))
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", cfg.addr)
	if err != nil {
		return fmt.Errorf("HTTP_ADDR: %w", err)
	}

	counts := newMetrics(db)
	cache := newCache(cfg.redis, cfg.namespace, counts)
	events := &pipeline{
		db: loose, nats: nc, js: js, clickhouse: openClickHouse(cfg),
		namespace: cfg.namespace, replicas: cfg.natsReplicas, batch: cfg.eventsBatch,
		log: log, counts: counts, nudge: make(chan struct{}, 1),
	}
	health := &health{log: log, pings: map[string]func(context.Context) error{
		"postgres": counts.pingPostgres, "redis": cache.ping, "nats": events.pingNATS, "clickhouse": events.pingClickHouse,
	}}
	api := &api{service: newService(db, cache, events.wake, counts, log), health: health, counts: counts, log: log}
	server := &http.Server{
		Handler:                      api.routes(),
		ReadTimeout:                  10 * time.Second,
		WriteTimeout:                 30 * time.Second,
		IdleTimeout:                  2 * time.Minute,
		MaxHeaderBytes:               12 << 10, // Go adds 4 KiB
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	go events.relay()
	go events.drain()
	health.watch()
	var open atomic.Int64 // connections
	server.ConnState = func(_ net.Conn, state http.ConnState) {
		open.Add(map[http.ConnState]int64{http.StateNew: 1, http.StateClosed: -1}[state])
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	log.Info("listening", "addr", listener.Addr().String(), "version", version)
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}

	log.Info("shutting down")
	api.closing.Store(true)
	time.Sleep(drainDelay)
	// Not Shutdown: it closes, without an answer, each connection whose first request has not been read by then.
	listener.Close()
	<-served
	server.SetKeepAlivesEnabled(false)
	for end := time.Now().Add(shutdownTimeout); open.Load() > 0 && time.Now().Before(end); {
		time.Sleep(5 * time.Millisecond)
	}
	if n := open.Load(); n > 0 {
		log.Warn("requests were still in flight at the end", "connections", n)
	}
	return nil
}
