"""Peak rates of matrix products on this process's device, and whether it multiplies bfloat16 faster than float32."""

from __future__ import annotations

import functools
import re
import time
from dataclasses import dataclass

import torch

_MEASURING_S = 0.2  # seconds that measuring the peak of a device outside the table takes


@dataclass(frozen=True)
class _Peak:
    """Peak rates of dense matrix products in 10^12 operations a second."""

    half: float  # with float16 factors and float32 sums; with bfloat16 too, unless that is emulated
    tf32: float  # with TF32 factors
    full: float  # with float32 factors
    emulated: bool = False  # whether bfloat16 is emulated by float32

    def rate(self, dtype: torch.dtype | None, tf32: bool) -> float:
        """The rate with factors of `dtype` (None: float32); `tf32`: whether TF32 may stand in for float32."""
        if dtype is None or (dtype is torch.bfloat16 and self.emulated):
            return self.tf32 if tf32 else self.full
        return self.half


# Patterns of GPUs' names and their peaks; the first pattern that matches counts. From the makers' data sheets; where those give the
# tensor cores' rates with sparsity, half of that.
# nvidia.com/en-us/data-center: /a100, /h100, /h200, /l40s, /l4, products/a10-gpu, /v100, /tesla-t4; B200: an eighth of HGX B200's page.
# GeForce: whitepapers of GA102 and AD102, appendix A. AMD: amd.com/en/products/accelerators/instinct/mi200/mi250x.html (a process sees
# one of the card's two dies), .../mi300/mi300x.html.
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
    """Peak operations a second of a GPU by its name in torch.cuda; None where the table does not have it, and for a slice of a GPU (MIG).
    `dtype` and `tf32`: see `_Peak.rate`."""
    peaks = (peak for pattern, peak in _PEAKS.items() if re.search(rf"\b(?:{pattern})(?!\w)", name))
    found = None if "MIG" in name.split() else next(peaks, None)
    return 1e12 * found.rate(dtype, tf32) if found else None


def peak_flops(device: torch.device, dtype: torch.dtype | None) -> float:
    """Peak operations a second of this rank's device, with the autocast's `dtype`; None is float32, or TF32 where torch may use it.

    From the table of GPUs; for other GPUs and for CPUs measured once per process, as the best of several large matrix products (on a CPU
    with the threads that torch uses in this process).
    """
    if device.type == "cuda":
        listed = listed_peak(torch.cuda.get_device_name(device), dtype, torch.get_float32_matmul_precision() != "highest")
        if listed is not None:
            return listed
    return measured_peak(device, dtype or torch.float32, torch.get_num_threads())


@functools.cache
def measured_peak(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """Measure the peak operations a second of a device with factors of `dtype`, which takes a fifth of a second. `threads`, that torch
    uses, is only a key of the cache, since the peak depends on it."""
    del threads
    size = 1024 if device.type == "cpu" else 4096
    factor = torch.ones(size, size, device=device, dtype=dtype)  # ones, since random numbers would change the state of the run's generators
    product = torch.empty_like(factor)
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 2 or time.perf_counter() - started < _MEASURING_S:  # at least twice: the first call initializes the library
        times.append(_seconds_of(factor, product))
    return 2 * size**3 / min(times)


def _seconds_of(factor: torch.Tensor, product: torch.Tensor) -> float:
    """Seconds that the product of `factor` (N, N) by itself takes, written to `product` (N, N)."""
    if factor.is_cuda:
        torch.cuda.synchronize(factor.device)
    started = time.perf_counter()
    torch.mm(factor, factor, out=product)
    if factor.is_cuda:
        torch.cuda.synchronize(factor.device)
    return time.perf_counter() - started


def prefers_bf16(use_gpu: bool) -> bool:
    """Whether the device multiplies bfloat16 faster than float32: this machine's GPU if `use_gpu` (where it has none, the GPUs of other
    machines are assumed to be faster), else its CPU."""
    if use_gpu:
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
