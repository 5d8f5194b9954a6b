"""Nothing of what libraries say reaches the screen of a run: not where it is stopped, nor where a worker or Ray is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT
from tests.support.terminals import noise

_SECONDS = 240.0  # for a run to begin to train, or to end


def lines(folder: Path) -> int:
    """Lines of training."""
    metrics = folder / "r" / "metrics.jsonl"
    return metrics.read_bytes().count(b'"kind": "train"') if metrics.exists() else 0


def wait(holds: Callable[[], bool], run: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _SECONDS
    while not holds():
        assert time.monotonic() < deadline and run.returncode is None
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(0.2)


def processes(run: subprocess.Popen[bytes], named: str) -> list[psutil.Process]:
    """The run's processes of Ray of this name."""
    return [each for each in psutil.Process(run.pid).children(recursive=True) if any(named in word for word in each.cmdline()[:1])]


def lose_a_worker(run: subprocess.Popen[bytes], folder: Path) -> None:
    for worker in processes(run, "RayTrainWorker"):
        worker.kill()
    before = lines(folder)
    wait(lambda: lines(folder) > before, run)
    run.terminate()


def lose_ray(run: subprocess.Popen[bytes], folder: Path) -> None:
    for raylet in processes(run, "raylet"):
        raylet.kill()


def end_the_group(run: subprocess.Popen[bytes], folder: Path) -> None:
    os.killpg(run.pid, signal.SIGTERM)


@pytest.mark.parametrize(
    ("act", "code", "says"),
    [
        (end_the_group, 75, "SIGTERM: was received, by Ray's processes too, which have ended"),
        (lose_a_worker, 75, "The workers were lost (rank 0: "),
        (lose_ray, 1, "Ray: has ended on this machine"),
    ],
)
def test_a_run_says_in_its_own_words_what_happens(
    act: Callable[[subprocess.Popen[bytes], Path], None], code: int, says: str, tmp_path: Path
) -> None:
    """And the whole error is in the file that it names."""
    flags = {"output_dir": str(tmp_path), "name": "r", "max_steps": "100000", "val_asr_dirs": "", "val_tts_dirs": ""}
    words = [
        sys.executable,
        "-m",
        "most_ray.cli",
        "train",
        "jobs/configs/digits.yaml",
        *(x for k, v in flags.items() for x in (f"--{k}", v)),
    ]
    screen = tmp_path / "screen"
    with screen.open("wb") as sink:
        run = subprocess.Popen(words, cwd=ROOT, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True)
    wait(lambda: lines(tmp_path) > 0, run)
    act(run, tmp_path)
    assert run.wait(_SECONDS) == code, screen.read_text()
    text = screen.read_text()
    assert says in text and noise(text) == [], text
    assert max(map(len, text.splitlines())) < 400
    log = tmp_path / "r" / "libraries.log"
    assert (str(log) in text) == (act is not end_the_group) and log.stat().st_size
