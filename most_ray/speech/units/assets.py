"""What a model needs to hear and to be heard: the files beside its units that turn recordings into them and them into sound."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from most_ray.errors import CheckpointError, DataError
from most_ray.io import storage
from most_ray.records.files import ASSET_FILES, KMEANS, SPEECH_FOLDER, UNITS_MANIFEST
from most_ray.records.record import units_hash
from most_ray.speech.units.clustering import SpeakerStatistics, assign, kmeans_hash, load_kmeans, remove_repeats
from most_ray.speech.units.extractors import open_extractor
from most_ray.speech.units.features import EncoderSettings, Extractor, FeatureSettings, MfccSettings

_REMEDY = "Name the folder that `most-ray prepare units` made the training records in: --speech DIR."


@dataclass(frozen=True)
class SpeechAssets:
    """units.json and kmeans.npy of a folder. Recordings come as float32 (samples,) at `extractor.sample_rate`."""

    folder: Path
    manifest: dict[str, Any]
    centroids: np.ndarray
    extractor: Extractor

    def units(self, waves: Sequence[np.ndarray], one_speaker: bool = False) -> list[np.ndarray]:
        """Units of recordings as the model's training records have them, int64 (units,) each; none where one is too short.

        Where features are normalised per speaker, each recording is taken for a speaker of its own, mixed with what the corpus'
        speakers are like; `one_speaker`: all of them are one.
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
                    found[index] = statistics.apply(found[index])
        units = [assign(frames, self.centroids) for frames in found]
        return [remove_repeats(each) for each in units] if self.manifest["identity"]["repeats_removed"] else units


def open_assets(uri: str | Path, encoder: str | None = None) -> SpeechAssets:
    """The kit in a folder: of records, of a run (its `speech/`), of a model. `encoder`: where its speech encoder lies, if not where it lay.

    Raises:
        DataError: a file is missing or damaged, or they do not belong together. CheckpointError: the encoder has other weights.
    """
    folder = Path(uri)
    manifest = read_units_manifest(folder)
    identity = manifest["identity"]
    if not (folder / KMEANS).exists():
        raise DataError("speech", str(folder), "holds no kmeans.npy, the centroids of its units.", _REMEDY)
    centroids = load_kmeans(folder / KMEANS)
    if kmeans_hash(centroids) != identity["kmeans"]:
        raise DataError("kmeans", str(folder / KMEANS), "is not the one that units.json beside it names.", _REMEDY)
    extractor = open_extractor(_settings(manifest, folder, encoder))
    if any(identity.get(key) != value for key, value in extractor.identity.items()):
        given, wanted = extractor.identity, {key: identity.get(key) for key in extractor.identity}
        raise CheckpointError("features", given, f"are not those that the units were made with: {wanted}.", "Name the same one: --encoder.")
    return SpeechAssets(folder, manifest, centroids, extractor)


def read_units_manifest(folder: Path) -> dict[str, Any]:
    """units.json of a folder.

    Raises:
        DataError: it is not there, or is no manifest.
    """
    try:
        manifest = json.loads((folder / UNITS_MANIFEST).read_text(encoding="utf-8"))
        if not {"kmeans", "features", "repeats_removed"} <= manifest["identity"].keys():
            raise KeyError("identity")
    except FileNotFoundError as error:
        raise DataError("speech", str(folder), "holds no units.json, which says what the units mean.", _REMEDY) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError("speech", str(folder / UNITS_MANIFEST), f"is no units manifest ({error!r}).", _REMEDY) from error
    return dict(manifest)


def find_assets(model_uri: str, identity: str | None) -> str | None:
    """The place of the kit that goes with a model folder, an export or a run's checkpoint (paths or URIs), where there is one whose units
    have that identity."""
    above = storage.parent(storage.parent(model_uri if storage.is_remote(model_uri) else storage.absolute(model_uri)))
    for candidate in (storage.join(model_uri, SPEECH_FOLDER), storage.join(above, SPEECH_FOLDER)):
        known = _identity_at(candidate)
        if identity is not None and known == identity:
            return candidate
    return None


def copy_assets(sources: Sequence[str], target: str, identity: str | None) -> None:
    """A kit to the place `target`: each of its files from the first of these places (paths or URIs) that has it, among those whose units
    have that identity. units.json comes last: where it is, the others are."""
    same = [source for source in sources if identity is not None and _identity_at(source) == identity]
    for name in ASSET_FILES:
        if source := next((source for source in same if storage.exists(storage.join(source, name))), None):
            storage.write_bytes(storage.join(target, name), storage.read_bytes(storage.join(source, name)))


def _identity_at(uri: str) -> str | None:
    """The identity of the units of a place, where it has a manifest."""
    manifest = storage.join(uri, UNITS_MANIFEST)
    if not storage.exists(manifest):
        return None
    try:
        return units_hash(json.loads(storage.read_bytes(manifest)))
    except (ValueError, AttributeError) as error:
        raise DataError("units manifest", manifest, f"is not JSON ({error}).") from error


def _settings(manifest: dict[str, Any], folder: Path, encoder: str | None) -> FeatureSettings:
    identity = manifest["identity"]
    try:
        if identity["features"] == "mfcc":
            return MfccSettings(**identity["settings"])
        return EncoderSettings(identity["features"], encoder or manifest["encoder"], int(identity["settings"]["layer"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError("speech", str(folder / UNITS_MANIFEST), f"does not say how to make its features ({error!r}).", _REMEDY) from error
