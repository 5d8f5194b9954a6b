"""Random numbers as hashes: equal on every machine and with every numpy, and each computed without those before it."""

from __future__ import annotations

import numpy as np


def splitmix64(x: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea, Flood 2014) of each element of a uint64 array."""
    with np.errstate(over="ignore"):
        x = x * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def uniform(key: int, n: int) -> np.ndarray:
    """Numbers in [0, 1) that follow from `key`, float64 (n,)."""
    return (splitmix64(np.arange(n, dtype=np.uint64) + np.uint64(key)) >> np.uint64(11)) * 2.0**-53


def mix_keys(*numbers: int) -> int:
    """A 62-bit key that follows from several integers in their order."""
    key = 0
    for number in numbers:
        key = int(splitmix64(np.array([key ^ (number * 0x632BE59BD9B4E019 + 0x1234567) & (2**64 - 1)], dtype=np.uint64))[0])
    return key >> 2
