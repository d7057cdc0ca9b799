FROM --platform=$BUILDPLATFORM golang:1.26-bookworm AS go

# What `make test` and its kin run in: Go, the four servers, and what the linters and the benchmark need.
FROM go AS test
COPY scripts/servers.sh /usr/local/bin/
RUN servers.sh install && \
    servers.sh install wrk shellcheck prometheus nginx haproxy pgbouncer chromium && rm -rf /var/lib/apt/lists/*

FROM go AS build
WORKDIR /src
# In a layer of its own: a change in the code downloads no modules.
COPY go.mod go.sum ./
RUN --mount=type=cache,target=/go/pkg/mod go mod download
ARG TARGETOS TARGETARCH
# The context is mounted, not copied, so that .git is in no layer and no cache: the go command only reads the version
# and the commit from it. HTTP/2 is left out: Go speaks it only over TLS, which ends before the service.
RUN --mount=type=bind,target=. --mount=type=cache,target=/go/pkg/mod --mount=type=cache,target=/root/.cache/go-build \
    git config --system --add safe.directory /src && \
    CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH \
    go build -trimpath -tags nethttpomithttp2 -ldflags="-s -w" -o /goods .

FROM scratch
# For servers that are reached over TLS.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build /goods /goods
# A number, so that Kubernetes' runAsNonRoot can tell.
USER 65532:65532
# The default, 127.0.0.1, cannot be reached from outside a container.
ENV HTTP_ADDR=:8080
EXPOSE 8080
# The image has no shell and no curl. The start period covers a minute of waiting for Postgres.
HEALTHCHECK --interval=5s --timeout=3s --start-period=70s --start-interval=1s CMD ["/goods", "healthcheck"]
ENTRYPOINT ["/goods"]
LABEL org.opencontainers.image.title="goods" \
      org.opencontainers.image.description="An ordered list of goods over HTTP" \
      org.opencontainers.image.licenses="MIT"
