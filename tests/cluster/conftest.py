"""A real cluster of this machine, as cluster/local/up.sh makes it, for whoever needs one."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import ROOT
from tests.support.pages import chromium


@dataclass(frozen=True)
class LocalCluster:
    """dashboard, prometheus: URLs; gcs_address: for ray.init; env: the environment of a command that uses the cluster, its token included;
    folder: MOST_RAY_CLUSTER_DIR."""

    dashboard: str
    prometheus: str
    gcs_address: str
    env: dict[str, str]
    folder: Path

    @property
    def token(self) -> str:
        return (self.folder / "auth_token").read_text()

    def get(self, path: str) -> Any:
        """JSON of the dashboard's API."""
        request = urllib.request.Request(f"{self.dashboard}{path}", headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def processes(self) -> list[psutil.Process]:
        """Those that up.sh has started, and all theirs."""
        roots = [psutil.Process(int(path.read_text().split()[0])) for path in self.folder.glob("*.pid")]
        return [process for root in roots for process in (root, *root.children(recursive=True))]


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="session")
def local_cluster() -> Iterator[LocalCluster]:
    """Up for the session, with ports and a token of its own; behind it no process of it is left."""
    folder = Path(tempfile.mkdtemp(prefix="most_ray", dir="/tmp"))  # short: Unix sockets lie in it
    names = ("RAY_PORT", "DASHBOARD_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT")
    ports = dict(zip(names, map(str, free_ports(4)), strict=True))
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") and name != "OMP_NUM_THREADS"}
    settings = {**outside, **ports, "MOST_RAY_CLUSTER_DIR": str(folder)}
    up = subprocess.run(["sh", "cluster/local/up.sh"], cwd=ROOT, env=settings, text=True, capture_output=True, timeout=240, check=False)
    assert up.returncode == 0, up.stderr
    exports = [shlex.split(line, comments=True)[1] for line in (folder / "env").read_text().splitlines() if line.startswith("export ")]
    cluster = LocalCluster(
        dashboard=f"http://127.0.0.1:{ports['DASHBOARD_PORT']}",
        prometheus=f"http://127.0.0.1:{ports['PROMETHEUS_PORT']}",
        gcs_address=f"127.0.0.1:{ports['RAY_PORT']}",
        env={**settings, **dict(export.split("=", 1) for export in exports)},
        folder=folder,
    )
    yield cluster
    processes = cluster.processes()
    down = subprocess.run(["sh", "cluster/local/down.sh"], cwd=ROOT, env=settings, text=True, capture_output=True, timeout=120, check=False)
    left = [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert down.returncode == 0, down.stderr
    assert not left
    shutil.rmtree(folder)


browser = pytest.fixture(scope="module", name="browser")(chromium)
