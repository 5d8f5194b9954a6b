"""The training loop. It does not know where batches come from, nor where metrics and checkpoints go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from most_ray.config import RunConfig
from most_ray.data.batch import Batch
from most_ray.model.placement import experts_of_ranks
from most_ray.optim.train_state import TrainState
from most_ray.train.meter import EXPERTS_STEPS, Meter
from most_ray.train.replicas import check_replicas
from most_ray.train.step import StepSettings, run_step


class Reporter(Protocol):
    """Receives what happens in the loop. Called on every rank, in the same order."""

    def trained(self, batch: Batch) -> None:
        """Note that an optimizer step was made on a batch."""

    def log(self, line: dict[str, Any]) -> None:
        """Write a line of metrics."""


@dataclass(frozen=True)
class LoopSettings:
    """How a rank trains. Fields with the name of a configuration key are described in config.RunConfig."""

    total_steps: int  # of the run
    step: StepSettings
    logging_steps: int
    check_replicas_steps: int
    load_alert: float

    @classmethod
    def of(cls, config: RunConfig, total_steps: int, device: torch.device) -> LoopSettings:
        """Return the settings of a configuration."""
        return cls(total_steps, StepSettings.of(config, device), config.logging_steps, config.check_replicas_steps, config.load_alert)


def make_meter(state: TrainState, settings: LoopSettings) -> Meter:
    """Make what collects a run's metrics on this rank."""
    ranks = experts_of_ranks(state.model)
    return Meter(state.model_config, ranks, settings.load_alert, settings.step.device, settings.step.precision.dtype)


def train(
    state: TrainState,
    batches: Iterable[Batch],
    settings: LoopSettings,
    reporter: Reporter,
    at_step: Callable[[TrainState, bool], float],
    should_stop: Callable[[], bool] = lambda: False,
    meter: Meter | None = None,
) -> bool:
    """Train until `settings.total_steps`, or until any rank is requested to stop.

    Args:
        batches: of the steps after `state.step`.
        at_step: called after every optimizer step, for checkpoints and evaluations, with whether training ends after it for now. Returns
            the seconds for which it held up training.
        should_stop: whether this rank was requested to stop after the current step.
        meter: one that was restored from a checkpoint, so that a line which a restart interrupted is continued; by default a new one.

    Returns:
        Whether the goal was reached.
    """
    meter = meter or make_meter(state, settings)
    iterator = iter(batches)
    meter.begin()
    while state.step < settings.total_steps:
        waiting = time.perf_counter()
        batch = next(iterator)
        waited = time.perf_counter() - waiting
        if batch.step != state.step + 1:
            raise RuntimeError(f"the data stream gave step {batch.step} where step {state.step + 1} was due")
        result = run_step(state, batch, settings.step, stop=should_stop())
        if settings.check_replicas_steps and state.step % settings.check_replicas_steps == 0:
            check_replicas(state)  # before a checkpoint is made of them
        reporter.trained(batch)
        meter.add(result, batch.n_tokens, batch.n_packs * batch.input_ids.shape[-1], waited, batch.n_records)
        last = state.step == settings.total_steps
        if state.step % settings.logging_steps == 0 or last:
            reporter.log(meter.line())
        if state.step % EXPERTS_STEPS == 0 or last:
            reporter.log(meter.experts_line())
        meter.stalled(at_step(state, result.stop or last))
        if result.stop:
            break
    return state.step >= settings.total_steps
