"""Sweeps of real runs: a driver that is killed, and population based training, whose winner can be trained again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from most_ray.sweep.ledger import Ledger, read_ledger
from tests.conftest import ROOT

SIZES = ["--max_steps", "60", "--eval_steps", "20", "--save_steps", "20", "--val_tts_dirs", ""]


def command(folder: Path, name: str, space: str, *flags: str) -> list[str]:
    file = folder / f"{name}.yaml"
    file.write_text(f"base: jobs/configs/digits.yaml\nname: {name}\noutput_dir: {folder}\nspace: {space}\n")
    return [sys.executable, "-m", "most_ray.cli", "sweep", "--config", str(file), *SIZES, "--objectives", "wer/test_takes", *flags]


def ledger_of(folder: Path, name: str) -> Ledger:
    ledger = read_ledger(str(folder / name))
    assert ledger is not None
    return ledger


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_sweep_whose_driver_is_stopped_ends_as_if_it_had_not_been(tmp_path: Path, number: signal.Signals) -> None:
    """With SIGKILL its Ray goes too. Every trial is counted once, trains each step once, and no ended trial is run again."""
    words = command(tmp_path, "stopped", "{asr_tts_mix_ratio: {grid: [0.4, 0.6, 0.7]}}", "--search", "grid", "--max_concurrent_trials", "1")
    first = subprocess.Popen(words, cwd=ROOT)
    while first.poll() is None:
        ledger = read_ledger(str(tmp_path / "stopped"))
        if ledger and 2 in ledger.trials and ledger.trials[2].results:
            break
        time.sleep(0.2)
    first.send_signal(number)
    assert first.wait(300) == (-9 if number == signal.SIGKILL else 75)
    assert subprocess.run(words, cwd=ROOT, timeout=900).returncode == 0
    ledger = ledger_of(tmp_path, "stopped")
    assert [(trial.number, trial.state, trial.runs) for trial in ledger.trials.values()] == [(n, "finished", [f"00{n}"]) for n in (1, 2, 3)]
    lines = [json.loads(line) for line in (tmp_path / "stopped" / "trials.jsonl").read_text().splitlines()]
    assert Counter(line["trial"] for line in lines if line["kind"] == "end") == {1: 1, 2: 1, 3: 1}
    for trial in ledger.trials.values():
        written = (tmp_path / "stopped" / "trials" / trial.runs[0] / "metrics.jsonl").read_text().splitlines()
        kinds = [(line["kind"], line["step"]) for line in map(json.loads, written)]
        assert [step for kind, step in kinds if kind == "train"] == list(range(1, 61))
        assert sum(kind == "start" for kind, _ in kinds) == (2 if trial.number == 2 else 1)


def test_population_based_training_and_its_winner_trained_again(tmp_path: Path) -> None:
    """A trial that took up another's checkpoint goes on at that step with the changed settings; best.yaml gives its word error rate."""
    space = "{learning_rate: {loguniform: [1.0e-4, 1.0e-2]}, asr_tts_mix_ratio: {uniform: [0.3, 0.8]}}"
    words = command(tmp_path, "pbt", space, "--scheduler", "pbt", "--max_trials", "4")
    assert subprocess.run(words, cwd=ROOT, timeout=1800).returncode == 0
    ledger = ledger_of(tmp_path, "pbt")
    assert {trial.state for trial in ledger.trials.values()} == {"finished"}
    replaced = [trial for trial in ledger.trials.values() if len(trial.runs) > 1]
    assert replaced
    for trial in replaced:
        parent, run = trial.parents[-1], tmp_path / "pbt" / "trials" / trial.runs[-1]
        start = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
        assert parent and (start["kind"], start["step"]) == ("start", parent["step"])
    best = json.loads((tmp_path / "pbt" / "summary.json").read_text())["best"]
    again = [sys.executable, "-m", "most_ray.cli", "train", "--config", str(tmp_path / "pbt" / "best.yaml")]
    assert subprocess.run(again, cwd=ROOT, timeout=600).returncode == 0
    alone = json.loads((tmp_path / f"pbt-best-{best['run']}" / "summary.json").read_text())
    assert alone["wer"]["test_takes"] == best["metrics"]["wer/test_takes"]
