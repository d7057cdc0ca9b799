#!/usr/bin/env bash
# Shows the API on a running service: the one of docker compose, or else the one at HTTP_ADDR,
# 127.0.0.1:8080 by default. It needs nothing but curl.
set -euo pipefail
cd "$(dirname "$0")/.."

die() { echo "demo.sh: $*" >&2; exit 1; }

step() { printf '# %s\n\n' "$*"; }

between='},{' apart=$'},\n  {' # goods in a list, and versions in a history

# call runs curl with these arguments, one of them a path, and shows both sides. The reply is left in $reply.
call() {
    local arg args=() shown='$ curl'
    for arg; do
        [[ $arg != /* ]] || arg=$address$arg
        args+=("$arg")
        case $arg in -? | PATCH | DELETE) shown+=" $arg" ;; *) shown+=" '$arg'" ;; esac
    done
    echo "$shown"
    reply=$(curl -sS --max-time 10 "${args[@]}") || die "no answer"
    reply=${reply//$'\r'/}
    printf '%s\n\n' "${reply//$between/$apart}"
}

# field prints a number of the last reply.
field() {
    [[ $reply =~ \"$1\":([0-9]+) ]] || die "the service cannot do that now: is Postgres up?"
    echo "${BASH_REMATCH[1]}"
}

# await waits until the history of a good has so many versions.
await() {
    local deadline=$((SECONDS + 20))
    local path="goods/history?id=$1&projectId=1&limit=1"
    until reply=$(curl -sS --max-time 10 "$address/$path") || die "no answer"
        [[ $reply == *"\"total\":$2,"* ]]; do
        ((SECONDS < deadline)) ||
            die "the history of good $1 should have $2 versions by now (see $address/readyz): $reply"
        sleep 0.2
    done
}

command -v curl >/dev/null || scripts/servers.sh install curl
published=
within=$(command -v timeout >/dev/null && echo timeout 5) || true
[[ ${NATIVE-} ]] || published=$($within docker compose port goods 8080 2>/dev/null) || true
address=${published:-${HTTP_ADDR:-127.0.0.1:8080}}
address=${address/#:/localhost:}
address=${address/#0.0.0.0:/localhost:}
address=${address/#'[::]:'/localhost:}
curl -fsS --max-time 5 "$address/healthz" >/dev/null 2>&1 ||
    die "nothing answers at $address: start the service with make run in another terminal, or say where it" \
        "listens: HTTP_ADDR=host:port make demo"

step "Is everything there?"
call /readyz

step "New goods go to the end: a good's priority is its position in the list of all goods."
call -d '{"name":"Hammer"}' '/goods/create?projectId=1'
hammer=$(field id) first=$(field priority)
call -d '{"name":"Saw","description":"for wood"}' '/goods/create?projectId=1'
saw=$(field id)

step "With an Idempotency-Key a create can be retried:" \
    "the second call creates nothing, and gets 200 and the same good."
for key in "demo-$hammer"{,}; do
    call -w '%{http_code}\n' -H "Idempotency-Key: $key" -d '{"name":"Drill"}' '/goods/create?projectId=1'
done
drill=$(field id)

step "The drill moves to the hammer's place. The goods between make room, and the reply names all that moved."
call -X PATCH -d "{\"newPriority\":$first}" "/goods/reprioritize?id=$drill&projectId=1"

step "A get returns the good, and its version as the ETag."
call -i "/goods/get?id=$hammer&projectId=1"
[[ $reply =~ [Ee][Tt]ag:\ *(\"[0-9]+\") ]] || die "there is no ETag"
etag=${BASH_REMATCH[1]}

step "With If-Match the hammer is updated only if it still has that version." \
    "The second client is told that it has not."
call -X PATCH -H "If-Match: $etag" -d '{"name":"Claw hammer","description":"500 g"}' \
    "/goods/update?id=$hammer&projectId=1"
call -X PATCH -H "If-Match: $etag" -d '{"name":"Mallet"}' "/goods/update?id=$hammer&projectId=1"

step "The saw is removed. It stays in the list, but no call can change it any more."
call -X DELETE "/goods/remove?id=$saw&projectId=1"
call -X PATCH -d '{"name":"Chainsaw"}' "/goods/update?id=$saw&projectId=1"

step "The list, from the drill on."
call "/goods/list?limit=3&offset=$first"

step "The list of one project: offset and meta count its goods only."
call '/goods/list?projectId=1&limit=1'

step "The reply to a bad request says everything that is wrong with it."
call -d '{"name":" ","colour":"red"}' '/goods/create?projectId=0&page=1'

step "A moment later ClickHouse has every version of each of the three. This is the history of the hammer."
await "$hammer" 3
await "$saw" 3
await "$drill" 2
call "/goods/history?id=$hammer&projectId=1"
