"""A corpus in parts of some utterances each, and who works on them.

The result of a part is a pure function of its recordings and of a task's settings, and its file is complete or does not exist. So parts can
be made in any order, by any number of processes, and a command that was stopped continues where it was.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from most_ray.errors import UserError
from most_ray.io import storage
from most_ray.io.json_values import parse_json
from most_ray.speech.corpora.corpus import Condition, CorpusOptions, Unusable, matches_all, read_corpus
from most_ray.speech.units.features import FeatureSettings

PART = 128  # utterances
VERSION = 1  # of how recordings become records: to be raised with every change that changes a unit

# An utterance: id, index (in the corpus), path, text, start, duration, columns, chosen, stamp; channel and length where they are given.
Item = dict[str, Any]
Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]  # (items, what they are, how many) -> the items, shown as they come


@dataclass(frozen=True)
class Part:
    """Some utterances of a corpus at one speed."""

    index: int
    chunk: str  # file that lists the utterances
    speed: float  # how many times as fast the recordings are played
    key: str  # hash of the utterances, and of the size and time of their recordings


@dataclass(frozen=True)
class Scan:
    """What a corpus contains."""

    parts: tuple[Part, ...]  # for each speed, in the corpus' order
    unusable: Path  # JSON Lines file of the entries that are not utterances
    unusable_key: str  # hash of that file
    columns: frozenset[str]  # of all utterances
    utterances: int
    chosen: int  # utterances that meet the conditions
    speakers: int  # of these, where the corpus names them; a copy at another speed is of the same speaker
    bytes: int  # of the chosen utterances' recordings
    unusable_entries: int  # without recordings that a table does not list
    unread: Mapping[str, int]  # recordings in formats that are not read, by suffix


PartFunction = Callable[[Part], dict[str, float]]  # makes the file of a part; returns how much it read: {"seconds", "utterances"}


class PartTask(Protocol):
    """Something to be made of each part. Picklable: it is sent to other processes."""

    def open(self, device: str | None) -> PartFunction:
        """Load what the task needs, once per process. `device`: of torch; None: a GPU if there is one."""
        ...

    def target(self, part: Part) -> Path:
        """The file that exists once the part is done."""
        ...


Runner = Callable[[PartTask, Sequence[Part]], Iterator[dict[str, float]]]  # makes the parts; yields what each PartFunction returned


def worth_a_cluster(features: FeatureSettings, size: int) -> bool:
    """Whether so many bytes of audio take long enough to be worth the start of a cluster."""
    return size >= features.cluster_bytes


def run_in_process(task: PartTask, parts: Sequence[Part]) -> Iterator[dict[str, float]]:
    """Make the parts one by one in this process; a `Runner`."""
    yield from map(task.open(None), parts)


class PartWorker:
    """Makes parts in a process of a pool, which opens its encoder once. A subclass sets `task` and `device`. An error that a user can fix
    is returned in the row, because the pool would wrap it. This class is not beside the pool, so that the process imports no more than it
    needs."""

    task: PartTask
    device: str

    def __init__(self) -> None:
        self._make = self.task.open(self.device)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Make the part whose fields are in `row`. Returns its counts, and `error`, None where there was none."""
        try:
            return {**self._make(Part(**row)), "error": None}
        except UserError as error:
            return {"seconds": 0.0, "utterances": 0, "error": error}


def scan_corpus(
    options: CorpusOptions, conditions: Sequence[Condition], speeds: Sequence[float], speaker_column: str, scratch: Path
) -> Scan:
    """List the corpus' utterances in files of PART each, below the folder `scratch`. Listed are the utterances that meet the conditions
    (`chosen`) and, for the statistics of their speakers, these speakers' others."""
    chunks = scratch / "chunks"
    chunks.mkdir(parents=True, exist_ok=True)
    unusable, unusable_hash = scratch / "unusable.jsonl", hashlib.blake2b(digest_size=12)
    columns, speakers, last = set[str](), set[str](), ""
    counts = {"utterances": 0, "chosen": 0, "bytes": 0, "unusable_entries": 0}
    unread = Counter[str]()

    def items(sink: TextIO) -> Iterator[Item]:
        nonlocal last
        for entry in read_corpus(options):
            if isinstance(entry, Unusable):
                shown = {key: value for key, value in asdict(entry).items() if value is not None and key != "unlisted"}
                line = json.dumps(shown, ensure_ascii=False) + "\n"
                unusable_hash.update(line.encode())
                sink.write(line)
                counts["unusable_entries"] += not entry.unlisted
                unread.update([entry.suffix] if entry.suffix else [])
                continue
            chosen = matches_all(entry, conditions)
            columns.update(entry.columns)
            stamp = file_stamp(entry.path)
            if chosen:
                speakers.add(str(entry.columns.get(speaker_column, "")))
                counts["bytes"] += stamp[0] if stamp and str(entry.path) != last else 0  # a long recording with many utterances counts once
                last = str(entry.path)
            item = {key: value for key, value in asdict(entry).items() if value is not None or key not in ("channel", "length")}
            yield {**item, "path": str(entry.path.absolute()), "index": counts["utterances"], "chosen": chosen, "stamp": stamp}
            counts["utterances"] += 1
            counts["chosen"] += chosen

    with unusable.open("w", encoding="utf-8") as sink:
        listed = _write_chunks(items(sink), chunks)
    if conditions:
        kept = (item for file, _ in listed for item in read_chunk(file) if str(item["columns"].get(speaker_column, "")) in speakers)
        listed = _write_chunks(kept, chunks)
    pairs = [(speed, file, key) for speed in speeds for file, key in listed]
    parts = tuple(Part(index, str(file), speed, key) for index, (speed, file, key) in enumerate(pairs))
    known = len(speakers - {""})
    return Scan(parts, unusable, unusable_hash.hexdigest(), frozenset(columns), **counts, speakers=known, unread=dict(unread))


def read_chunk(file: str | Path) -> list[Item]:
    """The utterances that a part's file lists."""
    with open(file, encoding="utf-8") as lines:
        return [parse_json(line) for line in lines]


def json_digest(*values: Any) -> str:
    """Hash of values that JSON can hold, in 24 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True, default=str).encode(), digest_size=12).hexdigest()


def file_stamp(path: Path) -> tuple[int, int] | None:
    """Size in bytes and modification time in nanoseconds; None where the file does not exist or cannot be reached."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _write_chunks(items: Iterable[Item], folder: Path) -> list[tuple[Path, str]]:
    """Write files of PART items each; returns each file and the hash of its content."""
    files: list[tuple[Path, str]] = []
    items = iter(items)
    while chunk := list(itertools.islice(items, PART)):
        content = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in chunk).encode()
        key = hashlib.blake2b(content, digest_size=12).hexdigest()
        file = folder / f"{key}.jsonl"  # named by its content, so no other command can write something else under the name
        if not file.exists():
            storage.write_bytes(file, content)
        files.append((file, key))
    return files
