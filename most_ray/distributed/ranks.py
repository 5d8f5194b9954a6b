"""The rank of this process and the number of ranks; without a process group, rank 0 of 1."""

from __future__ import annotations

import sys
from typing import Any


def process_groups() -> Any | None:
    """torch.distributed where this process has a default process group; None elsewhere. torch is not imported for it: a process that has
    not loaded torch has no process group."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_initialized() else None


def this_rank() -> int:
    """The rank of this process."""
    dist = process_groups()
    return int(dist.get_rank()) if dist else 0


def world_size() -> int:
    """The number of ranks."""
    dist = process_groups()
    return int(dist.get_world_size()) if dist else 1
