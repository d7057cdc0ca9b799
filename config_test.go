package main

import (
	"strings"
	"testing"
)

// env is an environment.
type env map[string]string

func (e env) get(name string) string { return e[name] }

func TestConfig(t *testing.T) {
	for name, values := range map[string][]string{
		"HTTP_ADDR": {":8080", "127.0.0.1:0", "[::1]:80"},
		"POSTGRES_URL": {"postgres://u:p@h:5433/d?sslmode=disable",
			"postgres://u:p@h1,h2/d?port=1,2", "postgres://[::1]:5432/d",
			"postgresql:///d?host=/run/postgresql"},
		"REDIS_URL": {"redis://h", "rediss://u:p@h:6380/3"},
		"NATS_URL":  {"nats://h", "tls://u:p@h1:4222,tls://h2:4222"},
		"CLICKHOUSE_URL": {"clickhouse://u:p@h:9000/d", "clickhouse://h1:9000,h2:9000",
			"http://h:8123", "https://u:p@h:8443/d?secure=true", "https://h:8443/d?dial_timeout=1s"},
		"EVENTS_BATCH":  {"1", "1000"},
		"NATS_REPLICAS": {"5"},
		"NAMESPACE":     {"a", "goods-2_b"},
		"LOG_LEVEL":     {"debug", "WARN"},
	} {
		for _, value := range values {
			if _, err := readConfig(env{name: value}.get); err != nil {
				t.Errorf("%s=%s: got %v, want it taken", name, value, err)
			}
		}
	}
}

func TestBadConfig(t *testing.T) {
	for name, values := range map[string][]string{
		"HTTP_ADDR": {"8080", "localhost", ":x"},
		"POSTGRES_URL": {"host=h password=secret", "mysql://u:secret@h", "postgres://u:secret@h:port",
			"postgres://u:secret@h1:1,h2:2/d"},
		"REDIS_URL": {"h:6379", "http://:secret@h", "redis://:secret@h/x"},
		"NATS_URL":  {"h", "nats://", "nats://h1,http://u:secret@h2"},
		"CLICKHOUSE_URL": {"h:9000", "tcp://u:secret@h:9000",
			"clickhouse://u:secret@h", "https://u:secret@h/d", "clickhouse://h:9000?read_timeout=secret"},
		"EVENTS_BATCH":  {"0", "1001", "-1", "five"},
		"NATS_REPLICAS": {"0", "6"},
		"NAMESPACE":     {"Goods", "1", "a b", strings.Repeat("a", 33)},
		"LOG_LEVEL":     {"loud"},
	} {
		for _, value := range values {
			_, err := readConfig(env{name: value}.get)
			if err == nil || !strings.HasPrefix(err.Error(), name+" is not valid: it is ") ||
				strings.Contains(err.Error(), "secret") {
				t.Errorf("%s=%s: got %v, want what it is, without the value", name, value, err)
			}
		}
	}
}
