"""Evaluations during training: a committed checkpoint is exported and scored by a Ray task while training goes on."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass

import ray
import ray.exceptions

from most_ray.errors import UserError
from most_ray.evaluation.evaluate import EvaluationSettings, evaluate_model, write_result
from most_ray.train.export import export_checkpoint
from most_ray.train.folder import RunFolder
from most_ray.train.session import ReportEvaluation

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValidationJob:
    asr_dirs: tuple[str, ...]
    tts_dirs: tuple[str, ...]
    settings: EvaluationSettings
    store_dir: str


def score_checkpoint(job: ValidationJob, place: str, run_place: str, step: int) -> dict[str, dict[str, float]]:
    """Export a checkpoint, evaluate it and write evaluations/step-N.json. Returns word error rates and losses per set."""
    folder = RunFolder(run_place)
    name = f"evaluations/step-{step:09d}"
    model_dir = folder.local / name
    export_checkpoint(place, model_dir)
    result = evaluate_model(str(model_dir), job.asr_dirs, job.tts_dirs, job.settings, job.store_dir)
    write_result(result, model_dir.with_name(f"{model_dir.name}.json"))
    folder.push(f"{name}.json")
    shutil.rmtree(model_dir, ignore_errors=True)
    return {"wer": result["wer"], "loss": {name: section["loss"] for name, section in result["sets"].items()}}


class Validation:
    """Evaluations, one after the other: each takes CPU from the data tasks. Results lie in evaluations/step-N.json, under the step that
    they belong to."""

    def __init__(self, job: ValidationJob, run_place: str, report: ReportEvaluation) -> None:
        self._job, self._run_place, self._report = job, run_place, report
        self._waiting: list[tuple[int, str]] = []
        self._running: tuple[int, ray.ObjectRef] | None = None

    def start(self, step: int, place: str) -> None:
        """Score a checkpoint, which stays as long as it is `pending`."""
        self._waiting.append((step, place))
        self._next()

    def _next(self) -> None:
        if self._running is None and self._waiting:
            step, place = self._waiting.pop(0)
            task = ray.remote(num_cpus=0.25, max_retries=2)(score_checkpoint)
            self._running = (step, task.remote(self._job, place, self._run_place, step))

    def pending(self) -> set[int]:
        """Steps whose checkpoints are still to be read."""
        return {step for step, _ in self._waiting} | ({self._running[0]} if self._running else set())

    def collect(self, wait_s: float) -> None:
        """Report the one that has finished, or does so within `wait_s` seconds."""
        if self._running is None or not ray.wait([self._running[1]], timeout=wait_s)[0]:
            return
        (step, reference), self._running = self._running, None
        try:
            scores = ray.get(reference)
        except (ray.exceptions.RayError, UserError) as error:
            # Training does not depend on it, and the same command scores the checkpoint again where that is still there.
            logger.error("evaluation of step %d failed: %s", step, str(error).strip().splitlines()[-1])
        else:
            logger.info("evaluation of step %d: %s", step, json.dumps(scores["wer"]))
            self._report(step, scores["wer"], scores["loss"])
        self._next()
