#!/usr/bin/env bash
# Shows the API on a service that runs (make run, in another terminal), and what ClickHouse knows afterwards.
set -euo pipefail
cd "$(dirname "$0")/.."

die() { echo "demo.sh: $*" >&2; exit 1; }

step() { printf '# %s\n\n' "$*"; }

between='},{' apart=$'},\n  {' # goods in a list

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
    printf '%s\n\n' "${reply//$between/$apart}"
}

# field prints a number of the last reply.
field() {
    [[ $reply =~ \"$1\":([0-9]+) ]] || die "the service cannot do that now: is Postgres up?"
    echo "${BASH_REMATCH[1]}"
}

# query asks the service's ClickHouse.
query() {
    if [[ $published ]]; then
        docker compose exec -T clickhouse sh -c \
            'clickhouse-client --user "$CLICKHOUSE_USER" --password "$CLICKHOUSE_PASSWORD" --database "$CLICKHOUSE_DB"' <<<"$1"
    else
        curl -sS --max-time 10 --data-binary "$1" "127.0.0.1:$((${SERVERS_PORT:-15430} + 4))"
    fi
}

command -v curl >/dev/null || scripts/servers.sh install curl
published=
[[ ${NATIVE-} ]] || published=$($(command -v timeout >/dev/null && echo timeout 5) docker compose port goods 8080 2>/dev/null) || true
address=${published:-${HTTP_ADDR:-127.0.0.1:8080}}
address=${address/#:/localhost:}
address=${address/#0.0.0.0:/localhost:}
curl -fsS --max-time 5 "$address/healthz" >/dev/null 2>&1 ||
    die "nothing answers at $address: start the service with make run, in another terminal"

step "Is everything there?"
call /readyz

step "New goods go to the end: a good's priority is its position in the list of all goods."
call -d '{"name":"Hammer"}' '/goods/create?projectId=1'
hammer=$(field id) first=$(field priority)
call -d '{"name":"Saw","description":"for wood"}' '/goods/create?projectId=1'
saw=$(field id)

step "With an Idempotency-Key a create can be repeated: the second call makes nothing, and answers 200 with the same good."
for key in "demo-$hammer"{,}; do
    call -w '%{http_code}\n' -H "Idempotency-Key: $key" -d '{"name":"Drill"}' '/goods/create?projectId=1'
done
drill=$(field id)

step "The drill moves to the hammer's place. The goods between make room, and the reply names all that moved."
call -X PATCH -d "{\"newPriority\":$first}" "/goods/reprioritize?id=$drill&projectId=1"

step "The hammer gets a new name and a description."
call -X PATCH -d '{"name":"Claw hammer","description":"500 g"}' "/goods/update?id=$hammer&projectId=1"

step "The saw is removed. It stays in the list, but no call can change it any more."
call -X DELETE "/goods/remove?id=$saw&projectId=1"
call -X PATCH -d '{"name":"Chainsaw"}' "/goods/update?id=$saw&projectId=1"

step "The list, from the drill on."
call "/goods/list?limit=3&offset=$first"

step "A bad request is told everything that is wrong with it."
call -d '{"name":" ","colour":"red"}' '/goods/create?projectId=0'

step "ClickHouse has every version of each of the three."
for ((i = 0; i < 100; i++)); do
    events=$(query "SELECT count() FROM goods_log FINAL WHERE Id IN ($hammer, $saw, $drill)") || die "ClickHouse does not answer"
    [[ $events != 8 ]] || break
    sleep 0.2
done
[[ $events == 8 ]] || die "ClickHouse says ${events:-nothing}; 8 events are due. Is it the one of the service, and up ($address/readyz)?"
history="SELECT Id, Version, EventTime, Name, Description, Priority, Removed FROM goods_log FINAL
WHERE Id IN ($hammer, $saw, $drill) ORDER BY Id, Version"
printf '%s\n\n' "$history"
query "$history FORMAT PrettyCompactNoEscapes"
