"""The training loop. It does not know where batches come from, nor where metrics and checkpoints go."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable

import torch

from most_ray.config import RunConfig
from most_ray.data.batch import Batch
from most_ray.model.placement import experts_of_ranks
from most_ray.optim.train_state import TrainState
from most_ray.train.meter import EXPERTS_STEPS, Meter
from most_ray.train.replicas import check_replicas
from most_ray.train.reporter import RunReporter
from most_ray.train.step import StepSettings, autocast_dtype, run_step


def make_meter(state: TrainState, config: RunConfig, device: torch.device) -> Meter:
    """Make what collects a run's metrics on this rank."""
    return Meter(state.model_config, experts_of_ranks(state.model), config.load_alert, device, autocast_dtype(config))


def train(
    state: TrainState,
    batches: Iterable[Batch],
    config: RunConfig,
    total_steps: int,
    device: torch.device,
    reporter: RunReporter,
    at_step: Callable[[TrainState, bool], float],
    should_stop: Callable[[], bool] = lambda: False,
    meter: Meter | None = None,
) -> bool:
    """Train until step `total_steps`, or until any rank is requested to stop.

    Args:
        batches: of the steps after `state.step`.
        reporter: its `trained` and `log` are called on every rank, in the same order.
        at_step: called after every optimizer step, for checkpoints and evaluations, with whether training ends after it for now. Returns
            the seconds for which it held up training.
        should_stop: whether this rank was requested to stop after the current step.
        meter: one that was restored from a checkpoint, so that a line which a restart interrupted is continued; by default a new one.

    Returns:
        Whether the goal was reached.
    """
    meter, settings, iterator = meter or make_meter(state, config, device), StepSettings.of(config, device), iter(batches)
    # A run none of whose steps is made has trained nothing, however few they are.
    settings = dataclasses.replace(settings, max_skipped_steps=min(config.max_skipped_steps, total_steps))
    meter.begin()
    while state.step < total_steps:
        waiting = time.perf_counter()
        batch = next(iterator)
        waited = time.perf_counter() - waiting
        if batch.step != state.step + 1:
            raise RuntimeError(f"the data stream gave step {batch.step} where step {state.step + 1} was due")
        result = run_step(state, batch, settings, stop=should_stop())
        if config.check_replicas_steps and state.step % config.check_replicas_steps == 0:
            check_replicas(state)  # before a checkpoint is made of them
        reporter.trained(batch)
        meter.add(result, batch.n_tokens, batch.n_packs * batch.input_ids.shape[-1], waited, batch.n_records)
        last = state.step == total_steps
        if state.step % config.logging_steps == 0 or last:
            reporter.log(meter.line())
        if state.step % EXPERTS_STEPS == 0 or last:
            reporter.log(meter.experts_line())
        meter.stalled(at_step(state, result.stop or last))
        if result.stop:
            break
    return state.step >= total_steps
