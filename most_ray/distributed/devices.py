"""What this process's device can do: the peak rate of its matrix products, and whether bfloat16 is faster on it."""

from __future__ import annotations

import functools
import re
import time
from dataclasses import dataclass

import torch

_MEASURING_S = 0.2  # for a device whose peak no table has


@dataclass(frozen=True)
class _Peak:
    """Dense 10^12 operations a second: with float16 factors (and float32 sums), which is also that of bfloat16 unless it is `emulated`;
    with TF32; with float32."""

    half: float
    tf32: float
    full: float
    emulated: bool = False

    def rate(self, dtype: torch.dtype | None, tf32: bool) -> float:
        if dtype is None or (dtype is torch.bfloat16 and self.emulated):
            return self.tf32 if tf32 else self.full
        return self.half


# From the makers' data sheets; where those give tensor cores' figures with sparsity, half of them. The first name that is found counts.
# nvidia.com/en-us/data-center: /a100, /h100, /h200, /l40s, /l4, products/a10-gpu, /v100, /tesla-t4; HGX B200: a page's eighth.
# GeForce: whitepapers of GA102 and AD102, appendix A. AMD: amd.com/en/products/accelerators/instinct/mi200/mi250x.html (a process sees
# half a card, one of its two dies), .../mi300/mi300x.html.
_PEAKS: dict[str, _Peak] = {
    r"B200$": _Peak(2250.0, 1125.0, 75.0),
    r"H200 NVL": _Peak(835.5, 417.5, 60.0),
    r"H200": _Peak(989.4, 494.7, 66.9),
    r"H100 NVL": _Peak(835.5, 417.5, 60.0),
    r"H100 PCIe": _Peak(756.0, 378.0, 51.2),
    r"H100 80GB HBM3|H100 SXM": _Peak(989.4, 494.7, 66.9),
    r"A100": _Peak(312.0, 156.0, 19.5),
    r"L40S": _Peak(362.0, 183.0, 91.6),
    r"L4": _Peak(121.0, 60.0, 30.3),
    r"A10": _Peak(125.0, 62.5, 31.2),
    r"V100-PCIE": _Peak(112.0, 14.0, 14.0, emulated=True),
    r"V100": _Peak(125.0, 15.7, 15.7, emulated=True),
    r"T4": _Peak(65.0, 8.1, 8.1, emulated=True),
    r"RTX 4090$": _Peak(165.2, 82.6, 82.6),
    r"RTX 3090$": _Peak(71.0, 35.6, 35.6),
    r"MI250X": _Peak(191.5, 47.9, 47.9),
    r"MI300X": _Peak(1307.4, 653.7, 163.4),
}


def listed_peak(name: str, dtype: torch.dtype | None, tf32: bool) -> float | None:
    """Operations a second of a GPU by its name; None where the table does not have it (nor a slice of one, MIG)."""
    if "MIG" in name.split():
        return None
    for pattern, peak in _PEAKS.items():
        if re.search(rf"\b(?:{pattern})(?!\w)", name):
            return 1e12 * peak.rate(dtype, tf32)
    return None


def peak_flops(device: torch.device, dtype: torch.dtype | None) -> float:
    """Operations a second that this rank's device can do, in the type of the autocast (None: float32, or TF32 where torch may use it).

    From the table, or, for other GPUs and for CPUs, measured once per process: the best of several large matrix products, on a CPU with
    this rank's threads.
    """
    if device.type == "cuda":
        listed = listed_peak(torch.cuda.get_device_name(device), dtype, torch.get_float32_matmul_precision() != "highest")
        if listed is not None:
            return listed
    return measured_peak(device, dtype or torch.float32, torch.get_num_threads())


@functools.cache
def measured_peak(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """Takes a fifth of a second. `threads`: those that torch has."""
    del threads  # another number, another peak
    size = 1024 if device.type == "cpu" else 4096
    factor = torch.ones(size, size, device=device, dtype=dtype)  # not random: a run's generators stay where they are
    product = torch.empty_like(factor)
    best, started = float("inf"), time.perf_counter()
    # At least twice: the first call makes the library ready.
    for _ in range(2):
        best = min(best, _seconds_of(factor, product))
    while time.perf_counter() - started < _MEASURING_S:
        best = min(best, _seconds_of(factor, product))
    return 2 * size**3 / best


def _seconds_of(factor: torch.Tensor, product: torch.Tensor) -> float:
    if factor.is_cuda:
        torch.cuda.synchronize(factor.device)
    started = time.perf_counter()
    torch.mm(factor, factor, out=product)
    if factor.is_cuda:
        torch.cuda.synchronize(factor.device)
    return time.perf_counter() - started


def prefers_bf16(use_gpu: bool) -> bool:
    """Whether this machine's GPU, or without one its CPU, multiplies bfloat16 faster than float32. GPUs elsewhere are taken to."""
    if use_gpu:
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
