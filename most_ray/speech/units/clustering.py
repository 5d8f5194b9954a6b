"""From frames to units: normalisation per speaker, k-means, and the units manifest, which says what the units mean."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save
from threadpoolctl import threadpool_limits

from most_ray.errors import DataError
from most_ray.io import storage
from most_ray.io.outputs import Kind, begins_with
from most_ray.records.model_files import loading
from most_ray.records.record import N_UNITS

MANIFEST_VERSION = 1
FIT_FRAMES = 200_000  # to fit k-means to, by default
_PRIOR_FRAMES = 50.0  # weight of the corpus' statistics where a single speaker's are adapted to them, in frames: one second
# As `save_kmeans` writes them: a float32 table of at most three digits of rows, or tensors that name the features.
CENTROIDS = Kind(
    "file of centroids", begins_with(rb"\x93NUMPY.{2,6}\{'descr': '<f4'.*'shape': \(\d{1,3}, \d+\)|.{8}\{\"__metadata__\":\{\"features\"")
)
_PICKLED = (".joblib", ".pkl", ".pickle", ".bin", ".pt")  # suffixes
Algorithm = Literal["minibatch", "lloyd"]


@dataclass(frozen=True)
class SpeakerStatistics:
    """Sums over a speaker's frames; the statistics of parts add up with `+`."""

    count: int  # of frames
    total: np.ndarray  # float64 (features,)
    squares: np.ndarray  # float64 (features,): sum of squares

    @classmethod
    def from_frames(cls, frames: np.ndarray) -> SpeakerStatistics:
        """Statistics of float32 (frames, features)."""
        wide = frames.astype(np.float64)
        return cls(len(wide), wide.sum(axis=0), (wide**2).sum(axis=0))

    def __add__(self, other: SpeakerStatistics) -> SpeakerStatistics:
        return SpeakerStatistics(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> np.ndarray:
        """Mean (features,)."""
        return self.total / self.count

    @property
    def deviation(self) -> np.ndarray:
        """Standard deviation (features,), at least 1e-5."""
        return np.maximum(np.sqrt(np.maximum(self.squares / self.count - self.mean**2, 0.0)), 1e-5)

    def normalise(self, frames: np.ndarray) -> np.ndarray:
        """Scale (frames, features) to zero mean and unit variance over the speaker's frames; float32."""
        return ((frames - self.mean) / self.deviation).astype(np.float32)

    def map_adapt(self, mean: np.ndarray, deviation: np.ndarray) -> SpeakerStatistics:
        """Add a second's worth of frames with the mean and deviation (features,) of a corpus' speakers, since a single short recording
        gives poor statistics (maximum a posteriori adaptation, Gauvain & Lee 1994)."""
        return self + SpeakerStatistics(int(_PRIOR_FRAMES), _PRIOR_FRAMES * mean, _PRIOR_FRAMES * (deviation**2 + mean**2))


def fit_kmeans(frames: np.ndarray, k: int, seed: int, algorithm: Algorithm = "minibatch") -> np.ndarray:
    """Fit centroids, float32 (k, features), to frames (frames, features): by mini-batch k-means (Sculley 2010), or by Lloyd's algorithm on
    all of them. Runs in one thread: with several, the order of additions and so the last bits of the centroids would differ from run to
    run. Raises DataError if there are fewer frames than centroids."""
    if len(frames) < k:
        raise DataError("fit_kmeans", k, f"is more units than there are frames ({len(frames)}).")
    from sklearn.cluster import KMeans, MiniBatchKMeans  # takes seconds to import, and most processes fit nothing

    if algorithm == "lloyd":
        model = KMeans(n_clusters=k, n_init=1, max_iter=100, random_state=seed, algorithm="lloyd")
    else:  # as HuBERT's own recipe
        model = MiniBatchKMeans(
            n_clusters=k, n_init=3, max_iter=100, batch_size=10_000, max_no_improvement=100, reassignment_ratio=0.0, random_state=seed
        )
    with threadpool_limits(limits=1):
        model.fit(frames)
    return np.ascontiguousarray(model.cluster_centers_.astype(np.float32))


def default_unit_count(n_frames: int) -> int:
    """How many units to fit to so many frames by default: one for a hundred frames, within 2 and the size of the vocabulary."""
    return min(N_UNITS, max(2, n_frames // 100))


def save_kmeans(path: Path, centroids: np.ndarray, features: Mapping[str, Any]) -> None:
    """Write centroids as .npy, or as .safetensors together with the identity of the features that they were fitted on. Atomic."""
    if path.suffix == ".safetensors":
        return storage.write_bytes(path, save({"centroids": centroids}, {"features": json.dumps(features, sort_keys=True)}))
    with io.BytesIO() as sink:
        np.save(sink, centroids)
        return storage.write_bytes(path, sink.getvalue())


def load_kmeans(path: Path, features: Mapping[str, Any] | None = None) -> np.ndarray:
    """Read centroids, float32 (k, features), from .npy or .safetensors.

    Pickled objects, joblib's among them, are refused: opening one can run any code. `features`: identity of those that the centroids must
    have been fitted on, if the file says so.

    Raises:
        DataError: the file is missing, pickled or not such an array, it has more centroids than there are units, or it was fitted on
            other features.
    """
    if path.suffix in _PICKLED:
        remedy = "Where you trust it: numpy.save('kmeans.npy', joblib.load(FILE).cluster_centers_)."
        raise DataError("kmeans", str(path), "is a pickled object, which can run any code when it is opened.", remedy)
    known = None
    with loading(DataError, "kmeans", str(path), "cannot be read as an array", "Name a .npy or .safetensors file."):
        if not path.is_file():
            raise ValueError("it is no file")
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy") as tensors:
                names = list(tensors.keys())
                centroids = tensors.get_tensor("centroids" if "centroids" in names else names[0])
                known = (tensors.metadata() or {}).get("features")
        else:
            centroids = np.lib.format.open_memmap(path, mode="r")  # which neither unpickles nor allocates what a header announces
    if not (isinstance(centroids, np.ndarray) and centroids.ndim == 2 and centroids.size and np.issubdtype(centroids.dtype, np.floating)):
        raise DataError("kmeans", str(path), "holds no table of centroids.")
    with np.errstate(over="ignore"):  # a value too large for float32 becomes infinite, and is refused
        found = np.array(centroids, dtype=np.float32)
    if not 1 <= len(found) <= N_UNITS or not np.isfinite(found).all():
        raise DataError("kmeans", str(path), f"is {centroids.dtype} {centroids.shape}, not 1..{N_UNITS} finite centroids.")
    if features is not None and known is not None and known != json.dumps(features, sort_keys=True):
        raise DataError("kmeans", str(path), f"was fitted on other features: {known[:300]}.", "Name the same --features, or fit again.")
    return found


def kmeans_hash(centroids: np.ndarray) -> str:
    """Hash of the centroids' shape and float32 values."""
    return hashlib.blake2b(np.ascontiguousarray(centroids, "<f4").tobytes() + str(centroids.shape).encode(), digest_size=16).hexdigest()


def assign(frames: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The nearest of the centroids (k, features), int64 (frames,), of each frame (frames, features). Computed in float64, so that all
    machines agree."""
    x, c = frames.astype(np.float64), centroids.astype(np.float64)
    return ((c**2).sum(axis=1) - 2.0 * x @ c.T).argmin(axis=1)


def remove_repeats(units: np.ndarray) -> np.ndarray:
    """Reduce each run of equal units, (units,), to one."""
    return units[np.concatenate([[True], units[1:] != units[:-1]])] if len(units) else units


def nearest_units(centroids: np.ndarray, count: int = 8) -> list[list[int]]:
    """For each unit the `count` nearest other units, nearest first: `unit_swap_prob` swaps a unit for one of these."""
    c = centroids.astype(np.float64)
    distances = (c**2).sum(axis=1)[None, :] - 2.0 * c @ c.T
    np.fill_diagonal(distances, np.inf)
    return np.argsort(distances, axis=1, kind="stable")[:, : min(count, len(c) - 1)].tolist()


def build_manifest(
    features: Mapping[str, Any], rate_hz: float, centroids: np.ndarray, repeats_removed: bool, source: str | None
) -> dict[str, Any]:
    """The content of units.json, which says what the units mean. Only records with equal `identity` may be trained on together.

    Args:
        features, rate_hz: an Extractor's identity and rate.
        centroids: (k, features).
        source: folder or name on the hub of the encoder, for people; the identity has a hash of its weights.
    """
    named = {"encoder": source} if source else {}
    identity = {**features, "kmeans": kmeans_hash(centroids), "n_units": len(centroids), "rate_hz": rate_hz}
    identity |= {"repeats_removed": repeats_removed}
    return {"neighbours": nearest_units(centroids), "version": MANIFEST_VERSION, **named, "identity": identity}
