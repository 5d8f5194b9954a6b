"""Devices that a run can be reckoned with, whether this machine has them or not."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from most_ray.errors import ConfigError, nearest
from most_ray.train.flops import listed_peak, measured_peak

# What torch reports as their memory, about, in GiB; rates are those of `listed_peak`. The first one that begins with a name counts.
_GPUS = {
    "H100 SXM": 79,
    "H100 PCIe": 79,
    "H100 NVL": 93,
    "H200": 139,
    "H200 NVL": 139,
    "B200": 178,
    "A100 80GB": 79,
    "A100 40GB": 39,
    "L40S": 44,
    "L4": 22,
    "A10": 22,
    "V100 32GB": 31,
    "V100 16GB": 15,
    "T4": 14,
    "RTX 4090": 23,
    "RTX 3090": 23,
    "MI250X": 63,
    "MI300X": 191,
}
# Of the peak: with communication between 8 or more GPUs; of small models on a CPU, as jobs/configs/digits.yaml.
_SHARE_GPU, _SHARE_CPU = 0.35, 0.1


@dataclass(frozen=True)
class Device:
    """half, full: peak operations a second in the type of the autocast and in float32; share: what of them is taken to be reached;
    memory: bytes that a rank has, None where not known."""

    name: str
    is_gpu: bool
    half: float
    full: float
    share: float
    memory: int | None


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
        return Device(f"this machine's CPU, {threads} thread{'s' if threads > 1 else ''}", False, half, full, _SHARE_CPU, memory)
    if not asked and torch.cuda.is_available():
        name, total = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
        peaks = [listed_peak(name, each, tf32=False) for each in (dtype, None)]
        half, full = (
            peak or measured_peak(torch.device("cuda", 0), each or torch.float32, threads)
            for peak, each in zip(peaks, (dtype, None), strict=True)
        )
        return Device(name, True, half, full, _SHARE_GPU, total)
    wanted = asked or "H100 SXM"
    found = next((name for name in _GPUS if name.lower().startswith(wanted.lower())), None)
    if found is None:
        raise ConfigError("dry_run", asked, "is no device that is known.", nearest(asked, [*_GPUS, "cpu"]))
    rates = [listed_peak(found, each, tf32=False) for each in (dtype, None)]
    assert rates[0] is not None and rates[1] is not None, "every device here is in the table of peaks"
    return Device(found, True, rates[0], rates[1], _SHARE_GPU, _GPUS[found] << 30)
