"""A training run from its configuration to its summary: everything is checked, then Ray Train's workers carry it out."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.train
import torch
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from rich.console import Console

from most_ray.config import RunConfig, write_yaml
from most_ray.errors import ConfigError, UserError
from most_ray.evaluation.evaluate import evaluate_model, write_result
from most_ray.service.cluster import start_ray
from most_ray.service.journal import read_journal
from most_ray.service.prepare import Prepared, prepare_run
from most_ray.service.telemetry import ProgressWatcher, redacted
from most_ray.service.worker import claim_run, run_summary, train_worker
from most_ray.train import checkpoint
from most_ray.train.export import export_checkpoint

logger = logging.getLogger(__name__)


class RunIncompleteError(UserError):
    """The workers ended short of the goal."""

    kind = "training failed"


def run_training(config: RunConfig, console: Console) -> dict[str, Any]:
    """Train, export, evaluate. The same name goes on where it stopped; a complete run is left as it is. Returns the summary.

    Raises:
        UserError: what the user can mend, or a run that ended short of its goal.
    """
    prepared = prepare_run(config)
    job, run_dir = prepared.job, Path(prepared.job.run_dir)
    summary = run_summary(run_dir / "summary.json")
    last = checkpoint.step_dir(run_dir / "checkpoints", job.total_steps)
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
    write_yaml(redacted(config), run_dir / "config.yaml")
    describe(prepared, console)
    started = time.monotonic()
    if prepared.done_steps < job.total_steps:
        _fit(prepared, console)
    if not (last / checkpoint.COMMIT).exists():
        raise RunIncompleteError("step", job.total_steps, "was not reached: no checkpoint of the last step was completed.")
    trained = time.monotonic() - started
    export_checkpoint(last, run_dir / "export")
    summary = finish_run(prepared, trained, last)
    write_result(summary, run_dir / "summary.json")
    return summary


def describe(prepared: Prepared, console: Console) -> None:
    job = prepared.job
    records = ", ".join(f"{len(store)} {store.task} ({store.name})" for store in prepared.plan.stores)
    console.print(
        f"Run {job.run_dir}: {job.total_steps} steps of {job.plan.global_batch_size} records; {records}", highlight=False, soft_wrap=True
    )
    if prepared.n_rejected:
        console.print(f"{prepared.n_rejected} records were set aside: {job.run_dir}/rejected.jsonl", highlight=False, soft_wrap=True)
    cursor = prepared.plan.cursor(prepared.done_steps)
    consumed = prepared.plan.consumed(prepared.done_steps)
    verb = "Resuming" if prepared.done_steps else "Starting"
    console.print(
        f"{verb} after step {prepared.done_steps}, epoch {cursor.epoch:.3f}, records trained on {consumed}, "
        + (f"exact: no, changed since: {', '.join(prepared.accepted)}" if prepared.accepted else "exact: yes"),
        highlight=False,
        soft_wrap=True,
    )


def _fit(prepared: Prepared, console: Console) -> None:
    config = prepared.job.config
    job = replace(prepared.job, driver=claim_run(Path(prepared.job.run_dir)))
    n_workers = job.topology.world_size
    start_ray(config, n_workers, prepared.use_gpu)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=job,
        scaling_config=ray.train.ScalingConfig(
            num_workers=n_workers,
            use_gpu=prepared.use_gpu,
            resources_per_worker={"CPU": 1.0, **({"GPU": 1.0} if prepared.use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name="ray", storage_path=job.run_dir, failure_config=ray.train.FailureConfig(max_failures=config.max_failures)
        ),
    )
    with ProgressWatcher(Path(job.run_dir) / "metrics.jsonl", job.total_steps, prepared.done_steps, console):
        for losses_left in range(config.max_failures, -1, -1):
            try:
                trainer.fit()
                return
            except TrainingFailedError as error:
                raise _user_error(error) from error
            except ray.exceptions.RayError as error:
                # The controller of the workers itself was lost (out of memory, its node gone): the next one goes on from the last
                # checkpoint, like the same command would.
                reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
                if losses_left == 0:
                    raise RunIncompleteError("workers", None, f"were lost for good: {reason}") from error
                console.print(f"The workers were lost ({reason}); going on from the last checkpoint.", highlight=False, soft_wrap=True)


def _user_error(error: BaseException) -> UserError:
    """The worker's own error where a user can mend it; else a short account of what failed, with the rank's last lines."""
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {}) or {}
    for rank, failure in sorted(failures.items()):
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, UserError):
                return cause
            cause = getattr(cause, "cause", None) or cause.__cause__
        logger.error("rank %d: %s", rank, failure)
    return RunIncompleteError("workers", None, f"failed for good: {str(error).strip().splitlines()[-1] if str(error).strip() else error!r}")


def _spread(items: Sequence[Any], count: int) -> Sequence[Any]:
    """About `count` of the items, evenly spaced."""
    return items[:: max(1, len(items) // count)][:count]


def finish_run(prepared: Prepared, seconds: float, last: Path) -> dict[str, Any]:
    """Evaluate the export on every validation set; the summary."""
    job, run_dir = prepared.job, Path(prepared.job.run_dir)
    lines = read_journal(run_dir / "metrics.jsonl")
    summary: dict[str, Any] = {
        "name": job.config.name,
        "step": job.total_steps,
        "wer": {},
        "loss": lines[-1]["loss"] if lines else None,
        "records": prepared.plan.consumed(job.total_steps),
        "rejected": prepared.n_rejected,
        "training_seconds": round(seconds, 1),
        "tokens_per_second": round(sorted(line["tokens_per_second"] for line in lines)[len(lines) // 2]) if lines else None,
        "checkpoint": str(last),
        "export": str(run_dir / "export"),
    }
    if job.validation:
        torch.set_num_threads(os.cpu_count() or 1)
        result = evaluate_model(
            str(run_dir / "export"),
            job.validation.asr_dirs,
            job.validation.tts_dirs,
            job.validation.settings,
            job.validation.store_dir,
        )
        write_result(result, run_dir / "evaluation.json")
        summary["wer"] = result["wer"]
        summary["routing"] = result["routing"]
        summary["sets"] = {
            name: {key: value for key, value in section.items() if key != "hypotheses"} for name, section in result["sets"].items()
        }
        summary["samples"] = [
            {"set": name, **sample} for name, section in result["sets"].items() for sample in _spread(section.get("hypotheses", []), 5)
        ]
    return summary
