"""Which steps of a run are evaluated, and how: asynchronously, from committed checkpoints, or inline, between training steps."""

from __future__ import annotations

import time
from typing import Any

from most_ray.checkpoint import catalog
from most_ray.distributed.collectives import all_gather_or_raise
from most_ray.optim.train_state import TrainState
from most_ray.train.attempt import Attempt
from most_ray.train.hooks import TrainHooks
from most_ray.train.meter import Meter
from most_ray.train.reporter import RunReporter


class EvaluationScheduler:
    """Evaluates a run at eval_steps and at its last step, if it has validation sets."""

    def __init__(self, attempt: Attempt, reporter: RunReporter, hooks: TrainHooks, meter: Meter) -> None:
        self._attempt, self._job, self._reporter, self._meter = attempt, attempt.job, reporter, meter
        self._inline = hooks.evaluate_inline if self._job.has_validation else None
        make_evaluator = hooks.async_evaluator if attempt.rank == 0 and self._job.has_validation else None
        self._evaluator = make_evaluator(self._report) if make_evaluator else None

    def is_due(self, step: int) -> bool:
        """Return whether a step is to be evaluated."""
        every, last = self._job.config.eval_steps, self._job.total_steps
        return self._job.has_validation and (step == last or (every is not None and step % every == 0))

    def restart(self, state: TrainState) -> None:
        """Repeat the evaluations that an interruption cut off. Collective."""
        uris = catalog.committed(self._attempt.folder.checkpoints) if self._attempt.rank == 0 else []
        steps = ((catalog.step_of(uri), uri) for uri in uris)
        missing = [(n, uri) for n, uri in steps if self.is_due(n) and n <= state.step and n not in self._reporter.evaluations]
        if self._evaluator:
            for step, uri in missing:
                self._evaluator.start(step, uri)
        elif self._inline and all_gather_or_raise(lambda: any(step == state.step for step, _ in missing))[0]:
            self._evaluate(state)  # the weights of older steps are not loaded

    def at_step(self, state: TrainState) -> None:
        """Evaluate the live model, if it is due and evaluations are inline. Collective."""
        if self._inline and self.is_due(state.step):
            self._evaluate(state)

    def committed(self, step: int, uri: str) -> None:
        """Start evaluating a checkpoint, if it is due and evaluations are asynchronous. On rank 0."""
        if self._evaluator and self.is_due(step):
            self._evaluator.start(step, uri)

    def collect(self, wait_s: float) -> None:
        """Report the asynchronous evaluations that finish within `wait_s` seconds."""
        if self._evaluator:
            self._evaluator.collect(wait_s=wait_s)

    def pending(self) -> set[int]:
        """Return the steps whose asynchronous evaluations are under way."""
        return self._evaluator.pending() if self._evaluator else set()

    def _evaluate(self, state: TrainState) -> None:
        assert self._inline is not None
        began = time.perf_counter()
        if line := self._inline(state.model, state.step):
            self._report(line)
        self._meter.paused(time.perf_counter() - began)

    def _report(self, line: dict[str, Any]) -> None:
        """Report an evaluation, if this attempt still owns the run."""
        if self._attempt.owns_run():
            self._reporter.evaluation(line)
