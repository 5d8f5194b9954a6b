"""Promises 1, 16, 36 and 37, short form: three random kills of a run under Ray, three kills inside a save. `make chaos` makes twenty."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.faults.harness import end_all, kills_inside_saves, random_kills


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    end_all()


def test_three_random_kills(tmp_path: Path, ray_cluster: str) -> None:
    seed = secrets.randbelow(1 << 30)
    report = random_kills(tmp_path, ray_cluster, kills=3, steps=24, save_steps=4, seed=seed)
    assert report.passed and len(report.rows) == 3, (seed, report)


def test_three_kills_inside_a_save(tmp_path: Path) -> None:
    """Every start finds an intact checkpoint behind it, and in the end nothing is missing."""
    seed = secrets.randbelow(1 << 30)
    report = kills_inside_saves(tmp_path, kills=3, save_steps=3, seed=seed)
    assert report.passed and len(report.rows) == 3, (seed, report)
