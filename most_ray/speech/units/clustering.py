"""Frames to units: normalisation per speaker, k-means, and the manifest that says what the units mean."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from threadpoolctl import threadpool_limits

from most_ray.errors import DataError
from most_ray.records.record import N_UNITS

MANIFEST_VERSION = 1
FIT_FRAMES = 200_000
_MEAN_WEIGHT = 50.0  # frames of the corpus' mean that a short recording's own is mixed with: one second
_PICKLED = (".joblib", ".pkl", ".pickle", ".bin", ".pt")
Algorithm = Literal["minibatch", "lloyd"]


@dataclass(frozen=True)
class SpeakerStatistics:
    """What is known of a speaker's frames: their number, sum and sum of squares, float64 (features,). Sums of parts add up."""

    count: int
    total: np.ndarray
    squares: np.ndarray

    @classmethod
    def from_frames(cls, frames: np.ndarray) -> SpeakerStatistics:
        wide = frames.astype(np.float64)
        return cls(len(wide), wide.sum(axis=0), (wide**2).sum(axis=0))

    def __add__(self, other: SpeakerStatistics) -> SpeakerStatistics:
        return SpeakerStatistics(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> np.ndarray:
        return self.total / self.count

    @property
    def deviation(self) -> np.ndarray:
        return np.maximum(np.sqrt(np.maximum(self.squares / self.count - self.mean**2, 0.0)), 1e-5)

    def apply(self, features: np.ndarray) -> np.ndarray:
        """(frames, features) with zero mean and unit variance over the speaker's frames."""
        return ((features - self.mean) / self.deviation).astype(np.float32)

    def map_adapt(self, mean: np.ndarray, deviation: np.ndarray) -> SpeakerStatistics:
        """These, mixed with a second's worth of a corpus' speakers: of a single short recording little can be known (maximum a
        posteriori adaptation, Gauvain & Lee 1994)."""
        squares = _MEAN_WEIGHT * (deviation**2 + mean**2)
        return self + SpeakerStatistics(int(_MEAN_WEIGHT), _MEAN_WEIGHT * mean, squares)


def fit_kmeans(frames: np.ndarray, k: int, seed: int, algorithm: Algorithm = "minibatch") -> np.ndarray:
    """Centroids, float32 (k, features), of these frames: mini-batch k-means (Sculley 2010), or Lloyd's on all of them.

    One thread: with several, the order of additions and with it the last bits of the centroids would differ from run to run.

    Raises:
        DataError: fewer frames than centroids.
    """
    if len(frames) < k:
        raise DataError("fit_kmeans", k, f"asks for more units than there are frames ({len(frames)}).")
    from sklearn.cluster import KMeans, MiniBatchKMeans  # takes seconds to import, and most processes fit nothing

    if algorithm == "lloyd":
        model = KMeans(n_clusters=k, n_init=1, max_iter=100, random_state=seed, algorithm="lloyd")
    else:  # as HuBERT's own recipe
        model = MiniBatchKMeans(
            n_clusters=k,
            n_init=3,
            max_iter=100,
            batch_size=10_000,
            max_no_improvement=100,
            reassignment_ratio=0.0,
            random_state=seed,
        )
    with threadpool_limits(limits=1):
        model.fit(frames)
    return np.ascontiguousarray(model.cluster_centers_.astype(np.float32))


def default_unit_count(n_frames: int) -> int:
    """How many units so many frames can tell apart: a hundred frames each, at most what the vocabulary holds."""
    return min(N_UNITS, max(2, n_frames // 100))


def save_kmeans(path: Path, centroids: np.ndarray, features: Mapping[str, Any]) -> None:
    """Centroids as .npy, or as .safetensors together with what they were fitted on; in place in one move."""
    temporary = path.with_name(f".{path.name}.tmp.{path.suffix[1:]}")
    if path.suffix == ".safetensors":
        save_file({"centroids": centroids}, temporary, {"features": json.dumps(features, sort_keys=True)})
    else:
        with temporary.open("wb") as sink:
            np.save(sink, centroids)
    temporary.replace(path)


def load_kmeans(path: Path, features: Mapping[str, Any] | None = None) -> np.ndarray:
    """Centroids, float32 (k, features), from .npy or .safetensors. Pickled objects, joblib's among them, are refused: opening one can
    run any code.

    Raises:
        DataError: missing, pickled, not such an array, more centroids than there are units, or fitted on other features than these.
    """
    if path.suffix in _PICKLED:
        remedy = "Where you trust it: numpy.save('kmeans.npy', joblib.load(FILE).cluster_centers_)."
        raise DataError("kmeans", str(path), "is a pickled object, which can run any code when it is opened.", remedy)
    known = None
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy") as tensors:
                names = list(tensors.keys())
                centroids = tensors.get_tensor("centroids" if "centroids" in names else names[0])
                known = (tensors.metadata() or {}).get("features")
        else:
            with path.open("rb") as stream:
                centroids = np.lib.format.read_array(stream, allow_pickle=False)
    except (OSError, ValueError, TypeError, IndexError, SafetensorError) as error:
        raise DataError("kmeans", str(path), f"cannot be read as an array ({error}).", "Name a .npy or .safetensors file.") from error
    if not isinstance(centroids, np.ndarray) or centroids.ndim != 2 or not np.issubdtype(centroids.dtype, np.floating):
        raise DataError("kmeans", str(path), "holds no table of centroids.")
    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite, and is refused
        found = centroids.astype(np.float32)
    if not 1 <= len(found) <= N_UNITS or not np.isfinite(found).all():
        raise DataError("kmeans", str(path), f"is {centroids.dtype} {centroids.shape}, not 1..{N_UNITS} finite centroids.")
    if features is not None and known is not None and known != json.dumps(features, sort_keys=True):
        raise DataError("kmeans", str(path), f"was fitted on other features: {known[:300]}.", "Name the same --features, or fit anew.")
    return found


def kmeans_hash(centroids: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(centroids, "<f4").tobytes() + str(centroids.shape).encode(), digest_size=16).hexdigest()


def assign(frames: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Nearest centroid of each frame, int64 (frames,). Distances in float64, so that all machines agree."""
    x, c = frames.astype(np.float64), centroids.astype(np.float64)
    return ((c**2).sum(axis=1) - 2.0 * x @ c.T).argmin(axis=1)


def remove_repeats(units: np.ndarray) -> np.ndarray:
    """Runs of one unit as one."""
    return units[np.concatenate([[True], units[1:] != units[:-1]])] if len(units) else units


def nearest_units(centroids: np.ndarray, count: int = 8) -> list[list[int]]:
    """The nearest other units of each unit, nearest first: what `unit_swap_prob` chooses from."""
    c = centroids.astype(np.float64)
    distances = (c**2).sum(axis=1)[None, :] - 2.0 * c @ c.T
    np.fill_diagonal(distances, np.inf)
    return np.argsort(distances, axis=1, kind="stable")[:, : min(count, len(c) - 1)].tolist()


def build_manifest(
    features: Mapping[str, Any], rate_hz: float, centroids: np.ndarray, repeats_removed: bool, place: str | None
) -> dict[str, Any]:
    """What the units mean. Records with equal `identity` may be trained on together; anything else is refused.

    Args:
        features: an Extractor's identity.
        place: the encoder as it was named, for people; the identity has a hash of its weights.
    """
    named = {"encoder": place} if place else {}
    return {
        "neighbours": nearest_units(centroids),
        "version": MANIFEST_VERSION,
        **named,
        "identity": {
            **features,
            "kmeans": kmeans_hash(centroids),
            "n_units": len(centroids),
            "rate_hz": rate_hz,
            "repeats_removed": repeats_removed,
        },
    }
