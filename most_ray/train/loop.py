"""The training loop. It takes batches and a reporter; where they come from and lead to is not its business."""

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
    """What the loop tells the world. Called on every rank, in the same order."""

    def trained(self, batch: Batch) -> None:
        """One optimizer step was made on this batch."""

    def log(self, line: dict[str, Any]) -> None:
        """A line of metrics is due."""


@dataclass(frozen=True)
class LoopSettings:
    """How a rank trains; see config.RunConfig for those of the same names."""

    total_steps: int
    step: StepSettings
    logging_steps: int
    check_replicas_steps: int
    load_alert: float

    @classmethod
    def of(cls, config: RunConfig, total_steps: int, device: torch.device) -> LoopSettings:
        """Those of a configuration."""
        return cls(total_steps, StepSettings.of(config, device), config.logging_steps, config.check_replicas_steps, config.load_alert)


def make_meter(state: TrainState, settings: LoopSettings) -> Meter:
    """What collects a run's metrics on this rank."""
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
    """Train until `settings.total_steps`, or until any rank wants to stop. Returns whether the goal was reached.

    `at_step` runs after every optimizer step (checkpoints, evaluations), is told whether it is the run's last one for now, and returns
    the seconds for which it held up the training. `meter`: one that `make_meter` made, where a line goes on that a restart cut in two.
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
