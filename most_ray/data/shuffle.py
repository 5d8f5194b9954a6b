"""The endless order of one source: its rows, reshuffled in every epoch, and the number of tokens before any position, in constant time.

Shuffles are hashes of (seed, source, epoch): they have no state and are equal on every machine.
"""

from __future__ import annotations

from functools import cached_property, lru_cache

import numpy as np

from most_ray.data.hashing import mix_keys, splitmix64

_BLOCK = 256  # rows that stay together on disk, so that reads are near-sequential
_WINDOW = 256 * _BLOCK  # rows shuffled among each other; sources up to this size are shuffled as a whole
_KEPT_ROWS = 1 << 19  # rows whose running sums of tokens a source caches: 4 MB


def shuffled_rows(positions: np.ndarray, size: int, seed: int, source: int) -> np.ndarray:
    """The rows of a source at positions of its endless sequence, int64 as `positions`. Each epoch of `size` positions has each row once."""
    epochs, offsets = np.divmod(positions, size)
    rows = np.empty_like(positions)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        rows[in_epoch] = _epoch_rows(offsets[in_epoch], size, mix_keys(seed, source, int(epoch)))
    return rows


def _epoch_rows(offsets: np.ndarray, size: int, key: int) -> np.ndarray:
    """The rows at offsets of an epoch: blocks of rows are shuffled, then rows inside windows of blocks. Rows after the last whole block
    come last; in the end all rows are rotated by a random number, so that these differ between epochs."""
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


@lru_cache(maxsize=64)
def _permutation(key: int, n: int) -> np.ndarray:
    """A permutation of 0..n-1, int64 (n,): the order of hashed numbers, which is equal on every machine and with every numpy."""
    return np.argsort(splitmix64(np.arange(n, dtype=np.uint64) + np.uint64(key)), kind="stable")


class CountedSource:
    """An endless sequence of records of one token each, `size` in an epoch, with the methods of `ShuffledSource`."""

    longest = 1

    def __init__(self, size: int) -> None:
        self.size = self.total = size

    def tokens_before(self, j: int) -> int:
        return j

    def count_within(self, num: int, den: int = 1) -> int:
        return max(0, (num // den + 1) // 2)

    def lengths_at(self, start: int, stop: int) -> np.ndarray:
        return np.ones(stop - start, np.int64)


class ShuffledSource:
    """The endless sequence of a source's records, and T(j), the tokens of its first j.

    A window's tokens are those of its blocks, so T needs the sums of blocks (the lengths are read once per epoch in use) and running
    sums inside one window. The epochs and windows used last are cached in some MB, whatever the size of the source.

    Args:
        lengths: tokens of each record, integers (records,); may be a memory map.
        seed: of the shuffles.
        source: number of the source, part of the shuffles' seed.
    """

    def __init__(self, lengths: np.ndarray, seed: int, source: int) -> None:
        self.lengths, self.seed, self.source = np.asarray(lengths), seed, source
        self.size = len(self.lengths)
        # Offsets in the epoch where windows begin; in large sources, rows after the last whole block are a window of their own.
        whole = self.size // _BLOCK * _BLOCK if self.size > _WINDOW else self.size
        self._starts = np.unique([*range(0, whole, _WINDOW), whole, self.size])
        self._epoch = lru_cache(maxsize=16)(self._find_epoch)
        self._sums = lru_cache(maxsize=max(8, _KEPT_ROWS // min(self.size, _WINDOW)))(self._window_sums)

    @cached_property
    def total(self) -> int:
        """Tokens of one epoch."""
        total = int(self.lengths.sum(dtype=np.int64))
        if total <= 0:
            raise ValueError(f"source {self.source} has no tokens")
        return total

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest record."""
        return int(self.lengths.max())

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Rows at positions of the endless sequence, int64 as `positions`."""
        return shuffled_rows(positions, self.size, self.seed, self.source)

    def tokens_before(self, j: int) -> int:
        """T(j): tokens of the first j records."""
        epoch, offset = divmod(j, self.size)
        if offset == 0:
            return epoch * self.total
        _, before = self._epoch(epoch)
        window = int(self._starts.searchsorted(offset, "right")) - 1
        inside = self._sums(epoch, window)[offset - int(self._starts[window])]
        return epoch * self.total + int(before[window]) + int(inside)

    def count_within(self, num: int, den: int = 1) -> int:
        """The number of records i with T(i-1) + T(i) <= num / den, that is, with the middle at or before half of it. Exact."""
        limit = num // den  # the sums are integers
        if limit < 0:
            return 0
        epoch, limit = divmod(limit, 2 * self.total)
        _, before = self._epoch(epoch)
        window = int(before.searchsorted(limit // 2, "right")) - 1
        limit -= 2 * int(before[window])
        sums = self._sums(epoch, window)
        inside = int(sums.searchsorted(limit // 2, "right")) - 1
        # Records up to `inside` end at or before limit / 2 and the next one after it, so only the middle of that one is to be compared.
        inside += int(sums[inside]) + int(sums[inside + 1]) <= limit
        return epoch * self.size + int(self._starts[window]) + inside

    def lengths_at(self, start: int, stop: int) -> np.ndarray:
        """Tokens of the records at positions start..stop-1, int64 (stop - start,)."""
        parts = [np.zeros(0, np.int64)]
        while start < stop:
            epoch, offset = divmod(start, self.size)
            window = int(self._starts.searchsorted(offset, "right")) - 1
            first = offset - int(self._starts[window])
            part = np.diff(self._sums(epoch, window)[first : first + stop - start + 1])
            parts.append(part)
            start += len(part)
        return np.concatenate(parts)

    def _find_epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        """Key of an epoch's shuffles, and tokens before each of its windows and in all, int64 (windows + 1,)."""
        key = mix_keys(self.seed, self.source, epoch)
        if self.size <= _WINDOW:
            return key, np.array([0, self.total])
        blocks = _permutation(key, self.size // _BLOCK)
        sums = self._block_sums(key % self.size)[blocks]
        windows = np.add.reduceat(sums, np.arange(0, len(blocks), _WINDOW // _BLOCK))
        before = np.concatenate([[0], np.cumsum(windows)])
        return key, before if len(before) == len(self._starts) else np.append(before, self.total)

    def _block_sums(self, rotation: int) -> np.ndarray:
        """Tokens of each whole block of the rows rotated to begin at row `rotation`, int64 (size // _BLOCK,)."""
        n = self.size // _BLOCK
        ahead = min(n, (self.size - rotation) // _BLOCK)  # blocks before the one, if any, that wraps around the end
        sums = np.empty(n, np.int64)
        sums[:ahead] = self._sums_from(rotation, ahead)
        if ahead < n:
            stop = (rotation + (ahead + 1) * _BLOCK) % self.size  # where that block stops
            sums[ahead] = self.lengths[stop + self.size - _BLOCK :].sum(dtype=np.int64) + self.lengths[:stop].sum(dtype=np.int64)
            sums[ahead + 1 :] = self._sums_from(stop, n - ahead - 1)
        return sums

    def _sums_from(self, start: int, n: int) -> np.ndarray:
        """Tokens of each of `n` blocks from row `start` on, int64 (n,)."""
        return self.lengths[start : start + n * _BLOCK].reshape(n, _BLOCK).sum(axis=1, dtype=np.int64)

    def _window_sums(self, epoch: int, window: int) -> np.ndarray:
        """Running sums of tokens inside a window in its shuffled order, from 0, int64 (rows of the window + 1,)."""
        offsets = np.arange(self._starts[window], self._starts[window + 1])
        rows = _epoch_rows(offsets, self.size, self._epoch(epoch)[0])
        sums = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(self.lengths[rows], dtype=np.int64, out=sums[1:])
        return sums
