"""The rank of this process and the number of ranks; without a process group, rank 0 of 1."""

from __future__ import annotations

import torch.distributed as dist


def this_rank() -> int:
    """The rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1
