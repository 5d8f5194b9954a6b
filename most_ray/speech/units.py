"""Speech units: k-means over frames of features that are normalised per speaker, repeats removed."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from most_ray.errors import DataError
from most_ray.records import N_UNITS
from most_ray.speech.features import MfccSettings

MANIFEST_VERSION = 1
_FIT_FRAMES = 200_000


@dataclass(frozen=True)
class SpeakerStatistics:
    """Mean and standard deviation of a speaker's frames, float64 (features,)."""

    mean: np.ndarray
    deviation: np.ndarray

    def apply(self, features: np.ndarray) -> np.ndarray:
        """(frames, features) with zero mean and unit variance over the speaker's frames."""
        return ((features - self.mean) / self.deviation).astype(np.float32)


def speaker_statistics(features: list[np.ndarray]) -> SpeakerStatistics:
    """Over all frames of a speaker's recordings."""
    frames = np.concatenate(features).astype(np.float64)
    return SpeakerStatistics(frames.mean(axis=0), np.maximum(frames.std(axis=0), 1e-5))


def fit_kmeans(frames: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Centroids, float32 (k, features), of a seeded sample of at most 200,000 frames.

    One thread: with several, the order of additions and with it the last bits of the centroids would differ from run to run.

    Raises:
        DataError: fewer frames than centroids.
    """
    if len(frames) < k:
        raise DataError("fit_kmeans", k, f"asks for more units than there are frames ({len(frames)}).")
    rng = np.random.RandomState(seed)
    sample = frames if len(frames) <= _FIT_FRAMES else frames[np.sort(rng.permutation(len(frames))[:_FIT_FRAMES])]
    with threadpool_limits(limits=1):
        model = KMeans(n_clusters=k, n_init=1, max_iter=100, random_state=seed, algorithm="lloyd").fit(sample)
    return np.ascontiguousarray(model.cluster_centers_.astype(np.float32))


def load_kmeans(path: Path) -> np.ndarray:
    """Centroids from a .npy file, float32 (k, features). Pickled objects are refused.

    Raises:
        DataError: missing, not such an array, or more centroids than there are units.
    """
    try:
        centroids = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError("kmeans", str(path), f"cannot be read as an array ({error}).") from error
    if centroids.ndim != 2 or not np.issubdtype(centroids.dtype, np.floating) or not 1 <= len(centroids) <= N_UNITS:
        raise DataError("kmeans", str(path), f"is {centroids.dtype} {centroids.shape}, not 1..{N_UNITS} centroids.")
    return centroids.astype(np.float32)


def kmeans_hash(centroids: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(centroids, "<f4").tobytes() + str(centroids.shape).encode(), digest_size=16).hexdigest()


def assign(frames: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Nearest centroid of each frame, int64 (frames,). Distances in float64, so that all machines agree."""
    x, c = frames.astype(np.float64), centroids.astype(np.float64)
    return ((c**2).sum(axis=1) - 2.0 * x @ c.T).argmin(axis=1)


def remove_repeats(units: np.ndarray) -> np.ndarray:
    """Runs of one unit as one."""
    return units[np.concatenate([[True], units[1:] != units[:-1]])] if len(units) else units


def neighbours_of(centroids: np.ndarray, count: int = 8) -> list[list[int]]:
    """The nearest other units of each unit, nearest first: what `unit_swap_prob` chooses from."""
    c = centroids.astype(np.float64)
    distances = (c**2).sum(axis=1)[None, :] - 2.0 * c @ c.T
    np.fill_diagonal(distances, np.inf)
    return np.argsort(distances, axis=1, kind="stable")[:, : min(count, len(c) - 1)].tolist()


def manifest_of(settings: MfccSettings, centroids: np.ndarray, repeats_removed: bool) -> dict[str, Any]:
    """What the units mean. Records with equal `identity` may be trained on together; anything else is refused."""
    return {
        "neighbours": neighbours_of(centroids),
        "version": MANIFEST_VERSION,
        "identity": {
            "features": "mfcc",
            "settings": asdict(settings),
            "normalisation": "mean and variance per speaker",
            "kmeans": kmeans_hash(centroids),
            "n_units": len(centroids),
            "rate_hz": settings.rate_hz,
            "repeats_removed": repeats_removed,
        },
    }
