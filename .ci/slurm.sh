#!/bin/sh
# Slurm for tests/cluster/test_slurm.py, where it can be installed; never a reason to stop.
if command -v slurmctld >/dev/null 2>&1 && command -v slurmd >/dev/null 2>&1; then exit 0; fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing Slurm for tests/cluster"
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends slurmctld slurmd slurm-client; } \
        >/dev/null 2>&1 && exit 0
fi
echo "tests/cluster/test_slurm.py needs Slurm: apt-get install slurmctld slurmd slurm-client" >&2
exit 0
