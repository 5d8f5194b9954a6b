"""What a run is on each layout of its workers: what a rank holds, sends and how long it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from most_ray.config import RunConfig
from most_ray.data.batch import forward_shape
from most_ray.data.plan import Plan
from most_ray.distributed.topology import Topology
from most_ray.metrics.flops import model_flops
from most_ray.planner.cost import Speed, StepCost, Work, layouts_of, step_cost
from most_ray.planner.memory import FULL, Load, Memory, Shapes, checkpoint_files, memory_of

_INT8_MOMENT = 1 + 4 / 256  # bytes: a code, and a float32 for each block of them
ROOM = 0.9  # of a device's memory: the rest is for what is not counted


@dataclass(frozen=True)
class Step:
    """One step: lengths of its records and how much of each is supervised, int64 (records,), and its packs."""

    lengths: np.ndarray
    supervised: np.ndarray
    packs: list[list[int]]

    def by_pass(self, world_size: int, passes: int, rows: int) -> np.ndarray:
        """Tokens, attended pairs and supervised tokens of each forward pass of each rank: (passes, ranks, 3)."""
        each = np.zeros((passes * rows * world_size, 3), np.int64)
        for index, pack in enumerate(self.packs):
            lengths = self.lengths[pack]
            each[index] = lengths.sum(), (lengths * (lengths + 1)).sum() // 2, self.supervised[pack].sum()
        return each.reshape(passes, rows, world_size, 3).sum(1)


@dataclass(frozen=True)
class Choice:
    """A layout, what it costs and whether a rank has room for it."""

    topology: Topology
    cost: StepCost
    memory: Memory
    fits: bool


@dataclass(frozen=True)
class Layout:
    """The run on one number of workers. passes, rows: forward passes of a rank in a step, packed rows in each; operations: of a
    step on all ranks. The bytes are those of the rank that holds most; checkpoint_bytes, those of all ranks' files."""

    topology: Topology
    passes: int
    rows: int
    memory: Memory
    checkpoint_bytes_per_rank: int
    checkpoint_bytes: int
    operations: float
    cost: StepCost


def steps_of(plan: Plan, first: int, last: int, count: int) -> list[Step]:
    """Some steps, evenly from first to last."""
    found = []
    for k in sorted({round(number) for number in np.linspace(first, max(first, last), count)}):
        step = plan.step(k)
        lengths, prompts = np.empty(len(step.rows), np.int64), np.empty(len(step.rows), np.int64)
        for source, store in enumerate(plan.stores):
            chosen = step.sources == source
            lengths[chosen], prompts[chosen] = store.lengths[step.rows[chosen]], store.prompt_lengths[step.rows[chosen]]
        found.append(Step(lengths, lengths - prompts, step.packs))
    return found


class LayoutEstimator:
    """A run's steps on so many workers: of the same passes, whatever their layout. The largest of the steps says what a rank holds, all of
    them how long they take."""

    def __init__(self, config: RunConfig, shapes: Shapes, steps: Sequence[Step], workers: int, speed: Speed, on_gpu: bool) -> None:
        self._shapes, self._speed, self._workers, self._moments = shapes, speed, workers, config.optimizer_state
        forms = [forward_shape(len(step.packs), workers, config.train_batch_size) for step in steps]
        parts = [step.by_pass(workers, *form) for step, form in zip(steps, forms, strict=True)]
        self.passes, self.rows = max(form[0] for form in forms), max(form[1] for form in forms)
        half = bool(config.bf16 or config.fp16)
        most = max(int(part[..., 2].max()) for part in parts)
        moment = _INT8_MOMENT if config.optimizer_state == "int8" else FULL
        self._load = Load(self.rows, config.max_seq_length, most, half, on_gpu, moment)
        # All wait in every pass for the rank that has most.
        busiest = [np.take_along_axis(part, part[..., :1].argmax(1, keepdims=True), axis=1).sum((0, 1)) for part in parts]
        tokens, pairs, targets = (float(mean) for mean in np.mean(busiest, axis=0))
        passes = round(float(np.mean([form[0] for form in forms])))
        per_token = memory_of(shapes, Topology(1, 1, 1), self._load).activations / (self.rows * config.max_seq_length)
        self._work = Work(passes, tokens, pairs, targets, half, per_token * tokens, config.recomputed)
        flops = model_flops(shapes.config)
        self._operations = float(np.mean([flops.of_training(*part.sum((0, 1)).tolist()) for part in parts]))

    def layout(self, topology: Topology) -> Layout:
        per_rank, total = checkpoint_files(self._shapes, topology, self._moments)
        memory, cost = self._memory(topology), step_cost(self._shapes, topology, self._work, self._speed)
        return Layout(topology, self.passes, self.rows, memory, per_rank, total, self._operations, cost)

    def choices(self, has: int | None) -> tuple[Choice, ...]:
        """All layouts of these workers, those first that a rank's memory (bytes, None: not known) has room for, then the fastest."""
        found = []
        for topology in layouts_of(self._workers, self._shapes.config):
            memory = self._memory(topology)
            fits = has is None or memory.total(self._work.recompute) <= ROOM * has
            found.append(Choice(topology, step_cost(self._shapes, topology, self._work, self._speed), memory, fits))
        return tuple(sorted(found, key=lambda choice: (not choice.fits, choice.cost.seconds)))

    def _memory(self, topology: Topology) -> Memory:
        return memory_of(self._shapes, topology, self._load)
