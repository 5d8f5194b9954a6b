"""Noise on the input units of ASR records: a pure function of the seed and the record's global index in the run.

It imitates speakers and microphones, which move a frame to a near centroid and rarely to a far one, and tempo, which changes the number
of frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from most_ray.data.hashing import mix_keys, uniform
from most_ray.records.record import N_UNITS


@dataclass(frozen=True)
class UnitNoise:
    """Probabilities, for each unit, of the kinds of noise."""

    swap: float = 0.0  # replaced by one of its neighbours
    replace: float = 0.0  # replaced by any unit
    drop: float = 0.0  # left out

    @property
    def any(self) -> bool:
        return self.swap > 0 or self.replace > 0 or self.drop > 0


NO_NOISE = UnitNoise()


def noisy_units(units: np.ndarray, noise: UnitNoise, neighbours: np.ndarray | None, seed: int, index: int) -> np.ndarray:
    """Units with noise, never more than without and at least one.

    Args:
        units: of a record, integers (units,).
        neighbours: near units of each unit, (n_units, k); needed where noise.swap is not 0.
        index: the record's global index in the run.
    """
    n = len(units)
    draws = uniform(mix_keys(seed, index), 4 * n).reshape(4, n)
    noisy = units.copy()
    n_units = N_UNITS if neighbours is None else len(neighbours)
    if noise.swap > 0 and neighbours is not None:
        swapped = (draws[0] < noise.swap) & (units < n_units)
        choice = (draws[1] * neighbours.shape[1]).astype(np.int64)
        noisy[swapped] = neighbours[units[swapped], choice[swapped]]
    replaced = draws[2] < noise.replace
    noisy[replaced] = (draws[1][replaced] * n_units).astype(units.dtype)
    kept = draws[3] >= noise.drop
    return noisy[kept] if kept.any() else noisy[:1]
