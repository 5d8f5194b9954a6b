"""Evaluations as Ray tasks: of a committed checkpoint while training goes on, and of any model by several workers."""

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
NICENESS = 10  # of tasks beside training: where cores are few, training goes first


class EvaluationFailedError(UserError):
    """The tasks of an evaluation ended without a result."""

    kind = "evaluation failed"
    exit_code = 1


def score_checkpoint(job: EvaluationJob, uri: str, rank: int, threads: int, niceness: int) -> EvalShard:
    """One share of a model's evaluation (see `open_model`), by this process."""
    os.nice(niceness)
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) - job.training_threads))
    model, tokenizer = open_model(uri)
    sets = job.sets(model.config, tokenizer, uri)
    if torch.cuda.is_available():
        model.to("cuda")
    outside = open_external_recogniser(job.settings, uri, getattr(model.config, "units_identity", None))
    return score_shard(Forward(model), tokenizer, sets, job.settings, rank, job.workers, outside)


def combine_shares(job: EvaluationJob, uri: str, *shares: EvalShard) -> Evaluation:
    config, tokenizer = open_description(uri)
    return merge_shards(shares, job.sets(config, tokenizer, uri), job.settings, config, tokenizer, uri)


def evaluate_checkpoint(job: EvaluationJob, uri: str) -> Evaluation:
    """The whole evaluation of a model folder or a checkpoint: by this process where one worker is asked for, else by Ray tasks.

    Raises:
        UserError: as `open_model` and `open_sets`.
    """
    if job.workers == 1:
        share = score_checkpoint(job, uri, 0, 0, 0)
        return combine_shares(job, uri, share)
    try:
        done: Evaluation = ray.get(_submit(job, uri, combine_shares, (job, uri), threads=_fair_threads(job), niceness=0))
    except ray.exceptions.RayError as error:
        own = _own(error)
        if isinstance(own, UserError):
            raise own from None
        raise EvaluationFailedError("workers", job.workers, f"were lost: {str(error).strip().splitlines()[-1]}", "Use fewer.") from error
    return done


def _own(error: Exception) -> Exception:
    """What a task has raised, without Ray's wrapping where a user can mend it."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, UserError) else error


def _fair_threads(job: EvaluationJob) -> int:
    return max(1, (os.cpu_count() or 1) // job.workers)


def _submit(job: EvaluationJob, uri: str, finish: Any, arguments: Sequence[Any], threads: int, niceness: int) -> ray.ObjectRef:
    """Start every share's task, and `finish` behind them, which gets the shares after its arguments."""
    # max_calls: a process of its own, which ends with the task and takes its niceness and threads along.
    options = {"num_cpus": 0.25, "max_retries": 2, "max_calls": 1}
    if job.workers == 1:
        return ray.remote(num_gpus=job.gpus, **options)(_alone).remote(job, uri, finish, arguments, threads, niceness)
    score = ray.remote(num_gpus=job.gpus, **options)(score_checkpoint)
    shares = [score.remote(job, uri, rank, threads, niceness) for rank in range(job.workers)]
    return ray.remote(**options)(finish).remote(*arguments, *shares)


def _alone(job: EvaluationJob, uri: str, finish: Any, arguments: Sequence[Any], threads: int, niceness: int) -> Any:
    """The one share and what is to come behind it, in one process: starting another takes seconds."""
    return finish(*arguments, score_checkpoint(job, uri, 0, threads, niceness))


def finish_evaluation(job: EvaluationJob, uri: str, run_uri: str, step: int, began: float, *shares: EvalShard) -> dict[str, Any]:
    """Write evaluations/step-N.json and the hypotheses; the line for metrics.jsonl."""
    return write_evaluation(combine_shares(job, uri, *shares), run_uri, step, time.time() - began)


class Validation:
    """Evaluations beside training, one after the other: each takes CPU from the data tasks. Results lie in evaluations/step-N.json, and in
    metrics.jsonl under the step that they belong to."""

    def __init__(self, job: EvaluationJob, run_uri: str, total_steps: int, report: ReportEvaluation) -> None:
        self._job, self._run_uri, self._total, self._report = job, run_uri, total_steps, report
        self._waiting: list[tuple[int, str]] = []
        self._running: tuple[int, ray.ObjectRef] | None = None
        self._warned = False

    def start(self, step: int, uri: str) -> None:
        """Score a checkpoint, which stays as long as it is `pending`."""
        self._waiting.append((step, uri))
        self._next()
        if len(self._waiting) > 1 and not self._warned:
            self._warned = True
            logger.warning("evaluations take longer than training needs for eval_steps: %d are waiting", len(self._waiting))

    def _next(self) -> None:
        if self._running is None and self._waiting:
            step, uri = self._waiting.pop(0)
            last = step == self._total  # nothing is trained beside it
            threads, niceness = (_fair_threads(self._job), 0) if last else (0, NICENESS)
            arguments = (self._job, uri, self._run_uri, step, time.time())
            self._running = (step, _submit(self._job, uri, finish_evaluation, arguments, threads, niceness))

    def pending(self) -> set[int]:
        """Steps whose checkpoints are still to be read."""
        return {step for step, _ in self._waiting} | ({self._running[0]} if self._running else set())

    def collect(self, wait_s: float) -> None:
        """Report the one that has finished, or does so within `wait_s` seconds.

        Raises:
            UserError or RayError: the run's last evaluation failed; without it the run is not what was asked for.
        """
        if self._running is None or not ray.wait([self._running[1]], timeout=wait_s)[0]:
            return
        (step, reference), self._running = self._running, None
        try:
            line = ray.get(reference)
        except (ray.exceptions.RayError, UserError) as error:
            if step == self._total:
                raise _own(error) from None
            # Training does not depend on it. The next start makes it, where the checkpoint is still there.
            reason = storage.redact(str(_own(error)).strip().splitlines()[-1])
            logger.error("evaluation of step %d failed: %s", step, reason)
            self._report({"kind": "failure", "step": step, "what": "evaluation", "reason": reason})
        else:
            logger.info("evaluation of step %d: %s", step, line["wer"])
            self._report(line)
        self._next()
