"""What the records of a run say of themselves beside speech and text: hours, speakers, licences, for readers of its report."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from most_ray.errors import redact
from most_ray.io import storage
from most_ray.records.files import UNITS_MANIFEST, read_raw, record_files
from most_ray.records.units_manifest import load_units_manifest

_MOST_READ = 20_000  # records that are read of a source: their mean duration stands for the others'
_MOST_SPEAKERS = 100_000
_MOST_LICENCES, _LONGEST_LICENCE = 5, 200  # that are named of a source; characters
_SPEAKER = ("speaker", "speaker_id", "client_id")  # columns that name a record's speaker, the first that it has

Source = tuple[str, str, int | None]  # name (task/folder), directory of records, and how many of them are usable (None: unknown)


def data_card(sources: Mapping[str, Sequence[Source]]) -> dict[str, Any]:
    """The data of a run, JSON-ready.

    Args:
        sources: those of `training` and of `validation`.

    Returns:
        `training` and `validation`, lists of sources with name, records (None: unknown), read (records that the rest is computed from),
        exact (they are all), seconds of speech and of those at the recordings' own speed (None: the records do not say), speech_units,
        speakers, licence and what the units mean (`units`); `speakers`: of all sources of such a list together, where a copy at another
        speed is no other speaker; `unseen`: those in validation that are not in training.

    Raises:
        DataError: a directory cannot be read, or its units manifest is wrong.
    """
    card: dict[str, Any] = {"speakers": {}}
    known: dict[str, set[str]] = {}
    for use, listed in sources.items():
        found = [_read(uri) for _, uri, _ in listed]
        card[use] = [
            {"name": name, **each.described(size), **_units_of(uri, each.licences)}
            for (name, uri, size), each in zip(listed, found, strict=True)
        ]
        known[use] = set().union(*(each.speakers for each in found))
        card["speakers"][use] = len(known[use]) or None
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
    licences: set[str] = field(default_factory=set)

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
        for licence in (metadata.get("licence"), metadata.get("license")):
            if isinstance(licence, str) and licence.strip() and len(found.licences) < _MOST_LICENCES:
                found.licences.add(" ".join(licence.split())[:_LONGEST_LICENCE])
    found.ended = next(records, None) is None
    return found


def _records(uri: str) -> Iterator[dict[str, Any]]:
    """The records of a directory that are objects, unchecked."""
    for entry in record_files(uri):
        yield from (raw for _, raw in read_raw(entry.uri) if isinstance(raw, dict))


def _units_of(uri: str, licences: Collection[str]) -> dict[str, Any]:
    """What units.json beside the records of a directory says of the units and the recordings; of the licence, where it says nothing, what
    the records do."""
    folder = uri if storage.exists(storage.join(uri, UNITS_MANIFEST)) else storage.parent(uri)
    manifest = load_units_manifest(folder) or {}
    units = {**manifest.get("identity", {}), **({"encoder": redact(manifest["encoder"])} if "encoder" in manifest else {})}
    return {"licence": manifest.get("licence") or ", ".join(sorted(licences)) or None, "units": units or None}
