"""Evaluations as Ray tasks: of a committed checkpoint while training continues, and of any model by several workers."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import ray
import ray.exceptions
import torch

from most_ray.checkpoint.export import open_description, open_model
from most_ray.errors import UserError
from most_ray.evaluation.decode import Forward
from most_ray.evaluation.evaluate import Evaluation, merge_shards
from most_ray.evaluation.inline import EvaluationJob, open_external_recogniser, write_evaluation
from most_ray.evaluation.scoring import EvalShard, score_shard
from most_ray.io import storage
from most_ray.train.hooks import ReportEvaluation

logger = logging.getLogger(__name__)
NICENESS = 10  # of tasks beside training, so that training comes first where cores are few


class EvaluationFailedError(UserError):
    """The tasks of an evaluation ended without a result."""

    kind, exit_code = "evaluation failed", 1


def score_checkpoint(job: EvaluationJob, uri: str, rank: int, threads: int, niceness: int) -> EvalShard:
    """Score the records of worker `rank` with a model, in this process, whose niceness grows. `threads`: torch's CPU threads (0: all cores
    but those that train)."""
    os.nice(niceness)
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) - job.training_threads))
    model, tokenizer = open_model(uri)
    recogniser = open_external_recogniser(job.settings, uri, getattr(model.config, "units_identity", None))
    sets = job.sets(model.config, tokenizer, uri)
    if torch.cuda.is_available():
        model.to("cuda")
    return score_shard(Forward(model), tokenizer, sets, job.settings, rank, job.workers, recogniser)


def merge_workers(job: EvaluationJob, uri: str, *shards: EvalShard) -> Evaluation:
    """The evaluation of a model from the shards of all workers."""
    config, tokenizer = open_description(uri)
    return merge_shards(shards, job.sets(config, tokenizer, uri), job.settings, config, tokenizer, uri)


def evaluate_checkpoint(job: EvaluationJob, uri: str) -> Evaluation:
    """Evaluate a model folder or a checkpoint: in this process where `job` has one worker, else by Ray tasks. Raises EvaluationFailedError
    where these were lost."""
    if job.workers == 1:
        return merge_workers(job, uri, score_checkpoint(job, uri, 0, 0, 0))
    try:
        return ray.get(_start_tasks(job, uri, merge_workers, (job, uri), threads=_fair_threads(job), niceness=0))
    except ray.exceptions.RayError as error:
        cause = _unwrap(error)
        if isinstance(cause, UserError):
            raise cause from None
        raise EvaluationFailedError("workers", job.workers, f"were lost: {str(error).strip().splitlines()[-1]}", "Use fewer.") from error


def _unwrap(error: Exception) -> Exception:
    """The UserError that a task has raised, else Ray's error around it."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, UserError) else error


def _fair_threads(job: EvaluationJob) -> int:
    return max(1, (os.cpu_count() or 1) // job.workers)


def _start_tasks(job: EvaluationJob, uri: str, finish: Any, arguments: Sequence[Any], threads: int, niceness: int) -> ray.ObjectRef:
    """Start a task for each worker's shard and one that calls `finish(*arguments, *shards)`, whose result the reference is to."""
    # max_calls: each task has a process of its own, which ends with it and does not pass on its niceness and threads.
    options = {"num_cpus": 0.25, "max_retries": 2, "max_calls": 1}
    if job.workers == 1:
        return ray.remote(num_gpus=job.gpus, **options)(_score_and_finish).remote(job, uri, finish, arguments, threads, niceness)
    score = ray.remote(num_gpus=job.gpus, **options)(score_checkpoint)
    shards = [score.remote(job, uri, rank, threads, niceness) for rank in range(job.workers)]
    return ray.remote(**options)(finish).remote(*arguments, *shards)


def _score_and_finish(job: EvaluationJob, uri: str, finish: Any, arguments: Sequence[Any], threads: int, niceness: int) -> Any:
    """Both steps of an evaluation by one worker in one process: to start a second one takes seconds."""
    return finish(*arguments, score_checkpoint(job, uri, 0, threads, niceness))


def finish_evaluation(job: EvaluationJob, uri: str, run_uri: str, step: int, began: float, *shards: EvalShard) -> dict[str, Any]:
    """Write evaluations/step-N.json and the hypotheses. Returns the line for metrics.jsonl. `began`: UNIX seconds."""
    return write_evaluation(merge_workers(job, uri, *shards), run_uri, step, time.time() - began)


class EvaluationQueue:
    """Evaluations beside training, one at a time, because each takes CPUs from the data tasks. Results are stored in
    evaluations/step-N.json, and in metrics.jsonl, whose lines `report` takes, under the step of the checkpoint. Nothing trains beside the
    evaluation of step `total_steps`."""

    def __init__(self, job: EvaluationJob, run_uri: str, total_steps: int, report: ReportEvaluation) -> None:
        self._job, self._run_uri, self._total, self._report = job, run_uri, total_steps, report
        self._waiting: list[tuple[int, str]] = []  # steps and URIs of checkpoints
        self._running: tuple[int, ray.ObjectRef] | None = None
        self._warned = False

    def start(self, step: int, uri: str) -> None:
        """Queue the evaluation of a checkpoint, which must stay as long as its step is `pending`."""
        self._waiting.append((step, uri))
        self._start_next()
        if (waiting := len(self._waiting)) > 1 and not self._warned:
            self._warned = True
            logger.warning("evaluations take longer than training needs for eval_steps: %d are waiting", waiting)

    def _start_next(self) -> None:
        if self._running is None and self._waiting:
            step, uri = self._waiting.pop(0)
            threads, niceness = (_fair_threads(self._job), 0) if step == self._total else (0, NICENESS)
            arguments = (self._job, uri, self._run_uri, step, time.time())
            self._running = (step, _start_tasks(self._job, uri, finish_evaluation, arguments, threads, niceness))

    def pending(self) -> set[int]:
        """Steps whose checkpoints are still to be read."""
        return {step for step, _ in self._waiting} | ({self._running[0]} if self._running else set())

    def collect(self, wait_s: float) -> None:
        """Report the evaluation that has finished, or finishes within `wait_s` seconds, and start the next one. Raises the error of the
        last step's evaluation, without which the run is not complete."""
        if self._running is None or not ray.wait([self._running[1]], timeout=wait_s)[0]:
            return
        (step, reference), self._running = self._running, None
        try:
            line = ray.get(reference)
        except (ray.exceptions.RayError, UserError) as error:
            if step == self._total:
                raise _unwrap(error) from None
            # Training does not depend on it. The next start makes it, if the checkpoint is still there.
            reason = storage.redact(str(_unwrap(error)).strip().splitlines()[-1])
            logger.error("evaluation of step %d failed: %s", step, reason)
            self._report({"kind": "failure", "step": step, "what": "evaluation", "reason": reason})
        else:
            logger.info("evaluation of step %d: %s", step, line["wer"])
            self._report(line)
        self._start_next()
