"""What a training step costs on a layout: the data that its ranks exchange, and its time. Pure functions.

The collectives are those of transformers' FSDP2 and of the token exchange, with their sizes. Seconds follow from a rank's `Speed`, which is
measured (calibration.py) or assumed (hardware.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from most_ray.config import Recompute
from most_ray.distributed.topology import Topology, plan_topology
from most_ray.metrics.flops import attention_flops, full_precision_flops, model_flops
from most_ray.model.configuration import MostConfig
from most_ray.planner.memory import FLOAT32_BYTES, ModelShapes

_TRAFFIC = 4  # times that kept activations are moved: they are written and read once, and so are gradients of their size
CollectiveKind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all"]


@dataclass(frozen=True)
class Collective:
    """All calls of one kind in a forward and backward pass."""

    kind: CollectiveKind
    ranks: int  # that take part
    stride: int  # from one of them to the next
    calls: int
    nbytes: float  # that a rank sends, and receives, in all calls together
    overlappable: bool  # can run during computation


class Links(Protocol):
    """The interconnect of the ranks."""

    overlaps: ClassVar[bool]  # whether overlappable communication runs during computation

    def seconds(self, collective: Collective) -> float:
        """Return the time of all calls of a collective."""


@dataclass(frozen=True)
class Speed:
    """What a rank reaches."""

    half_flops: float  # operations/s of matrix products in the type of the autocast
    full_flops: float  # and in float32
    bandwidth: float  # bytes/s of everything else; infinite if the rates of products include it
    update_rate: float  # parameters/s of the optimizer
    links: Links
    fsdp_s: float = 0.0  # of FSDP's own work in a pass, whatever is sent
    fsdp_update_s: float = 0.0  # and in an update
    exchange_s: float = 0.0  # of the token exchange's own work in a pass


@dataclass(frozen=True)
class StepWork:
    """What the busiest rank computes in a step, in all forward passes together."""

    passes: int
    tokens: float  # without padding
    pairs: float  # attended pairs of tokens
    targets: float  # supervised tokens
    half: bool  # under autocast in a type of two bytes
    kept: float  # bytes of activations that autograd keeps
    recompute: Recompute


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step by what they are spent on, and bytes that a rank sends."""

    compute: float  # matrix products and everything else but the update
    update: float  # the optimizer
    exposed: float  # communication that computation does not hide
    sent: dict[str, float]  # by kind of collective

    @property
    def seconds(self) -> float:
        return self.compute + self.update + self.exposed

    @property
    def communication(self) -> float:
        """Share of the step in which nothing but communication happens."""
        return self.exposed / self.seconds


def distinct_ranks(shapes: ModelShapes, ep_size: int) -> float:
    """Return how many expert-parallel ranks hold the experts of a token, expected under random routing: the sum over ranks of one minus the
    probability that none of the token's k experts, out of those of its modality, is there. Modalities are weighted by their numbers of
    experts."""
    config = shapes.config
    k, share = config.num_experts_per_tok, config.n_routed_experts // ep_size
    placement = shapes.placement(ep_size)
    ranks = [set(placement[start : start + share]) for start in range(0, len(placement), share)]
    found = (len(group) * (1 - math.comb(len(group - rank), k) / math.comb(len(group), k)) for group in shapes.groups for rank in ranks)
    return sum(found) / sum(map(len, shapes.groups))


def collectives_of(shapes: ModelShapes, topology: Topology, work: StepWork) -> list[Collective]:
    """Return the collectives of a forward and backward pass of mean size. FSDP2 gathers each layer's weights in float32 for the forward
    pass and again for the backward pass, the head's once, and reduces the gradients of each pass, over replicas too. With expert
    parallelism a layer's experts are gathered apart, over the ranks that share them. The exchange sends a token once to each rank that
    holds some of its experts, returns one row, and sends the gradients of both."""
    units = shapes.units()
    fsdp, ep, replicas = topology.fsdp, topology.ep, topology.dp_replicate
    gathered_twice = {name: unit for name, unit in units.items() if name != "lm_head"}
    groups = [(fsdp, 1, [dense + (experts if ep == 1 else 0) for dense, experts in units.values()], units["lm_head"][0])]
    if ep > 1:
        groups.append((fsdp // ep, ep, [experts // ep for _, experts in gathered_twice.values() if experts], 0))
    found: list[Collective] = []
    for ranks, stride, sizes, once in groups:
        others, total, count = (ranks - 1) / ranks, FLOAT32_BYTES * sum(sizes), len(sizes)
        gathered, reduced = others * (2 * total - FLOAT32_BYTES * once), 2 * (replicas - 1) / replicas * total / ranks
        found.append(Collective("all-gather", ranks, stride, count * 2 - (once > 0), gathered, overlappable=True))
        found.append(Collective("reduce-scatter", ranks, stride, count, others * total, overlappable=True))
        found.append(Collective("all-reduce", replicas, fsdp, count, reduced, overlappable=True))
    if ep > 1:
        found.append(_exchange(shapes, ep, work))
    return [collective for collective in found if collective.ranks > 1]


def _exchange(shapes: ModelShapes, ep: int, work: StepWork) -> Collective:
    """Return the token exchange's calls. A row goes out with the slots and weights of its experts, padded to 16 bytes, and an output row
    comes back; in the backward pass the output's gradient goes out, and the gradients of row and weights come back."""
    k, output = shapes.config.num_experts_per_tok, shapes.config.hidden_size * (2 if work.half else FLOAT32_BYTES)
    row = _aligned(output)
    dispatch, gradient = _aligned(row + 2 * FLOAT32_BYTES * k), _aligned(row + FLOAT32_BYTES * k)
    repeated = work.recompute == "full"  # selective recomputation leaves experts out
    nbytes = dispatch + gradient + 2 * output + (dispatch + output if repeated else 0)
    layers = sum(experts > 0 for _, experts in shapes.units().values())
    rows = work.tokens / work.passes * distinct_ranks(shapes, ep) * (ep - 1) / ep
    # A first call sends the number of rows.
    return Collective("all-to-all", ep, 1, layers * (8 if repeated else 5), layers * rows * nbytes, overlappable=False)


def _aligned(size: int) -> int:
    return -(-size // 16) * 16


def step_cost(shapes: ModelShapes, topology: Topology, work: StepWork, speed: Speed) -> StepCost:
    """Return the cost of a step on the busiest rank, which the others wait for."""
    operations = model_flops(shapes.config).of_training(work.tokens, work.pairs, work.targets)
    in_full = 3 * full_precision_flops(shapes.config) * work.tokens if work.half else operations
    compute = (operations - in_full) / speed.half_flops + in_full / speed.full_flops
    if work.recompute == "full":
        compute += compute / 3
    elif work.recompute == "selective":
        per_token, per_pair = attention_flops(shapes.config)
        compute += (per_token * work.tokens + per_pair * work.pairs) / (speed.half_flops if work.half else speed.full_flops)
    compute += _TRAFFIC * work.kept / speed.bandwidth
    update = shapes.parameters_on(topology, 0) / speed.update_rate
    if topology.world_size == 1:
        return StepCost(compute, update, 0.0, {})
    compute += work.passes * (speed.fsdp_s + (speed.exchange_s if topology.ep > 1 else 0.0))
    collectives = collectives_of(shapes, topology, work)
    sent: dict[str, float] = {}
    for each in collectives:
        sent[each.kind] = sent.get(each.kind, 0.0) + work.passes * each.nbytes
    overlappable = work.passes * sum(speed.links.seconds(each) for each in collectives if each.overlappable)
    exposed = work.passes * sum(speed.links.seconds(each) for each in collectives if not each.overlappable)
    if speed.links.overlaps:  # the first unit's weights and the last one's gradients have nothing to overlap with
        overlappable = max(overlappable - compute, overlappable / len(shapes.units()))
    return StepCost(compute, update + speed.fsdp_update_s, overlappable + exposed, sent)


def layouts_of(world_size: int, config: MostConfig) -> list[Topology]:
    """Return all valid layouts of `world_size` workers."""
    sizes, experts = [size for size in range(1, world_size + 1) if world_size % size == 0], config.n_routed_experts
    pairs = ((replicas, ep) for replicas in sizes for ep in sizes if world_size // replicas % ep == 0 and experts % ep == 0)
    return [plan_topology(world_size, ep, replicas, experts) for replicas, ep in pairs]
