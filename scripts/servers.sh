#!/usr/bin/env bash
# Runs Postgres, Redis, NATS with JetStream and ClickHouse as plain processes, without Docker: their data in one
# folder, their ports next to each other on 127.0.0.1, apart from any system-wide instance. Another folder and
# another base port make another, independent set, for tests that break their servers.
set -euo pipefail

usage() {
    cat <<'END'
usage: scripts/servers.sh COMMAND [ARGUMENT...]

  install [package...]  install these packages, or the missing servers, with apt
  start [server...]     start what does not run, and wait until it answers
  stop [server...]      stop, and wait until it has ended
  pause [server...]     freeze every process of a server (SIGSTOP)
  resume [server...]    let it go on
  status                one line a server
  env                   print the servers' URLs as shell exports
  clean                 stop all and delete their data

servers: postgres redis nats clickhouse (default: all)

  SERVERS_DIR   data, logs (NAME.log) and pid files (NAME.pid)   /var/tmp/goods-servers
  SERVERS_PORT  the first of seven ports: postgres, redis,       15430
                nats, clickhouse native, clickhouse HTTP,
                clickhouse interserver, nats monitoring
END
}

readonly all=(postgres redis nats clickhouse)
readonly wait_start=60 wait_stop=10 # seconds

dir=${SERVERS_DIR:-/var/tmp/goods-servers}
base=${SERVERS_PORT:-15430}

# Debian keeps two of the servers where only root's PATH looks.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

die() {
    echo "servers.sh: $*" >&2
    exit 1
}

settings() {
    dir=$(realpath -ms -- "$dir")
    # The folder's name goes into four configuration formats; this keeps quoting out of all of them.
    [[ $dir =~ ^/[A-Za-z0-9/._+@-]+$ ]] ||
        die "SERVERS_DIR=$dir: use letters, digits and . _ + @ - only"
    if ! [[ $base =~ ^[1-9][0-9]{3,4}$ ]] || ((base < 1024 || base > 65529)); then
        die "SERVERS_PORT=$base: must be a number from 1024 to 65529"
    fi
}

# ports prints the ports of server $1; the first is the one in its URL.
ports() {
    case $1 in
    postgres) echo $((base)) ;;
    redis) echo $((base + 1)) ;;
    nats) echo $((base + 2)) $((base + 6)) ;;
    clickhouse) echo $((base + 3)) $((base + 4)) $((base + 5)) ;;
    esac
}

url() {
    local port
    port=$(ports "$1")
    port=127.0.0.1:${port%% *}
    case $1 in
    postgres) echo "postgres://goods:goods@$port/goods?sslmode=disable" ;;
    redis) echo "redis://$port/0" ;;
    nats) echo "nats://$port" ;;
    clickhouse) echo "clickhouse://$port/default" ;;
    esac
}

# ---- install

# postgres_bin prints the folder of the Postgres programs: of the version that made the data, else the newest.
postgres_bin() {
    local bin
    if [[ -r $dir/postgres/PG_VERSION ]]; then
        bin=/usr/lib/postgresql/$(<"$dir/postgres/PG_VERSION")/bin/postgres
    else
        bin=$(printf '%s\n' /usr/lib/postgresql/*/bin/postgres | sort -V | tail -n 1)
    fi
    [[ -x $bin ]] || bin=$(command -v postgres) || return 1
    dirname "$(realpath "$bin")"
}

# have tells whether server $1 is installed. It looks for the program, so that one built or placed by hand counts
# and a second call asks no package manager.
have() {
    case $1 in
    postgres) postgres_bin >/dev/null ;;
    *) command -v "$1-server" >/dev/null ;;
    esac
}

package() {
    case $1 in
    postgres) echo postgresql ;;
    *) echo "$1-server" ;;
    esac
}

# install brings the servers of $1 (a list in one word) and the packages that follow, as far as they are missing.
install() {
    local name status want=() missing=()
    for name in $1; do
        have "$name" || missing+=("$(package "$name")")
    done
    want=("${missing[@]}")
    for name in "${@:2}"; do
        status=$(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null) || true
        [[ $status == installed ]] || want+=("$name")
    done
    ((${#want[@]})) || return 0

    command -v apt-get >/dev/null || die "missing: ${want[*]}; there is no apt-get here to install them with"
    if ((EUID == 0)); then
        install_as_root "${want[@]}"
    elif command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [[ -t 0 && -t 2 ]]; }; then
        echo "+ sudo apt-get install -y --no-install-recommends ${want[*]}"
        sudo "$(realpath "$0")" install "${@:2}"
    else
        die "missing, and neither root nor sudo to install them: apt-get install ${want[*]}"
    fi
}

# install_as_root installs packages. A system-wide server among them must neither start now (policy-rc.d) nor at the
# next boot (disable), and Postgres must not create its "main" cluster: this script starts servers of its own, and
# only those.
install_as_root() (
    local policy=/usr/sbin/policy-rc.d cluster=/etc/postgresql-common/createcluster.d/goods.conf package
    local made=()
    trap '((${#made[@]} == 0)) || rm -f "${made[@]}"' EXIT
    trap 'exit 130' INT TERM
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
    # A new machine has no package lists, and old lists name files that are gone.
    local updated=
    if ! apt-cache show "$@" >/dev/null 2>&1; then
        apt update || true
        updated=1
        for package; do
            apt-cache show "$package" >/dev/null 2>&1 || die "apt has no package $package on this system"
        done
    fi
    if ! apt install -y --no-install-recommends "$@"; then
        [[ ! $updated ]] || die "apt could not install: $*"
        apt update || true
        apt install -y --no-install-recommends "$@" || die "apt could not install: $*"
    fi

    local now=()
    [[ ! -d /run/systemd/system ]] || now=(--now) # an existing policy-rc.d may have let it start
    for package; do
        if command -v systemctl >/dev/null; then
            systemctl disable --quiet "${now[@]}" "$package"
        else
            update-rc.d "$package" disable
        fi 2>/dev/null || true
    done
)

# ---- processes

# pid_of prints the pid of server $1, or fails when it does not run. A pid file outlives its process, and the number
# may belong to another by now, so the process must also have this folder among its arguments; a zombie has none.
pid_of() {
    local pid args
    [[ -r $dir/$1.pid ]] && read -r pid <"$dir/$1.pid" && [[ $pid =~ ^[0-9]+$ ]] || return 1
    mapfile -d '' -t args 2>/dev/null <"/proc/$pid/cmdline" || return 1
    [[ " ${args[*]}" == *[\ =]"$dir/$1"* ]] || return 1
    echo "$pid"
} 2>/dev/null

# family prints all pids of server $1. Postgres' children show in no argument that they are of this server, and each
# is a session of its own, but all of them stay in the data folder. They may outlive a killed parent for a moment.
family() {
    local process
    pid_of "$1" || true
    [[ $1 == postgres ]] || return 0
    for process in /proc/[0-9]*; do
        [[ ! $process/cwd -ef $dir/postgres ]] || echo "${process#/proc/}"
    done
}

# signal sends signal $2 to every process of server $1.
signal() {
    local pids
    mapfile -t pids < <(family "$1")
    ((${#pids[@]} == 0)) || kill -s "$2" "${pids[@]}" 2>/dev/null || true
}

# launch runs a command as server $1, detached from this shell, its terminal and its open files, so that it outlives
# make and is not reached by Ctrl-C. setsid and setpriv replace themselves, so $! is the server's own pid.
launch() {
    local name=$1
    shift
    (
        echo "$BASHPID" >"$dir/$name.pid"
        exec </dev/null >>"$dir/$name.log" 2>&1
        for fd in "/proc/$BASHPID/fd"/*; do
            fd=${fd##*/}
            ((fd <= 2)) || eval "exec $fd>&-"
        done
        exec setsid "$@"
    ) &
}

# as_postgres holds what to put before a command that has to run as user postgres: Postgres refuses to be root.
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
    # Left of a killed server: children that hold its shared memory, and a lock file whose number may be
    # another process by now. Both would keep the new one from starting.
    signal postgres KILL
    rm -f "$data/postmaster.pid"
    # In arguments rather than in postgresql.conf, so that the same data can move to other ports.
    launch postgres "${as_postgres[@]}" "$bin/postgres" -D "$data" -h 127.0.0.1 -p "$(ports postgres)" \
        -c unix_socket_directories= -c max_connections=200
}

run_redis() {
    mkdir -p "$dir/redis"
    # One rare save point: SIGTERM and SHUTDOWN then save, while a benchmark is not disturbed by forks.
    cat >"$dir/redis/redis.conf" <<END
bind 127.0.0.1
port $(ports redis)
dir $dir/redis
save 3600 1
# keeps the arguments, by which this script knows its process
set-proc-title no
END
    launch redis "$(command -v redis-server)" "$dir/redis/redis.conf"
}

run_nats() {
    local port
    read -ra port <<<"$(ports nats)"
    mkdir -p "$dir/nats"
    cat >"$dir/nats/nats.conf" <<END
listen: "127.0.0.1:${port[0]}"
http: "127.0.0.1:${port[1]}"
jetstream { store_dir: "$dir/nats", max_memory_store: 64MB, max_file_store: 10GB }
END
    launch nats "$(command -v nats-server)" -c "$dir/nats/nats.conf"
}

run_clickhouse() {
    local port
    read -ra port <<<"$(ports clickhouse)"
    mkdir -p "$dir/clickhouse"
    # The root element has to be "yandex" for the version that Debian ships; later ones accept it too.
    cat >"$dir/clickhouse/config.xml" <<END
<yandex>
    <logger><level>information</level><console>1</console></logger>
    <listen_host>127.0.0.1</listen_host>
    <tcp_port>${port[0]}</tcp_port>
    <http_port>${port[1]}</http_port>
    <interserver_http_port>${port[2]}</interserver_http_port>
    <interserver_http_host>127.0.0.1</interserver_http_host>
    <path>$dir/clickhouse/data/</path>
    <tmp_path>$dir/clickhouse/tmp/</tmp_path>
    <user_files_path>$dir/clickhouse/user_files/</user_files_path>
    <format_schema_path>$dir/clickhouse/format_schemas/</format_schema_path>
    <users_config>$dir/clickhouse/users.xml</users_config>
    <default_profile>default</default_profile>
    <default_database>default</default_database>
    <mark_cache_size>67108864</mark_cache_size>
    <uncompressed_cache_size>0</uncompressed_cache_size>
    <query_log>
        <database>system</database>
        <table>query_log</table>
        <flush_interval_milliseconds>1000</flush_interval_milliseconds>
    </query_log>
</yandex>
END
    cat >"$dir/clickhouse/users.xml" <<END
<yandex>
    <profiles><default><log_queries>1</log_queries></default></profiles>
    <quotas><default></default></quotas>
    <users>
        <default>
            <password></password>
            <networks><ip>127.0.0.1</ip></networks>
            <profile>default</profile>
            <quota>default</quota>
        </default>
    </users>
</yandex>
END
    launch clickhouse "$(command -v clickhouse-server)" --config-file="$dir/clickhouse/config.xml"
}

# ---- answers

open() {
    # shellcheck disable=SC2016 # the inner shell expands: timeout needs a command
    timeout 2 bash -c '</dev/tcp/127.0.0.1/"$0"' "$1" 2>/dev/null
}

# ask sends $2 to port $1 and prints the answer, up to its end.
ask() {
    # shellcheck disable=SC2016 # the inner shell expands: timeout needs a command
    timeout 2 bash -c 'exec 3<>"/dev/tcp/127.0.0.1/$0" && printf %b "$1" >&3 && cat <&3' "$1" "$2" 2>/dev/null |
        tr -d '\0'
}

# answers tells whether server $1 is ready for work, not only listening.
answers() {
    case $1 in
    postgres) "$(postgres_bin)/pg_isready" -q -h 127.0.0.1 -p $((base)) -t 2 ;;
    redis) [[ $(ask $((base + 1)) 'PING\r\nQUIT\r\n') == +PONG* ]] ;;
    nats) [[ $(ask $((base + 6)) 'GET /healthz HTTP/1.0\r\n\r\n') == *'"ok"'* ]] && open $((base + 2)) ;;
    clickhouse)
        [[ $(ask $((base + 4)) 'GET /?query=SELECT+1 HTTP/1.0\r\n\r\n') == *' 200 OK'* ]] && open $((base + 3))
        ;;
    esac
}

# prepare makes the folder, and marks it as one that clean may delete.
prepare() {
    mkdir -p "$dir" 2>/dev/null || true
    [[ -d $dir && -w $dir ]] || die "cannot write to $dir; choose another folder with SERVERS_DIR"
    # Under /var/tmp anyone can make a folder of this name first: what lies in it is then not to be trusted.
    [[ -O $dir ]] || die "$dir belongs to $(stat -c %U "$dir"); choose another folder with SERVERS_DIR"
    if [[ ! -e $dir/.goods-servers ]]; then
        [[ -z $(ls -A "$dir") || -e $dir/.goods-servers ]] ||
            die "$dir holds other files; choose a new or empty folder with SERVERS_DIR"
        : >"$dir/.goods-servers"
        chmod 755 "$dir"
    fi
    cd "$dir"
}

# ours tells whether this script made the folder, and refuses one of another user.
ours() {
    [[ -e $dir/.goods-servers ]] || return 1
    [[ -O $dir ]] || die "$dir belongs to $(stat -c %U "$dir")"
}

# locked runs a command under the lock of server $2, so that two makes at once do not both initialise it.
locked() {
    (
        flock -w $((wait_start + wait_stop)) 9 || die "$2: another servers.sh is busy with it"
        "$@"
    ) 9>>"$dir/.$2.lock"
}

start_server() {
    local name=$1 pid port began=$SECONDS
    if pid=$(pid_of "$name"); then
        [[ $(cat ".$name.base") == "$base" ]] ||
            die "$name: runs here for SERVERS_PORT=$(cat ".$name.base"); stop it first, or choose another SERVERS_DIR"
        signal "$name" CONT
    else
        if [[ $name == postgres ]] && ! "${as_postgres[@]}" test -x "$dir"; then
            die "postgres: user postgres cannot enter $dir; choose another folder with SERVERS_DIR"
        fi
        for port in $(ports "$name"); do
            # A killed server's port may stay open for an instant longer than its process.
            for ((i = 0; i < 10; i++)); do
                open "$port" || continue 2
                sleep 0.1
            done
            die "$name: port $port is taken; choose others with SERVERS_PORT (seven in a row)"
        done
        echo "$base" >".$name.base"
        "run_$name" || report "$name" "could not be set up"
        pid=$!
    fi
    until answers "$name"; do
        kill -0 "$pid" 2>/dev/null || report "$name" "ended while starting"
        ((SECONDS - began < wait_start)) || report "$name" "does not answer after $wait_start seconds"
        sleep 0.05
    done
    echo "$name: $(url "$name")"
}

# report fails with message $2 and what server $1 said last.
report() {
    tail -n 5 "$dir/$1.log" >&2 || true
    die "$1: $2; its log is $dir/$1.log"
}

stop_server() {
    local name=$1 signal=TERM i
    if pid_of "$name" >/dev/null; then
        [[ $name != postgres ]] || signal=INT # TERM waits until the last client has gone
        kill -s $signal "$(pid_of "$name")" 2>/dev/null || die "$name: not allowed to stop it"
        signal "$name" CONT # a paused process takes its signals only then
        for ((i = 0; i < wait_stop * 20; i++)); do
            pid_of "$name" >/dev/null || break
            sleep 0.05
        done
        if ((i == wait_stop * 20)); then
            echo "$name: did not stop in $wait_stop seconds, killed" >&2
            signal "$name" KILL
            while pid_of "$name" >/dev/null; do sleep 0.05; done
        fi
    fi
    rm -f "$dir/$name.pid"
}

# each runs a function for every server named, side by side, and fails when one of them fails.
each() {
    local action=$1 name pids=() failed=0
    shift
    for name; do
        "$action" "$name" &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do
        wait "$pid" || failed=1
    done
    return $failed
}

start_locked() { locked start_server "$1"; }
stop_locked() { locked stop_server "$1"; }
pause_server() { signal "$1" STOP; }
resume_server() { signal "$1" CONT; }

main() {
    local command=${1:-} name pid
    if [[ ! $command || $command == -h || $command == --help ]]; then
        usage
        return
    fi
    shift
    settings
    if [[ $command == install ]]; then
        if (($#)); then install "" "$@"; else install "${all[*]}"; fi
        return
    fi
    for name; do
        [[ " ${all[*]} " == *" $name "* ]] || die "$name: no such server; there are ${all[*]}"
    done
    (($#)) || set -- "${all[@]}"
    case $command in
    start)
        install "$*"
        prepare
        each start_locked "$@"
        ;;
    stop)
        if ours; then each stop_locked "$@"; fi
        ;;
    pause | resume)
        if ours; then each "${command}_server" "$@"; fi
        ;;
    status)
        for name; do
            if ! pid=$(pid_of "$name"); then
                echo "$name: stopped"
            elif answers "$name"; then
                echo "$name: running, pid $pid, $(url "$name")"
            else
                echo "$name: does not answer, pid $pid, log $dir/$name.log"
            fi
        done
        ;;
    env)
        for name; do
            echo "export ${name^^}_URL='$(url "$name")'"
        done
        ;;
    clean)
        [[ -e $dir ]] || return 0
        ours || die "$dir was not made by this script; nothing deleted"
        each stop_locked "${all[@]}"
        rm -rf --one-file-system "$dir"
        ;;
    *)
        usage >&2
        exit 2
        ;;
    esac
}

main "$@"
