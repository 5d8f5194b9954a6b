# shellcheck shell=sh
# What up.sh and down.sh share: where the state is, and which processes are the cluster's.

STATE=${MOST_RAY_CLUSTER_DIR:-${HOME:?names no folder}/.most_ray/cluster}
case $STATE in /*) ;; *) STATE=$PWD/$STATE ;; esac

# Whether a folder is the user's own, and no one else may enter it.
closed() {
    [ -n "$(find "$1" -maxdepth 0 -type d -user "$(id -u)" ! -perm /077 2>/dev/null)" ]
}

# Every process: its pid, its parent's, and its start in clock ticks since boot, which distinguishes a pid that is used again.
processes() {
    # A process may end between the listing and the reading.
    cat /proc/[0-9]*/stat 2>/dev/null | awk '
        { pid = $1; sub(/^.*\) /, ""); if ($1 != "Z") print pid, $2, $20 }'
}

# "pid start" of one process; nothing where there is none.
identity() {
    processes | awk -v pid="$1" '$1 == pid { print $1, $3 }'
}

# Whether the process of a pid file is still alive.
alive() {
    [ -s "$1" ] && [ "$(identity "$(cut -d ' ' -f 1 "$1")")" = "$(cat "$1")" ]
}

# "pid start" of the processes that are named by pid files, and of all that they have started.
family() {
    for file in "$STATE"/*.pid; do
        if alive "$file"; then cut -d ' ' -f 1 "$file"; fi
    done >"$STATE/roots"
    processes | awk -v roots="$STATE/roots" '
        BEGIN { while ((getline line < roots) > 0) ours[line] = 1 }
        { parent[$1] = $2; start[$1] = $3 }
        END {
            for (pid in parent) {
                for (up = pid; up in parent && !(up in ours); up = parent[up]) if (parent[up] == up) break
                if (up in ours) print pid, start[pid]
            }
        }'
    rm -f "$STATE/roots"
}

# Those of a list of "pid start" lines, in a file, that live still.
remaining() {
    processes | awk '{ print $1, $3 }' | grep -Fx -f "$1"
}

# Sends a signal to each of the processes of a list that live still.
signal_all() {
    remaining "$2" | while read -r pid _; do kill "-$1" "$pid" 2>/dev/null || true; done
}

# Whether a path, made or not, is a folder or in it, links resolved.
inside() {
    case $(realpath -m -- "$1")/ in "$(realpath -m -- "$2")"/*) return 0 ;; esac
    return 1
}

# Seconds of a clock that only goes forward.
now() {
    read -r uptime _ </proc/uptime
    echo "${uptime%.*}"
}

# what seconds: to be called again and again while something is waited for: says so
# after 3 s, and then every 5 s. The wait began at $began; it fails once it is over.
still_waiting() {
    waited=$(($(now) - began))
    [ "$waited" -lt "$2" ] || return 1
    [ "$waited" -lt "$due" ] || echo "cluster: waiting for $1: $waited s, until $2 s" >&2
    while [ "$waited" -ge "$due" ]; do due=$((due + 5)); done
    sleep 0.1
}

# Waits until a command fails or a number of seconds is over; whether it came to fail.
until_gone() {
    limit=$1
    shift
    began=$(now) due=3
    while "$@" >/dev/null; do
        still_waiting "processes to end" "$limit" || return 1
    done
}

# Whether one of the processes that up.sh itself has started lives.
any_root() {
    for file in "$STATE"/*.pid; do
        if alive "$file"; then return 0; fi
    done
    return 1
}

# Stops everything that up.sh has started, and nothing else.
stop_all() {
    list=$STATE/stopping
    # What was left by a call that was broken off comes on top.
    { family; cat "$list" 2>/dev/null || true; } >"$list.new"
    mv "$list.new" "$list"
    for file in "$STATE"/*.pid; do
        if alive "$file"; then kill -TERM "$(cut -d ' ' -f 1 "$file")" 2>/dev/null || true; fi
    done
    until_gone 20 any_root || true # Ray takes its own processes with it, but for what jobs have started
    if [ -s "$list" ]; then
        signal_all TERM "$list"
        until_gone 5 remaining "$list" || { signal_all KILL "$list" && until_gone 5 remaining "$list"; } || {
            echo "cluster: these processes do not end: $(remaining "$list" | cut -d ' ' -f 1 | tr '\n' ' ')" >&2
            return 1
        }
    fi
    rm -f "$list" "$STATE"/*.pid "$STATE/env"
}
