"""The two stages of work on the parts of a corpus: statistics and a sample of frames first, then the records."""

from __future__ import annotations

import gzip
import io
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from most_ray.errors import CheckpointError, DataError
from most_ray.io import storage
from most_ray.records.record import ASR_INSTRUCTION, units_to_text
from most_ray.speech.corpora.audio import load_audio
from most_ray.speech.units.clustering import SpeakerStatistics, assign, remove_repeats
from most_ray.speech.units.corpus_parts import VERSION, Item, Part, PartFunction, file_stamp, json_digest, read_chunk
from most_ray.speech.units.extractors import open_extractor
from most_ray.speech.units.features import Extractor, FeatureSettings, Frames

_AT_ONCE = 240.0  # seconds of audio that are in memory together
_SUFFIX = {"jsonl.gz": ".jsonl.gz", "jsonl": ".jsonl", "json": ".jsonl"}  # of a part, by the records' form; output.py joins JSON

Normalisation = dict[str, tuple[np.ndarray, np.ndarray]]  # mean and deviation (features,) by speaker


@dataclass(frozen=True, kw_only=True)
class _Stage:
    features: FeatureSettings
    features_key: str  # json_digest of the extractor's identity
    speaker_column: str
    max_seconds: float  # longer recordings are rejected
    scratch: str  # folder of the parts' files

    def _open_extractor(self, device: str | None) -> Extractor:
        """Open the command's extractor in this process. Raises CheckpointError if the encoder of that name has other weights here."""
        extractor = open_extractor(self.features, device)
        if json_digest(extractor.identity) != self.features_key:
            reason = f"are other ones on {socket.gethostname()} than where the command was started: {extractor.identity}."
            raise CheckpointError("features", None, reason, "Bring the same files to every node.")
        return extractor


@dataclass(frozen=True, kw_only=True)
class CollectStatistics(_Stage):
    """First stage, a PartTask: each speaker's statistics, and a sample of frames to fit k-means to."""

    sample: int  # frames that a part keeps at most
    seed: int  # of the sample

    def target(self, part: Part) -> Path:
        settings = (self.features_key, self.speaker_column, self.max_seconds, self.sample, self.seed)
        return Path(self.scratch) / f"measured-{json_digest(VERSION, part.key, part.speed, *settings)}.npz"

    def open(self, device: str | None) -> PartFunction:
        extractor = self._open_extractor(device)
        return lambda part: self._make(part, extractor)

    def _make(self, part: Part, extractor: Extractor) -> dict[str, float]:
        statistics: dict[str, SpeakerStatistics] = {}
        frames, owners, priorities = [np.zeros((0, extractor.width), np.float32)], [], [np.zeros(0)]
        seconds, total, reason = 0.0, 0, ""
        items = [item for item in read_chunk(part.chunk) if extractor.per_speaker or item["chosen"]]
        for item, found, length in _extract_features(items, part.speed, extractor, self.max_seconds):
            if isinstance(found, str):  # the second stage reports it
                reason = reason or found * item["chosen"]
                continue
            speaker = _speaker_of(item, self.speaker_column, part.speed)
            if extractor.per_speaker:
                new = SpeakerStatistics.from_frames(found.values)
                statistics[speaker] = statistics[speaker] + new if speaker in statistics else new
            if item["chosen"]:
                total += len(found.values)
                seconds += length
                # Seeded by the id: which frames are kept depends neither on the number of parts nor on where the recordings are stored.
                random = np.random.Generator(np.random.PCG64(int(json_digest(item["id"], part.speed, self.seed), 16)))
                drawn = random.random(len(found.values))
                keep = lowest(drawn, self.sample)
                frames.append(found.values[keep])
                owners += [speaker] * len(keep) if extractor.per_speaker else []
                priorities.append(drawn[keep])
        values, drawn = np.concatenate(frames), np.concatenate(priorities)
        keep = lowest(drawn, self.sample)
        names, known = sorted(statistics), [statistics[name] for name in sorted(statistics)]
        arrays = {
            "speakers": np.array(names, dtype=np.str_),
            "counts": np.array([each.count for each in known], np.int64),
            "totals": np.array([each.total for each in known]).reshape(len(names), extractor.width),
            "squares": np.array([each.squares for each in known]).reshape(len(names), extractor.width),
            "sample": values[keep],
            "owners": np.array(owners, dtype=np.str_)[keep] if owners else np.zeros(0, np.str_),
            "priorities": drawn[keep],
            "frames": np.array(total),
            "reason": np.array(reason),
        }
        _write_arrays(self.target(part), arrays)
        return {"seconds": seconds, "utterances": len(items)}


def lowest(priorities: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` lowest of the priorities (frames,), ascending."""
    return np.sort(np.argsort(priorities, kind="stable")[:count])


@dataclass(frozen=True, kw_only=True)
class EncodeUnits(_Stage):
    """Second stage, a PartTask: the records."""

    codebook: str  # file of `write_codebook`
    codebook_key: str  # hash of its content
    keep_repeats: bool
    name: str  # of the data set, for the records' metadata
    corpus: str  # its folder, below which the records name their recordings
    form: str  # of the records: a key of _SUFFIX

    def target(self, part: Part) -> Path:
        settings = (self.features_key, self.codebook_key, self.max_seconds, self.keep_repeats, self.name, self.speaker_column)
        return Path(self.scratch) / f"records-{json_digest(VERSION, part.key, part.speed, *settings)}{_SUFFIX[self.form]}"

    def open(self, device: str | None) -> PartFunction:
        extractor = self._open_extractor(device)
        with np.load(self.codebook, allow_pickle=False) as book:
            centroids = book["centroids"]
            columns = (book["speakers"], book["means"], book["deviations"])
            speakers = {str(name): (mean, deviation) for name, mean, deviation in zip(*columns, strict=True)}
        return lambda part: self._make(part, extractor, centroids, speakers)

    def _make(self, part: Part, extractor: Extractor, centroids: np.ndarray, speakers: Normalisation) -> dict[str, float]:
        records, rejected, seconds, longest = [], [], 0.0, 0
        items = [item for item in read_chunk(part.chunk) if item["chosen"]]
        speed = {"speed": part.speed} if part.speed != 1.0 else {}
        for item, found, length in _extract_features(items, part.speed, extractor, self.max_seconds):
            if isinstance(found, str):
                rejected.append({"file": item["path"], "index": item["index"], "reason": found, "id": item["id"], **speed})
                continue
            values = self._normalise(found.values, item, part.speed, speakers) if extractor.per_speaker else found.values
            units = assign(values, centroids)
            units = units if self.keep_repeats else remove_repeats(units)
            seconds, longest = seconds + length, max(longest, len(units) + len(item["text"]))
            metadata = {
                **self._recording(item),
                **item["columns"],
                "dataset": self.name,
                "duration": round(length, 3),
                "unit_rate_hz": extractor.rate_hz,
            }
            metadata |= {"deduplicated": not self.keep_repeats, **speed}
            record = {"id": f"{item['id']}_sp{part.speed:g}" if speed else item["id"], "instruction": ASR_INSTRUCTION}
            record |= {"input": units_to_text(units.tolist()), "output": item["text"], "metadata": metadata}
            records.append(json.dumps(record, ensure_ascii=False) + "\n")
        target = self.target(part)
        summary = {"seconds": seconds, "records": len(records), "longest": longest, "rejected": rejected}
        # The records last: their file marks the part as done.
        storage.write_bytes(summary_path(target), json.dumps(summary, ensure_ascii=False).encode())
        lines = "".join(records).encode()
        storage.write_bytes(target, gzip.compress(lines, compresslevel=6, mtime=0) if self.form == "jsonl.gz" and lines else lines)
        return {"seconds": seconds, "utterances": len(items)}

    def _recording(self, item: Item) -> dict[str, Any]:
        """Where an utterance was read from: its recording, with the second that it begins at and the channel where it is a part."""
        path = Path(os.path.abspath(item["path"]))
        below = path.relative_to(self.corpus).as_posix() if path.is_relative_to(self.corpus) else str(path)
        part = {"start": item["start"]} if item["start"] or item["duration"] is not None else {}
        channel = item.get("channel")
        return {"recording": below, **part, **({} if channel is None or channel < 0 else {"channel": channel})}

    def _normalise(self, values: np.ndarray, item: Item, speed: float, speakers: Normalisation) -> np.ndarray:
        speaker = _speaker_of(item, self.speaker_column, speed)
        if speaker not in speakers:
            reason = "gave no frames when its speaker was measured, and does now."
            raise DataError("recording", item["path"], reason, f"Remove {self.scratch} and run this again.")
        mean, deviation = speakers[speaker]
        return ((values - mean) / deviation).astype(np.float32)


def write_codebook(path: Path, centroids: np.ndarray, speakers: Mapping[str, SpeakerStatistics]) -> Path:
    """Write what the second stage needs of the first: centroids (k, features) and each speaker's mean and deviation. Returns `path`."""
    names, width = sorted(speakers), centroids.shape[1]
    means, deviations = (np.array([getattr(speakers[name], each) for name in names]).reshape(-1, width) for each in ("mean", "deviation"))
    _write_arrays(path, {"centroids": centroids, "speakers": np.array(names, dtype=np.str_), "means": means, "deviations": deviations})
    return path


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with io.BytesIO() as sink:
        np.savez(sink, **arrays)  # type: ignore[arg-type]
        storage.write_bytes(path, sink.getvalue())


def summary_path(target: Path) -> Path:
    """The JSON file beside a part's records: {"seconds", "records", "longest" (units and characters of one record), "rejected" (a line of
    rejected.jsonl for each utterance without a record)}."""
    return target.with_name(f"{target.name.split('.')[0]}.about.json")


def _speaker_of(item: Item, column: str, speed: float) -> str:
    """The item's speaker; at another speed than 1 it counts as another speaker."""
    speaker = str(item["columns"].get(column, ""))
    return speaker if speed == 1.0 else f"{speaker} at {speed:g}"


def _extract_features(
    items: Sequence[Item], speed: float, extractor: Extractor, max_seconds: float
) -> Iterator[tuple[Item, Frames | str, float]]:
    """Yield each item with its frames, or with the reason why it has none, and its seconds. Items that cannot be read may come early."""
    waiting: list[tuple[Item, np.ndarray]] = []

    def flush() -> Iterator[tuple[Item, Frames | str, float]]:
        for (item, wave), frames in zip(waiting, extractor([wave for _, wave in waiting]), strict=True):
            fault = "is shorter than one frame" if not len(frames.values) else "gives features that are not finite"
            yield item, frames if np.isfinite(frames.values).all() and len(frames.values) else fault, len(wave) / extractor.sample_rate
        waiting.clear()

    for item in items:
        try:
            part = (item["start"], item["duration"], max_seconds, item.get("channel"), item.get("length"))
            wave = load_audio(Path(item["path"]), extractor.sample_rate, speed, *part)
        except DataError as error:
            if item["stamp"] is not None and list(file_stamp(Path(item["path"])) or ()) != item["stamp"]:
                reason = f"has changed since the corpus was listed, or cannot be reached from {socket.gethostname()}."
                raise DataError("recording", item["path"], reason, "Mount the corpus on every node, and run this again.") from error
            yield item, error.rule.rstrip("."), 0.0
            continue
        waiting.append((item, wave))
        if sum(len(wave) for _, wave in waiting) > _AT_ONCE * extractor.sample_rate:
            yield from flush()
    if waiting:
        yield from flush()
