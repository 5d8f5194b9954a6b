"""Records: the unit of training and evaluation data, in every JSON form that users have, streamed.

`{"id", "instruction", "input", "output", "metadata"}`; speech is written as `[Hu7][Hu90]...`. The task follows from where the
speech is: in the input (ASR), in the output (TTS), in neither (text).
"""

from __future__ import annotations

import datetime as dt
import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import ijson
import numpy as np
from ijson.common import ObjectBuilder

from most_ray.errors import DataError

Task = Literal["asr", "tts", "text"]
TASKS: tuple[Task, ...] = ("asr", "tts", "text")
N_UNITS = 500
TTS_INSTRUCTION = "Convert the following text into speech."
ASR_INSTRUCTION = "Transcribe the following speech into text."
RECORD_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")

_UNIT = re.compile(r"\[Hu(\d+)\]")
_UNITS_ONLY = re.compile(r"\s*(?:\[Hu\d+\]\s*)+")
_REQUIRED = ("id", "instruction", "input", "output")
_CHUNK = 1 << 16


class RecordError(ValueError):
    """One record breaks a rule. The message is the reason that is kept in rejected.jsonl."""


@dataclass(frozen=True)
class Record:
    """One example. `input` and `output` are text, or unit ids as an int32 array of shape (units,)."""

    id: str
    instruction: str
    input: str | np.ndarray
    output: str | np.ndarray
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        if not isinstance(self.input, str):
            return "asr"
        return "text" if isinstance(self.output, str) else "tts"


def units_to_text(units: Iterable[int]) -> str:
    """Unit ids as `[Hu7][Hu90]...`."""
    return "".join(f"[Hu{unit}]" for unit in units)


def parse_units(text: str) -> np.ndarray:
    """`[Hu7][Hu90]...` as int32 unit ids, shape (units,).

    Raises:
        RecordError: something else stands between the units, or a unit lies outside 0..499.
    """
    if not _UNITS_ONLY.fullmatch(text):
        raise RecordError("mixes speech units with other text")
    numbers = _UNIT.findall(text)
    outside = next((number for number in numbers if len(number) > 9 or int(number) >= N_UNITS), None)
    if outside is not None:
        raise RecordError(f"unit [Hu{outside[:20]}] is outside 0..{N_UNITS - 1}")
    return np.array(numbers, dtype=np.int32)


def parse_record(raw: object) -> Record:
    """Check one decoded JSON value and make a Record of it.

    Raises:
        RecordError: a field is missing or of the wrong type, the output is empty, a unit is out of range, or speech stands on
            both sides.
    """
    if not isinstance(raw, dict):
        raise RecordError(f"is a JSON {type(raw).__name__}, not an object")
    missing = [name for name in _REQUIRED if name not in raw]
    if missing:
        raise RecordError(f"has no field {', '.join(map(repr, missing))}")
    record_id = raw["id"] if isinstance(raw["id"], str) else json.dumps(raw["id"])
    for name in _REQUIRED[1:]:
        if not isinstance(raw[name], str):
            raise RecordError(f"field {name!r} is {type(raw[name]).__name__}, not a string")
    for name in ("id", *_REQUIRED[1:]):
        if not _encodable(record_id if name == "id" else raw[name]):
            raise RecordError(f"field {name!r} holds half a surrogate pair, which is no text")
    metadata = raw.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise RecordError(f"field 'metadata' is {type(metadata).__name__}, not an object")
    if not raw["output"].strip():
        raise RecordError("has an empty output")
    sides = {}
    for name in ("input", "output"):
        try:
            sides[name] = parse_units(raw[name]) if "[Hu" in raw[name] else raw[name]
        except RecordError as error:
            raise RecordError(f"field {name!r} {error}") from error
    if not isinstance(sides["input"], str) and not isinstance(sides["output"], str):
        raise RecordError("has speech in both input and output")
    if isinstance(sides["input"], str) and not sides["input"].strip() and not isinstance(sides["output"], str):
        raise RecordError("has speech to produce but an empty input")
    return Record(record_id, raw["instruction"], sides["input"], sides["output"], metadata)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def asr_to_tts(raw: Mapping[str, Any], dataset: str, timestamp: dt.datetime) -> dict[str, Any]:
    """An ASR record (JSON object) as the TTS record of the same utterance: sides swapped, `tts_` before the id, metadata kept."""
    return {
        "id": f"tts_{raw['id']}",
        "instruction": TTS_INSTRUCTION,
        "input": raw["output"],
        "output": raw["input"],
        "metadata": {
            **(raw.get("metadata") or {}),
            "task": "tts",
            "original_task": "asr",
            "dataset": dataset,
            "conversion_timestamp": timestamp.isoformat(timespec="seconds"),
        },
    }


def record_files(directory: Path, pattern: str = "*") -> list[Path]:
    """The record files of a directory (or the one file given), sorted by name.

    Raises:
        DataError: the directory is not there, or holds no record file.
    """
    if directory.is_file():
        return [directory]
    if not directory.is_dir():
        raise DataError("directory", str(directory), "does not exist.", "Check the path.")
    files = sorted(
        path for path in directory.rglob(pattern) if path.is_file() and path.name.endswith(RECORD_SUFFIXES) and path.name not in NOT_RECORDS
    )
    if not files:
        raise DataError("directory", str(directory), f"holds no records ({', '.join(RECORD_SUFFIXES)}).")
    return files


# Files that the project itself writes beside records.
NOT_RECORDS = frozenset({"units.json", "rejected.jsonl"})


def open_maybe_gzip(path: Path) -> BinaryIO:
    """Binary reader of the file's content, decompressed when its name ends in .gz."""
    return cast(BinaryIO, gzip.open(path, "rb")) if path.name.endswith(".gz") else path.open("rb")


def read_raw(path: Path) -> Iterator[tuple[int, object]]:
    """Stream `(index, decoded JSON value)` of every record of a file: a list, `{"data": [...]}`, one object, or JSON Lines.

    Memory does not grow with the file. A line of JSON Lines that is not JSON comes as a `RecordError` value in place of the
    record (the others go on); any other broken file raises.

    Raises:
        DataError: the file is not JSON; says file and byte offset.
    """
    try:
        with open_maybe_gzip(path) as stream:
            if path.name.removesuffix(".gz").endswith(".jsonl"):
                yield from _read_lines(stream)
            else:
                yield from enumerate(_read_values(stream))
    except ijson.JSONError as error:
        offset = _error_offset(path)
        raise DataError("file", str(path), f"is not JSON at byte {offset} ({_first_line(error)}).") from error
    except (EOFError, gzip.BadGzipFile) as error:
        raise DataError("file", str(path), f"is not a whole gzip file ({error}).") from error


def _read_lines(stream: BinaryIO) -> Iterator[tuple[int, object]]:
    offset = index = 0
    for line in stream:
        if line.strip():
            try:
                value: object = json.loads(line)
            except (ValueError, RecursionError) as error:
                position = offset + (error.pos if isinstance(error, json.JSONDecodeError) else 0)
                value = RecordError(f"is not JSON at byte {position} ({error})")
            yield index, value
            index += 1
        offset += len(line)


def _read_values(stream: BinaryIO) -> Iterator[object]:
    """Records among the top-level values: the elements of a list, the elements of an object's "data" list, or objects."""
    builder: ObjectBuilder | None = None  # collects the record being read
    base = ""  # where that record stands: "", "item" or "data.item"
    in_data = False  # inside a top-level object that wraps its records in "data"
    scalars = ("string", "number", "boolean", "null")
    events = ijson.parse(io.BufferedReader(_AsRaw(stream), _CHUNK), multiple_values=True, use_float=True)
    for prefix, event, value in events:
        # A top-level "data" wraps records, unless the object has shown an id before it and so is a record itself.
        wrapper = base == prefix == "" and event == "map_key" and value == "data"
        if builder is not None and not (wrapper and "id" not in builder.value):
            builder.event(event, value)
            if event in ("end_map", "end_array") and prefix == base:
                yield builder.value
                builder = None
        elif prefix == "" and event == "map_key":
            in_data, builder = in_data or value == "data", None
        elif prefix == "" and event == "end_map":
            in_data = False
        elif (event == "start_map" and prefix in ("", "item")) or (in_data and prefix == "data.item" and event == "start_map"):
            builder, base = ObjectBuilder(), prefix
            builder.event(event, value)
        elif event in scalars and prefix in ("", "item", "data.item"):
            yield value
        elif in_data and prefix == "data" and event not in ("start_array", "end_array"):
            yield RecordError("'data' is not a list of records")
        elif event == "start_array" and prefix in ("item", "data.item"):
            yield RecordError("is a JSON list, not an object")


class _AsRaw(io.RawIOBase):
    """Lets a decompressing stream be re-buffered in chunks of a known size."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _error_offset(path: Path) -> int:
    """Byte at which the (decompressed) file stops being JSON: the parse again, its last chunk byte by byte."""

    @ijson.coroutine
    def ignore() -> Any:
        while True:
            yield

    def feed(limit: int) -> int:
        parser = ijson.basic_parse_coro(ignore(), multiple_values=True)
        position = 0
        with open_maybe_gzip(path) as stream:
            while chunk := stream.read(_CHUNK if position < limit else 1):
                try:
                    parser.send(chunk)
                except ijson.JSONError:
                    return position
                position += len(chunk)
        return position

    return feed(feed(1 << 62))


def _first_line(error: Exception) -> str:
    message = error.args[0] if error.args else error
    text = message.decode(errors="replace") if isinstance(message, bytes) else str(message)
    return text.strip().splitlines()[0] if text.strip() else type(error).__name__
