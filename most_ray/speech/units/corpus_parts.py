"""A corpus in parts of some recordings each. Making a part is a pure function of its recordings and of a work's settings, and its file is
complete or is not there: so parts can be made in any order, by any number of processes, and a run that was stopped goes on where it was."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np

from most_ray.errors import CheckpointError, DataError, UserError
from most_ray.io import storage
from most_ray.records.record import ASR_INSTRUCTION, units_to_text
from most_ray.speech.corpora.audio import load_audio
from most_ray.speech.corpora.corpus import Condition, CorpusOptions, Unusable, matches_all, read_corpus
from most_ray.speech.units.clustering import SpeakerStatistics, assign, remove_repeats
from most_ray.speech.units.extractors import open_extractor
from most_ray.speech.units.features import Extractor, FeatureSettings, Frames, MfccSettings

PART = 128  # utterances
VERSION = 1  # of how recordings become records: raised with every change that changes a unit
_AT_ONCE = 240.0  # seconds of audio that are in memory together
_SUFFIX = {"jsonl.gz": ".jsonl.gz", "jsonl": ".jsonl", "json": ".jsonl"}  # of a part; JSON is put together at the end

Item = dict[str, Any]  # an utterance: id, index (in the corpus), path, text, start, duration, columns, chosen, stamp


@dataclass(frozen=True)
class Part:
    """Some utterances, listed in the file `chunk`, at one speed. `key` says which they are and what their recordings were."""

    index: int
    chunk: str
    speed: float
    key: str


@dataclass(frozen=True)
class Scan:
    """What was found in a corpus: `parts` of the utterances (for each speed, in the corpus' order), a file of entries that are none, a
    line each, all columns, and the bytes of audio."""

    parts: tuple[Part, ...]
    unusable: Path
    unusable_key: str
    columns: frozenset[str]
    utterances: int
    chosen: int
    bytes: int


class PartFunction(Protocol):
    """Makes parts, one after the other. Returns what it went through: {"seconds", "utterances"}."""

    def __call__(self, part: Part) -> dict[str, float]: ...


class PartTask(Protocol):
    """Something to be done with each part; goes to other processes as it is."""

    def open(self, device: str | None) -> PartFunction:
        """`device`: of torch; None: the best there is."""
        ...

    def target(self, part: Part) -> Path:
        """The file that is there when the part is done."""
        ...


Runner = Callable[[PartTask, Sequence[Part]], Iterator[dict[str, float]]]
# Bytes of audio from which on a cluster is worth its start: some two minutes' work of one core.
_WORTH_BYTES = {"mfcc": 512 << 20, "encoder": 16 << 20}


def worth_a_cluster(features: FeatureSettings, size: int) -> bool:
    """Whether so many bytes of audio are much to do."""
    return size >= _WORTH_BYTES["mfcc" if isinstance(features, MfccSettings) else "encoder"]


def run_in_process(work: PartTask, parts: Sequence[Part]) -> Iterator[dict[str, float]]:
    """The parts one by one in this process."""
    maker = work.open(None)
    for part in parts:
        yield maker(part)


class PartWorker:
    """Makes parts in a process of a pool, which opens its encoder once: a subclass says for what `work` and on which `device`. What a user
    can mend comes back in the row, for the pool would wrap it. It lives here so that such a process imports no more than it needs."""

    work: PartTask
    device: str

    def __init__(self) -> None:
        self._make = self.work.open(self.device)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row with a part's fields to one with its counts, and `error`."""
        try:
            return {**self._make(Part(**row)), "error": None}
        except UserError as error:
            return {"seconds": 0.0, "utterances": 0, "error": error}


def scan_corpus(options: CorpusOptions, conditions: Sequence[Condition], speeds: Sequence[float], speaker: str, scratch: Path) -> Scan:
    """List the corpus' utterances in files of PART each. Kept are those for which the conditions hold and, not `chosen`, the other
    utterances of their speakers, which tell what the speaker sounds like."""
    chunks = scratch / "chunks"
    chunks.mkdir(parents=True, exist_ok=True)
    unusable = scratch / "unusable.jsonl"
    columns: set[str] = set()
    speakers: set[str] = set()
    counts = {"utterances": 0, "chosen": 0, "bytes": 0}

    last = ""

    def items(aside: TextIO) -> Iterator[Item]:
        nonlocal last
        for entry in read_corpus(options):
            if isinstance(entry, Unusable):
                about = {key: value for key, value in asdict(entry).items() if value is not None}
                line = json.dumps(about, ensure_ascii=False) + "\n"
                told.update(line.encode())
                aside.write(line)
                continue
            chosen = matches_all(entry, conditions)
            columns.update(entry.columns)
            stamp = _stamp(entry.path)
            if chosen:
                speakers.add(str(entry.columns.get(speaker, "")))
                counts["bytes"] += stamp[0] if stamp and str(entry.path) != last else 0  # of a long recording's parts once
                last = str(entry.path)
            yield {**asdict(entry), "path": str(entry.path.absolute()), "index": counts["utterances"], "chosen": chosen, "stamp": stamp}
            counts["utterances"] += 1
            counts["chosen"] += chosen

    told = hashlib.blake2b(digest_size=12)
    with unusable.open("w", encoding="utf-8") as aside:
        everything = _write_chunks(items(aside), chunks)
    if conditions:
        kept = (item for file, _ in everything for item in read_chunk(file) if str(item["columns"].get(speaker, "")) in speakers)
        listed = _write_chunks(kept, chunks)
    else:
        listed = everything
    parts = tuple(
        Part(index, str(file), speed, key)
        for index, (speed, (file, key)) in enumerate((speed, each) for speed in speeds for each in listed)
    )
    return Scan(parts, unusable, told.hexdigest(), frozenset(columns), counts["utterances"], counts["chosen"], counts["bytes"])


def read_chunk(file: str | Path) -> list[Item]:
    with open(file, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def json_digest(*values: Any) -> str:
    return hashlib.blake2b(json.dumps(values, sort_keys=True, default=str).encode(), digest_size=12).hexdigest()


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _write_chunks(items: Iterable[Item], folder: Path) -> list[tuple[Path, str]]:
    """Files of PART items each, with what they hold as a digest."""
    files: list[tuple[Path, str]] = []
    waiting: list[Item] = []

    def write() -> None:
        content = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in waiting).encode()
        key = hashlib.blake2b(content, digest_size=12).hexdigest()
        file = folder / f"{key}.jsonl"  # by what it holds: no other command can put something else under the name
        if not file.exists():
            storage.write_bytes(file, content)
        files.append((file, key))
        waiting.clear()

    for item in items:
        waiting.append(item)
        if len(waiting) == PART:
            write()
    if waiting:
        write()
    return files


@dataclass(frozen=True)
class CollectStatistics:
    """First work: what each speaker sounds like, and a sample of frames for k-means. `sample` frames of a part are kept at most."""

    features: FeatureSettings
    features_key: str
    speaker: str
    max_seconds: float
    sample: int
    seed: int
    scratch: str

    def target(self, part: Part) -> Path:
        key = json_digest(VERSION, part.key, part.speed, self.features_key, self.speaker, self.max_seconds, self.sample, self.seed)
        return Path(self.scratch) / f"measured-{key}.npz"

    def open(self, device: str | None) -> PartFunction:
        extractor = _checked_extractor(self.features, device, self.features_key)
        return lambda part: self._make(part, extractor)

    def _make(self, part: Part, extractor: Extractor) -> dict[str, float]:
        statistics: dict[str, SpeakerStatistics] = {}
        frames, owners, priorities = [np.zeros((0, extractor.width), np.float32)], [], [np.zeros(0)]
        target = self.target(part)
        seconds, total, reason = 0.0, 0, ""
        items = [item for item in read_chunk(part.chunk) if extractor.per_speaker or item["chosen"]]
        for item, found, length in extract_features(items, part.speed, extractor, self.max_seconds):
            if isinstance(found, str):  # told by the second work
                reason = reason or found * item["chosen"]
                continue
            speaker = speaker_key(item, self.speaker, part.speed)
            if extractor.per_speaker:
                known, new = statistics.get(speaker), SpeakerStatistics.from_frames(found.values)
                statistics[speaker] = known + new if known else new
            if item["chosen"]:
                total += len(found.values)
                seconds += length
                # By the id: which frames are kept hangs neither on how many parts there are nor on where the recordings lie.
                random = np.random.Generator(np.random.PCG64(int(json_digest(item["id"], part.speed, self.seed), 16)))
                drawn = random.random(len(found.values))
                keep = np.sort(np.argsort(drawn, kind="stable")[: self.sample])
                frames.append(found.values[keep])
                owners += [speaker] * len(keep) if extractor.per_speaker else []
                priorities.append(drawn[keep])
        values, drawn = np.concatenate(frames), np.concatenate(priorities)
        keep = np.sort(np.argsort(drawn, kind="stable")[: self.sample])
        names = sorted(statistics)
        arrays = {
            "speakers": np.array(names, dtype=np.str_),
            "counts": np.array([statistics[name].count for name in names], np.int64),
            "totals": np.array([statistics[name].total for name in names]).reshape(len(names), extractor.width),
            "squares": np.array([statistics[name].squares for name in names]).reshape(len(names), extractor.width),
            "sample": values[keep],
            "owners": np.array(owners, dtype=np.str_)[keep] if owners else np.zeros(0, np.str_),
            "priorities": drawn[keep],
            "frames": np.array(total),
            "reason": np.array(reason),
        }
        with io.BytesIO() as sink:
            np.savez(sink, **arrays)  # type: ignore[arg-type]
            storage.write_bytes(target, sink.getvalue())
        return {"seconds": seconds, "utterances": len(items)}


@dataclass(frozen=True)
class EncodeUnits:
    """Second work: the records. `codebook` is a file of centroids and, where features are normalised, speakers' means and deviations."""

    features: FeatureSettings
    features_key: str
    speaker: str
    max_seconds: float
    codebook: str
    codebook_key: str
    keep_repeats: bool
    name: str
    form: str
    scratch: str

    def target(self, part: Part) -> Path:
        settings = (self.features_key, self.codebook_key, self.max_seconds, self.keep_repeats, self.name, self.speaker)
        key = json_digest(VERSION, part.key, part.speed, *settings)
        return Path(self.scratch) / f"records-{key}{_SUFFIX[self.form]}"

    def open(self, device: str | None) -> PartFunction:
        extractor = _checked_extractor(self.features, device, self.features_key)
        with np.load(self.codebook, allow_pickle=False) as book:
            centroids = book["centroids"]
            normal = {
                str(name): (mean, deviation)
                for name, mean, deviation in zip(book["speakers"], book["means"], book["deviations"], strict=True)
            }
        return lambda part: self._make(part, extractor, centroids, normal)

    def _make(
        self, part: Part, extractor: Extractor, centroids: np.ndarray, normal: dict[str, tuple[np.ndarray, np.ndarray]]
    ) -> dict[str, float]:
        records: list[str] = []
        rejected: list[Item] = []
        seconds, longest = 0.0, 0
        items = [item for item in read_chunk(part.chunk) if item["chosen"]]
        for item, found, length in extract_features(items, part.speed, extractor, self.max_seconds):
            speed = {"speed": part.speed} if part.speed != 1.0 else {}
            if isinstance(found, str):
                rejected.append({"file": item["path"], "index": item["index"], "reason": found, "id": item["id"], **speed})
                continue
            values = found.values
            if extractor.per_speaker:
                speaker = speaker_key(item, self.speaker, part.speed)
                if speaker not in normal:
                    reason = "gave no frames when its speaker was measured, and does now."
                    raise DataError("recording", item["path"], reason, f"Remove {self.scratch} and run this again.")
                mean, deviation = normal[speaker]
                values = ((values - mean) / deviation).astype(np.float32)
            units = assign(values, centroids)
            units = units if self.keep_repeats else remove_repeats(units)
            seconds, longest = seconds + length, max(longest, len(units) + len(item["text"]))
            metadata = {
                **item["columns"],
                "dataset": self.name,
                "duration": round(length, 3),
                "unit_rate_hz": extractor.rate_hz,
                "deduplicated": not self.keep_repeats,
                **speed,
            }
            record = {
                "id": f"{item['id']}_sp{part.speed:g}" if speed else item["id"],
                "instruction": ASR_INSTRUCTION,
                "input": units_to_text(units.tolist()),
                "output": item["text"],
                "metadata": metadata,
            }
            records.append(json.dumps(record, ensure_ascii=False))
        target = self.target(part)
        about = {"seconds": seconds, "records": len(records), "longest": longest, "rejected": rejected}
        # The records last: they say that the part is done.
        storage.write_bytes(summary_path(target), json.dumps(about, ensure_ascii=False).encode())
        lines = "".join(f"{record}\n" for record in records).encode()
        packed = gzip.compress(lines, compresslevel=6, mtime=0) if self.form == "jsonl.gz" and lines else lines
        storage.write_bytes(target, packed)
        return {"seconds": seconds, "utterances": len(items)}


def summary_path(target: Path) -> Path:
    """The file that tells of a part's records: {"seconds", "records", "longest" (units and characters of one), "rejected": entries that
    gave none}."""
    return target.with_name(f"{target.name.split('.')[0]}.about.json")


def speaker_key(item: Item, column: str, speed: float) -> str:
    """Who speaks: at another speed, somebody else."""
    speaker = str(item["columns"].get(column, ""))
    return speaker if speed == 1.0 else f"{speaker} at {speed:g}"


def _checked_extractor(features: FeatureSettings, device: str | None, key: str) -> Extractor:
    """The extractor that the command was started with.

    Raises:
        CheckpointError: in this process the same name stands for other weights.
    """
    extractor = open_extractor(features, device)
    if json_digest(extractor.identity) != key:
        reason = f"are other ones on {socket.gethostname()} than where the command was started: {extractor.identity}."
        raise CheckpointError("features", None, reason, "Bring the same files to every node.")
    return extractor


def extract_features(
    items: Sequence[Item], speed: float, extractor: Extractor, max_seconds: float
) -> Iterator[tuple[Item, Frames | str, float]]:
    """Each item with its frames, or the reason why there are none, and its seconds. What cannot be read comes ahead of what can."""
    waiting: list[tuple[Item, np.ndarray]] = []

    def flush() -> Iterator[tuple[Item, Frames | str, float]]:
        for (item, wave), frames in zip(waiting, extractor([wave for _, wave in waiting]), strict=True):
            yield item, frames if len(frames.values) else "is shorter than one frame", len(wave) / extractor.sample_rate
        waiting.clear()

    for item in items:
        try:
            wave = load_audio(Path(item["path"]), extractor.sample_rate, speed, item["start"], item["duration"], max_seconds)
        except DataError as error:
            if item["stamp"] is not None and list(_stamp(Path(item["path"])) or ()) != item["stamp"]:
                reason = f"has changed since the corpus was listed, or cannot be reached from {socket.gethostname()}."
                raise DataError("recording", item["path"], reason, "Mount the corpus on every node, and run this again.") from error
            yield item, error.rule.rstrip("."), 0.0
            continue
        waiting.append((item, wave))
        if sum(len(wave) for _, wave in waiting) > _AT_ONCE * extractor.sample_rate:
            yield from flush()
    if waiting:
        yield from flush()
