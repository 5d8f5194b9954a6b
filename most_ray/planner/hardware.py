"""Devices that a run can be reckoned with, whether this machine has them or not, and what joins them.

Bandwidths are the makers', in one direction; the shares of them that programs reach are assumed, here, in one place.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import torch

from most_ray.distributed.devices import listed_peak, measured_peak
from most_ray.errors import ConfigError, nearest
from most_ray.planner.cost import Collective, Speed

NODE = 8  # GPUs of a machine


@dataclass(frozen=True)
class _Card:
    """memory: what torch reports, about, in GiB. In GB a second: moved, of its memory; within, to another card of the machine, one
    direction; between, a card's share of the machine's network."""

    memory: int
    moved: float
    within: float
    between: float


# Rates of products are those of `listed_peak`. A whole name counts before the first one that begins with it. Memory and NVLink (half of the
# sum of both directions) are from the data sheets that flops.py names; cards without it, or with bridges of two cards only, have PCIe 3.0,
# 4.0 or 5.0 x16 (16, 32, 64). Network: 400 Gb/s a card as in NVIDIA's DGX H100 and B200 and AMD's MI300X platform, 200 in DGX A100, 100 for
# two in DGX-1 (V100), 100 for a machine of 8 cards on PCIe.
_GPUS = {
    "H100 SXM": _Card(79, 3350, 450, 50),
    "H100 PCIe": _Card(79, 2000, 64, 1.6),
    "H100 NVL": _Card(93, 3900, 64, 1.6),
    "H200": _Card(139, 4800, 450, 50),
    "H200 NVL": _Card(139, 4800, 64, 1.6),
    "B200": _Card(178, 8000, 900, 50),
    "A100 80GB": _Card(79, 2039, 300, 25),
    "A100 40GB": _Card(39, 1555, 300, 25),
    "L40S": _Card(44, 864, 32, 1.6),
    "L4": _Card(22, 300, 32, 1.6),
    "A10": _Card(22, 600, 32, 1.6),
    "V100 32GB": _Card(31, 900, 150, 6.25),
    "V100 16GB": _Card(15, 900, 150, 6.25),
    "T4": _Card(14, 320, 16, 1.6),
    "RTX 4090": _Card(23, 1008, 32, 1.6),
    "RTX 3090": _Card(23, 936, 32, 1.6),
    "MI250X": _Card(63, 1638, 50, 25),
    "MI300X": _Card(191, 5300, 448, 50),
}
_UNKNOWN = _Card(0, 1000, 32, 1.6)  # a GPU of this machine that the table does not have
# Assumed: products reach half of the peak at the sizes of DeepSeek-V2-Lite; streams 0.8 of a memory's bandwidth and of the links'.
SHARE_PRODUCTS, SHARE_STREAMS = 0.5, 0.8
_UPDATE_BYTES = (
    32  # of a parameter: weight, gradient and two moments are read, all but the gradient written, the norm reads gradients again
)
_CALL_S, _FAR_CALL_S = 20e-6, 60e-6  # of a collective within a machine and beyond, however small


@dataclass(frozen=True)
class GpuLinks:
    """A fast net within machines of `NODE` GPUs, a slower one between them, to which every GPU has a way of its own. Bytes a second."""

    within: float
    between: float

    @property
    def overlap(self) -> bool:
        return True

    def seconds(self, collective: Collective) -> float:
        """Rings of a collective cross between machines on as many ways as it has members in each; of an all-to-all each member's rows for
        other machines go its own way."""
        ranks, stride = collective.ranks, collective.stride
        if ranks * stride <= NODE:
            return collective.calls * _CALL_S + collective.nbytes / self.within
        here = max(1, NODE // stride)  # members in each machine
        if collective.kind == "all-to-all":
            away = (ranks - here) / (ranks - 1)
            rate = 1 / max(away / self.between, (1 - away) / self.within)
        else:
            rate = min(self.within, here * self.between)
        return collective.calls * _FAR_CALL_S + collective.nbytes / rate


@dataclass(frozen=True)
class Device:
    """half, full: peak operations a second in the type of the autocast and in float32; memory: bytes that a rank has, None where not
    known; speed: what is taken to be reached of all that, None for a CPU, where it is measured (most_ray/planner/calibration.py)."""

    name: str
    is_gpu: bool
    half: float
    full: float
    memory: int | None
    speed: Speed | None


def device_of(asked: str, use_gpu: bool, dtype: torch.dtype | None, workers: int, threads: int) -> Device:
    """The device called `asked`; where empty, this machine's GPU, an H100 SXM for a run on GPUs where this machine has none, or this
    machine's CPU, measured with so many threads for each of the workers, who share its memory.

    Raises:
        ConfigError: no such device.
    """
    if asked.lower() == "cpu" or (not asked and not use_gpu):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            half, full = (measured_peak(torch.device("cpu"), each or torch.float32, threads) for each in (dtype, None))
        finally:
            torch.set_num_threads(before)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // workers
        return Device(f"this machine's CPU, {threads} thread{'s' if threads > 1 else ''}", False, half, full, memory, None)
    if not asked and torch.cuda.is_available():
        name, total = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
        peaks = [listed_peak(name, each, tf32=False) for each in (dtype, None)]
        half, full = (
            peak or measured_peak(torch.device("cuda", 0), each or torch.float32, threads)
            for peak, each in zip(peaks, (dtype, None), strict=True)
        )
        return Device(name, True, half, full, total, _assumed(half, full, _card_of(name, total)))
    wanted = asked or "H100 SXM"
    by_name = {name.lower(): name for name in _GPUS}
    begun = (name for lower, name in by_name.items() if lower.startswith(wanted.lower()))
    found = by_name.get(wanted.lower()) or next(begun, None)
    if found is None:
        raise ConfigError("dry_run", asked, "is no device that is known.", nearest(asked, [*_GPUS, "cpu"]))
    half, full = (listed_peak(found, each, tf32=False) or 0.0 for each in (dtype, None))
    assert half and full, "every device here is in the table of peaks"
    return Device(found, True, half, full, _GPUS[found].memory << 30, _assumed(half, full, _GPUS[found]))


def _card_of(name: str, memory: int) -> _Card:
    """The listed card that a GPU with torch's name for it is most like."""
    alike = {known: card for known, card in _GPUS.items() if re.search(rf"\b{known.split()[0]}(?!\w)", name)}
    if not alike:
        return _UNKNOWN
    return alike[min(alike, key=lambda known: (any(w not in name for w in known.split()), abs((alike[known].memory << 30) - memory)))]


def _assumed(half: float, full: float, card: _Card) -> Speed:
    stream = SHARE_STREAMS * 1e9
    return Speed(
        half=SHARE_PRODUCTS * half,
        full=SHARE_PRODUCTS * full,
        moved=stream * card.moved,
        updated=stream * card.moved / _UPDATE_BYTES,
        links=GpuLinks(stream * card.within, stream * card.between),
    )
