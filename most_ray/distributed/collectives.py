"""Operations that every rank calls together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist


def all_gather_or_raise(work: Callable[[], Any], group: Any = None) -> list[Any]:
    """What `work` gave on every rank of a group; an error of one is raised on all, so that none is left waiting."""
    value, error = None, None
    try:
        value = work()
    except Exception as raised:  # noqa: BLE001 - it is raised below, on every rank
        error = raised
    answers: list[tuple[Any, Exception | None]] = [(value, error)]
    if dist.is_initialized():
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (value, error), group)
        answers = gathered
    first = next((error for _, error in answers if error is not None), None)
    if first is not None:
        raise first
    return [value for value, _ in answers]
