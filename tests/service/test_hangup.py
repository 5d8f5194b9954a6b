"""A run whose terminal ends writes a checkpoint, and Ray with it lives until then."""

from __future__ import annotations

import os
import pty
import select
import signal
import sys
import time
from pathlib import Path

from most_ray.checkpoint import catalog
from tests.conftest import ROOT

_SECONDS = 240.0  # for a run to begin to train


def test_a_run_whose_terminal_ends_stops_after_a_checkpoint(tmp_path: Path) -> None:
    """The kernel sends SIGHUP to all processes of the command, those of Ray too, and what is written to the terminal is an error."""
    flags = [
        "--config",
        "jobs/configs/digits.yaml",
        "--output_dir",
        str(tmp_path),
        "--name",
        "r",
        "--num_workers",
        "1",
        "--max_steps",
        "100000",
    ]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.execv(sys.executable, [sys.executable, "-m", "most_ray.cli", "train", *flags])
    metrics, deadline, shown = tmp_path / "r" / "metrics.jsonl", time.monotonic() + _SECONDS, b""
    while not (metrics.exists() and b'"kind": "train"' in metrics.read_bytes()):
        assert time.monotonic() < deadline, shown[-3000:]
        if select.select([terminal], [], [], 0.5)[0]:
            shown += os.read(terminal, 65536)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    assert len(catalog.committed(str(tmp_path / "r" / "checkpoints"))) == 1
