package test

import (
	"crypto/rand"
	"fmt"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"goods/test/harness"
)

// A URL that cannot be parsed ends the start with one line, which names the variable and what to do, but
// not the password. SECRET stands for a password that appears nowhere else.
func TestSecretsInBadURLs(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	urls := map[string]string{ // of no server; PASSWORD is to be replaced
		"POSTGRES_URL":   "postgres://goods:PASSWORD@127.0.0.1:1/goods?sslmode=disable",
		"REDIS_URL":      "redis://:PASSWORD@127.0.0.1:1/0",
		"NATS_URL":       "nats://goods:PASSWORD@127.0.0.1:1",
		"CLICKHOUSE_URL": "clickhouse://goods:PASSWORD@127.0.0.1:1/goods",
	}
	type badURL struct {
		variable, value string
		unescaped       bool // the message says that the password has to be percent-encoded
	}
	bad := []badURL{
		{"POSTGRES_URL", "postgres://goods@127.0.0.1:1/goods?password=SECRET&sslmode=bogus", false},
		{"POSTGRES_URL", "postgres://goods@127.0.0.1:1/goods?password=SECRET&connect_timeout=soon", false},
		{"POSTGRES_URL", "postgres://goods@127.0.0.1:1/goods?password=SECRET%zz", true},
		{"POSTGRES_URL", "host=127.0.0.1 password=SECRET", false},
		{"REDIS_URL", "redis://:SECRET@127.0.0.1:1,127.0.0.1:2/0", false},
		{"REDIS_URL", "redis://:SECRET@127.0.0.1:1/first", false},
		{"NATS_URL", "nats://goods:SEC,RET@127.0.0.1:1", true},
		{"NATS_URL", "nats://127.0.0.1:1,nats://goods:SECRET>@127.0.0.1:2", true},
		{"CLICKHOUSE_URL", "clickhouse://127.0.0.1:1/goods?username=a&password=SECRET&dial_timeout=soon", false},
		{"CLICKHOUSE_URL", "clickhouse://goods:SECRET@127.0.0.1:1,127.0.0.1:x/goods", false},
	}
	for variable, value := range urls {
		for _, special := range []string{
			" ", "\t", "\n", "\x01", "\x7f", `"`, "#", "%", "%zz", "/", "<", ">", "?", "[", `\`, "]",
			"^", "`", "{", "|", "}", "é",
		} {
			for _, password := range []string{"SECRET" + special + "x", special + "SECRET"} {
				bad = append(bad, badURL{variable, strings.Replace(value, "PASSWORD", password, 1), true})
			}
		}
		value := strings.Replace(value, "PASSWORD", "SECRET", 1)
		_, rest, _ := strings.Cut(value, "://")
		for _, changed := range []string{
			rest, "://" + rest, "ftp://" + rest, " x" + value, "SECRET", ":SECRET@", "…" + value,
			strings.Replace(value, ":1", ":x", 1), strings.Replace(value, ":1", ":1x", 1),
			strings.Replace(value, "127.0.0.1", "127.0.0.1 ", 1), strings.Replace(value, "127.0.0.1", "[::1", 1),
			strings.Replace(value, "127.0.0.1", "%zz", 1),
		} {
			bad = append(bad, badURL{variable, changed, false})
		}
	}
	const atOnce = 4
	harness.Together(atOnce, func(worker int) {
		for i := worker; i < len(bad); i += atOnce {
			b := bad[i]
			secret := "S" + rand.Text() // no digits of an escape
			value := strings.NewReplacer("SECRET", secret, "SEC,RET", secret[:8]+","+secret[8:]).Replace(b.value)
			begin := time.Now()
			out, stderr, success := goods(t, w, "", b.variable+"="+value, "LOG_LEVEL=debug")
			told := strings.HasPrefix(stderr, "goods: "+b.variable) && strings.Count(stderr, "\n") == 1 &&
				(!b.unescaped || strings.Contains(stderr, "percent-encoded"))
			if success || !told || time.Since(begin) > 10*time.Second {
				t.Errorf("%s=%q: got success %v and %q after %v, want one line with the variable and what to change",
					b.variable, b.value, success, stderr, time.Since(begin))
			}
			printed := out + stderr
			if strings.Contains(printed, secret[:8]) || strings.Contains(printed, secret[8:]) {
				t.Errorf("%s=%q: the password is printed in %q", b.variable, b.value, printed)
			}
		}
	})
}

// What a server that refuses, is silent, or is not there leaves in the log is never the password.
func TestSecretsInFailures(t *testing.T) {
	t.Parallel()
	silent, err := net.Listen("tcp", "127.0.0.1:0") // accepts, and says nothing
	harness.Must(t, err)
	defer silent.Close()
	const special = "%25%20%23%2F%3F%40%3A%3E"
	ways := map[string]func(u *url.URL){
		"refuses":         func(*url.URL) {},
		"is away":         func(u *url.URL) { u.Host = "127.0.0.1:1" },
		"is silent":       func(u *url.URL) { u.Host = silent.Addr().String() },
		"has no name":     func(u *url.URL) { u.Host = "nowhere.invalid:1" },
		"bad port number": func(u *url.URL) { u.Host = "127.0.0.1:99999" },
		"speaks no TLS": func(u *url.URL) {
			switch u.Scheme {
			case "postgres":
				u.RawQuery = "sslmode=require"
			case "clickhouse":
				u.RawQuery = "secure=true"
			default:
				u.Scheme = map[string]string{"redis": "rediss", "nats": "tls"}[u.Scheme]
			}
		},
	}
	for name, variable := range servers {
		for way, change := range ways {
			if name == "nats" && way == "refuses" {
				continue // takes any password: see TestCausesOfNATS
			}
			t.Run(name+" "+way, func(t *testing.T) {
				t.Parallel()
				w := harness.NewWorld(t)
				password := rand.Text()
				u, err := url.Parse(w.Env[variable])
				harness.Must(t, err)
				change(u)
				value := strings.Replace(u.String(), "://", "://nobody:"+password+special+"@", 1)
				value = strings.Replace(value, special+"@goods:goods@", special+"@", 1)
				a := w.Launch(t, variable+"="+value)
				harness.Eventually(t, 30*time.Second, func() error {
					log := a.Log()
					if strings.Contains(log, fmt.Sprintf(`"msg":"failing","name":%q`, name)) ||
						strings.Contains(log, "goods: ") || strings.Contains(log, "waiting for postgres") {
						return nil
					}
					return fmt.Errorf("got no line about %s in the log", name)
				})
				_ = a.Stop() // it may have ended with an error
				printed := a.Log()
				if name == "clickhouse" {
					out, stderr, success := goods(t, w, "migrate clickhouse", variable+"="+value)
					harness.Equal(t, success, false, "migrate clickhouse succeeds")
					printed += out + stderr
				}
				harness.Equal(t, strings.Contains(printed, password), false, "the password is printed")
			})
		}
	}
}

// A secret that comes from a file often ends with a newline.
func TestSpaceAroundValues(t *testing.T) {
	t.Parallel()
	w := harness.NewWorld(t)
	w.Env["EVENTS_BATCH"], w.Env["NATS_REPLICAS"] = "5", "1"
	for name, value := range w.Env {
		w.Env[name] = " \t" + value + "\r\n"
	}
	a := w.Start(t)
	a.Create(t, "one")
	ready(t, a)
	harness.Equal(t, w.Settled(t, 15*time.Second), 1, "events")
	cached(t, w, "1:1")
}
