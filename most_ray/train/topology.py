"""How workers are laid out: replicas x shards x expert-parallel groups. Pure."""

from __future__ import annotations

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
