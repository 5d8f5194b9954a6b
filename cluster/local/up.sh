#!/bin/sh
# A Ray cluster of this machine, watched: dashboard and job submission with a token, Prometheus, and Grafana where it is installed.
# Everything listens on 127.0.0.1 alone. down.sh stops it.
#
#   MOST_RAY_CLUSTER_DIR  state, logs, token, Prometheus' data (~/.most_ray/cluster)
#   RAY_PORT              Ray itself (6379)
#   DASHBOARD_PORT        dashboard and job submission (8265)
#   PROMETHEUS_PORT       9090, or off
#   GRAFANA_PORT          3000, or off
#   NUM_CPUS              logical CPUs (all cores and two)
#   MOST_RAY_HOME         where jobs write what they give a relative name, as runs/ (this checkout)
#   RAY_TMPDIR            Ray's sockets and logs, in a folder below it that no other user can enter (ray in the state's folder)
set -eu
umask 077
here=$(cd "$(dirname "$0")" && pwd)
monitoring=$here/../monitoring
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"
RAY_PORT=${RAY_PORT:-6379}
DASHBOARD_PORT=${DASHBOARD_PORT:-8265}
PROMETHEUS_PORT=${PROMETHEUS_PORT:-9090}
GRAFANA_PORT=${GRAFANA_PORT:-3000}
# Workers take a CPU each; their data tasks and an evaluation need room beside them.
NUM_CPUS=${NUM_CPUS:-$(($(nproc) + 2))}
READY_WITHIN=90 # seconds for Ray, and again for each of the others

fail() {
    echo "cluster: $1" >&2
    exit "${2:-2}"
}

ray=$here/../../.venv/bin/ray
[ -x "$ray" ] || ray=$(command -v ray) || fail "Ray is not installed: make .venv/.installed, or activate its environment."
python=$(dirname "$ray")/python
[ -x "$python" ] || python=python3

# `most-ray submit` sends the checkout to clusters; the state would go along, with the token that lets everyone in.
checkout=$here/../..
if [ -e "$checkout/pyproject.toml" ]; then
    for setting in "MOST_RAY_CLUSTER_DIR=$STATE" "RAY_TMPDIR=${RAY_TMPDIR:-}"; do
        if [ -z "${setting#*=}" ] || ! inside "${setting#*=}" "$checkout"; then continue; fi
        fail "$setting is inside this checkout, which \`most-ray submit\` sends with jobs: set ${setting%%=*} to a folder elsewhere."
    done
fi
{ mkdir -p "$STATE" && chmod 700 "$STATE"; } 2>/dev/null || true
closed "$STATE/." || fail "MOST_RAY_CLUSTER_DIR=$STATE cannot be used: set it to a folder of your own."
exec 9>"$STATE/lock"
flock -n 9 || fail "another up.sh is starting the cluster of $STATE." 1

token=$STATE/auth_token # the key to the cluster: who has it can run any code

# name what url [path]: waits until it answers there.
await() {
    name=$1 what=$2 url=$3
    began=$(now) due=3
    until answers "$url${4:-}" >/dev/null 2>&1; do
        alive "$STATE/$name.pid" || fail_with_log "$what has ended; the reason is in $STATE/$name.log."
        still_waiting "$what at $url" "$READY_WITHIN" ||
            fail_with_log "$what did not answer at $url within $READY_WITHIN s: look into $STATE/$name.log, then down.sh and, when the machine is less busy, up.sh again."
    done
}

# message: of what ended up.sh, under the last lines of the log of `name`.
fail_with_log() {
    tail -n 5 "$STATE/$name.log" >&2 || true
    fail "$1" 1
}

# url: whether it answers, to the token.
answers() {
    "$python" - "$1" "$token" <<'PYTHON'
import pathlib, sys, urllib.request
headers = {"Authorization": "Bearer " + pathlib.Path(sys.argv[2]).read_text()}
urllib.request.build_opener(urllib.request.ProxyHandler({})).open(urllib.request.Request(sys.argv[1], headers=headers), timeout=4).read()
PYTHON
}

if alive "$STATE/ray.pid" && [ -s "$STATE/env" ]; then
    # shellcheck source=/dev/null
    await ray "Ray's dashboard" "$(. "$STATE/env" && echo "$RAY_API_SERVER_ADDRESS")" /api/jobs/
    echo "The cluster of $STATE is up already."
    cat "$STATE/summary"
    exit 0
fi
stop_all # what a start that was broken off may have left

# name value: the port must be one, and free.
check_port() {
    case $2 in '' | *[!0-9]*) fail "$1=$2 is no port: set it to a number from 1 to 65535." ;; esac
    if [ "${#2}" -gt 5 ] || [ "$2" -lt 1 ] || [ "$2" -gt 65535 ]; then fail "$1=$2 is no port: set it to a number from 1 to 65535."; fi
    "$python" -c '
import socket, sys
with socket.socket() as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind(("127.0.0.1", int(sys.argv[1])))
    except OSError as error:
        sys.exit(error.strerror)
' "$2" 2>/dev/null || fail "port $2 of 127.0.0.1 is taken: set $1 to a free one, or stop what listens there."
}

case $NUM_CPUS in '' | *[!0-9]* | 0) fail "NUM_CPUS=$NUM_CPUS is no number of CPUs: set it to 1 or more." ;; esac
check_port RAY_PORT "$RAY_PORT"
check_port DASHBOARD_PORT "$DASHBOARD_PORT"
notes=
if [ "$PROMETHEUS_PORT" != off ]; then
    if command -v prometheus >/dev/null 2>&1; then
        check_port PROMETHEUS_PORT "$PROMETHEUS_PORT"
    else
        PROMETHEUS_PORT=off
        notes="Prometheus is not installed, so nothing is kept of the metrics: apt-get install prometheus, then down.sh and up.sh."
    fi
fi
grafana=$(command -v grafana-server || command -v grafana || true)
if [ "$PROMETHEUS_PORT" = off ] || [ -z "$grafana" ]; then GRAFANA_PORT=off; fi
if [ "$GRAFANA_PORT" != off ]; then check_port GRAFANA_PORT "$GRAFANA_PORT"; fi
twice=$(printf '%s\n' "$RAY_PORT" "$DASHBOARD_PORT" "$PROMETHEUS_PORT" "$GRAFANA_PORT" | grep -vx off | sort | uniq -d)
[ -z "$twice" ] || fail "port $twice is given twice: RAY_PORT, DASHBOARD_PORT, PROMETHEUS_PORT and GRAFANA_PORT must differ."

[ -s "$token" ] || "$python" -c 'import secrets; print(secrets.token_hex(32), end="")' >"$token"
chmod 600 "$token"

# Unix sockets have names of at most 107 bytes, of which Ray's dashboard needs 68. Ray opens its folder to everyone: the one above it is closed.
parent=$STATE
if [ -n "${RAY_TMPDIR:-}" ]; then
    case $RAY_TMPDIR in /*) parent=$RAY_TMPDIR ;; *) parent=$PWD/$RAY_TMPDIR ;; esac
    if [ -e "$parent" ] && ! closed "$parent/."; then
        parent=$parent/ray-$(id -u)
        [ ! -L "$parent" ] || fail "$parent is a link: set RAY_TMPDIR to a folder of your own (chmod 700)."
    fi
fi
room=$((39 - ${#parent} - 4)) # /ray
if [ "$room" -lt 0 ]; then
    [ -z "${RAY_TMPDIR:-}" ] || fail "RAY_TMPDIR=$RAY_TMPDIR is too long for Ray's sockets: set it to a folder of at most $((${#RAY_TMPDIR} + room)) characters."
    parent=$(cat "$STATE/temp_parent" 2>/dev/null || true)
    closed "$parent" || parent=$(mktemp -d /tmp/most_ray.XXXXXX)
    printf '%s' "$parent" >"$STATE/temp_parent"
fi
temp=$parent/ray
mkdir -p "$parent" 2>/dev/null || true # closed, by the umask
{ closed "$parent/." && mkdir -p "$temp"; } || fail "$parent cannot be used: set RAY_TMPDIR to a folder of your own (chmod 700)."

# name command...: runs it beside us, for down.sh to find.
start() {
    name=$1
    shift
    setsid "$@" >"$STATE/$name.log" 2>&1 </dev/null 9>&- &
    identity $! >"$STATE/$name.pid"
}

free_ports=$("$python" -c '
import socket
probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(5)]
print(*(probe.getsockname()[1] for probe in probes))')
# shellcheck disable=SC2086 # five words are wanted
set -- $free_ports

# shellcheck disable=SC2329 # called by the trap
stop_after_failure() { if [ "$1" != 0 ]; then stop_all; fi; }
trap 'stop_after_failure $?' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

unset RAY_AUTH_TOKEN RAY_ADDRESS RAY_API_SERVER_ADDRESS OMP_NUM_THREADS
PATH=$(cd "$(dirname "$ray")" && pwd):$PATH # what a job calls python is the one that has Ray
MOST_RAY_HOME=${MOST_RAY_HOME:-$(cd "$here/../.." && pwd)} # where jobs' relative folders are
export PATH MOST_RAY_HOME RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$token"
# Without it Ray takes 127.0.0.1 for the machine's outer address and listens on all of them; nothing else in it depends on this on Linux.
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
# Where a second cluster of the machine would look for its own.
export AUTOSCALER_METRIC_PORT="$4" DASHBOARD_METRIC_PORT="$5"
# A run has more processes than Ray expects of so few cores: it would warn of each further one.
export RAY_worker_maximum_startup_concurrency=$((2 * NUM_CPUS))
export RAY_USAGE_STATS_ENABLED=0 RAY_TRAIN_V2_ENABLED=1 RAY_TRAIN_ENABLE_STATE_TRACKING=1
export RAY_PROMETHEUS_HOST="http://127.0.0.1:$PROMETHEUS_PORT" RAY_GRAFANA_HOST="http://127.0.0.1:$GRAFANA_PORT"
[ "$PROMETHEUS_PORT" != off ] || unset RAY_PROMETHEUS_HOST
[ "$GRAFANA_PORT" != off ] || export RAY_GRAFANA_HOST=DISABLED

start ray "$ray" start --head --block --node-ip-address 127.0.0.1 --port "$RAY_PORT" --num-cpus "$NUM_CPUS" --temp-dir "$temp" \
    --dashboard-host 127.0.0.1 --dashboard-port "$DASHBOARD_PORT" --dashboard-agent-listen-port "$1" --metrics-export-port "$2" \
    --ray-client-server-port "$3" --min-worker-port 0 --max-worker-port 0 --log-style record --log-color false
await ray "Ray's dashboard" "http://127.0.0.1:$DASHBOARD_PORT" /api/jobs/
await ray "Ray's metrics" "http://127.0.0.1:$2" /metrics

if [ "$PROMETHEUS_PORT" != off ]; then
    cp "$monitoring/rules.yml" "$STATE/rules.yml"
    sed "s|/tmp/ray/prom_metrics_service_discovery.json|$temp/prom_metrics_service_discovery.json|" \
        "$monitoring/prometheus.yml" >"$STATE/prometheus.yml"
    start prometheus prometheus --config.file "$STATE/prometheus.yml" --storage.tsdb.path "$STATE/prometheus" \
        --storage.tsdb.retention.time 15d --storage.tsdb.retention.size 1GB --web.listen-address "127.0.0.1:$PROMETHEUS_PORT"
    await prometheus Prometheus "http://127.0.0.1:$PROMETHEUS_PORT" /-/ready
fi
if [ "$GRAFANA_PORT" != off ]; then
    # Grafana takes a password only when it makes its database: the first one stays.
    [ -s "$STATE/grafana_password" ] || "$python" -c 'import secrets; print(secrets.token_urlsafe(16), end="")' >"$STATE/grafana_password"
    server=$([ "$(basename "$grafana")" = grafana-server ] || echo server)
    # shellcheck disable=SC2086 # no word where grafana-server is the program
    start grafana env \
        GF_SERVER_HTTP_ADDR=127.0.0.1 GF_SERVER_HTTP_PORT="$GRAFANA_PORT" GF_PATHS_DATA="$STATE/grafana" GF_PATHS_LOGS="$STATE/grafana" \
        GF_PATHS_PROVISIONING="$monitoring/grafana/provisioning" GF_AUTH_ANONYMOUS_ENABLED=false GF_USERS_ALLOW_SIGN_UP=false \
        GF_SECURITY_ADMIN_PASSWORD__FILE="$STATE/grafana_password" GF_SECURITY_ALLOW_EMBEDDING=true \
        GF_ANALYTICS_REPORTING_ENABLED=false GF_ANALYTICS_CHECK_FOR_UPDATES=false GF_ANALYTICS_CHECK_FOR_PLUGIN_UPDATES=false \
        GF_NEWS_NEWS_FEED_ENABLED=false GF_SECURITY_DISABLE_GRAVATAR=true \
        MOST_RAY_PROMETHEUS_URL="$RAY_PROMETHEUS_HOST" MOST_RAY_DASHBOARDS="$monitoring/grafana/dashboards" \
        RAY_DASHBOARDS="$temp/session_latest/metrics/grafana/dashboards" \
        "$grafana" $server --homepath "${GRAFANA_HOME:-/usr/share/grafana}"
    await grafana Grafana "http://127.0.0.1:$GRAFANA_PORT" /api/health
fi

cat >"$STATE/env" <<ENV
unset RAY_AUTH_TOKEN
export RAY_API_SERVER_ADDRESS='http://127.0.0.1:$DASHBOARD_PORT'
export RAY_ADDRESS='127.0.0.1:$RAY_PORT'
export RAY_AUTH_MODE='token'
export RAY_AUTH_TOKEN_PATH='$token'
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 # 127.0.0.1 is meant
ENV
{
    echo "For this shell, or: . '$STATE/env'"
    sed 's/^/    /' "$STATE/env"
    echo "Dashboard    http://127.0.0.1:$DASHBOARD_PORT  it requires the token: cat '$token'"
    [ "$PROMETHEUS_PORT" = off ] || echo "Prometheus   http://127.0.0.1:$PROMETHEUS_PORT"
    [ "$GRAFANA_PORT" = off ] || echo "Grafana      http://127.0.0.1:$GRAFANA_PORT  user admin, password: cat '$STATE/grafana_password'"
    echo "Ray          127.0.0.1:$RAY_PORT, $NUM_CPUS CPUs; most-ray train --ray_address 127.0.0.1:$RAY_PORT"
    echo "Stop         MOST_RAY_CLUSTER_DIR='$STATE' $here/down.sh"
    [ -z "$notes" ] || echo "$notes"
} >"$STATE/summary"
cat "$STATE/summary"
