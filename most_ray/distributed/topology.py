"""The layout of workers: replicas x shards x expert-parallel groups. Pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from most_ray.errors import TopologyError


@dataclass(frozen=True)
class Topology:
    """The sizes of a layout of `dp_replicate * fsdp` workers, each of which trains on rows of its own."""

    dp_replicate: int  # replicas of the model
    fsdp: int  # workers that a replica's parameters are sharded over
    ep: int  # workers in each expert-parallel group, a divisor of `fsdp`; the members of a group hold different experts

    @property
    def world_size(self) -> int:
        """The number of workers."""
        return self.dp_replicate * self.fsdp


def plan_topology(world_size: int, ep_size: int, dp_replicate_size: int, n_experts: int) -> Topology:
    """The layout of `world_size` workers in `dp_replicate_size` replicas and expert-parallel groups of `ep_size`.

    Raises:
        TopologyError: the sizes do not fit; the remedy lists those that do.
    """
    replicas = [size for size in range(1, world_size + 1) if world_size % size == 0]
    if dp_replicate_size not in replicas:
        rule = f"must divide the number of workers ({world_size})."
        raise TopologyError("dp_replicate_size", dp_replicate_size, rule, f"Use one of {replicas}.")
    fsdp = world_size // dp_replicate_size
    fitting = [size for size in range(1, fsdp + 1) if fsdp % size == 0 and n_experts % size == 0]
    if ep_size not in fitting:
        each = f" / dp_replicate_size {dp_replicate_size}" if dp_replicate_size > 1 else ""
        rule = f"must divide both the workers ({world_size}{each}) and the routed experts ({n_experts})."
        raise TopologyError("ep_size", ep_size, rule, f"Use one of {fitting}.")
    return Topology(dp_replicate_size, fsdp, ep_size)


def plan_topologies(fewest: int, most: int, ep_size: int, dp_replicate_size: int, n_experts: int) -> tuple[Topology, ...]:
    """The layout for each number of workers from `fewest` to `most`, ascending.

    For `most` workers it has the requested sizes, for fewer the nearest to them: the greatest common divisor of the number of workers and
    `dp_replicate_size` as replicas, then the largest expert-parallel size up to `ep_size` that fits. TopologyError: see `plan_topology`.
    """
    requested = plan_topology(most, ep_size, dp_replicate_size, n_experts)
    smaller = []
    for size in range(fewest, most):
        replicas = math.gcd(size, dp_replicate_size)
        fsdp = size // replicas
        ep = max(e for e in range(1, min(ep_size, fsdp) + 1) if fsdp % e == 0 and n_experts % e == 0)
        smaller.append(Topology(replicas, fsdp, ep))
    return (*smaller, requested)
