#!/bin/sh
# Stops what up.sh has started, and only that. Runs that are under way resume from their last checkpoint when they are started again.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"

if [ ! -d "$STATE" ] || { [ -z "$(family)" ] && [ ! -s "$STATE/stopping" ]; }; then
    rm -f "$STATE"/*.pid "$STATE/env"
    echo "No cluster of $STATE is up."
    exit 0
fi
stop_all
echo "The cluster of $STATE is down. Its logs and Prometheus' data stay there."
