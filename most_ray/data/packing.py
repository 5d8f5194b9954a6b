"""Packing: records into rows of a fixed length. Pure; never cuts a record, never splits one."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

PACKER_VERSION = 1


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of the records of each pack: best fit, longest first; ties by index. Every length must be within capacity."""
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        assert 0 < length <= capacity, "ingest rejects records that do not fit"
        place = bisect_left(room, (length, -1))
        if place < len(room):
            free, pack = room.pop(place)
        else:
            free, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(index)
        insort(room, (free - length, pack))
    return packs
