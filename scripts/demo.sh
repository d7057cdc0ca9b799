#!/usr/bin/env bash
# Shows the API on a service that runs (make run, in another terminal), and what ClickHouse knows afterwards.
set -euo pipefail
cd "$(dirname "$0")/.."

address=${HTTP_ADDR:-:8080}
address=${address/#:/localhost:}
address=${address/#0.0.0.0:/localhost:}

die() {
    echo "demo.sh: $*" >&2
    exit 1
}

step() { printf '# %s\n\n' "$*"; }

# call sends method $1, path $2 and body $3 as a person would, and shows both sides. The reply is left in $reply.
call() {
    local args=() shown=
    if [[ $1 != GET && $1 != POST ]]; then # what curl does by itself
        args+=(-X "$1")
        shown=" -X $1"
    fi
    if [[ ${3-} ]]; then
        args+=(-d "$3")
        shown+=" -d '$3'"
    fi
    echo "\$ curl$shown '$address$2'"
    reply=$(curl -sS --max-time 10 "${args[@]+"${args[@]}"}" "$address$2") || die "no answer"
    sed '/"goods":\[{/ { s//"goods":[\n  {/; s/},{/},\n  {/g; s/}\]}$/}\n]}/ }' <<<"$reply"
    echo
}

# field prints a number of the last reply.
field() {
    [[ $reply == *"\"$1\":"* ]] || die "the service can not do that now: is Postgres up?"
    sed -nE "s/.*\"$1\":([0-9]+).*/\1/p" <<<"$reply"
}

# query asks the service's ClickHouse.
query() {
    if [[ $docker ]]; then
        docker compose exec -T clickhouse sh -c \
            'clickhouse-client --user "$CLICKHOUSE_USER" --password "$CLICKHOUSE_PASSWORD" --database "$CLICKHOUSE_DB"' <<<"$1"
    else
        curl -sS --max-time 10 --data-binary "$1" "127.0.0.1:$((${SERVERS_PORT:-15430} + 4))"
    fi
}

command -v curl >/dev/null || scripts/servers.sh install curl
curl -fsS --max-time 5 "$address/healthz" >/dev/null 2>&1 ||
    die "nothing answers at $address: start the service with make run, in another terminal"
docker=
if command -v docker >/dev/null && [[ $(timeout 5 docker compose ps --quiet --status running goods 2>/dev/null) ]]; then
    docker=1
fi

step "Is everything there?"
call GET /readyz

step "Three new goods. Each stands last: its priority is its position in the list of all goods."
call POST '/goods/create?projectId=1' '{"name":"Hammer"}'
hammer=$(field id) first=$(field priority)
call POST '/goods/create?projectId=1' '{"name":"Saw","description":"for wood"}'
saw=$(field id)
call POST '/goods/create?projectId=1' '{"name":"Drill"}'
drill=$(field id)

step "The drill moves to the hammer's place. The goods between make room, and the answer names all that moved."
call PATCH "/goods/reprioritize?id=$drill&projectId=1" "{\"newPriority\":$first}"

step "The hammer gets a new name and a description."
call PATCH "/goods/update?id=$hammer&projectId=1" '{"name":"Claw hammer","description":"500 g"}'

step "The saw is removed. It stays in the list, and keeps its place, but can not be changed any more."
call DELETE "/goods/remove?id=$saw&projectId=1"
call PATCH "/goods/update?id=$saw&projectId=1" '{"name":"Chainsaw"}'

step "The list, from the drill on."
call GET "/goods/list?limit=3&offset=$first"

step "A bad request is told everything that is wrong with it."
call POST '/goods/create?projectId=0' '{"name":" ","colour":"red"}'

step "ClickHouse has every version of each of the three."
events=0
for ((i = 0; i < 100 && events < 8; i++)); do
    events=$(query "SELECT count() FROM goods_log FINAL WHERE Id IN ($hammer, $saw, $drill)") || die "ClickHouse does not answer"
    [[ $events =~ ^[0-9]+$ ]] || die "ClickHouse says: $events"
    sleep 0.2
done
((events >= 8)) || die "ClickHouse has $events of 8 events after 20 seconds; what does $address/readyz say?"
history="SELECT Id, Version, EventTime, Name, Description, Priority, Removed FROM goods_log FINAL
WHERE Id IN ($hammer, $saw, $drill) ORDER BY Id, Version"
echo "$history"
echo
query "$history FORMAT PrettyCompactNoEscapes"
