"""Long curves thinned to what a screen can show, without losing what stands out."""

from __future__ import annotations

import numpy as np


def extremes(x: np.ndarray, y: np.ndarray, columns: int) -> np.ndarray:
    """Indices, ascending, of what a picture of `columns` columns shows of a curve.

    Args:
        x: `(n,)`, ascending.
        y: `(n,)`, NaN where there is no value.

    Returns:
        All indices if there are at most `2 * columns`; else the first and the last one, and of each column the smallest and the largest
        value (of a column without values: one of its points, so that the gap stays).
    """
    if len(x) <= 2 * columns:
        return np.arange(len(x))
    inner = np.searchsorted(x, np.linspace(x[0], x[-1], columns + 1)[1:-1])
    edges = np.unique(np.concatenate(([0], inner, [len(x)])))
    chosen = {0, len(x) - 1}
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        part = y[start:end]
        if np.all(np.isnan(part)):
            chosen.add(start)
        else:
            chosen |= {start + int(np.nanargmin(part)), start + int(np.nanargmax(part))}
    known = np.flatnonzero(~np.isnan(y))
    chosen |= {int(known[0]), int(known[-1])} if len(known) else set()
    return np.array(sorted(chosen))


def running_mean(y: np.ndarray, window: int, at: np.ndarray) -> np.ndarray:
    """At each index of `at`, the mean of the `window` values around it, of fewer at the ends; NaN where no value is near.

    Near are those that are closer to this index than to its neighbours in `at`.
    """
    half, found = window // 2, np.full(len(at), np.nan)
    middles = (at[1:] + at[:-1]) // 2
    lows, highs = np.append(0, middles + 1), np.append(middles, len(y) - 1)
    known = ~np.isnan(y)
    for place, (index, low, high) in enumerate(zip(at.tolist(), lows.tolist(), highs.tolist(), strict=True)):
        if known[min(low, index) : max(high, index) + 1].any():
            start, end = max(0, index - half), index + half + 1
            around = y[start:end][known[start:end]]
            if len(around):
                found[place] = around.mean()
    return found


def evenly(count: int, most: int) -> np.ndarray:
    """At most `most` indices of `count` items at equal distances, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)) if count else np.arange(0)
