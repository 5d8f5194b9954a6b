"""Ctrl-C in a terminal: once, a run stops behind a checkpoint and says which; twice, it ends now."""

from __future__ import annotations

import sys
from pathlib import Path

from most_ray.checkpoint import catalog
from tests.conftest import ROOT
from tests.support.terminals import INTERRUPT, TerminalCommand, noise

_SECONDS = 240.0  # for a run to begin to train, or to end


def train(folder: Path, *launcher: str) -> TerminalCommand:
    """Digits, in a terminal, until a step is made."""
    metrics = folder / "r" / "metrics.jsonl"
    steps = count(metrics)
    words = [
        sys.executable,
        *launcher,
        "--config",
        "jobs/configs/digits.yaml",
        "--output_dir",
        str(folder),
        "--name",
        "r",
        "--max_steps",
        "100000",
    ]
    command = TerminalCommand(words, ROOT, {"PYTHONPATH": str(ROOT)})
    command.read_until(lambda: count(metrics) > steps, _SECONDS)
    return command


def count(metrics: Path) -> int:
    """Lines of training."""
    return metrics.read_bytes().count(b'"kind": "train"') if metrics.exists() else 0


def check_stopped(command: TerminalCommand, folder: Path, code: int) -> None:
    """The command has said what it does, and stops behind a checkpoint, whose step it names; no library says a word."""
    command.press(INTERRUPT)
    assert command.end(_SECONDS) == code, command.shown[-3000:]
    (uri,) = catalog.committed(str(folder / "r" / "checkpoints"))
    text = command.shown.decode()
    assert "stopping after the current step, with a checkpoint; Ctrl-C again stops now" in text
    assert f"the checkpoint of step {catalog.step_of(uri)} was written" in text and "Run the same command again to resume." in text
    assert noise(text) == []


def test_once_is_a_stop_after_a_checkpoint_and_twice_is_the_end(tmp_path: Path) -> None:
    """Ray's processes, which are in the terminal's process group, live until the checkpoint is written."""
    check_stopped(train(tmp_path, "-m", "most_ray.cli", "train"), tmp_path, 75)
    command = train(tmp_path, "-m", "most_ray.cli", "train")
    command.press(INTERRUPT)
    command.read_until(lambda: b"Ctrl-C again stops now" in command.shown, _SECONDS)
    command.press(INTERRUPT)
    assert command.end(_SECONDS) in (75, 130)
    assert noise(command.shown.decode()) == []
