# Targets that run the service or its tests use Docker where a daemon answers, and otherwise the servers that
# scripts/servers.sh starts on this machine. NATIVE=1 always means the latter.
#
# GNU make 3.81 runs every line of a recipe in a shell of its own, so most recipes are one line, under `set -e`.

SHELL := bash
MAKEFLAGS += --no-print-directory
.SILENT:

NATIVE ?=
TESTFLAGS ?=
MINUTES ?= 5
FUZZTIME ?= 30s
STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2
ACTIONLINT = github.com/rhysd/actionlint/cmd/actionlint@v1.7.12

# Docker then labels the images that it builds with the commit.
export BUILDX_GIT_LABELS = 1

# Whether to use Docker, as a shell condition. A daemon that hangs must not hang make, where there is timeout.
within = $$(command -v timeout >/dev/null && echo timeout 5)
docker = test -z '$(NATIVE)' && $(within) docker compose version >/dev/null 2>&1 && $(within) docker info >/dev/null 2>&1

# Runs the target again in a container that has Go and the four servers, when there is Docker. In one container rather
# than against compose.yaml, because tests pause, kill and empty servers of their own.
contained = set -e; if $(docker); then \
	docker build --target test --tag goods-test .; \
	exec docker run --rm --init --volume '$(CURDIR):/src' --workdir /src \
		--volume goods-mod:/go/pkg/mod --volume goods-build:/root/.cache/go-build \
		--env GOFLAGS=-buildvcs=false goods-test make $@ NATIVE=1 $(MAKEOVERRIDES); fi;

# Starts the servers of this machine and exports their URLs. What was exported before wins over them.
servers = scripts/servers.sh start; given=$$(export -p); eval "$$(scripts/servers.sh env)"; eval "$$given";

# Go's race detector needs a C compiler.
compiler = command -v cc >/dev/null || scripts/servers.sh install gcc libc6-dev;

# What reads deploy/alerts.yaml in the tests, and promtool for the linters.
prometheus = command -v prometheus >/dev/null || scripts/servers.sh install prometheus;

# The tests drive the page at / in it.
chromium = command -v chromium >/dev/null || scripts/servers.sh install chromium;

# go build takes the version from git, and fails where git refuses the folder because it belongs to another user.
gobuild = CGO_ENABLED=0 go build -trimpath -buildvcs=$$(git status >/dev/null 2>&1 && echo auto || echo false) -o goods .

# Says where the service answers.
hello = printf '\n%s\n%s\n\n' "goods answers at http://$$address; try:" \
	"  curl -d '{\"name\":\"first\"}' '$$address/goods/create?projectId=1'"

.PHONY: help run up down clean env build test faults soak bench fuzz lint demo migrate-postgres migrate-clickhouse

help: ## list the targets
	grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-20s %s\n", $$1, $$2 }'

# With Docker it follows the container by its id, and then the one that replaced it: docker compose logs ends, or hangs,
# when the only container that it follows is restarted or made anew.
#
# Natively, a loop in the background prints where the service answers once it does, and ends when the service has ended,
# whose process id is that of the shell ($$$$): exec keeps it. Its second parentheses make it no child of the service.
run: ## start the servers, build and run the service on 127.0.0.1:8080; Ctrl-C ends the service
	set -e; if $(docker); then \
		since=$$(date +%s); \
		docker compose up --build --detach --wait; \
		address=$$(docker compose port goods 8080); $(hello); \
		trap 'kill $$logs 2>/dev/null || true; docker compose stop goods; exit' INT TERM; \
		while container=$$(docker compose ps --quiet goods) && test -n "$$container"; do \
			docker logs --follow --since $$since "$$container" & logs=$$!; \
			wait $$logs || true; \
			since=$$(date +%s); sleep 1; \
		done; \
		exit; \
	fi; \
	$(servers) $(gobuild); \
	address=$${HTTP_ADDR:-127.0.0.1:8080}; address=$${address/#:/localhost:}; \
	if ./goods healthcheck 2>/dev/null; then echo "a service answers at http://$$address already; for another: HTTP_ADDR=127.0.0.1:8081 make run" >&2; exit 1; fi; \
	( ( until ./goods healthcheck; do kill -0 $$$$ || exit; sleep 0.2; done 2>/dev/null; $(hello) ) & ); \
	exec ./goods

up: ## start the servers only
	set -e; if $(docker); then docker compose up --detach --wait postgres redis nats clickhouse; \
	else scripts/servers.sh start; fi

down: ## stop the servers, keep their data
	set -e; if $(docker); then docker compose --profile monitoring down; fi; scripts/servers.sh stop

clean: ## stop the servers, delete their data and what was built
	set -e; if $(docker); then \
		docker compose --profile monitoring down --volumes; docker volume rm --force goods-mod goods-build >/dev/null; \
	fi; scripts/servers.sh clean; rm -f goods

env: ## print the URLs of this machine's servers, for eval
	scripts/servers.sh env

build: ## build ./goods
	$(gobuild)

test: ## run the tests with the race detector; TESTFLAGS='-run Name -v'
	$(contained) $(compiler) $(servers) $(prometheus) $(chromium) scripts/servers.sh install pgbouncer; \
	go test -race -count=1 -timeout=5m $(TESTFLAGS) .; \
	cd test; go test -race -count=1 -timeout=10m $(TESTFLAGS) $$(go list ./... | grep -vE '/(faults|bench)$$')

# Without the race detector: its price would hide what clients see.
faults: ## break every server, and the service, under load; prints what clients saw
	$(contained) $(servers) scripts/servers.sh install nginx haproxy; \
	cd test; go test -count=1 -timeout=15m -v $(TESTFLAGS) ./faults

soak: ## break servers at random under load, for MINUTES=5
	$(contained) $(servers) scripts/servers.sh install nginx haproxy; \
	cd test; MINUTES=$(MINUTES) go test -count=1 -timeout=0 -v $(TESTFLAGS) ./faults

bench: ## measure throughput and latency; BENCH='lists writes' picks parts, DOCS=1 also writes docs/benchmarks.md
	$(contained) $(servers) scripts/servers.sh install wrk; cd test; go test -count=1 -timeout=30m -v $(TESTFLAGS) ./bench

fuzz: ## run each fuzz target for FUZZTIME=30s
	$(contained) $(servers) \
	for target in $$(grep -hoE '^func Fuzz[A-Za-z0-9]+' *_test.go | cut -c 6-); do \
		go test -run '^$$' -fuzz "^$$target$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x .; \
	done

lint: ## gofmt, go vet, staticcheck, a build for arm64, shellcheck, actionlint, promtool
	$(contained) $(prometheus) \
	unformatted=$$(gofmt -l .); \
	if test -n "$$unformatted"; then echo "not formatted with gofmt:" $$unformatted; exit 1; fi; \
	for module in . test; do (cd $$module; go vet ./...; go run $(STATICCHECK) ./...); done; \
	CGO_ENABLED=0 GOARCH=arm64 go build -buildvcs=false -o /dev/null .; \
	command -v shellcheck >/dev/null || scripts/servers.sh install shellcheck; \
	shellcheck scripts/*.sh .ci/run; \
	go run $(ACTIONLINT) .github/workflows/*.yml; \
	promtool check rules deploy/alerts.yaml

demo: ## show the API on a running service
	scripts/demo.sh

migrate-postgres: ## apply sql/postgres now
migrate-clickhouse: ## apply sql/clickhouse now
migrate-postgres migrate-clickhouse: migrate-%:
	set -e; if $(docker); then exec docker compose run --rm --build goods migrate $*; fi; \
	$(servers) $(gobuild); ./goods migrate $*
