"""A run on each layout of its workers: the memory of a rank, the data it sends, and how long a step takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from most_ray.config import RunConfig
from most_ray.data.batch import forward_shape
from most_ray.data.plan import Plan
from most_ray.distributed.topology import Topology
from most_ray.metrics.flops import model_flops
from most_ray.planner.cost import Speed, StepCost, StepWork, layouts_of, step_cost
from most_ray.planner.memory import FLOAT32_BYTES, ForwardPass, Memory, ModelShapes, checkpoint_sizes, memory_of

_INT8_MOMENT = 1 + 4 / 256  # bytes: a code, and a float32 for each block of 256
USABLE_MEMORY = 0.9  # share of a device's memory; the rest is for what is not counted


@dataclass(frozen=True)
class StepRecords:
    """The records of one step."""

    lengths: np.ndarray  # tokens of each record, int64 (records,)
    supervised: np.ndarray  # and the supervised ones among them
    packs: list[list[int]]  # indices of the records in each row

    def per_pass(self, world_size: int, passes: int, rows: int) -> np.ndarray:
        """Return tokens, attended pairs and supervised tokens of each forward pass of each rank, `(passes, ranks, 3)`."""
        each = np.zeros((passes * rows * world_size, 3), np.int64)
        for index, pack in enumerate(self.packs):
            lengths = self.lengths[pack]
            each[index] = lengths.sum(), (lengths * (lengths + 1)).sum() // 2, self.supervised[pack].sum()
        return each.reshape(passes, rows, world_size, 3).sum(1)


@dataclass(frozen=True)
class LayoutChoice:
    """A layout that a run could have."""

    topology: Topology
    cost: StepCost
    memory: Memory
    fits: bool  # in a rank's memory


@dataclass(frozen=True)
class LayoutEstimate:
    """The run on one number of workers."""

    topology: Topology
    passes: int  # forward passes of a rank in a step
    rows: int  # packed rows in each pass
    memory: Memory
    checkpoint_bytes_per_rank: int  # of the rank that holds the most
    checkpoint_bytes: int  # of all ranks
    operations: float  # of a step, on all ranks
    cost: StepCost


def steps_of(plan: Plan, first: int, last: int, count: int) -> list[StepRecords]:
    """Return the records of `count` steps, evenly spaced from `first` to `last`."""
    found = []
    for k in sorted({round(number) for number in np.linspace(first, max(first, last), count)}):
        step = plan.step(k)
        lengths, prompts = np.empty(len(step.rows), np.int64), np.empty(len(step.rows), np.int64)
        for source, store in enumerate(plan.stores):
            chosen = step.sources == source
            lengths[chosen], prompts[chosen] = store.lengths[step.rows[chosen]], store.prompt_lengths[step.rows[chosen]]
        found.append(StepRecords(lengths, lengths - prompts, step.packs))
    return found


class LayoutEstimator:
    """Estimates a run on a number of workers, each of a `speed`; the forward passes are the same on any layout of them. Of `steps`, a
    sample of the run's, the largest determines memory, all of them the time."""

    def __init__(
        self, config: RunConfig, shapes: ModelShapes, steps: Sequence[StepRecords], workers: int, speed: Speed, on_gpu: bool
    ) -> None:
        self._shapes, self._speed, self._workers, self._moments = shapes, speed, workers, config.optimizer_state
        forms = [forward_shape(len(step.packs), workers, config.train_batch_size) for step in steps]
        amounts = [step.per_pass(workers, *form) for step, form in zip(steps, forms, strict=True)]
        self.passes, self.rows = max(form[0] for form in forms), max(form[1] for form in forms)
        half = bool(config.bf16 or config.fp16)
        supervised = max(int(amount[..., 2].max()) for amount in amounts)
        moment = _INT8_MOMENT if config.optimizer_state == "int8" else FLOAT32_BYTES
        self._forward = ForwardPass(self.rows, config.max_seq_length, supervised, half, on_gpu, moment)
        # In every pass all ranks wait for the one that has the most tokens.
        busiest = [np.take_along_axis(each, each[..., :1].argmax(1, keepdims=True), axis=1).sum((0, 1)) for each in amounts]
        tokens, pairs, targets = (float(mean) for mean in np.mean(busiest, axis=0))
        passes = round(float(np.mean([form[0] for form in forms])))
        per_token = memory_of(shapes, Topology(1, 1, 1), self._forward).activations / (self.rows * config.max_seq_length)
        self._work = StepWork(passes, tokens, pairs, targets, half, per_token * tokens, config.recomputed)
        flops = model_flops(shapes.config)
        self._operations = float(np.mean([flops.of_training(*amount.sum((0, 1)).tolist()) for amount in amounts]))

    def estimate(self, topology: Topology) -> LayoutEstimate:
        """Estimate the run on a layout of the workers."""
        per_rank, total = checkpoint_sizes(self._shapes, topology, self._moments)
        memory, cost = self._memory_and_cost(topology)
        return LayoutEstimate(topology, self.passes, self.rows, memory, per_rank, total, self._operations, cost)

    def choices(self, available: int | None) -> tuple[LayoutChoice, ...]:
        """Return all layouts of the workers, those that fit `available` bytes of a rank's memory (None: unknown) first, then by speed."""
        usable, found = math.inf if available is None else USABLE_MEMORY * available, []
        for topology in layouts_of(self._workers, self._shapes.config):
            memory, cost = self._memory_and_cost(topology)
            found.append(LayoutChoice(topology, cost, memory, memory.total(self._work.recompute) <= usable))
        return tuple(sorted(found, key=lambda choice: (not choice.fits, choice.cost.seconds)))

    def _memory_and_cost(self, topology: Topology) -> tuple[Memory, StepCost]:
        return memory_of(self._shapes, topology, self._forward), step_cost(self._shapes, topology, self._work, self._speed)
