"""What a training step costs on a layout: what its ranks send each other, how long it takes, and which layout is the fastest. Pure.

The collectives are those that transformers' FSDP2 and the token exchange make, counted by shape; seconds follow from a rank's `Speed`,
measured (most_ray/planner/calibration.py) or assumed (most_ray/planner/hardware.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

from most_ray.config import Recompute
from most_ray.distributed.topology import Topology, plan_topology
from most_ray.metrics.flops import attention_flops, full_precision_flops, model_flops
from most_ray.model.configuration import MostConfig
from most_ray.planner.memory import FULL, Shapes

_TRAFFIC = 4  # what is kept is written once and read once, and so is a gradient of its size
Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all"]


@dataclass(frozen=True)
class Collective:
    """All calls of one kind in a forward and backward pass. ranks: that take part; stride: from one of them to the next; nbytes: what a
    rank sends in all of them together, and gets; hidden: it can go on beside computation."""

    kind: Kind
    ranks: int
    stride: int
    calls: int
    nbytes: float
    hidden: bool


class Links(Protocol):
    """What joins the ranks."""

    @property
    def overlap(self) -> bool:
        """Whether what can be hidden behind computation is."""

    def seconds(self, collective: Collective) -> float:
        """Of all its calls."""


@dataclass(frozen=True)
class Speed:
    """What a rank reaches. half, full: operations a second of matrix products in the type of the autocast and in float32; moved: bytes a
    second of all that is no product (infinite where `half` and `full` count it in); updated: parameters a second of the optimizer.
    sharding, sharding_update, exchange: seconds of FSDP's own work in a pass and in an update, and of the token exchange's in a pass,
    whatever is sent."""

    half: float
    full: float
    moved: float
    updated: float
    links: Links
    sharding: float = 0.0
    sharding_update: float = 0.0
    exchange: float = 0.0


@dataclass(frozen=True)
class Work:
    """A step of the busiest rank: forward passes; of all of them tokens (of which padding is none), attended pairs and supervised tokens;
    half: under autocast in a type of two bytes; kept: bytes that autograd keeps in all passes; recompute: what of the forward pass is made
    twice."""

    passes: int
    tokens: float
    pairs: float
    targets: float
    half: bool
    kept: float
    recompute: Recompute


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step: products and all else that is computed, the optimizer's, what of the communication nothing hides; and what a rank
    sends, bytes by kind."""

    compute: float
    update: float
    exposed: float
    sent: dict[str, float]

    @property
    def seconds(self) -> float:
        return self.compute + self.update + self.exposed

    @property
    def communication(self) -> float:
        """Share of the step."""
        return self.exposed / self.seconds


def distinct_ranks(shapes: Shapes, ep_size: int) -> float:
    """Expert-parallel ranks that a token's experts are on, expected for random routing: the sum over ranks of one minus the chance that
    none of the k experts out of those of the token's modality is there. Modalities count by their numbers of experts."""
    config = shapes.config
    k, share = config.num_experts_per_tok, config.n_routed_experts // ep_size
    placement = shapes.placement(ep_size)
    ranks = [set(placement[start : start + share]) for start in range(0, len(placement), share)]
    found = 0.0
    for group in shapes.groups:
        for rank in ranks:
            missed = len(group) - len(group & rank)
            found += len(group) * (1 - math.comb(missed, k) / math.comb(len(group), k))
    return found / sum(map(len, shapes.groups))


def collectives_of(shapes: Shapes, topology: Topology, work: Work) -> list[Collective]:
    """Those of a forward and backward pass of the mean size, in order of nothing.

    FSDP2 gathers each layer's weights in float32 for the forward pass and again for the backward pass, the head's once, and adds up the
    gradients of each pass; replicas add theirs up too. A layer's experts are gathered by themselves where expert-parallel ranks own them.
    The exchange takes a token to each rank of its experts once, brings back one row, and the same of the gradients.
    """
    units = shapes.units()
    fsdp, ep, replicas = topology.fsdp, topology.ep, topology.dp_replicate
    twice = {name: unit for name, unit in units.items() if name != "lm_head"}
    groups = [(fsdp, 1, [dense + (experts if ep == 1 else 0) for dense, experts in units.values()], units["lm_head"][0])]
    if ep > 1:
        groups.append((fsdp // ep, ep, [experts // ep for _, experts in twice.values() if experts], 0))
    found: list[Collective] = []
    for ranks, stride, sizes, once in groups:
        others, whole = (ranks - 1) / ranks, FULL * sum(sizes)
        calls = len(sizes) * 2 - (once > 0)
        found.append(Collective("all-gather", ranks, stride, calls, others * (2 * whole - FULL * once), hidden=True))
        found.append(Collective("reduce-scatter", ranks, stride, len(sizes), others * whole, hidden=True))
        shared = 2 * (replicas - 1) / replicas * whole / ranks
        found.append(Collective("all-reduce", replicas, fsdp, len(sizes), shared, hidden=True))
    if ep > 1:
        found.append(_exchange(shapes, ep, work))
    return [collective for collective in found if collective.ranks > 1]


def _exchange(shapes: Shapes, ep: int, work: Work) -> Collective:
    """A row there, with its experts' slots and weights, and its gradient back, with the weights' gradients, all in pieces of 16 bytes; an
    answer back and its gradient there."""
    config = shapes.config
    answer = config.hidden_size * (2 if work.half else FULL)
    row, k = _aligned(answer), config.num_experts_per_tok
    there, back = _aligned(row + 2 * FULL * k), _aligned(row + FULL * k)
    again = work.recompute == "full"  # selective leaves experts alone
    nbytes = there + back + 2 * answer + (there + answer if again else 0)
    layers = sum(experts > 0 for _, experts in shapes.units().values())
    rows = work.tokens / work.passes * distinct_ranks(shapes, ep) * (ep - 1) / ep
    # A call before the rows says how many there will be.
    return Collective("all-to-all", ep, 1, layers * (8 if again else 5), layers * rows * nbytes, hidden=False)


def _aligned(size: int) -> int:
    return -(-size // 16) * 16


def step_cost(shapes: Shapes, topology: Topology, work: Work, speed: Speed) -> StepCost:
    """Of the busiest rank, for which the others wait."""
    operations = model_flops(shapes.config).of_training(work.tokens, work.pairs, work.targets)
    in_full = 3 * full_precision_flops(shapes.config) * work.tokens if work.half else operations
    compute = (operations - in_full) / speed.half + in_full / speed.full
    if work.recompute == "full":
        compute += compute / 3
    elif work.recompute == "selective":
        per_token, per_pair = attention_flops(shapes.config)
        compute += (per_token * work.tokens + per_pair * work.pairs) / (speed.half if work.half else speed.full)
    compute += _TRAFFIC * work.kept / speed.moved
    held = shapes.held(topology, 0)
    update = held / speed.updated
    if topology.world_size == 1:
        return StepCost(compute, update, 0.0, {})
    compute += work.passes * (speed.sharding + (speed.exchange if topology.ep > 1 else 0.0))
    update += speed.sharding_update
    each = collectives_of(shapes, topology, work)
    sent: dict[str, float] = {}
    for collective in each:
        sent[collective.kind] = sent.get(collective.kind, 0.0) + work.passes * collective.nbytes
    hidden = work.passes * sum(speed.links.seconds(collective) for collective in each if collective.hidden)
    open_ = work.passes * sum(speed.links.seconds(collective) for collective in each if not collective.hidden)
    if speed.links.overlap:
        # The first unit's weights and the last one's gradients have nothing beside them.
        hidden = max(hidden - compute, hidden / len(shapes.units()))
    return StepCost(compute, update, hidden + open_, sent)


def layouts_of(world_size: int, config: MostConfig) -> list[Topology]:
    """All valid layouts of so many workers."""
    sizes = [size for size in range(1, world_size + 1) if world_size % size == 0]
    experts = config.n_routed_experts
    return [
        plan_topology(world_size, ep, replicas, experts)
        for replicas in sizes
        for ep in sizes
        if world_size // replicas % ep == 0 and experts % ep == 0
    ]
