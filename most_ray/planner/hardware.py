"""Devices that a run can be estimated for, whether this machine has them or not, and their interconnect.

Bandwidths are the makers' figures in one direction. The shares of them that programs reach are assumptions, all of them here.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import ClassVar

import torch

from most_ray.distributed.determinism import torch_threads
from most_ray.distributed.devices import listed_peak, measured_peak
from most_ray.errors import ConfigError, nearest
from most_ray.planner.cost import Collective, Speed

GPUS_PER_NODE = 8


@dataclass(frozen=True)
class _GpuSpec:
    memory: int  # GiB, about what torch reports
    bandwidth: float  # of the memory, GB/s
    intra_node: float  # to another GPU of the machine, one direction, GB/s
    inter_node: float  # a GPU's share of the machine's network, GB/s


# Peak rates of matrix products are in `listed_peak`. A full name is matched before the first one that begins with the request. Memory and
# NVLink (half of the sum of both directions) are from the data sheets that distributed/devices.py names; cards without it, or with bridges
# between two cards only, have PCIe 3.0, 4.0 or 5.0 x16 (16, 32, 64). Network: 400 Gb/s a card as in NVIDIA's DGX H100 and B200 and AMD's
# MI300X platform, 200 in DGX A100, 100 for two in DGX-1 (V100), 100 for a machine of 8 cards on PCIe.
_GPUS = {
    "H100 SXM": _GpuSpec(79, 3350, 450, 50),
    "H100 PCIe": _GpuSpec(79, 2000, 64, 1.6),
    "H100 NVL": _GpuSpec(93, 3900, 64, 1.6),
    "H200": _GpuSpec(139, 4800, 450, 50),
    "H200 NVL": _GpuSpec(139, 4800, 64, 1.6),
    "B200": _GpuSpec(178, 8000, 900, 50),
    "A100 80GB": _GpuSpec(79, 2039, 300, 25),
    "A100 40GB": _GpuSpec(39, 1555, 300, 25),
    "L40S": _GpuSpec(44, 864, 32, 1.6),
    "L4": _GpuSpec(22, 300, 32, 1.6),
    "A10": _GpuSpec(22, 600, 32, 1.6),
    "V100 32GB": _GpuSpec(31, 900, 150, 6.25),
    "V100 16GB": _GpuSpec(15, 900, 150, 6.25),
    "T4": _GpuSpec(14, 320, 16, 1.6),
    "RTX 4090": _GpuSpec(23, 1008, 32, 1.6),
    "RTX 3090": _GpuSpec(23, 936, 32, 1.6),
    "MI250X": _GpuSpec(63, 1638, 50, 25),
    "MI300X": _GpuSpec(191, 5300, 448, 50),
}
_UNKNOWN_GPU = _GpuSpec(0, 1000, 32, 1.6)  # a GPU of this machine that the table lacks
MATMUL_EFFICIENCY = 0.5  # assumed share of the peak that matrix products reach at the sizes of DeepSeek-V2-Lite
BANDWIDTH_EFFICIENCY = 0.8  # assumed share of a memory's and of the links' bandwidth
# Of AdamW, for each parameter: reads weight, gradient and two moments, writes all but the gradient; the norm reads gradients again.
_UPDATE_BYTES = 32
_INTRA_NODE_CALL_S, _INTER_NODE_CALL_S = 20e-6, 60e-6  # latency of a collective within a machine, and across machines


@dataclass(frozen=True)
class GpuLinks:
    """A fast interconnect within machines of `GPUS_PER_NODE` GPUs, and between them a slower one with a link for each GPU; bytes/s."""

    intra_node: float
    inter_node: float
    overlaps: ClassVar = True

    def seconds(self, collective: Collective) -> float:
        """Return the time of a collective's calls. Rings cross between machines on as many links as the collective has members in each. In
        an all-to-all, each member's rows for other machines use that member's own link."""
        ranks, stride = collective.ranks, collective.stride
        if ranks * stride <= GPUS_PER_NODE:
            return collective.calls * _INTRA_NODE_CALL_S + collective.nbytes / self.intra_node
        members = max(1, GPUS_PER_NODE // stride)  # in each machine
        if collective.kind == "all-to-all":
            remote = (ranks - members) / (ranks - 1)
            rate = 1 / max(remote / self.inter_node, (1 - remote) / self.intra_node)
        else:
            rate = min(self.intra_node, members * self.inter_node)
        return collective.calls * _INTER_NODE_CALL_S + collective.nbytes / rate


@dataclass(frozen=True)
class Device:
    """What a worker runs on."""

    name: str
    is_gpu: bool
    half_flops: float  # peak operations/s in the type of the autocast
    full_flops: float  # and in float32
    memory: int | None  # bytes for each worker; None if unknown
    speed: Speed | None  # assumed to be reached; None for a CPU, which is measured (planner/calibration.py)


def device_of(requested: str, use_gpu: bool, dtype: torch.dtype | None, workers: int, threads: int) -> Device:
    """Return the device that a run is estimated for. Raises ConfigError if there is no such device.

    Args:
        requested: its name or the beginning of it, or `cpu`. If empty: this machine's GPU; an H100 SXM for a run on GPUs if this machine
            has none; or this machine's CPU.
        dtype: of the autocast; None for float32.
        workers: their number; they share a CPU's memory.
        threads: of each worker.
    """
    if requested.lower() == "cpu" or (not requested and not use_gpu):
        with torch_threads(threads):
            half, full = (measured_peak(torch.device("cpu"), each or torch.float32, threads) for each in (dtype, None))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // workers
        return Device(f"this machine's CPU, {threads} thread{'s' if threads > 1 else ''}", False, half, full, memory, None)
    if not requested and torch.cuda.is_available():
        name, total = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
        gpu = torch.device("cuda", 0)
        half, full = (listed_peak(name, each, tf32=False) or measured_peak(gpu, each or torch.float32, threads) for each in (dtype, None))
        return Device(name, True, half, full, total, _assumed_speed(half, full, _closest_spec(name, total)))
    wanted = requested or "H100 SXM"
    matches = [name for name in _GPUS if name.lower().startswith(wanted.lower())]
    if not matches:
        raise ConfigError("dry_run", requested, "is not a known device.", nearest(requested, [*_GPUS, "cpu"]))
    found = min(matches, key=lambda name: name.lower() != wanted.lower())  # the full name, else the first
    half, full = (listed_peak(found, each, tf32=False) or 0.0 for each in (dtype, None))
    assert half and full, "every device here is in the table of peaks"
    return Device(found, True, half, full, _GPUS[found].memory << 30, _assumed_speed(half, full, _GPUS[found]))


def _closest_spec(name: str, memory: int) -> _GpuSpec:
    """Return the listed GPU that is closest to one by torch's name for it and its memory in bytes."""
    similar = {known: spec for known, spec in _GPUS.items() if re.search(rf"\b{known.split()[0]}(?!\w)", name)}
    if not similar:
        return _UNKNOWN_GPU
    return similar[min(similar, key=lambda known: (any(w not in name for w in known.split()), abs((similar[known].memory << 30) - memory)))]


def _assumed_speed(half: float, full: float, spec: _GpuSpec) -> Speed:
    memory, intra, inter = (BANDWIDTH_EFFICIENCY * 1e9 * each for each in (spec.bandwidth, spec.intra_node, spec.inter_node))
    return Speed(MATMUL_EFFICIENCY * half, MATMUL_EFFICIENCY * full, memory, memory / _UPDATE_BYTES, GpuLinks(intra, inter))
