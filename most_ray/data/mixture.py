"""The mixture: a pure function from a global index to (source, position), exact in every prefix, with seeded shuffles.

No state: where a run stands in its data is one number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from most_ray.data.hashing import mix_keys, splitmix

MAX_PERIOD = 1 << 18  # of the pattern of sources; weights that would need a longer one are rounded to multiples of 1 / MAX_PERIOD
_BLOCK = 256  # rows that stay together on disk: reads are near-sequential
_WINDOW = 256 * _BLOCK  # rows shuffled among each other; smaller sources are shuffled whole


def integer_weights(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """The smallest integers in the ratio of the weights. Where their sum would exceed MAX_PERIOD they are rounded: shares are then exact
    for the rounded weights, which differ from the given ones by less than 1 / MAX_PERIOD."""
    total = sum(weights, Fraction(0))
    shares = [weight / total for weight in weights]
    common = math.lcm(*(share.denominator for share in shares))
    if common > MAX_PERIOD:
        rounded = [max(1, round(share * MAX_PERIOD)) for share in shares]
    else:
        rounded = [int(share * common) for share in shares]
    divisor = math.gcd(*rounded)
    return tuple(number // divisor for number in rounded)


@lru_cache(maxsize=16)
def pattern_of(weights: tuple[int, ...]) -> np.ndarray:
    """One period of the order of sources, int16 (sum(weights),).

    R. Tijdeman, "The chairman assignment problem" (1980): among the sources whose turn may have come, the one with the earliest
    deadline. After any n records the count of source s differs from n * share_s by at most 1 - 1/(2k - 2) < 1 for k sources.
    """
    k, total = len(weights), sum(weights)
    if k == 1:
        return np.zeros(1, np.int16)
    # All in units of 1 / (total * (2k - 2)), so that comparisons are between integers.
    slack = total
    scale = 2 * k - 2
    counts = [0] * k
    pattern = np.empty(total, np.int16)
    for n in range(1, total + 1):
        best, best_deadline = -1, 0
        for s, weight in enumerate(weights):
            if scale * (n * weight - counts[s] * total) >= slack:
                deadline = scale * total * (counts[s] + 1) - slack
                if best < 0 or deadline * weights[best] < best_deadline * weight:
                    best, best_deadline = s, deadline
        pattern[n - 1] = best
        counts[best] += 1
    return pattern


class Mixture:
    """Where each global index leads.

    Args:
        weights: integer weights of the sources (see `integer_weights`).
        sizes: records in each source.
        seed: of the shuffles.
    """

    def __init__(self, weights: tuple[int, ...], sizes: Sequence[int], seed: int) -> None:
        self.weights, self.sizes, self.seed = weights, tuple(sizes), seed
        self._pattern = pattern_of(weights)
        one_hot = self._pattern[:, None] == np.arange(len(weights))
        self._before = np.concatenate([np.zeros((1, len(weights)), np.int64), np.cumsum(one_hot, axis=0)])

    def counts(self, n: int) -> np.ndarray:
        """Records of each source among the first n, int64 (sources,)."""
        periods, rest = divmod(n, len(self._pattern))
        return periods * np.array(self.weights) + self._before[rest]

    def locate(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources and rows of the global indices start..stop-1, two int64 arrays (stop - start,)."""
        periods, rest = np.divmod(np.arange(start, stop), len(self._pattern))
        sources = self._pattern[rest].astype(np.int64)
        positions = periods * np.array(self.weights)[sources] + self._before[rest, sources]
        rows = np.empty_like(positions)
        for source in np.unique(sources):
            chosen = sources == source
            rows[chosen] = shuffled_rows(positions[chosen], self.sizes[source], self.seed, int(source))
        return sources, rows

    def records_for_epochs(self, epochs: float) -> int:
        """The smallest n after which every source has been seen at least `epochs` times."""
        needed = [math.ceil(epochs * size) for size in self.sizes]
        total = sum(self.weights)
        n = max(need * total // weight for need, weight in zip(needed, self.weights, strict=True))
        while (self.counts(n) < needed).any():
            n += 1
        return n


def shuffled_rows(positions: np.ndarray, size: int, seed: int, source: int) -> np.ndarray:
    """Rows of a source at positions of its endless, per-epoch reshuffled sequence. Each epoch holds each row once."""
    epochs, offsets = np.divmod(positions, size)
    rows = np.empty_like(positions)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        rows[in_epoch] = _epoch_rows(offsets[in_epoch], size, mix_keys(seed, source, int(epoch)))
    return rows


def _epoch_rows(offsets: np.ndarray, size: int, key: int) -> np.ndarray:
    """Shuffle blocks of rows, then rows inside windows of blocks; rows behind the last whole block end the epoch, rotated."""
    if size <= _WINDOW:
        return _permutation(key, size)[offsets]
    whole = size // _BLOCK * _BLOCK
    blocks = _permutation(key, size // _BLOCK)
    rows = offsets.copy()
    windows = offsets // _WINDOW
    for window in np.unique(windows[offsets < whole]):
        chosen = (windows == window) & (offsets < whole)
        start = int(window) * _WINDOW
        inside = _permutation(mix_keys(key, int(window)), min(_WINDOW, whole - start))
        shuffled = start + inside[offsets[chosen] - start]
        rows[chosen] = blocks[shuffled // _BLOCK] * _BLOCK + shuffled % _BLOCK
    return (rows + key % size) % size


@lru_cache(maxsize=32)
def _permutation(key: int, n: int) -> np.ndarray:
    """A permutation of 0..n-1, the same on every machine and with every numpy: the order of hashed numbers."""
    return np.argsort(splitmix(np.arange(n, dtype=np.uint64) + np.uint64(key)), kind="stable")
