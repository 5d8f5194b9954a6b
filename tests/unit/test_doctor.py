"""`most-ray doctor` says all that is wrong at once, each with its remedy, and all that is right."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from most_ray.cli import main
from most_ray.config import config_from
from most_ray.service.preflight.doctor import examine_run


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_a_run_that_can_start_has_every_check_and_none_that_fails(tmp_path: Path, digits: Path) -> None:
    found = examine_run(config_from({"output_dir": str(tmp_path), "train_asr_dirs": [str(digits / "train_asr")]}))
    checks = ["cluster", "storage", "data", "limits", "room", "space", "tracking", "safety"]
    assert [finding.check for finding in found] == checks
    assert "error" not in {finding.level for finding in found}


def test_one_fault_does_not_hide_the_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Storage, data and layout are all named, with their remedies; the exit code is 2."""
    values = {"output_dir": "/proc/runs", "train_asr_dirs": ["nothing"], "num_workers": [2], "ep_size": 3}
    found = {finding.check: finding for finding in examine_run(config_from(values)) if finding.level == "error"}
    assert found.keys() == {"storage", "data", "room"}
    assert str(found["room"].error()).endswith("must divide both the workers (2) and the routed experts (8). Use one of [1, 2].")
    flags = ["--output_dir", "/proc/runs", "--train_asr_dirs", "nothing", "--num_workers", "2", "--ep_size", "3"]
    assert main(["doctor", *flags]) == 2
    assert "3 of these would end a run." in capsys.readouterr().out


def test_a_cluster_that_cannot_be_joined_is_a_finding_and_the_rest_is_still_looked_at(tmp_path: Path) -> None:
    found = {finding.check: finding for finding in examine_run(config_from({"output_dir": str(tmp_path), "ray_address": "127.0.0.1:1"}))}
    assert "nothing listens there" in found["cluster"].text
    assert found["storage"].level == "ok"
    assert not {"room", "safety"} & found.keys()  # whose answers nobody knows
    assert not ray.is_initialized()
