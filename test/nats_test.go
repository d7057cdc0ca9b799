package test

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"goods/test/harness"
)

// users is a configuration of a nats-server: the test itself is admin, the service is goods.
func users(password, permissions string) string {
	return fmt.Sprintf(`authorization { users: [
	{ user: admin, password: admin }
	{ user: goods, password: %q, permissions: { %s } }
] }
`, password, permissions)
}

// warned waits for a line at WARN or above that has all of these words.
func warned(t testing.TB, a *harness.App, words ...string) {
	t.Helper()
	harness.Eventually(t, 20*time.Second, func() error {
		for line := range strings.Lines(a.Log()) {
			missing := func(word string) bool { return !strings.Contains(line, word) }
			if !strings.Contains(line, `"level":"INFO"`) && !slices.ContainsFunc(words, missing) {
				return nil
			}
		}
		return fmt.Errorf("no warning in the log has %q", words)
	})
}

// The log has the cause for which events do not get on, at any level, and not only that they do not.
func TestCausesOfNATS(t *testing.T) {
	t.Parallel()
	certificate, key := harness.Certificate(t)
	withTLS := fmt.Sprintf("tls { cert_file: %q, key_file: %q }\n", certificate, key)
	for name, test := range map[string]struct {
		config, scheme, cause string
	}{
		"wrong password": {users("another", ""), "nats", "Authorization Violation"},
		"refused":        {"", "", "connection refused"},
		"unknown authority": {
			users("goods", "") + withTLS, "tls", "certificate signed by unknown authority",
		},
		"may not publish events": {
			users("goods", `publish: { deny: "*.events" }`), "nats", "Permissions Violation",
		},
		"may not use JetStream": {
			users("goods", `publish: { deny: "$JS.API.>" }`), "nats", "Permissions Violation",
		},
		"may not receive": {
			users("goods", `subscribe: { deny: "_INBOX.>" }`), "nats", "Permissions Violation",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := harness.NewWorld(t)
			url := "nats://goods:goods@" + harness.FreeAddress(t)
			if test.scheme != "" {
				url = strings.Replace(harness.NewNATS(t, test.config).URL("goods:goods"), "nats", test.scheme, 1)
			}
			a := w.Start(t, "NATS_URL="+url, "LOG_LEVEL=info")
			a.Create(t, "one")
			warned(t, a, test.cause)
			if !strings.HasPrefix(name, "may not") { // then there is no connection
				warned(t, a, `"msg":"failing"`, `"name":"nats"`, test.cause)
			}
			ok(t, a, "PATCH", calls[1].path, someName)
		})
	}
}

// timesLogged returns how often each reason was logged for which the connection to NATS fails.
func timesLogged(t testing.TB, a *harness.App) map[string]int {
	t.Helper()
	times := map[string]int{}
	for _, line := range a.AwaitLines(t, "nats connection", 0) {
		times[fmt.Sprint(line["err"])]++
	}
	return times
}

// The password changes under the service, which is refused again and again until it is changed back. The log
// tells each reason once an outage.
func TestPasswordOfNATSChanges(t *testing.T) {
	t.Parallel()
	n := harness.NewNATS(t, users("goods", ""))
	w := harness.NewWorld(t, "NATS_URL="+n.URL("admin:admin"))
	a := w.Start(t, "NATS_URL="+n.URL("goods:goods"))
	ready(t, a)
	for outage := range 2 {
		n.Configure(t, users("another", ""))
		ready(t, a, "nats")
		a.Create(t, "meanwhile")
		<-time.After(2 * time.Second) // several refusals
		n.Configure(t, users("goods", ""))
		ready(t, a)
		harness.Equal(t, w.Settled(t, 20*time.Second), outage+1, "events")
		refusals := 0
		for reason, times := range timesLogged(t, a) {
			if times > outage+1 {
				t.Errorf("%q was logged %d times in %d outages", reason, times, outage+1)
			}
			if strings.Contains(strings.ToLower(reason), "authorization violation") {
				refusals = max(refusals, times)
			}
		}
		harness.Equal(t, refusals, outage+1, "lines in the log that tell the reason")
	}

	// The same from the start.
	n.Configure(t, users("another", ""))
	b := w.Start(t, "NATS_URL="+n.URL("goods:goods"))
	ready(t, b, "nats")
	<-time.After(2 * time.Second)
	n.Configure(t, users("goods", ""))
	ready(t, b)
}

// What the server takes limits a message.
func TestSmallMessages(t *testing.T) {
	t.Parallel()
	n := harness.NewNATS(t, "max_payload: 64KB\n")
	w := harness.NewWorld(t, "NATS_URL=nats://"+n.Address)
	w.Env["EVENTS_BATCH"] = "500"
	a := w.Start(t)
	// As events, of 30 and of 60 KB.
	longest := []string{strings.Repeat("日", 10_000), strings.Repeat(`\u0001`, 10_000)}
	for i := range 12 {
		body := fmt.Sprintf(`{"name":"long","description":"%s"}`, longest[i%2])
		harness.Want[harness.Good](t, a, 201, "POST", create, body)
	}
	makeGoods(t, w, 1000)
	harness.Equal(t, w.Settled(t, 30*time.Second), 1012, "events")
	if inserts := len(insertSizes(t, w)); inserts > 40 {
		t.Errorf("the events came in %d messages: large ones must not divide the others", inserts)
	}
}

// A stream of another application is left as it is, with what is in it, and the log says what to change.
// Nothing that it takes in passes for published.
func TestForeignStream(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		ourName   bool
		subjects  string // OURS stands for the subject of the service's events, OTHER for that of the messages
		retention jetstream.RetentionPolicy
	}{
		"our name, a work queue of other subjects":  {true, "OTHER", jetstream.WorkQueuePolicy},
		"our name, a log of other subjects":         {true, "OTHER", jetstream.LimitsPolicy},
		"our name, with our subject besides":        {true, "OTHER OURS", jetstream.WorkQueuePolicy},
		"our name and subject, with other messages": {true, "OTHER OURS", jetstream.LimitsPolicy},
		"our name and subject, but no work queue":   {true, "OURS", jetstream.LimitsPolicy},
		"another name, with our subject":            {false, "OTHER OURS", jetstream.LimitsPolicy},
		"another name, a work queue of our subject": {false, "OTHER OURS", jetstream.WorkQueuePolicy},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := harness.NewWorld(t)
			other := w.Namespace + ".orders"
			config := jetstream.StreamConfig{Name: w.Stream(), Retention: test.retention}
			if !test.ourName {
				config.Name += "-OF-ANOTHER"
			}
			names := strings.NewReplacer("OURS", w.Subject(), "OTHER", other)
			config.Subjects = strings.Fields(names.Replace(test.subjects))
			foreign, err := w.JS.CreateStream(t.Context(), config)
			harness.Must(t, err)
			t.Cleanup(func() { _ = w.JS.DeleteStream(context.Background(), config.Name) }) // it may have been
			for range 2 {
				_, err = w.JS.Publish(t.Context(), config.Subjects[0], []byte("[]"))
				harness.Must(t, err)
			}
			before := foreign.CachedInfo().Config

			a := w.Start(t)
			a.Stock(t, 7)
			ok(t, a, "PATCH", calls[1].path, someName)
			harness.AwaitEqual(t, 20*time.Second, func() bool {
				r := a.Call(t, "GET", "/readyz", "")
				return r.Status == 200 && strings.Contains(r.Body, `"nats":"down"`)
			}, true, "/readyz says that NATS is down")
			if test.ourName {
				warned(t, a, `"msg":"failing"`, "NAMESPACE")
			} else {
				warned(t, a, `"msg":"failing"`, "subject")
			}
			<-time.After(3 * time.Second) // for the relay and the consumer to do harm
			harness.Equal(t, a.List(t, 1, 1).Meta.Total, 7, "goods")
			info, err := foreign.Info(t.Context())
			harness.Must(t, err)
			harness.Equal(t, info.Config, before, "configuration of the foreign stream")
			harness.Equal(t, info.State.Msgs, 2, "messages in the foreign stream")
			harness.Equal(t, info.State.Consumers, 0, "consumers of the foreign stream")
			const waiting = `SELECT count(*) FROM outbox WHERE published_at IS NULL`
			harness.Equal(t, harness.One[int](t, w, waiting), 8, "events that are not published")

			harness.Must(t, w.JS.DeleteStream(t.Context(), config.Name))
			ready(t, a)
			harness.Equal(t, w.Settled(t, 30*time.Second), 8, "events")
		})
	}
}

// The same when the other stream takes the place of the service's while that one runs.
func TestForeignStreamLater(t *testing.T) {
	w, a := started(t)
	ready(t, a)
	config := jetstream.StreamConfig{Name: w.Stream() + "-OF-ANOTHER", Subjects: []string{w.Subject()}}
	var foreign jetstream.Stream
	harness.Eventually(t, 10*time.Second, func() (err error) { // the service may be faster
		harness.Must(t, w.JS.DeleteStream(t.Context(), w.Stream()))
		foreign, err = w.JS.CreateStream(t.Context(), config)
		return err
	})
	t.Cleanup(func() { _ = w.JS.DeleteStream(context.Background(), config.Name) }) // it may have been
	makeGoods(t, w, 5)
	warned(t, a, `"msg":"failing"`, `"name":"relay"`)
	info, err := foreign.Info(t.Context())
	harness.Must(t, err)
	harness.Equal(t, info.State.Msgs, 0, "messages in the foreign stream")
	harness.Must(t, w.JS.DeleteStream(t.Context(), config.Name))
	harness.Equal(t, w.Settled(t, 20*time.Second), 5, "events")
}

// A stream is left to the database whose events it has: two deployments that share NATS and forgot to set
// NAMESPACE, or a restored database and the events of a future that it has not had, do not mix histories.
func TestStreamOfAnotherDatabase(t *testing.T) {
	w, a := started(t)
	makeGoods(t, w, 3)
	ready(t, a)
	other := harness.NewWorld(t)
	b := other.Start(t, "NAMESPACE="+w.Namespace)
	makeGoods(t, other, 5)
	warned(t, b, `"name":"relay"`, "another database")
	warned(t, b, `"name":"consumer"`, "another database")
	ready(t, b, "nats")
	harness.Equal(t, w.Settled(t, 20*time.Second), 3, "events of the first database")

	harness.Must(t, a.Stop())
	harness.Must(t, w.JS.DeleteStream(t.Context(), w.Stream()))
	ready(t, b)
	harness.Equal(t, other.Settled(t, 20*time.Second), 5, "events of the second database")
	harness.Equal(t, len(w.Events(t)), 3, "events of the first database")
}

// A server without a cluster keeps one replica, whatever it is told.
func TestReplicasWithoutCluster(t *testing.T) {
	w, a := started(t)
	ready(t, a)
	harness.Must(t, a.Stop())
	b := w.Start(t, "NATS_REPLICAS=3")
	warned(t, b, `"name":"relay"`, "NATS_REPLICAS is 3")
}

// What NATS refuses, here because the stream is full, waits in the outbox and does not count as published.
func TestStreamFull(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	p := w.NewProxy(t, "CLICKHOUSE_URL")
	a := w.Start(t)
	ready(t, a)
	p.Shut()
	full := stream(t, w).CachedInfo().Config
	full.MaxMsgs = 1
	_, err := w.JS.UpdateStream(t.Context(), full)
	harness.Must(t, err)
	makeGoods(t, w, 20)
	warned(t, a, `"msg":"failing"`, `"name":"relay"`, "maximum messages exceeded")
	p.Pass()
	harness.Equal(t, w.Settled(t, 20*time.Second), 20, "events")
	harness.Equal(t, value(t, a, "goods_events_requeued_total", ""), 0, "events that NATS lost")
}

// With NATS_REPLICAS=3 a cluster may lose a server, here the one that leads the stream.
func TestReplicasOfNATS(t *testing.T) {
	t.Parallel()
	cluster := harness.NewNATSCluster(t, 3)
	var urls []string
	for _, n := range cluster {
		urls = append(urls, "nats://"+n.Address)
	}
	w := harness.NewWorld(t, "NATS_URL="+strings.Join(urls, ","), "NATS_REPLICAS=3")
	a := w.Start(t)
	ready(t, a)
	show := w.HideLog(t)
	makeGoods(t, w, 12)
	published(t, w)
	info := stream(t, w).CachedInfo()
	harness.Equal(t, info.Config.Replicas, 3, "replicas of the stream")
	leader, err := strconv.Atoi(info.Cluster.Leader)
	harness.Must(t, err)
	cluster[leader-1].Kill(t)
	show()
	a.Create(t, "afterwards")
	harness.Equal(t, w.Settled(t, 30*time.Second), 13, "events")
	ready(t, a)
	harness.Equal(t, value(t, a, "goods_events_requeued_total", ""), 0, "events that NATS lost")
}
