"""Promises 1, 16, 36 and 37, short form: three random kills of a run under Ray, three kills inside a save. `make chaos` makes twenty."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from most_ray.io.journal import read_journal
from tests.end_to_end.faults.harness import end_all, kills_inside_saves, random_kills
from tests.support.tracking import times_logged, wandb_rows


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    end_all()


def test_three_random_kills(tmp_path: Path, ray_cluster: str) -> None:
    seed = secrets.randbelow(1 << 30)
    followed = {"wandb_project": "tests", "wandb_mode": "offline", "eval_steps": 8, "val_asr_dirs": "jobs/data/digits/test_takes"}
    report = random_kills(tmp_path, ray_cluster, kills=3, steps=24, save_steps=4, seed=seed, **followed)
    assert report.passed and len(report.rows) == 3, (seed, report)
    scored = read_journal(tmp_path / "killed" / "metrics.jsonl", "evaluation")
    assert sorted(line["step"] for line in scored) == [8, 16, 24], (seed, report)
    # Promise 34: every metric of the run in W&B's own files, once per step.
    logged = times_logged(wandb_rows(tmp_path / "killed"))
    assert logged["train/loss"] == logged["train/tokens_per_second"] == dict.fromkeys(range(1, 25), 1), (seed, report)
    assert logged["eval/asr/test_takes/wer"] == dict.fromkeys((8, 16, 24), 1), (seed, report)
    assert all(times == 1 for steps in logged.values() for times in steps.values()), (seed, report)


def test_three_kills_inside_a_save(tmp_path: Path) -> None:
    """Every start finds an intact checkpoint behind it, and in the end nothing is missing."""
    seed = secrets.randbelow(1 << 30)
    report = kills_inside_saves(tmp_path, kills=3, save_steps=3, seed=seed)
    assert report.passed and len(report.rows) == 3, (seed, report)
