"""Whole runs on the digits records, through Ray Train, on the tests' one cluster."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import most_ray  # noqa: F401
from most_ray.checkpoint import catalog
from most_ray.cli import main
from most_ray.config import RunConfig, load_config, to_yaml
from most_ray.data.batch import Batch
from most_ray.data.feed import StreamSpec
from most_ray.errors import CheckpointError, ConfigError, DataError
from most_ray.evaluation.hypotheses import read_hypotheses
from most_ray.io import storage
from most_ray.io.journal import read_journal
from most_ray.metrics.schema import check_line
from most_ray.service.tasks.batch_stream import stream_batches
from most_ray.service.training.attempts import RunIncompleteError
from most_ray.service.training.start import run_training
from most_ray.service.training.worker import WorkerJob
from most_ray.train.run import main as train_without_ray
from tests.conftest import ROOT
from tests.support.digits import few_digits

STEPS = 20
CONFIG = ROOT / "jobs" / "configs" / "digits.yaml"


def config_of(folder: Path, name: str, **changes: Any) -> RunConfig:
    os.chdir(ROOT)
    values = {"max_steps": STEPS, "save_steps": 8, "output_dir": str(folder), "name": name, "warmup_steps": 5, "val_tts_dirs": []}
    values["bf16"] = False  # losses are compared
    return load_config(CONFIG, {**values, "trace_records": str(folder / f"{name}.trace"), **changes})


def run(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    return run_training(config_of(folder, name, **changes), Console(quiet=True))


def losses(folder: Path, name: str) -> list[float]:
    lines = read_journal(folder / name / "metrics.jsonl", "train")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, ray_cluster: str) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict[str, Any]:
    """The uninterrupted run of one worker."""
    return run(folder, "reference")


def test_a_run_leaves_what_it_promises(folder: Path, reference: dict[str, Any]) -> None:
    run_dir = folder / "reference"
    files = "config.yaml environment.json metrics.jsonl summary.json rejected.jsonl evaluation.json hypotheses.jsonl report.html"
    for name in (*files.split(), "checkpoints", "export"):
        assert (run_dir / name).exists(), name
    summary = json.loads((run_dir / "summary.json").read_text())
    assert set(summary["wer"]) == {"test_takes", "test_speaker"} and summary["step"] == STEPS
    assert summary["sets"]["asr/test_takes"]["records"] == 200 and summary["sets"]["asr/test_speaker"]["records"] == 500
    assert [p.name for p in sorted((run_dir / "checkpoints").iterdir())] == ["step-000000016", "step-000000020"]
    assert (run_dir / "checkpoints" / "step-000000020" / "tokenizer.json").exists()
    assert load_config(run_dir / "config.yaml").max_steps == STEPS
    lines = read_journal(run_dir / "metrics.jsonl")
    assert [problem for line in lines for problem in check_line(line)] == []
    line = next(line for line in reversed(lines) if line["kind"] == "train")
    assert {
        "loss",
        "asr_loss",
        "tts_loss",
        "aux_loss",
        "learning_rate",
        "tokens_per_second",
        "mix",
        "expert_load",
        "leaked",
    } <= set(line)
    assert losses(folder, "reference")[-1] < losses(folder, "reference")[0] - 0.5


def test_no_token_leaked(reference: dict[str, Any], folder: Path) -> None:
    """Over the whole evaluation and the whole training."""
    load = reference["routing"]["expert_load"]
    assert reference["routing"]["leaked"] == 0
    assert sum(load["text"][:4]) > 0 and sum(load["audio"][4:]) > 0 and sum(load["text"][4:]) == sum(load["audio"][:4]) == 0
    assert all(line["leaked"] == 0 for line in read_journal(folder / "reference" / "metrics.jsonl", "train"))


def test_the_plan_command_writes_the_same_trace(folder: Path, reference: dict[str, Any], tmp_path: Path) -> None:
    words = ["--config", str(CONFIG), "--output_dir", str(tmp_path), "--steps", f"0:{STEPS}", "--trace", str(tmp_path / "t")]
    assert main(["plan", *words]) == 0
    assert (tmp_path / "t").read_bytes() == (folder / "reference.trace").read_bytes()


def test_a_complete_run_is_left_alone(folder: Path, reference: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "reference" / "metrics.jsonl").read_bytes()
    words = [
        "--config",
        str(CONFIG),
        "--max_steps",
        str(STEPS),
        "--output_dir",
        str(folder),
        "--name",
        "reference",
        "--save_steps",
        "8",
    ]
    assert main(["train", *words, "--warmup_steps", "5"]) == 0
    shown = capsys.readouterr().out
    assert "is complete" in shown and "Export:" in shown.replace("\n", "")
    assert (folder / "reference" / "metrics.jsonl").read_bytes() == before


def test_the_export_gives_the_runs_word_error_rate(folder: Path, reference: dict[str, Any], tmp_path: Path) -> None:
    """Promises 18, 23 and 24 of docs/promises.md: transformers loads it; `most-ray evaluate`, the run and another batch size agree."""
    export = folder / "reference" / "export"
    model = AutoModelForCausalLM.from_pretrained(export)
    assert type(model).__name__ == "MostForCausalLM"
    sets = [str(ROOT / "jobs/data/digits" / name) for name in ("test_takes", "test_speaker")]
    words = ["evaluate", "--model", str(export), "--asr_dirs", *sets, "--output", str(tmp_path / "e.json"), "--batch_size", "7"]
    assert main(words) == 0
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["wer"] == reference["wer"] and result["routing"]["leaked"] == 0
    _, of_the_run = read_hypotheses(str(folder / "reference" / "hypotheses.jsonl"))
    _, of_the_command = read_hypotheses(str(tmp_path / "e.hypotheses.jsonl"))
    assert [{**row, "loss": 0} for row in of_the_command] == [{**row, "loss": 0} for row in of_the_run]
    assert len({(row["set"], row["id"]) for row in of_the_run}) == 700
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "notes.txt").write_text("keep me")
    checkpoint = folder / "reference" / "checkpoints" / "step-000000020"
    for uri in (tmp_path / "precious", folder):
        assert main(["export", "--checkpoint", str(checkpoint), "--output", str(uri)]) == 2
    assert (tmp_path / "precious" / "notes.txt").exists() and checkpoint.exists()
    again = tmp_path / "again"
    assert main(["export", "--checkpoint", str(folder / "reference/checkpoints/step-000000020"), "--output", str(again)]) == 0
    assert (again / "model.safetensors").read_bytes() == (export / "model.safetensors").read_bytes()


def test_a_run_does_not_end_before_its_newest_checkpoint(folder: Path, reference: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="below the step of the run's newest checkpoint"):
        run(folder, "reference", max_steps=10)


def test_evaluation_during_training(folder: Path, reference: dict[str, Any]) -> None:
    """eval_steps: a committed checkpoint is scored beside training, the training is none the different; bf16 and recomputation run."""
    changes = {"val_asr_dirs": ["jobs/data/digits/test_takes"], "keep_last": 1, "keep_best": 2, "best_metric": "loss/asr/test_takes"}
    run(folder, "evaluated", eval_steps=10, **changes)
    # Saved at 8, 10, 16 and 20: the last one stays, and those that have a score.
    assert [catalog.step_of(uri) for uri in catalog.committed(str(folder / "evaluated" / "checkpoints"))] == [10, 20]
    result = json.loads((folder / "evaluated" / "evaluations" / "step-000000010.json").read_text())
    assert 0.0 <= result["wer"]["test_takes"] <= 3.0 and result["sets"]["asr/test_takes"]["records"] == 200
    assert losses(folder, "evaluated") == losses(folder, "reference")
    scored = read_journal(folder / "evaluated" / "metrics.jsonl", "evaluation")
    assert [line["step"] for line in scored] == [10, 20] and scored[0]["wer"] == result["wer"]


def test_one_number_by_every_way(folder: Path, reference: dict[str, Any], tmp_path: Path) -> None:
    """Promises 23 and 24 of docs/promises.md: WER and all other figures of metrics.jsonl at the last step, of `most-ray evaluate` on that
    checkpoint by one worker and by two, in batches of 1 and 8, and of the file scored again: equal to the last digit."""
    (line,) = read_journal(folder / "reference" / "metrics.jsonl", "evaluation")
    uri = str(folder / "reference" / "checkpoints" / f"step-{STEPS:09d}")
    sets = [str(ROOT / "jobs/data/digits" / name) for name in ("test_takes", "test_speaker")]
    for workers, batch in ((1, 8), (2, 1)):
        words = ["evaluate", "--model", uri, "--asr_dirs", *sets, "--output", str(tmp_path / "e.json"), "--batch_size", str(batch)]
        assert main([*words, "--num_workers", str(workers)]) == 0
        assert main(["evaluate", "--rescore", str(tmp_path / "e.hypotheses.jsonl"), "--output", str(tmp_path / "r.json")]) == 0
        assert (tmp_path / "r.json").read_bytes() == (tmp_path / "e.json").read_bytes()
        result = json.loads((tmp_path / "e.json").read_text())
        assert result["wer"] == line["wer"] == reference["wer"]
        for name, section in line["sets"].items():
            for figure in ("words", "characters", "empty_rate", "loop_rate", "length_cap_rate", "confusions", "records"):
                assert result["sets"][name][figure] == section[figure], (name, figure)
            assert result["sets"][name]["loss"] == pytest.approx(section["loss"], abs=1e-6)


def test_evaluation_in_between_by_two_workers_that_share_the_experts(folder: Path, reference: dict[str, Any]) -> None:
    """eval_inline: the records and losses of one worker, the error rates of an evaluation beside training; speech is scored too."""
    changes = {"val_asr_dirs": ["jobs/data/digits/test_takes"], "num_workers": 2, "ep_size": 2, "eval_steps": 10, "eval_inline": True}
    summary = run(folder, "inline", **changes)
    assert losses(folder, "inline") == pytest.approx(losses(folder, "reference"), abs=1e-4)
    assert (folder / "inline.trace").read_bytes() == (folder / "reference.trace").read_bytes()
    scored = read_journal(folder / "inline" / "metrics.jsonl", "evaluation")
    assert [line["step"] for line in scored] == [10, STEPS]
    words = reference["sets"]["asr/test_takes"]["words"]
    assert summary["sets"]["asr/test_takes"]["words"]["rate"] == pytest.approx(words["rate"], abs=0.02)
    assert summary["sets"]["asr/test_takes"]["records"] == 200


def test_evaluations_that_fail_are_told_and_made_by_the_next_start(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their records vanish during training: a line for the one on the way, exit code 2 and the reason for the last one. The same command
    makes what is missing, and trains no step again."""
    records, away = few_digits(ROOT / "jobs/data/digits/test_takes", tmp_path / "val"), tmp_path / "away"

    def losing(spec: StreamSpec, first: int, last: int) -> Iterator[Batch]:
        for batch in stream_batches(spec, first, last):
            if batch.step == 1:
                records.rename(away)
            yield batch

    changes = {"val_asr_dirs": [str(records)], "max_steps": 4, "eval_steps": 2, "warmup_steps": 1}
    with monkeypatch.context() as patch:
        patch.setattr("most_ray.service.training.attempts.WorkerJob", functools.partial(WorkerJob, stream=losing))
        with pytest.raises(DataError, match="val"):
            run(folder, "unscored", **changes)
    before = read_journal(folder / "unscored" / "metrics.jsonl", "train")
    (told,) = read_journal(folder / "unscored" / "metrics.jsonl", "failure")
    assert (told["step"], told["what"]) == (2, "evaluation") and "val" in told["reason"] and check_line(told) == []
    away.rename(records)
    summary = run(folder, "unscored", **changes)
    assert read_journal(folder / "unscored" / "metrics.jsonl", "train") == before and len(before) == 4
    assert [line["step"] for line in read_journal(folder / "unscored" / "metrics.jsonl", "evaluation")] == [2, 4]
    assert summary["sets"]["asr/val"]["records"] == 40


def test_gpus_for_evaluations_that_the_cluster_has_not_are_missed_at_the_start(folder: Path, ray_cluster: str) -> None:
    with pytest.raises(ConfigError, match=r"eval_gpus = 1\.0: needs 1 GPU for evaluations beside 0 of the training workers"):
        run(folder, "without-gpus", eval_gpus=1, max_steps=3, warmup_steps=1)


def test_a_failing_worker_ends_the_run_with_its_error(folder: Path) -> None:
    """A weight file that went bad after the checks: the run ends, exit code 2 and the worker's own words, no traceback."""
    from safetensors.torch import load_file, save_file

    config = config_of(folder, "broken", max_failures=0, val_asr_dirs=[])
    from most_ray.runs.resolve import prepare_run

    prepare_run(config)
    weights = folder / "broken" / "init" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] = torch.zeros(3)
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        run_training(config, Console(quiet=True))


def test_a_rank_that_raises_ends_the_run_with_its_own_traceback(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Promise 8 of docs/promises.md: within 60 s, though the other rank waits in a collective; `max_failures` restarts before it."""
    raised = tmp_path / "raised"

    def failing(spec: StreamSpec, first: int, last: int) -> Iterator[Batch]:
        for batch in stream_batches(spec, first, last):
            if spec.rank == 1 and batch.step == 3:
                with raised.open("a") as note:
                    note.write(f"{time.time()}\n")
                raise ZeroDivisionError("rank 1 has had enough")
            yield batch

    monkeypatch.setattr("most_ray.service.training.attempts.WorkerJob", functools.partial(WorkerJob, stream=failing))
    with pytest.raises(RunIncompleteError, match=r"failed 2 times within 3600 s, the last time: rank 1: .*rank 1 has had enough") as error:
        run(folder, "raising", num_workers=2, ep_size=2, max_failures=1, val_asr_dirs=[])
    took = time.time() - float(raised.read_text().splitlines()[-1])
    assert took < 60 and error.value.exit_code == 1
    assert "in failing" in caplog.text and "ZeroDivisionError" in caplog.text
    assert len(raised.read_text().splitlines()) == 2


def test_a_run_whose_folder_is_a_bucket(ray_cluster: str, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """output_dir as a URI: checkpoints, metrics and export are stored there; another machine, without Ray, resumes from them."""
    validation = few_digits(ROOT / "jobs/data/digits/test_takes", tmp_path / "test_takes")
    changes = {"output_dir": bucket % "runs", "save_steps": 2, "val_asr_dirs": [str(validation)], "train_tts_dirs": []}
    changes |= {"asr_tts_mix_ratio": 1.0, "warmup_steps": 1}
    monkeypatch.setenv("MOST_RAY_CACHE_DIR", str(tmp_path / "one"))
    run(tmp_path, "remote", max_steps=4, **changes)
    monkeypatch.setenv("MOST_RAY_CACHE_DIR", str(tmp_path / "two"))
    (tmp_path / "remote.yaml").write_text(to_yaml(config_of(tmp_path, "remote", max_steps=6, **changes)))
    assert train_without_ray(["--config", str(tmp_path / "remote.yaml")]) == 0
    uri = bucket % "runs/remote"
    names = {entry.name for entry in storage.list_files(uri, ("",))}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "export/config.json", "init/config.json"} <= names
    assert [catalog.step_of(c) for c in catalog.committed(bucket % "runs/remote/checkpoints")] == [4, 6]
    lines = [json.loads(line) for line in storage.read_bytes(bucket % "runs/remote/metrics.jsonl").splitlines()]
    steps = {kind: [line["step"] for line in lines if line["kind"] == kind] for kind in ("start", "train", "evaluation")}
    assert steps == {"start": [0, 4], "train": [1, 2, 3, 4, 5, 6], "evaluation": [4, 6]}
    assert json.loads(storage.read_bytes(bucket % "runs/remote/summary.json"))["step"] == 6
    assert {"hypotheses.jsonl", "report.html", "environment.json", "evaluations/step-000000004.json"} <= names
