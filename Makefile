# Targets that run the service or its tests use Docker where a daemon answers, and otherwise the servers that
# scripts/servers.sh starts on this machine. NATIVE=1 always means the latter.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.SILENT:
MAKEFLAGS += --no-print-directory

NATIVE ?=
HTTP_ADDR ?= :8080
TESTFLAGS ?=
MINUTES ?= 5
FUZZTIME ?= 30s
STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2
REDOCLY = @redocly/cli@1.34.5

export HTTP_ADDR

# Whether to use Docker, as a shell condition. A daemon that hangs must not hang make.
docker = [[ ! "$(NATIVE)" ]] && timeout 5 docker info >/dev/null 2>&1 && docker compose version >/dev/null 2>&1

# Starts the servers of this machine and exports their URLs. What was exported before wins over them.
servers = scripts/servers.sh start; exported=$$(export -p); eval "$$(scripts/servers.sh env)"; eval "$$exported"

# Runs the target again in a container that has Go and the four servers, when there is Docker. In one container rather
# than against compose.yaml, because tests pause, kill and empty servers of their own.
contained = if $(docker); then \
	docker build --target test --tag goods-test . ; \
	exec docker run --rm --init --volume "$(CURDIR):/src" --workdir /src \
		--volume goods-mod:/go/pkg/mod --volume goods-build:/root/.cache/go-build \
		--env GOFLAGS=-buildvcs=false goods-test make $@ NATIVE=1 $(MAKEOVERRIDES); fi

# Go's race detector needs a C compiler.
compiler = command -v cc >/dev/null || scripts/servers.sh install gcc libc6-dev

# A git that refuses this folder (another owner) would otherwise fail the build.
GOBUILD = CGO_ENABLED=0 go build -trimpath -buildvcs=$$(git status >/dev/null 2>&1 && echo true || echo false)

# Runs command $(1) until it ends or Ctrl-C ends it, and leaves its exit status in $$status. With job control the
# command has the terminal for itself: Ctrl-C then does not reach make, which would end with an error.
define foreground
status=0
if [[ -t 0 ]]; then
	set -m
	( trap exit INT; $(1) ) || status=$$? # a command that Ctrl-C kills would take this shell with it
else
	$(1) &
	trap "kill -s TERM $$! 2>/dev/null" INT TERM
	wait $$! || wait $$! || status=$$? # the first one ends early when a signal comes
fi
endef

# Says where the service answers.
define hello
address=$${HTTP_ADDR/#:/localhost:}
echo
echo "goods answers at http://$$address; try:"
echo "  curl -d '{\"name\":\"first\"}' '$$address/goods/create?projectId=1'"
echo
endef

.PHONY: help
help: ## print the targets
	grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-20s %s\n", $$1, $$2 }'

.PHONY: run
run: ## start the servers, build and run the service on :8080; Ctrl-C ends the service
	if $(docker); then
		export HTTP_ADDR=:8080 # the port that compose.yaml publishes
		docker compose up --build --detach --wait
		$(hello)
		$(call foreground,docker compose logs --follow --since 1s goods)
		docker compose stop goods
		exit
	fi
	$(servers)
	$(GOBUILD) -o goods .
	# Not at once: when its port is taken, the service has ended by then, and what answers is another.
	( sleep 0.3; until ./goods healthcheck >/dev/null 2>&1; do sleep 0.2; done; $(hello) ) & disown
	greeting=$$!
	$(call foreground,./goods)
	kill $$greeting 2>/dev/null || true
	exit $$status

.PHONY: up
up: ## start the servers only
	if $(docker); then
		docker compose up --detach --wait postgres redis nats clickhouse
	else
		scripts/servers.sh start
	fi

.PHONY: down
down: ## stop the servers, keep their data
	if $(docker); then docker compose down; fi
	scripts/servers.sh stop

.PHONY: clean
clean: ## stop the servers, delete their data and what was built
	if $(docker); then
		docker compose down --volumes
		docker volume rm --force goods-mod goods-build >/dev/null
	fi
	scripts/servers.sh clean
	rm -f goods

.PHONY: env
env: ## print the URLs of this machine's servers, for eval
	scripts/servers.sh env

.PHONY: build
build: ## build ./goods
	$(GOBUILD) -o goods .

.PHONY: test
test: ## run the tests with the race detector; TESTFLAGS='-run Name -v'
	$(contained)
	$(compiler)
	$(servers)
	go test -race -count=1 -parallel=4 -timeout=10m $(TESTFLAGS) ./...

# Without the race detector: its price would hide what clients see. The soak has it.
.PHONY: faults
faults: ## break every server, and the service, under load; prints what clients saw
	$(contained)
	$(servers)
	go test -count=1 -parallel=4 -timeout=10m -tags faults -run TestFaults -v $(TESTFLAGS) .

.PHONY: lint
lint: ## gofmt, go vet, staticcheck, Redocly, promtool; shellcheck where it is installed
	unformatted=$$(gofmt -l .)
	[[ ! "$$unformatted" ]] || { echo "not formatted with gofmt:" $$unformatted; exit 1; }
	go vet -tags bench,soak ./...
	go run $(STATICCHECK) -tags bench,soak ./...
	command -v npx >/dev/null || scripts/servers.sh install npm
	REDOCLY_TELEMETRY=off REDOCLY_SUPPRESS_UPDATE_NOTICE=true npx --yes $(REDOCLY) lint --skip-rule info-license openapi.yaml
	command -v promtool >/dev/null || scripts/servers.sh install prometheus
	promtool check metrics <testdata/metrics.txt
	promtool check rules deploy/alerts.yaml
	if command -v shellcheck >/dev/null; then shellcheck scripts/*.sh .ci/run; fi

.PHONY: bench
bench: ## measure throughput and latency; BENCH='lists large writes alone events memory' picks parts, 'sustained' writes for MINUTES=5
	$(contained)
	$(servers)
	scripts/servers.sh install wrk
	MINUTES=$(MINUTES) go test -count=1 -timeout=$$(($(MINUTES) + 15))m -tags bench -run TestBench # no package: its output comes at once, and always

.PHONY: soak
soak: ## run mixed load and faults for MINUTES=5
	$(contained)
	$(compiler)
	$(servers)
	SOAK=$(MINUTES)m go test -race -count=1 -timeout=0 -tags soak -run TestSoak -v .

.PHONY: fuzz
fuzz: ## run each fuzz target for FUZZTIME=30s
	$(contained)
	$(servers)
	for target in $$(grep -hoE '^func Fuzz\w+' *_test.go | cut -c 6-); do
		go test -run '^$$' -fuzz "^$$target$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x .
	done

.PHONY: demo
demo: ## show the API on a running service
	scripts/demo.sh

.PHONY: migrate-postgres migrate-clickhouse
migrate-postgres: ## apply sql/postgres now
migrate-clickhouse: ## apply sql/clickhouse now
migrate-postgres migrate-clickhouse: migrate-%:
	if $(docker); then
		docker compose run --rm --build goods migrate $*
		exit
	fi
	$(servers)
	$(GOBUILD) -o goods .
	./goods migrate $*
