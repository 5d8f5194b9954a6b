"""How workers are laid out: replicas x shards x expert-parallel groups. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from most_ray.errors import TopologyError


@dataclass(frozen=True)
class Topology:
    """`dp_replicate * fsdp` workers each see their own rows; within `fsdp`, groups of `ep` workers own distinct experts."""

    dp_replicate: int
    fsdp: int
    ep: int

    @property
    def world_size(self) -> int:
        return self.dp_replicate * self.fsdp


def plan_topology(world_size: int, ep_size: int, dp_replicate_size: int, n_experts: int) -> Topology:
    """The layout of `world_size` workers.

    Raises:
        TopologyError: the sizes do not fit; lists those that do.
    """
    replicas = [size for size in range(1, world_size + 1) if world_size % size == 0]
    if dp_replicate_size not in replicas:
        raise TopologyError(
            "dp_replicate_size",
            dp_replicate_size,
            f"must divide the number of workers ({world_size}).",
            f"Use one of {replicas}.",
        )
    fsdp = world_size // dp_replicate_size
    fitting = [size for size in range(1, fsdp + 1) if fsdp % size == 0 and n_experts % size == 0]
    if ep_size not in fitting:
        each = f" / dp_replicate_size {dp_replicate_size}" if dp_replicate_size > 1 else ""
        raise TopologyError(
            "ep_size",
            ep_size,
            f"must divide both the workers ({world_size}{each}) and the routed experts ({n_experts}).",
            f"Use one of {fitting}.",
        )
    return Topology(dp_replicate_size, fsdp, ep_size)


def plan_topologies(fewest: int, most: int, ep_size: int, dp_replicate_size: int, n_experts: int) -> tuple[Topology, ...]:
    """The layout for each number of workers from `fewest` to `most`, ascending. At `most` it is the one that is asked for; at smaller
    sizes the nearest to it: as many replicas as divide both, then the largest expert-parallel size that fits and is not larger.

    Raises:
        TopologyError: what is asked for does not fit `most`.
    """
    asked = plan_topology(most, ep_size, dp_replicate_size, n_experts)
    smaller = []
    for size in range(fewest, most):
        replicas = math.gcd(size, dp_replicate_size)
        fsdp = size // replicas
        ep = max(e for e in range(1, min(ep_size, fsdp) + 1) if fsdp % e == 0 and n_experts % e == 0)
        smaller.append(Topology(replicas, fsdp, ep))
    return (*smaller, asked)
