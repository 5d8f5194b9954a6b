"""Places that one host of two does not have as the other has them: found on it before a worker starts (promise 32 of docs/promises.md)."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tests.support.hosts import Hosts, View, require_namespaces

WITHIN_S = 30.0
MOUNT = "Name a folder that all nodes mount, or a URI as s3://bucket/folder."


def test_a_place_that_only_the_head_has_is_named_with_the_host(tmp_path: Path) -> None:
    """An output_dir on the head's own disk; the same on another host full, and read-only; data that lie on the head alone."""
    require_namespaces()
    shared, own, full, fixed, data = (tmp_path / name for name in ("shared", "own", "full", "fixed", "data"))
    for folder in (shared, own, full, fixed):
        folder.mkdir()
    (fixed / "run").mkdir()
    (fixed / "store").mkdir()
    data.mkdir()
    (data / "records.jsonl").write_text('{"id": "a", "instruction": "x", "input": "y", "output": "z"}\n')
    views = [View(own), View(data), View(fixed, read_only=True)]
    with Hosts(2, private={1: views}) as hosts:
        hosts[0].start_ray(num_cpus=3)
        hosts[1].start_ray(num_cpus=2)

        def said(output: Path, *flags: str) -> str:
            words = [sys.executable, "-m", "most_ray.cli", "train", "--config", "jobs/configs/digits.yaml", "--output_dir", str(output)]
            address = ["--ray_address", f"{hosts[0].address}:6379", "--name", "run"]
            log, began = tmp_path / "log", time.monotonic()
            log.unlink(missing_ok=True)
            process = hosts[0].start([*words, *address, *flags], log)
            assert process.wait(timeout=120) == 2, log.read_text()
            assert time.monotonic() - began < WITHIN_S
            assert "Traceback" not in log.read_text()
            return " ".join(log.read_text().split())

        found = said(own)
        assert f"output_dir = '{own}/run': is not there on host1, unlike on the driver's machine. {MOUNT}" in found
        assert not list(own.rglob(".probe-*"))
        read_only = f"output_dir = '{fixed}/run': cannot be written to (Read-only file system) on host1. Fix it there"
        assert read_only in said(fixed)
        no_data = f"val_asr_dirs = '{data}': is empty on host1, unlike on the driver's machine. {MOUNT}"
        assert no_data in said(shared, "--val_asr_dirs", str(data))
