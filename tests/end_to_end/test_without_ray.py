"""The engine by itself: under torchrun or in one process, on a machine where there is no Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from most_ray.io.journal import read_journal
from tests.conftest import ROOT
from tests.end_to_end.faults.harness import flags_of

# What a machine without Ray would say to `import ray`, then the module as torchrun would start it.
_FORBID_RAY = "import sys, runpy; sys.modules['ray'] = None; runpy.run_module('most_ray.train.run', run_name='__main__', alter_sys=True)"


def command(tmp_path: Path, ranks: int, name: str, **flags: object) -> list[str]:
    script = tmp_path / "without_ray.py"
    script.write_text(_FORBID_RAY)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, str(script), *flags_of(tmp_path, name, max_steps=8, save_steps=4, **flags)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240, check=False)


def lines(tmp_path: Path, name: str) -> list[dict[str, float]]:
    return read_journal(tmp_path / name / "metrics.jsonl", "train")


def test_torchrun_and_one_process_train_the_same(tmp_path: Path) -> None:
    for ranks in (1, 2):
        done = run(command(tmp_path, ranks, f"r{ranks}", ep_size=ranks))
        assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "r1.trace").read_bytes() == (tmp_path / "r2.trace").read_bytes()
    losses = [[line["loss"] for line in lines(tmp_path, f"r{ranks}")] for ranks in (1, 2)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 8
    assert (tmp_path / "r2" / "export" / "config.json").exists()
    assert [p.parent.name for p in sorted((tmp_path / "r2").glob("checkpoints/*/commit.json"))] == ["step-000000004", "step-000000008"]


def test_sigterm_stops_behind_a_checkpoint(tmp_path: Path) -> None:
    """Exit code 75, a checkpoint of the step that it had come to, and the same command goes on."""
    words = command(tmp_path, 1, "ended", logging_steps=1)
    trace = tmp_path / "ended.trace"
    with subprocess.Popen(words, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "starting after step" in line:
                break
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(timeout=120) == 75, rest
    assert "stopped after a checkpoint" in rest
    done = len(trace.read_text().splitlines())
    assert 1 <= done < 8 and (tmp_path / "ended" / "checkpoints" / f"step-{done:09d}" / "commit.json").exists()
    assert run(words).returncode == 0
    assert [line["step"] for line in lines(tmp_path, "ended")] == list(range(1, 9))


def test_a_mistake_is_told_once_by_one_rank(tmp_path: Path) -> None:
    done = run(command(tmp_path, 2, "wrong", ep_size=3))
    assert done.returncode != 0 and done.stderr.count("topology error: ep_size = 3") == 1
