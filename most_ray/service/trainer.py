"""A training run from its configuration to its summary: everything is checked, then Ray Train's workers carry it out."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from most_ray import storage
from most_ray.config import RunConfig, to_yaml
from most_ray.errors import ConfigError
from most_ray.evaluation.evaluate import EvaluationSettings, evaluate_model, write_result
from most_ray.service.attempts import RunIncompleteError, run_attempts
from most_ray.service.cluster import start_ray
from most_ray.service.control import Terminated
from most_ray.service.ingest import runner_of
from most_ray.service.telemetry import ProgressWatcher
from most_ray.service.validation import ValidationJob
from most_ray.train import checkpoint
from most_ray.train.export import export_checkpoint
from most_ray.train.journal import read_journal
from most_ray.train.prepare import Prepared, prepare_run, store_dir_of


def run_training(config: RunConfig, console: Console) -> dict[str, Any]:
    """Train, export, evaluate. The same name goes on where it stopped; a complete run is left as it is. Returns the summary.

    Raises:
        UserError: what the user can mend, a run that was asked to stop, or one that ended short of its goal.
    """
    with Terminated().on_sigterm() as terminated:
        return _run(config, console, terminated)


def _run(config: RunConfig, console: Console, terminated: Terminated) -> dict[str, Any]:
    prepared = prepare_run(config, runner_of)
    job, folder = prepared.job, prepared.folder
    last = checkpoint.step_place(folder.checkpoints, job.total_steps)
    for place, reason in prepared.torn:
        console.print(f"Checkpoint {storage.redact(place)} is damaged and is passed over: {reason}.", highlight=False, soft_wrap=True)
    folder.pull("summary.json")
    summary = _read_summary(folder.local / "summary.json")
    if summary and summary.get("step") == job.total_steps and prepared.done_steps >= job.total_steps:
        console.print(f"The run {config.name!r} is complete ({job.total_steps} steps); nothing to do.", highlight=False, soft_wrap=True)
        return summary
    if prepared.done_steps > job.total_steps:
        raise ConfigError(
            "max_steps",
            job.total_steps,
            f"lies behind the run's newest checkpoint (step {prepared.done_steps}).",
            "Raise it or rename the run.",
        )
    storage.write_bytes(folder.at("config.yaml"), to_yaml(config.redacted()).encode())
    describe(prepared, console)
    started = time.monotonic()
    validation = _validation_job(prepared)
    if prepared.done_steps < job.total_steps:
        start_ray(config, prepared.topologies[0].world_size, prepared.topologies[-1].world_size, prepared.use_gpu)
        terminated.install()
        with ProgressWatcher(folder.local / "metrics.jsonl", job.total_steps, prepared.done_steps, console):
            run_attempts(prepared, validation, console, terminated)
    if last not in checkpoint.committed(folder.checkpoints):
        raise RunIncompleteError(
            "step", job.total_steps, "was not reached: no checkpoint of the last step was completed.", "Start it again."
        )
    trained = time.monotonic() - started
    export_checkpoint(last, folder.local / "export")
    folder.push_folder("export", "config.json")
    summary = finish_run(prepared, validation, trained, last)
    write_result(summary, folder.local / "summary.json")
    folder.push("evaluation.json", "summary.json")
    return summary


def _read_summary(path: Path) -> dict[str, Any] | None:
    """summary.json of a finished run."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return loaded if isinstance(loaded, dict) else None


def _validation_job(prepared: Prepared) -> ValidationJob | None:
    config = prepared.job.config
    if not prepared.job.has_validation:
        return None
    settings = EvaluationSettings(config.eval_batch_size, config.max_new_tokens, config.max_rejected_fraction)
    asr, tts = (tuple(map(storage.absolute, dirs)) for dirs in (config.val_asr_dirs, config.val_tts_dirs))
    return ValidationJob(asr, tts, settings, store_dir_of(config))


def describe(prepared: Prepared, console: Console) -> None:
    job, place = prepared.job, storage.redact(prepared.folder.place)
    records = ", ".join(f"{len(store)} {store.task} ({store.name})" for store in prepared.plan.stores)
    console.print(
        f"Run {place}: {job.total_steps} steps of {job.plan.global_batch_size} records; {records}", highlight=False, soft_wrap=True
    )
    if prepared.n_rejected:
        console.print(f"{prepared.n_rejected} records were set aside: {place}/rejected.jsonl", highlight=False, soft_wrap=True)
    cursor = prepared.plan.cursor(prepared.done_steps)
    consumed = prepared.plan.consumed(prepared.done_steps)
    verb = "Resuming" if prepared.done_steps else "Starting"
    console.print(
        f"{verb} after step {prepared.done_steps}, epoch {cursor.epoch:.3f}, records trained on {consumed}, "
        + (f"exact: no, changed since: {', '.join(prepared.accepted)}" if prepared.accepted else "exact: yes"),
        highlight=False,
        soft_wrap=True,
    )


def _spread(items: Sequence[Any], count: int) -> Sequence[Any]:
    """About `count` of the items, evenly spaced."""
    return items[:: max(1, len(items) // count)][:count]


def finish_run(prepared: Prepared, validation: ValidationJob | None, seconds: float, last: str) -> dict[str, Any]:
    """Evaluate the export on every validation set; the summary."""
    job, folder = prepared.job, prepared.folder
    folder.pull("metrics.jsonl")
    lines = read_journal(folder.local / "metrics.jsonl")
    summary: dict[str, Any] = {
        "name": job.config.name,
        "step": job.total_steps,
        "wer": {},
        "loss": lines[-1]["loss"] if lines else None,
        "records": prepared.plan.consumed(job.total_steps),
        "rejected": prepared.n_rejected,
        "training_seconds": round(seconds, 1),
        "tokens_per_second": round(sorted(line["tokens_per_second"] for line in lines)[len(lines) // 2]) if lines else None,
        "checkpoint": storage.redact(last),
        "export": storage.redact(folder.at("export")),
    }
    if validation:
        torch.set_num_threads(os.cpu_count() or 1)
        result = evaluate_model(
            str(folder.local / "export"),
            validation.asr_dirs,
            validation.tts_dirs,
            validation.settings,
            validation.store_dir,
        )
        write_result(result, folder.local / "evaluation.json")
        summary["wer"] = result["wer"]
        summary["routing"] = result["routing"]
        summary["sets"] = {
            name: {key: value for key, value in section.items() if key != "hypotheses"} for name, section in result["sets"].items()
        }
        summary["samples"] = [
            {"set": name, **sample} for name, section in result["sets"].items() for sample in _spread(section.get("hypotheses", []), 5)
        ]
    return summary
