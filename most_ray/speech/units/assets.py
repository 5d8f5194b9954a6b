"""Speech assets: the files beside a model or its records by which recordings become the model's units, and its units sound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from most_ray.errors import CheckpointError, DataError, UserError, count_of
from most_ray.io import storage
from most_ray.records.files import ASSET_FILES, KMEANS, SPEECH_FOLDER, UNITS_MANIFEST
from most_ray.records.record import units_hash
from most_ray.records.units_manifest import NEEDED_FOR_SPEECH, load_units_manifest
from most_ray.speech.units.clustering import SpeakerStatistics, assign, kmeans_hash, load_kmeans, remove_repeats
from most_ray.speech.units.extractors import manifest_settings, open_extractor
from most_ray.speech.units.features import Extractor

_REMEDY = "Name the folder that `most-ray prepare units` made the training records in: --speech DIR."


@dataclass(frozen=True)
class SpeechAssets:
    """The units manifest and centroids of a folder, with the extractor that the manifest names."""

    folder: Path
    manifest: dict[str, Any]  # units.json
    centroids: np.ndarray  # float32 (k, features)
    extractor: Extractor

    def encode(self, waves: Sequence[np.ndarray], one_speaker: bool = False) -> list[np.ndarray]:
        """Convert recordings to units as in the model's training records, int64 (units,) each; none for one that is too short.

        Args:
            waves: float32 (samples,) each, at `extractor.sample_rate`.
            one_speaker: all recordings are of one speaker. Otherwise, if features are normalised per speaker, each recording counts as a
                speaker of its own, whose statistics are adapted to those of the corpus.
        """
        found = [frames.values for frames in self.extractor(waves)]
        groups = [range(len(found))] if one_speaker and found else [range(index, index + 1) for index in range(len(found))]
        for group in groups if self.extractor.per_speaker else ():
            frames = np.concatenate([found[index] for index in group])
            if len(frames):
                statistics = SpeakerStatistics.from_frames(frames)
                if reference := self.manifest.get("reference"):
                    statistics = statistics.map_adapt(*(np.array(reference[what]) for what in ("mean", "deviation")))
                for index in group:
                    found[index] = statistics.normalise(found[index])
        units = [assign(frames, self.centroids) for frames in found]
        return [remove_repeats(each) for each in units] if self.manifest["identity"]["repeats_removed"] else units


def open_assets(uri: str | Path, encoder: str | None = None) -> SpeechAssets:
    """Open the assets in a folder: of records, of a run (its `speech/`), or of a model.

    `encoder`: folder or name on the hub of the speech encoder; None: the one that the manifest names.

    Raises:
        DataError: a file is missing or damaged, or the files do not belong together.
        CheckpointError: the encoder has other weights.
    """
    folder = Path(uri)
    manifest = require_units_manifest(folder)
    identity = manifest["identity"]
    if not (folder / KMEANS).exists():
        raise DataError("speech", str(folder), f"holds no {KMEANS}, the centroids of its units.", _REMEDY)
    centroids = load_kmeans(folder / KMEANS)
    if kmeans_hash(centroids) != identity["kmeans"]:
        raise DataError("kmeans", str(folder / KMEANS), "is not the one that units.json beside it names.", _REMEDY)
    if len(centroids) != identity.get("n_units", len(centroids)):
        rule = f"holds {count_of(len(centroids), 'centroid')}, and units.json beside it describes {count_of(identity['n_units'], 'unit')}."
        raise DataError("kmeans", str(folder / KMEANS), rule, _REMEDY)
    try:
        settings = manifest_settings(manifest, encoder)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise DataError("speech", str(folder / UNITS_MANIFEST), f"does not say how to make its features ({error!r}).", _REMEDY) from error
    extractor = open_extractor(settings)
    if any(identity.get(key) != value for key, value in extractor.identity.items()):
        given, wanted = extractor.identity, {key: identity.get(key) for key in extractor.identity}
        raise CheckpointError("features", given, f"are not those that the units were made with: {wanted}.", "Name the same one: --encoder.")
    reference = len(manifest["reference"]["mean"]) if manifest.get("reference") else extractor.width
    if not centroids.shape[1] == reference == extractor.width:
        rule = f"has {count_of(centroids.shape[1], 'feature')} in its centroids, {reference} in its reference, and makes {extractor.width}."
        raise DataError("speech", str(folder), rule, _REMEDY)
    return SpeechAssets(folder, manifest, centroids, extractor)


def require_units_manifest(folder: Path) -> dict[str, Any]:
    """Read units.json of a folder. Raises DataError if it does not exist, or does not describe units of speech."""
    manifest = load_units_manifest(str(folder), NEEDED_FOR_SPEECH)
    if manifest is None:
        raise DataError("speech", str(folder), f"holds no {UNITS_MANIFEST}, which says what the units mean.", _REMEDY)
    return manifest


def find_assets(model_uri: str, identity: str | None) -> str | None:
    """Find the folder, path or URI, of the assets that belong to a model: an export's or a run's `speech/`; None if there are none.

    Args:
        model_uri: folder of a model, or of a run's checkpoint.
        identity: `units_hash` that the assets must have; None: unknown, so none are found.
    """
    run = storage.parent(storage.parent(model_uri if storage.is_remote(model_uri) else storage.absolute(model_uri)))
    candidates = (storage.join(uri, SPEECH_FOLDER) for uri in (model_uri, run))
    return next((uri for uri in candidates if _units_hash_at(uri) == identity and identity is not None), None)


def copy_assets(sources: Sequence[str], target: str, identity: str | None) -> None:
    """Copy each asset file from the first of the folders `sources` that has it and whose `units_hash` is `identity`. All are paths or URIs.
    units.json comes last: where it exists, the others do."""
    same = [source for source in sources if identity is not None and _units_hash_at(source) == identity]
    for name in ASSET_FILES:
        if source := next((source for source in same if storage.exists(storage.join(source, name))), None):
            storage.write_bytes(storage.join(target, name), storage.read_bytes(storage.join(source, name)))


def _units_hash_at(uri: str) -> str | None:
    """The hash of the units manifest in a folder; None if it has none."""
    manifest = load_units_manifest(uri)
    return None if manifest is None else units_hash(manifest)
