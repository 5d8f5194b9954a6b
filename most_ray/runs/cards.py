"""cards.json of a run: what its model is, and what the data are that it is trained and validated on, for readers of its report."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from most_ray.config import RunConfig
from most_ray.data.plan import distinct_names
from most_ray.errors import UserError, redact
from most_ray.io import storage
from most_ray.io.run_folder import local_copy
from most_ray.model.build import read_config
from most_ray.records.files import UNITS_MANIFEST, read_raw, record_files
from most_ray.records.record import TASKS, Task
from most_ray.records.units_manifest import load_units_manifest
from most_ray.runs.job import overrides_of
from most_ray.runs.resolve import Prepared

logger = logging.getLogger(__name__)
CARDS = "cards.json"
_MOST_READ = 20_000  # records that are read of a source: their mean duration stands for the others'
_MOST_SPEAKERS = 100_000
_SPEAKER = ("speaker", "speaker_id", "client_id")  # columns that name a record's speaker, the first that it has


def write_cards(prepared: Prepared, config: RunConfig) -> None:
    """Write cards.json to a run's folder: `model`, its config.json; `data`, see `data_card`. What cannot be read is left out: no run ends
    for want of it."""
    found: dict[str, Any] = {}
    try:
        model = read_config(local_copy(prepared.job.model_path), overrides_of(config)).to_dict()
        found["model"] = {key: value for key, value in model.items() if not key.startswith("_")}
        found["data"] = data_card(config, [len(store) for store in prepared.plan.stores])
    except (UserError, OSError) as error:
        logger.warning("the report will not describe all of the model and the data: %s", error)
    storage.write_bytes(prepared.folder.at(CARDS), json.dumps(found, indent=1, default=str).encode())


def data_card(config: RunConfig, counts: Sequence[int]) -> dict[str, Any]:
    """The data of a run, JSON-ready.

    Args:
        counts: the usable records of each training source, in the order of tasks and directories.

    Returns:
        `training` and `validation`, lists of sources with name (task/folder), records (None: unknown), read (records that the rest is
        computed from), seconds of speech and of those at the recordings' own speed (None: the records do not say), units of speech,
        speakers, licence and what the units mean (`units`); `speakers`: of all sources of the list together, a copy at another speed not
        counted; `unseen`: those in validation that are not in training.
    """
    card: dict[str, Any] = {"speakers": {}}
    known: dict[str, set[str]] = {}
    for use, name in (("train", "training"), ("val", "validation")):
        named: list[tuple[Task, str]] = [(task, uri) for task in TASKS for uri in config.directories(use, task)]  # type: ignore[arg-type]
        names = distinct_names([uri for _, uri in named], [task for task, _ in named])
        sizes: Sequence[int | None] = counts if use == "train" and len(counts) == len(named) else [None] * len(named)
        speakers: set[str] = set()
        card[name] = []
        for (task, uri), short, size in zip(named, names, sizes, strict=True):
            found = _read(uri)
            speakers |= found.speakers
            card[name].append({"name": f"{task}/{short}", **found.described(size), **_units_of(uri)})
        known[name] = speakers
        card["speakers"][name] = len(speakers) or None
    card["unseen"] = len(known["validation"] - known["training"]) if all(known.values()) else None
    return card


@dataclass
class _Found:
    """What the records of a source say."""

    read: int = 0
    ended: bool = True  # all of them were read
    seconds: list[float] = field(default_factory=list)  # of each record that states it
    own_speed: list[float] = field(default_factory=list)  # of those at the recording's own speed
    units: int = 0
    speakers: set[str] = field(default_factory=set)

    def described(self, records: int | None) -> dict[str, Any]:
        """The figures of a source with so many usable records (None: as many as were read)."""
        records = self.read if records is None and self.ended else records
        scale = records / self.read if records and self.read else 1.0
        complete = len(self.seconds) == self.read and self.read > 0
        return {
            "records": records,
            "read": self.read,
            "exact": self.ended,
            "seconds": round(scale * math.fsum(self.seconds), 1) if complete else None,
            "own_speed_seconds": round(scale * math.fsum(self.own_speed), 1) if complete else None,
            "speech_units": round(scale * self.units),
            "speakers": len(self.speakers) or None,
        }


def _read(uri: str) -> _Found:
    """What the first records of a directory say; of larger sources not all are read."""
    found, records = _Found(), _records(uri)
    for raw in itertools.islice(records, _MOST_READ):
        found.read += 1
        metadata = raw["metadata"] if isinstance(raw.get("metadata"), dict) else {}
        found.units += sum(side.count("[Hu") for side in (raw.get("input"), raw.get("output")) if isinstance(side, str))
        seconds = metadata.get("duration")
        if isinstance(seconds, int | float) and 0 < seconds < 1e6:
            found.seconds.append(seconds)
            if metadata.get("speed", 1.0) == 1.0:
                found.own_speed.append(seconds)
        speaker = next((str(metadata[key]) for key in _SPEAKER if metadata.get(key) not in (None, "")), None)
        if speaker is not None and len(found.speakers) < _MOST_SPEAKERS:
            found.speakers.add(speaker)
    found.ended = next(records, None) is None
    return found


def _records(uri: str) -> Iterator[dict[str, Any]]:
    """The records of a directory that are objects, unchecked."""
    for entry in record_files(uri):
        yield from (raw for _, raw in read_raw(entry.uri) if isinstance(raw, dict))


def _units_of(uri: str) -> dict[str, Any]:
    """What units.json beside the records of a directory says of the units and the recordings."""
    folder = uri if storage.exists(storage.join(uri, UNITS_MANIFEST)) else storage.parent(uri)
    manifest = load_units_manifest(folder) or {}
    units = {**manifest.get("identity", {}), **({"encoder": redact(manifest["encoder"])} if "encoder" in manifest else {})}
    return {"licence": manifest.get("licence"), "units": units or None}
