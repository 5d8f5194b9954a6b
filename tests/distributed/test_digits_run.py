"""Whole runs on the digits records by the engine without Ray: any number of ranks, other runs' checkpoints, settings that may change."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from most_ray.config import RunConfig, load_config
from most_ray.errors import CheckpointError
from most_ray.io.journal import read_journal
from most_ray.io.run_folder import step_uri
from most_ray.runs.resolve import prepare_run
from tests.conftest import ROOT
from tests.support.runs import run_on_ranks

STEPS = 20
CONFIG = ROOT / "jobs" / "configs" / "digits.yaml"


def config_of(folder: Path, name: str, **changes: Any) -> RunConfig:
    os.chdir(ROOT)
    values = {"max_steps": STEPS, "save_steps": 8, "output_dir": str(folder), "name": name, "warmup_steps": 5, "bf16": False}
    values |= {"val_asr_dirs": [], "val_tts_dirs": [], "threads_per_worker": 1, "use_gpu": False}
    return load_config(CONFIG, {**values, "trace_records": str(folder / f"{name}.trace"), **changes})


def run(folder: Path, name: str, workers: int = 1, **changes: Any) -> None:
    run_on_ranks(config_of(folder, name, **changes), workers)


def losses(folder: Path, name: str) -> list[float]:
    lines = read_journal(folder / name / "metrics.jsonl", "train")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `reference`: the uninterrupted run of one rank."""
    folder = tmp_path_factory.mktemp("runs")
    run(folder, "reference")
    return folder


@pytest.mark.parametrize(("workers", "ep"), [(4, 2)])
def test_any_number_of_ranks_trains_the_same(folder: Path, workers: int, ep: int) -> None:
    """The same records in the same steps, losses to 1e-4 in float32."""
    name = f"w{workers}e{ep}"
    run(folder, name, workers, ep_size=ep)
    assert losses(folder, name) == pytest.approx(losses(folder, "reference"), abs=1e-4)
    assert (folder / f"{name}.trace").read_bytes() == (folder / "reference.trace").read_bytes()


def test_starting_from_another_runs_checkpoint(folder: Path) -> None:
    """resume_from_checkpoint continues at its step; with ignore_optimizer_state a new run begins from its weights. Relative paths work."""
    uri = os.path.relpath(step_uri(str(folder / "reference" / "checkpoints"), 16), ROOT)
    model = str(folder / "reference" / "init")
    trace = os.path.relpath(folder / "onward.trace", ROOT)
    run(folder, "onward", trace_records=trace, resume_from_checkpoint=uri, model_name_or_path=model)
    assert [line["step"] for line in read_journal(folder / "onward.trace")] == [17, 18, 19, 20]
    lines = read_journal(folder / "onward" / "metrics.jsonl", "train")
    assert [line["step"] for line in lines] == [17, 18, 19, 20]
    assert [line["loss"] for line in lines] == losses(folder, "reference")[16:]
    changes = {"resume_from_checkpoint": uri, "ignore_optimizer_state": True, "model_name_or_path": model}
    run(folder, "fresh", **changes, max_steps=2, seed=5)
    other = {**changes, "model_name_or_path": "tiny", "train_asr_dirs": ["jobs/data/digits/test_takes"], "train_tts_dirs": []}
    with pytest.raises(CheckpointError, match="another tokenizer"):
        run(folder, "stranger", **other, max_steps=2)
    assert losses(folder, "fresh")[0] < losses(folder, "reference")[0] - 0.5


def test_a_run_does_not_continue_over_other_data(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="global_batch_size"):
        run(folder, "reference", max_steps=30, global_batch_size=32)
    with pytest.raises(CheckpointError, match="noise"):
        run(folder, "reference", max_steps=30, unit_drop_prob=0.0)


def test_half_precision_and_recomputation(folder: Path) -> None:
    run(folder, "half", bf16=True, gradient_checkpointing=True, max_steps=4)
    assert losses(folder, "half") == pytest.approx(losses(folder, "reference")[:4], rel=0.02)


def test_a_run_that_continues_keeps_its_global_batch_size(folder: Path) -> None:
    """Where the size was never named, another number of workers must not change it."""
    changes = {"global_batch_size": None, "train_batch_size": 2, "gradient_accumulation_steps": 4}
    run(folder, "unnamed", max_steps=2, **changes)
    assert prepare_run(config_of(folder, "unnamed", max_steps=4, num_workers=2, **changes)).job.plan.global_batch_size == 8
    assert prepare_run(config_of(folder, "another", max_steps=4, num_workers=2, **changes)).job.plan.global_batch_size == 16
