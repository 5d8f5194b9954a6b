"""Evaluations during training: a committed checkpoint is exported and scored by a Ray task while training goes on."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ray
import ray.exceptions

from most_ray.errors import UserError
from most_ray.evaluation.evaluate import EvaluationSettings, evaluate_model, write_result
from most_ray.train.export import export_checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValidationJob:
    asr_dirs: tuple[str, ...]
    tts_dirs: tuple[str, ...]
    settings: EvaluationSettings
    store_dir: str


def score_checkpoint(job: ValidationJob, model_dir: str, output: str) -> dict[str, dict[str, float]]:
    """Evaluate an exported checkpoint and write the result. Returns word error rates and losses per set."""
    result = evaluate_model(model_dir, job.asr_dirs, job.tts_dirs, job.settings, job.store_dir)
    write_result(result, Path(output))
    return {"wer": result["wer"], "loss": {name: section["loss"] for name, section in result["sets"].items()}}


class Validation:
    """Evaluations under way. Results lie in evaluations/step-N.json, under the step that they belong to."""

    def __init__(self, job: ValidationJob, run_dir: Path, report: Callable[[int, dict[str, float], dict[str, float]], None]) -> None:
        self._job, self._run_dir, self._report = job, run_dir, report
        self._running: dict[ray.ObjectRef, tuple[int, Path]] = {}

    def start(self, step: int, checkpoint: Path) -> None:
        """Take a copy of the weights out of the checkpoint now, for retention may delete it before they are read, and score it."""
        model_dir = self._run_dir / "evaluations" / f"step-{step:09d}"
        export_checkpoint(checkpoint, model_dir)
        task = ray.remote(num_cpus=0.25, max_retries=2)(score_checkpoint)
        self._running[task.remote(self._job, str(model_dir), f"{model_dir}.json")] = (step, model_dir)

    def collect(self, wait: bool) -> None:
        """Report the finished ones; with `wait`, all of them."""
        if not self._running:
            return
        done, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=None if wait else 0)
        for reference in done:
            step, model_dir = self._running.pop(reference)
            try:
                scores = ray.get(reference)
            except (ray.exceptions.RayError, UserError) as error:
                # Training does not depend on it; the weights stay in evaluations/ for most-ray evaluate.
                logger.error("evaluation of step %d failed: %s", step, str(error).strip().splitlines()[-1])
                continue
            shutil.rmtree(model_dir, ignore_errors=True)
            logger.info("evaluation of step %d: %s", step, json.dumps(scores["wer"]))
            self._report(step, scores["wer"], scores["loss"])
