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
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
	"time"
)

const (
	// statementTimeout ends one statement of a request in Postgres. If the server does not end it, the
	// connection fails an eighth later (see openPostgres), which is still within requestTimeout: 63/64 of it.
	// A transaction has several statements, each with this limit: its caller may have left before its end.
	statementTimeout = requestTimeout * 7 / 8
	startTimeout     = time.Minute // for Postgres to answer at the start
	// eventConns are two for the relay, as database.statement prepares a query on a second connection while
	// a transaction has the first, and one each for the consumer and the sampler.
	eventConns = 4
)

func main() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400) // about 10 % more list throughput, for some 10 MB
	}
	// A log reader that has ended must not end the service: writing then fails instead.
	signal.Ignore(syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	if err := run(ctx, os.Args[1:], os.Getenv, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "goods:", err)
		os.Exit(1)
	}
}

// run is the program: args without its name, and the environment. It returns when the command is done or,
// to serve, when ctx ends.
func run(ctx context.Context, args []string, getenv func(string) string, stdout io.Writer) error {
	command := strings.Join(args, " ")
	switch command {
	case "-h", "-help", "--help", "help":
		usage(stdout)
		return nil
	case "version", "-version", "--version":
		version, revision := buildVersion()
		fmt.Fprintln(stdout, "goods", version, revision, runtime.Version())
		return nil
	}
	cfg, err := readConfig(getenv)
	if err != nil {
		return err
	}
	writer := newLogWriter(stdout)
	defer writer.flush()
	log := newLog(writer, isTerminal(stdout), cfg.logLevel)
	switch command {
	case "":
		return serve(ctx, cfg, log)
	case "healthcheck":
		return healthcheck(cfg.addr)
	case "migrate postgres":
		err = untilEnd(ctx, func() error { return preparePostgres(cfg, log) })
	case "migrate clickhouse":
		err = untilEnd(ctx, openEventLog(cfg.clickhouse).migrate)
	default:
		err = fmt.Errorf("unknown command %q: see goods -h", command)
	}
	if err != nil {
		return err
	}
	fmt.Fprintln(writer, strings.TrimPrefix(command, "migrate "), "is up to date")
	return nil
}

// untilEnd runs f until it is done or ctx ends. In the second case f still runs: the process has to end.
func untilEnd(ctx context.Context, f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// healthcheck succeeds if the service that listens on addr is up.
func healthcheck(addr string) error {
	client := &http.Client{
		Timeout:   3 * time.Second,
		Transport: &http.Transport{Proxy: nil}, // whatever HTTP_PROXY says
	}
	reply, err := client.Get("http://" + addr + "/healthz")
	if err != nil {
		return err
	}
	defer reply.Body.Close()
	if reply.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answers %s", addr, reply.Status)
	}
	return nil
}

// preparePostgres waits for the server and applies its migrations.
func preparePostgres(cfg *config, log *slog.Logger) error {
	probe, err := openPostgres(cfg.postgres, 1, statementTimeout, nil)
	if err != nil {
		return err
	}
	defer probe.Close()
	if err := awaitPostgres(probe, startTimeout, log); err != nil {
		return fmt.Errorf("POSTGRES_URL: %w", err)
	}
	if err := checkEncoding(probe); err != nil {
		return fmt.Errorf("POSTGRES_URL: %w", err)
	}
	db, err := openPostgres(cfg.postgres, 1, time.Hour, nil) // a migration may take its time
	if err != nil {
		return err
	}
	defer db.Close()
	return migratePostgres(db, migrations, log)
}

// serve runs the service until ctx ends. It listens once Postgres is migrated. At the end the requests in
// flight are answered; what carries events is not stopped but ends with the process, as in a crash, and the
// next start goes on from there.
func serve(ctx context.Context, cfg *config, log *slog.Logger) error {
	err := untilEnd(ctx, func() error { return preparePostgres(cfg, log) })
	if ctx.Err() != nil { // asked to end, which is no failure
		log.Info("ended before the service was ready", "err", err)
		return nil
	}
	if err != nil {
		return err
	}
	db, err := openPostgres(cfg.postgres, requestConns, statementTimeout, nil)
	if err != nil {
		return err
	}
	// To lose a commit here only repeats work.
	asyncCommit := map[string]string{"synchronous_commit": `'off'`}
	outboxDB, err := openPostgres(cfg.postgres, eventConns, eventTimeout, asyncCommit)
	if err != nil {
		return err
	}

	metrics := newMetrics(db)
	cache := newCache(cfg.redis, cfg.namespace, metrics)
	events := openEventLog(cfg.clickhouse)
	stream, err := openStream(cfg.nats, cfg.namespace, cfg.natsReplicas, metrics, log)
	if err != nil {
		return err
	}
	// Only now, when the service can answer.
	listener, err := net.Listen("tcp", cfg.addr)
	if err != nil {
		return fmt.Errorf("HTTP_ADDR: %w", err)
	}

	relay := newRelay(outboxDB, stream, cfg.eventsBatch, metrics, log)
	consumer := &consumer{
		db:      outboxDB,
		stream:  stream,
		relay:   relay,
		events:  events,
		log:     log,
		metrics: metrics,
	}
	health := newHealth(log, map[string]func(context.Context) error{
		"postgres":   db.pingPostgres,
		"redis":      cache.ping,
		"nats":       stream.ping,
		"clickhouse": events.ping,
	})
	api := newAPI(newService(db, cache, events, relay.wake, metrics, log), health, metrics, log)

	go relay.run()
	go consumer.run()
	go relay.sample()
	health.watch()
	version, revision := buildVersion()
	log.Info("listening", "addr", listener.Addr().String(), "version", version, "revision", revision)
	if err := serveHTTP(ctx, listener, api, log); err != nil {
		return err
	}
	log.Info("ended")
	return nil
}
