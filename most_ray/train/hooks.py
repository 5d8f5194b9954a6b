"""What the launcher of the ranks (torchrun, or Ray Train) provides to a training session."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from most_ray.data.batch import Batch
from most_ray.data.feed import StreamSpec, local_batches
from most_ray.trackers.base import Tracker


class AsyncEvaluator(Protocol):
    """Evaluates committed checkpoints while training continues, on rank 0."""

    def start(self, step: int, uri: str) -> None:
        """Start evaluating a committed checkpoint."""

    def pending(self) -> set[int]:
        """Return the steps whose checkpoints must stay until they are evaluated."""

    def collect(self, wait_s: float) -> None:
        """Report the evaluations that finish within `wait_s` seconds. Raises the error of the evaluation of the run's last step."""


ReportEvaluation = Callable[[dict[str, Any]], None]  # takes a line for metrics.jsonl


@dataclass(frozen=True)
class TrainHooks:
    """Callbacks of a training session."""

    batches: Callable[[StreamSpec, int, int], Iterator[Batch]] = local_batches  # this rank's batches from a first to a last step
    should_stop: Callable[[], bool] = lambda: False  # whether this rank was requested to stop after the current step
    async_evaluator: Callable[[ReportEvaluation], AsyncEvaluator] | None = None  # makes rank 0's, given where results go
    # Collective: evaluates the live model at a step. Returns a line for metrics.jsonl on rank 0, None elsewhere.
    evaluate_inline: Callable[[torch.nn.Module, int], dict[str, Any] | None] | None = None
    trackers: Sequence[Tracker] = ()  # rank 0's; they get each line of metrics
