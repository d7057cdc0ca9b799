#!/usr/bin/env bash
# usage: scripts/servers.sh COMMAND [ARGUMENT...]
#
# Runs Postgres, Redis, NATS with JetStream and ClickHouse as plain processes, without Docker: their data in
# one folder, their ports side by side on 127.0.0.1, apart from any system-wide instance. Another folder and
# another base port make another, independent set, for tests that break their servers.
#
#   install [package...]  install these packages, or the missing servers, with apt
#   start [server...]     start what does not run, and wait until it answers
#   stop [server...]      stop, and wait until it has ended
#   pause [server...]     freeze every process of a server (SIGSTOP)
#   resume [server...]    let it go on
#   kill [server...]      end a server with SIGKILL
#   status                one line a server
#   env                   print the servers' URLs as shell exports
#   clean                 stop all and delete their data
#
# servers: postgres redis nats clickhouse (default: these four)
#          standby, a hot standby that streams from a postgres which runs; only when named
#
#   SERVERS_DIR   data, logs (NAME.log) and pid files (NAME.pid)   /var/tmp/goods-servers
#   SERVERS_PORT  the first of seven ports: postgres, redis,       15430
#                 nats, clickhouse native, clickhouse HTTP,
#                 standby, nats monitoring
set -euo pipefail

readonly all=(postgres redis nats clickhouse)
readonly wait_start=60 wait_stop=10 # seconds

dir=${SERVERS_DIR:-/var/tmp/goods-servers}
base=${SERVERS_PORT:-15430}

# Debian keeps two of the servers where only root's PATH looks.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

die() { echo "servers.sh: $*" >&2; exit 1; }

command=${1:-help}
[[ $command != stop && $command != clean || -e $dir ]] || exit 0
[[ $(uname) == Linux ]] || die "runs on Linux only; elsewhere start Docker, and make uses that"
dir=$(realpath -ms -- "$dir")
# The folder's name goes into four configuration formats; this keeps quoting out of all of them.
[[ $dir =~ ^/[A-Za-z0-9/._+@-]+$ ]] || die "SERVERS_DIR=$dir: use letters, digits and . _ + @ - only"
[[ $base =~ ^[1-9][0-9]{3,4}$ && $base -ge 1024 && $base -le 65529 ]] ||
    die "SERVERS_PORT=$base: must be a number from 1024 to 65529"

# The first port of each is the one in its URL.
declare -A ports=([postgres]=$base [standby]=$((base + 5)) [redis]=$((base + 1))
    [nats]="$((base + 2)) $((base + 6))" [clickhouse]="$((base + 3)) $((base + 4))")
declare -A url=([postgres]="postgres://goods:goods@127.0.0.1:$base/goods?sslmode=disable"
    [standby]="postgres://goods:goods@127.0.0.1:$((base + 5))/goods?sslmode=disable"
    [redis]="redis://127.0.0.1:$((base + 1))/0" [nats]="nats://127.0.0.1:$((base + 2))"
    [clickhouse]="clickhouse://127.0.0.1:$((base + 3))/default")

# ---- install

# postgres_bin prints the folder of the Postgres programs: of the version that made the data, else the newest.
postgres_bin() {
    local bin version='*'
    [[ ! -r $dir/postgres/PG_VERSION ]] || version=$(<"$dir/postgres/PG_VERSION")
    bin=$(compgen -G "/usr/lib/postgresql/$version/bin/postgres" | sort -V | tail -n 1) ||
        bin=$(command -v postgres) || return 1
    dirname "$(realpath "$bin")"
}

# missing prints the packages of the servers named that are not here. It looks for the programs, so that one
# built or placed by hand counts, and a second call asks no package manager.
missing() {
    local name
    for name; do
        case $name in
        postgres | standby) postgres_bin >/dev/null || echo postgresql ;;
        *) command -v "$name-server" >/dev/null || echo "$name-server" ;;
        esac
    done
}

# install brings the packages named, as far as they are missing.
install() {
    local name want=()
    for name; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null) == installed ]] || want+=("$name")
    done
    ((${#want[@]})) || return 0
    command -v apt-get >/dev/null || die "missing: ${want[*]}; there is no apt-get here to install them with"
    if ((EUID == 0)); then
        install_as_root "${want[@]}"
    elif command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [[ -t 0 && -t 2 ]]; }; then
        echo "+ sudo apt-get install -y --no-install-recommends ${want[*]}"
        sudo "$(realpath "$0")" install "${want[@]}"
    else
        die "missing, and neither root nor sudo to install them: apt-get install ${want[*]}"
    fi
}

# install_as_root installs packages. A system-wide server among them must neither start now (policy-rc.d)
# nor at the next boot (disable), and Postgres must not create its "main" cluster: this script starts
# servers of its own only.
install_as_root() (
    local policy=/usr/sbin/policy-rc.d cluster=/etc/postgresql-common/createcluster.d/goods.conf
    local package made=() now=()
    trap 'rm -f "${made[@]}"' EXIT
    if [[ ! -e $policy ]]; then
        made+=("$policy")
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod 755 $policy
    fi
    if [[ " $* " == *' postgresql '* ]]; then
        made+=("$cluster")
        mkdir -p "${cluster%/*}"
        echo 'create_main_cluster = false' >$cluster
    fi
    apt() {
        echo "+ apt-get $*"
        DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 "$@" </dev/null
    }
    apt update || true # a new machine has no lists, and old ones name files that are gone
    apt install -y --no-install-recommends "$@" || die "apt could not install: $*"
    [[ ! -d /run/systemd/system ]] || now=(--now) # a policy-rc.d that was there may have let it start
    for package; do
        # Not all are servers.
        systemctl disable --quiet "${now[@]}" "$package" || update-rc.d "$package" disable || true
    done 2>/dev/null
)

# ---- processes

# pid_of prints the pid of server $1, or fails when it does not run. A pid file outlives its process, and
# the number may belong to another by now, so the process must also have this folder among its arguments; a
# zombie has none.
pid_of() {
    local pid args
    read -r pid <"$dir/$1.pid" && [[ $pid =~ ^[0-9]+$ ]] && mapfile -d '' -t args <"/proc/$pid/cmdline" &&
        [[ " ${args[*]}" == *[\ =]"$dir/$1"* ]] && echo "$pid"
} 2>/dev/null

# signal sends signal $2 to every process of server $1. Postgres' children show in no argument that they are
# of this server, and each is a session of its own, but all of them stay in the data folder. They may
# outlive a killed parent.
signal() {
    local pids process
    mapfile -t pids < <(pid_of "$1")
    if [[ $1 == postgres || $1 == standby ]]; then
        for process in /proc/[0-9]*; do
            [[ ! $process/cwd -ef $dir/$1 ]] || pids+=("${process#/proc/}")
        done
    fi
    ((${#pids[@]} == 0)) || kill -s "$2" "${pids[@]}" 2>/dev/null || true
}

# launch runs a command as server $1, detached from this shell, its terminal and its open files (make's and
# the lock's), so that it outlives make and Ctrl-C. setsid and setpriv replace themselves, so $! is the
# server's own pid.
launch() {
    (
        echo "$BASHPID" >"$dir/$1.pid"
        exec setsid "${@:2}" </dev/null >>"$dir/$1.log" 2>&1 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&-
    ) &
}

# as_postgres holds what to put before a command that has to run as user postgres: Postgres refuses to be
# root.
as_postgres=()
((EUID != 0)) || as_postgres=(setpriv --reuid=postgres --regid=postgres --init-groups --)

run_postgres() {
    local bin data=$dir/postgres
    bin=$(postgres_bin)
    if [[ ! -d $data ]]; then
        # Made under another name first: an interrupted initdb leaves nothing that looks complete.
        rm -rf "$data.new"
        mkdir "$data.new"
        ((EUID != 0)) || chown postgres:postgres "$data.new"
        # shellcheck disable=SC2016 # the inner shell expands: postgres must own the pipe that it reads from
        "${as_postgres[@]}" bash -c '
            "$1/initdb" -D "$2" --username=goods --pwfile=<(echo goods) --auth=scram-sha-256 \
                --encoding=UTF8 --locale=C.UTF-8 --no-sync &&
            "$1/postgres" --single -D "$2" postgres <<<"CREATE DATABASE goods"' - "$bin" "$data.new" \
            >>"$dir/postgres.log" 2>&1 || return
        mv "$data.new" "$data"
    fi
    launch_postgres postgres
}

# launch_postgres launches server $1, postgres or standby, on the data that it has.
launch_postgres() {
    # Left of a killed server: children that hold its shared memory, and a lock file whose number may be
    # another process by now. Both would keep the new one from starting.
    signal "$1" KILL
    rm -f "$dir/$1/postmaster.pid"
    # In arguments rather than in postgresql.conf, so that the same data can move to other ports.
    launch "$1" "${as_postgres[@]}" "$(postgres_bin)/postgres" -D "$dir/$1" -h 127.0.0.1 -p "${ports[$1]}" \
        -c unix_socket_directories= -c max_connections=200
}

run_standby() {
    local data=$dir/standby
    if [[ ! -d $data ]]; then
        rm -rf "$data.new"
        mkdir -m 700 "$data.new"
        ((EUID != 0)) || chown postgres:postgres "$data.new"
        # The slot keeps what the standby has not received yet, however long it is away.
        "${as_postgres[@]}" "$(postgres_bin)/pg_basebackup" --pgdata="$data.new" --checkpoint=fast --no-sync \
            --wal-method=stream --create-slot --slot=standby --write-recovery-conf \
            --dbname="${url[postgres]}&application_name=standby" >>"$dir/standby.log" 2>&1 || return
        mv "$data.new" "$data"
    fi
    launch_postgres standby
}

run_redis() {
    mkdir -p "$dir/redis"
    # One rare save point: SIGTERM and SHUTDOWN then save, while a benchmark is not disturbed by forks. The
    # title stays, as this script knows its process by the arguments.
    launch redis "$(command -v redis-server)" --bind 127.0.0.1 --port "${ports[redis]}" --dir "$dir/redis" \
        --save "3600 1" --set-proc-title no
}

run_nats() {
    launch nats "$(command -v nats-server)" -a 127.0.0.1 -p $((base + 2)) -m $((base + 6)) -js -sd "$dir/nats"
}

run_clickhouse() {
    mkdir -p "$dir/clickhouse"
    # The root element has to be "yandex" for the version that Debian ships; later ones accept it too.
    cat >"$dir/clickhouse/config.xml" <<END
<yandex>
    <logger><level>information</level><console>1</console></logger>
    <listen_host>127.0.0.1</listen_host>
    <tcp_port>$((base + 3))</tcp_port>
    <http_port>$((base + 4))</http_port>
    <path>$dir/clickhouse/data/</path>
    <mark_cache_size>67108864</mark_cache_size>
    <query_log><database>system</database><table>query_log</table></query_log>
    <users_config>$dir/clickhouse/users.xml</users_config>
    <default_profile>default</default_profile>
    <default_database>default</default_database>
</yandex>
END
    cat >"$dir/clickhouse/users.xml" <<END
<yandex>
    <profiles><default><log_queries>1</log_queries></default></profiles>
    <quotas><default></default></quotas>
    <users><default>
        <password></password><networks><ip>127.0.0.1</ip></networks>
        <profile>default</profile><quota>default</quota>
    </default></users>
</yandex>
END
    launch clickhouse "$(command -v clickhouse-server)" --config-file="$dir/clickhouse/config.xml"
}

# ---- answers

# ask sends $2 to port $1 of this machine and prints the answer up to its end; without $2 it only connects.
ask() {
    # shellcheck disable=SC2016 # the inner shell expands: timeout needs a command
    timeout 2 bash -c 'exec 3<>"/dev/tcp/127.0.0.1/$0" || exit
        [[ ! $1 ]] || { printf %b "$1" >&3 && tr -d "\0" <&3; }' "$1" "${2-}" 2>/dev/null
}

# answers tells whether server $1 is ready for work, not only listening.
answers() {
    case $1 in
    postgres | standby) "$(postgres_bin)/pg_isready" -q -h 127.0.0.1 -p "${ports[$1]}" -t 2 ;;
    redis) [[ $(ask $((base + 1)) 'PING\r\nQUIT\r\n') == +PONG* ]] ;;
    nats) [[ $(ask $((base + 6)) 'GET /healthz HTTP/1.0\r\n\r\n') == *'"ok"'* ]] && ask $((base + 2)) ;;
    clickhouse) [[ $(ask $((base + 4)) 'GET /ping HTTP/1.0\r\n\r\n') == *' 200 OK'* ]] && ask $((base + 3)) ;;
    esac
}

# ---- commands

# report fails with message $2 and what server $1 said last.
report() { die "$1: $2; its log, $dir/$1.log, ends:"$'\n'"$(tail -n 5 "$dir/$1.log")"; }

start_server() {
    local name=$1 pid port began=$SECONDS
    if pid=$(pid_of "$name"); then
        [[ $(<"$dir/.$name.base") == "$base" ]] ||
            die "$name: runs here for SERVERS_PORT=$(<"$dir/.$name.base");" \
                "stop it first, or choose another SERVERS_DIR"
        signal "$name" CONT
    else
        [[ $name != postgres && $name != standby ]] || "${as_postgres[@]}" test -x "$dir" ||
            die "$name: user postgres cannot enter $dir; choose another folder with SERVERS_DIR"
        for port in ${ports[$name]}; do
            # A killed server's port may stay open for an instant longer than its process.
            ! ask "$port" || { sleep 0.5 && ! ask "$port"; } ||
                die "$name: port $port is taken; choose others with SERVERS_PORT (seven in a row)"
        done
        echo "$base" >"$dir/.$name.base"
        "run_$name" || report "$name" "could not be set up"
        pid=$!
    fi
    until answers "$name"; do
        kill -0 "$pid" 2>/dev/null || report "$name" "ended while starting"
        ((SECONDS - began < wait_start)) || report "$name" "does not answer after $wait_start seconds"
        sleep 0.05
    done
    echo "$name: ${url[$name]}"
}

stop_server() {
    local name=$1 pid signal=TERM began=$SECONDS
    if pid=$(pid_of "$name"); then
        [[ $name != postgres && $name != standby ]] || signal=INT # TERM waits until the last client has gone
        kill -s $signal "$pid" || die "$name: not allowed to stop it"
        signal "$name" CONT # a paused process takes its signals only then
        while pid_of "$name" >/dev/null; do
            if ((SECONDS - began > wait_stop)); then
                echo "$name: did not stop in $wait_stop seconds, killed" >&2
                signal "$name" KILL
                began=$SECONDS
            fi
            sleep 0.05
        done
    fi
    rm -f "$dir/$name.pid"
}

pause_server() { signal "$1" STOP; }
resume_server() { signal "$1" CONT; }
kill_server() { kill -s KILL "$(pid_of "$1")"; } # its children find that out by themselves

# each runs function $1 for every server named, side by side, and fails when one of them fails. It holds the
# server's lock, so that two makes at once do not both initialise it.
each() {
    local name pid pids=() failed=0
    for name in "${@:2}"; do
        (
            flock -w $((wait_start + wait_stop)) 9 || die "$name: another servers.sh is busy with it"
            "$1" "$name"
        ) 9>>"$dir/.$name.lock" &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do
        wait "$pid" || failed=1
    done
    return $failed
}

# ours tells whether this script made the folder. Under /var/tmp anyone can make one of this name first:
# what lies in it is then not to be trusted.
ours() {
    [[ -e $dir/.goods-servers ]] || return 1
    [[ -O $dir ]] || die "$dir belongs to $(stat -c %U "$dir"); choose another folder with SERVERS_DIR"
}

if [[ $command == install ]]; then
    # shellcheck disable=SC2046 # one word a package
    install $(if (($# > 1)); then echo "${@:2}"; else missing "${all[@]}"; fi)
    exit
fi
servers=("${@:2}")
(($# > 1)) || servers=("${all[@]}")
for name in "${servers[@]}"; do
    [[ " ${all[*]} standby " == *" $name "* ]] || die "$name: no such server; there are ${all[*]} standby"
done
case $command in
start)
    # shellcheck disable=SC2046
    install $(missing "${servers[@]}")
    mkdir -p "$dir" 2>/dev/null || die "cannot make $dir; choose another folder with SERVERS_DIR"
    if [[ -O $dir && ! $(ls -A "$dir") ]]; then
        : >"$dir/.goods-servers"
        chmod 755 "$dir"
    fi
    ours || die "$dir holds other files, or is another user's; choose a new or empty folder with SERVERS_DIR"
    cd "$dir"
    each start_server "${servers[@]}"
    ;;
stop | pause | resume | kill) ! ours || each "${command}_server" "${servers[@]}" ;;
status)
    for name in "${servers[@]}"; do
        pid=$(pid_of "$name") || { echo "$name: stopped" && continue; }
        state="does not answer, pid $pid, log $dir/$name.log"
        ! answers "$name" || state="running, pid $pid, ${url[$name]}"
        echo "$name: $state"
    done
    ;;
env) for name in "${servers[@]}"; do echo "export ${name^^}_URL='${url[$name]}'"; done ;;
clean)
    ours || die "$dir was not made by this script; nothing deleted"
    each stop_server "${all[@]}" standby
    rm -rf --one-file-system "$dir"
    ;;
*)
    sed -n '/^set/q; 2,$s/^# \{0,1\}//p' "$0"
    [[ $command == *help || $command == -h ]] || exit 2
    ;;
esac
