"""Noise on the units that ASR records are heard through: a pure function of the seed and the record's place in the run.

Speakers and microphones move a frame to a near centroid, now and then to a far one, and tempo changes how many frames there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from most_ray.data.hashing import mix_keys, uniform
from most_ray.records.record import N_UNITS


@dataclass(frozen=True)
class UnitNoise:
    """Shares of the units that are swapped for one of their neighbours, replaced by any unit, left out."""

    swap: float = 0.0
    replace: float = 0.0
    drop: float = 0.0

    @property
    def any(self) -> bool:
        return self.swap > 0 or self.replace > 0 or self.drop > 0


NO_NOISE = UnitNoise()


def noisy_units(units: np.ndarray, noise: UnitNoise, neighbours: np.ndarray | None, seed: int, index: int) -> np.ndarray:
    """Units (units,) as heard at global index `index` of the run; never longer, never empty.

    neighbours: (n_units, k), needed where noise.swap is not 0.
    """
    n = len(units)
    draws = uniform(mix_keys(seed, index), 4 * n).reshape(4, n)
    heard = units.copy()
    n_units = N_UNITS if neighbours is None else len(neighbours)
    if noise.swap > 0 and neighbours is not None:
        swapped = (draws[0] < noise.swap) & (units < n_units)
        choice = (draws[1] * neighbours.shape[1]).astype(np.int64)
        heard[swapped] = neighbours[units[swapped], choice[swapped]]
    replaced = draws[2] < noise.replace
    heard[replaced] = (draws[1][replaced] * n_units).astype(units.dtype)
    kept = draws[3] >= noise.drop
    return heard[kept] if kept.any() else heard[:1]
