"""A run folder that version 0.1 wrote still opens: token stores, checkpoint, metrics, evaluations (tests/fixtures/README.md)."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from most_ray.checkpoint import catalog
from most_ray.checkpoint.export import export_checkpoint, open_model
from most_ray.config import RunConfig, load_config
from most_ray.data.ingest import Runner
from most_ray.io.journal import read_journal
from most_ray.report import write_report
from most_ray.runs.resolve import prepare_run
from tests.conftest import ROOT
from tests.support.runs import go

STORED = ROOT / "tests" / "fixtures" / "run-0.1"
LAST = 6


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A copy of the stored run's folder, with its records and stores beside it."""
    shutil.copytree(STORED, tmp_path / "runs")
    return tmp_path / "runs" / "stored"


def config_of(stored: Path) -> RunConfig:
    """The configuration that the run has kept, at the place of the copy; deterministic algorithms would be switched on for all tests."""
    root = stored.parent
    config = load_config(stored / "config.yaml", {"output_dir": str(root), "store_dir": str(root / "store"), "deterministic": False})
    directories = {name: value for name, value in vars(config).items() if name.endswith("_dirs")}
    moved: dict[str, Any] = {name: tuple(str(root / directory) for directory in value) for name, value in directories.items()}
    return replace(config, **moved, trace_records=f"{stored}.trace")


def no_new_parts(config: RunConfig, use_gpu: bool) -> Runner:
    def refuse(parts: object, recipe: object) -> None:
        raise AssertionError(f"token stores are made again: {parts}")

    return refuse


def losses_of(metrics: Path) -> dict[int, tuple[float, ...]]:
    names = ("loss", "asr_loss", "tts_loss", "text_loss", "grad_norm", "aux_loss", "learning_rate")
    return {line["step"]: tuple(line[name] for name in names) for line in read_journal(metrics, "train")}


def test_it_resumes_from_its_checkpoint_to_the_same_losses_on_the_same_records(stored: Path) -> None:
    expected, trace = losses_of(stored / "metrics.jsonl"), Path(f"{stored}.trace").read_bytes()
    assert sorted(expected) == list(range(1, LAST + 1))
    prepared = prepare_run(config_of(stored), no_new_parts)
    assert (prepared.done_steps, prepared.job.total_steps, prepared.changed) == (3, LAST, [])
    assert go(prepared)
    found = losses_of(stored / "metrics.jsonl")
    assert {step: found[step] for step in range(1, 4)} == {step: expected[step] for step in range(1, 4)}
    assert found == {step: pytest.approx(values, rel=1e-5) for step, values in expected.items()}
    assert Path(f"{stored}.trace").read_bytes() == trace
    assert [catalog.step_of(uri) for uri in catalog.committed(str(stored / "checkpoints"))] == [3, LAST]


def test_its_checkpoint_is_whole_and_exports(stored: Path, tmp_path: Path) -> None:
    uri = catalog.step_uri(str(stored / "checkpoints"), 3)
    assert catalog.latest_valid(str(stored / "checkpoints")) == (uri, [])
    export_checkpoint(uri, tmp_path / "export")
    model, _ = open_model(str(tmp_path / "export"))
    written = load_file(Path(uri) / "rank-00000.safetensors")  # by a reader that knows nothing of checkpoints
    assert all(torch.equal(tensor, written[f"model.{name}"]) for name, tensor in model.state_dict().items())
    assert sum(parameter.numel() for parameter in model.parameters()) == 15_576


def test_its_metrics_and_evaluations_are_read_and_its_report_is_written(stored: Path, tmp_path: Path) -> None:
    kinds = [line["kind"] for line in read_journal(stored / "metrics.jsonl")]
    assert {kind: kinds.count(kind) for kind in kinds} == {"start": 1, "train": LAST, "evaluation": 2, "experts": 1}
    write_report([str(stored)], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    summary = json.loads((stored / "summary.json").read_bytes())
    assert all(name in page for name in ("stored", *summary["wer"], *(sample["id"] for sample in summary["samples"])))
