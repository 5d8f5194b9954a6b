#!/bin/sh
# Prometheus with promtool for tests/unit/test_monitoring.py and tests/cluster, where it can be installed; never a reason to stop.
if command -v promtool >/dev/null 2>&1; then exit 0; fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing Prometheus for the tests of metrics and alerts"
    { apt-get update && apt-get install --yes --no-install-recommends prometheus; } >/dev/null 2>&1 && exit 0
fi
echo "the tests of metrics and alerts need Prometheus: apt-get install prometheus" >&2
exit 0
