"""Which rank this process is, of how many; one process is rank 0 of 1."""

from __future__ import annotations

import torch.distributed as dist


def this_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
