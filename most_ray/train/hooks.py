"""What whoever starts the ranks provides to a training session."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from most_ray.data.batch import Batch
from most_ray.data.feed import StreamSpec, local_batches
from most_ray.trackers.base import Tracker


class Validator(Protocol):
    """Evaluations under way beside training, on rank 0."""

    def start(self, step: int, uri: str) -> None:
        """Score a committed checkpoint, while training goes on."""

    def pending(self) -> set[int]:
        """Steps whose checkpoints are still to be read."""

    def collect(self, wait_s: float) -> None:
        """Report those that have finished, or do so within `wait_s` seconds.

        Raises:
            Exception: the run's last one could not be made.
        """


ReportEvaluation = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class TrainHooks:
    """What the one who starts the ranks provides.

    batches: the stream of a rank's batches; wants_stop: whether this rank has been asked to stop behind the step that it is at;
    validator: made on rank 0, given where results go. evaluate_here: collective, scores the model at a step as the ranks hold it; a line
    for metrics.jsonl on rank 0, None elsewhere. trackers: on rank 0, get each line of metrics.
    """

    batches: Callable[[StreamSpec, int, int], Iterator[Batch]] = local_batches
    wants_stop: Callable[[], bool] = lambda: False
    validator: Callable[[ReportEvaluation], Validator] | None = None
    evaluate_here: Callable[[torch.nn.Module, int], dict[str, Any] | None] | None = None
    trackers: Sequence[Tracker] = field(default=())
