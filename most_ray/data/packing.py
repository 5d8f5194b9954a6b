"""Packing of records into rows of a fixed length, each record whole. Pure functions."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

PACKER_VERSION = 1  # part of a plan's fingerprint: another packing of the same records needs a new one


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit-decreasing bin packing; ties go to the lower index. Returns the indices of the records of each pack.

    Args:
        lengths: tokens of each record, in 1..capacity.
        capacity: tokens of a row.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        assert 0 < length <= capacity, "ingest rejects records that do not fit"
        fit = bisect_left(room, (length, -1))
        if fit < len(room):
            free, pack = room.pop(fit)
        else:
            free, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(index)
        insort(room, (free - length, pack))
    return packs
