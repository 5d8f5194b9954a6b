"""Promises 1, 16, 36 and 37 of docs/promises.md, short form: a worker and the driver of a run under Ray are killed at random steps, and a
run inside a save. `make chaos` makes twenty of each."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from most_ray.io.journal import read_journal
from tests.conftest import ROOT
from tests.end_to_end.faults.harness import end_all, kills_inside_saves, random_kills
from tests.support.digits import few_digits
from tests.support.tracking import times_logged, wandb_rows


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    end_all()


def test_a_worker_and_the_driver_are_killed(tmp_path: Path, ray_cluster: str) -> None:
    seed = secrets.randbelow(1 << 30)
    validation = few_digits(ROOT / "jobs/data/digits/test_takes", tmp_path / "test_takes")
    followed = {"wandb_project": "tests", "wandb_mode": "offline", "eval_steps": 8, "val_asr_dirs": str(validation)}
    report = random_kills(tmp_path, ray_cluster, kills=2, steps=16, save_steps=4, seed=seed, **followed)
    assert report.passed and len(report.rows) == 2, (seed, report)
    scored = read_journal(tmp_path / "killed" / "metrics.jsonl", "evaluation")
    assert sorted(line["step"] for line in scored) == [8, 16], (seed, report)
    # Promise 34 of docs/promises.md: every metric of the run in W&B's own files, once per step.
    logged = times_logged(wandb_rows(tmp_path / "killed"))
    assert logged["train/loss"] == logged["train/tokens_per_second"] == dict.fromkeys(range(1, 17), 1), (seed, report)
    assert logged["eval/asr/test_takes/wer"] == dict.fromkeys((8, 16), 1), (seed, report)
    assert all(times == 1 for steps in logged.values() for times in steps.values()), (seed, report)


def test_a_kill_inside_a_save(tmp_path: Path) -> None:
    """Every start finds an intact checkpoint behind it, and in the end nothing is missing."""
    seed = secrets.randbelow(1 << 30)
    report = kills_inside_saves(tmp_path, kills=1, save_steps=3, seed=seed)
    assert report.passed and len(report.rows) == 1, (seed, report)
