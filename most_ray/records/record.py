"""Records, the units of training and evaluation data, checked and parsed from decoded JSON.

A record is `{"id", "instruction", "input", "output", "metadata"}`; speech is written as `[Hu7][Hu90]...`. The task follows from where
the speech is: in the input (ASR), in the output (TTS), in neither (text).
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from most_ray.errors import RecordError

Task = Literal["asr", "tts", "text"]
TASKS: tuple[Task, ...] = ("asr", "tts", "text")
N_UNITS = 500  # speech units in the vocabulary
TTS_INSTRUCTION = "Convert the following text into speech."
ASR_INSTRUCTION = "Transcribe the following speech into text."

_UNIT = re.compile(r"\[Hu(\d+)\]")
_UNIT_ROW = re.compile(r"(?:\[Hu\d+\]\s*){3}")
_UNITS_ONLY = re.compile(r"\s*(?:\[Hu\d+\]\s*)+")
_BEGINS_UNIT = re.compile(r"\[Hu\s*\d")  # [Humming] is text
# How other projects spell units: a row of them, or a field of nothing else, is no text.
_OTHER_UNIT = r"(?:<\|?(?:unit|audio|speech|sound|token|code|hubert|hu|km|u|s)?[ _-]?\d{1,5}\|?>|\[(?:hubert|hu|unit|u)[ _-]?\d{1,5}\]) ?"
_MARKER = r"(?:<\|?/?[a-z_]{1,24}\|?>|\[[a-z]{1,12}\]) ?"
_MISSPELLED = re.compile(rf"(?:{_OTHER_UNIT}){{3}}|\A\s*(?:{_MARKER})?(?:{_OTHER_UNIT}){{1,2}}(?:{_MARKER})?\s*\Z", re.IGNORECASE)
_UNITS_RULE = "speech units are one string, [Hu7][Hu90]..."
_REQUIRED = ("id", "instruction", "input", "output")


@dataclass(frozen=True)
class Record:
    """One example."""

    id: str
    instruction: str
    input: str | np.ndarray  # text, or unit ids, int32 (units,)
    output: str | np.ndarray  # text, or unit ids, int32 (units,); at most one of the two is speech
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        """What the record trains: it follows from where the speech is."""
        if not isinstance(self.input, str):
            return "asr"
        return "text" if isinstance(self.output, str) else "tts"


def units_to_text(units: Iterable[int]) -> str:
    """Write unit ids as `[Hu7][Hu90]...`."""
    return "".join(f"[Hu{unit}]" for unit in units)


def parse_units(text: str) -> np.ndarray:
    """Parse `[Hu7][Hu90]...` to unit ids, int32 (units,).

    Raises:
        RecordError: there is other text between the units, or a unit is outside 0..499.
    """
    if not _UNITS_ONLY.fullmatch(text):
        other = _UNIT.sub("", text).strip()[:30]
        raise RecordError(f"mixes speech units with other text ({other!r}); {_UNITS_RULE}")
    numbers = _UNIT.findall(text)
    outside = next((number for number in numbers if len(number) > 9 or int(number) >= N_UNITS), None)
    if outside is not None:
        raise RecordError(f"unit [Hu{outside[:20]}] is outside 0..{N_UNITS - 1}")
    return np.array(numbers, dtype=np.int32)


def _unit_tables() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tables that recognise a unit by the eight bytes that end with its "]".

    Each has shape (4096,) and is indexed by the low nibbles of the three bytes before the "]". No two units share an index: the nibbles
    of "u" and "H" are 5 and 8, and no unit begins with 5 or 8 hundred ("Hu7", "u12" and "123" are the three cases).

    Returns:
        The unit, int32; the length of "[HuN]", int64; its bytes, right-aligned in a little-endian uint64; a mask of these bytes, uint64.
    """
    unit_of, size = np.zeros(4096, np.int32), np.ones(4096, np.int64)
    spelled, mask = np.full(4096, 1, np.uint64), np.zeros(4096, np.uint64)  # where there is no unit, 0 == 1 rejects the bytes
    for unit in range(N_UNITS):
        text = f"[Hu{unit}]".encode()
        index = (text[-4] & 15) << 8 | (text[-3] & 15) << 4 | (text[-2] & 15)
        unit_of[index], size[index] = unit, len(text)
        spelled[index] = int.from_bytes(text.rjust(8, b"\0"), "little")
        mask[index] = int.from_bytes((b"\xff" * len(text)).rjust(8, b"\0"), "little")
    return unit_of, size, spelled, mask


_UNIT_OF, _SIZE, _SPELLED, _MASK = _unit_tables()
_GATHER = np.uint64(1 | 1 << 12 | 1 << 24)  # multiplied with three nibbles a byte apart, it puts them side by side from bit 16 on
_AT_ONCE = 1 << 16  # characters parsed together: they and all arrays computed from them fit into a CPU's cache


def parse_units_batch(texts: Sequence[str]) -> list[np.ndarray | RecordError]:
    """Parse the `[Hu7][Hu90]...` of many records: for each text the result of `parse_units`, or the error that it raises.

    Thirty times as fast as `parse_units` for texts without spaces and leading zeros; other texts go through it one by one.
    """
    results: list[np.ndarray | RecordError] = []
    start = size = 0
    for index, text in enumerate(texts):
        size += len(text)
        if size >= _AT_ONCE or index == len(texts) - 1:
            results += _parse_chunk(texts[start : index + 1])
            start, size = index + 1, 0
    return results


def _parse_chunk(texts: Sequence[str]) -> Sequence[np.ndarray | RecordError]:
    if (units := _parse_plain(texts)) is not None:
        return units
    return [u[0] if (u := _parse_plain([text])) else _parse_slowly(text) for text in texts]


def _parse_plain(texts: Sequence[str]) -> list[np.ndarray] | None:
    """The units of texts that consist of whole units alone (each one's bytes match, and their lengths add up to the texts'); else None."""
    joined = "".join(texts)
    if not joined.isascii() or not all(texts):
        return None
    padded = bytes(7) + joined.encode()
    closing = np.frombuffer(padded, np.uint8)[7:] == ord("]")
    eight = np.ndarray((len(joined),), "<u8", padded, 0, (1,))[closing]  # up to each bracket
    nibbles = (eight >> np.uint64(32)) & np.uint64(0x0F0F0F)
    index = ((nibbles * _GATHER >> np.uint64(16)) & np.uint64(0xFFF)).view(np.int64)
    if not len(index) or not ((eight & _MASK.take(index)) == _SPELLED.take(index)).all():
        return None
    reached = _SIZE.take(index).cumsum()
    ends = np.cumsum([len(text) for text in texts])
    last = reached.searchsorted(ends)
    if reached[-1] != ends[-1] or (reached.take(last) != ends).any():
        return None
    units = _UNIT_OF.take(index)
    return [units[a:b] for a, b in pairwise([0, *(last + 1).tolist()])]


def _parse_slowly(text: str) -> np.ndarray | RecordError:
    try:
        return parse_units(text)
    except RecordError as error:
        return error


def parse_record(raw: object) -> Record:
    """Check one decoded JSON value and convert it to a Record.

    Raises:
        RecordError: a field is missing or of the wrong type, the output is empty, a unit is out of range, or there is speech on both sides.
    """
    record = parse_records([raw])[0]
    if isinstance(record, RecordError):
        raise record
    return record


def parse_records(raws: Sequence[object]) -> list[Record | RecordError]:
    """Check decoded JSON values and convert each to a Record, or to the error that says why it is none. All units are parsed together."""
    checked = [_check_fields(raw) for raw in raws]
    sides = [
        (i, side) for i, c in enumerate(checked) if not isinstance(c, RecordError) for side in ("input", "output") if holds_units(c[side])
    ]
    units = dict(zip(sides, parse_units_batch([checked[i][side] for i, side in sides]), strict=True))  # type: ignore[index]
    spoken = [{side: units[i, side] for side in ("input", "output") if (i, side) in units} for i in range(len(checked))]
    return [c if isinstance(c, RecordError) else _with_units(c, found) for c, found in zip(checked, spoken, strict=True)]


def _check_fields(raw: object) -> dict[str, Any] | RecordError:
    """The raw record if it has every field, of the right type; else what is wrong with it."""
    if isinstance(raw, RecordError):
        return raw
    if not isinstance(raw, dict):
        return RecordError(f"is a JSON {type(raw).__name__}, not an object")
    if missing := [name for name in _REQUIRED if name not in raw]:
        return RecordError(f"has no field {', '.join(map(repr, missing))}")
    if isinstance(raw["id"], (list, dict)):
        return RecordError(f"field 'id' is {type(raw['id']).__name__}, not a string or a number")
    for name in _REQUIRED[1:]:
        if not isinstance(raw[name], str):
            hint = f" ({_UNITS_RULE})" if isinstance(raw[name], list) else ""
            return RecordError(f"field {name!r} is {type(raw[name]).__name__}, not a string{hint}")
        if found := _misspelled_units(name, raw[name]):
            return RecordError(f"field {name!r} {found}")
    for name in _REQUIRED:
        if isinstance(raw[name], str) and not _encodable(raw[name]):
            return RecordError(f"field {name!r} holds bytes that are not UTF-8, or half a surrogate pair, which is not text")
    if not isinstance(raw.get("metadata") or {}, dict):
        return RecordError(f"field 'metadata' is {type(raw['metadata']).__name__}, not an object")
    if not raw["output"].strip():
        return RecordError("has an empty output")
    return raw


def holds_units(text: str) -> bool:
    """Whether there is a speech unit in a text, or what was meant to be one."""
    return "[Hu" in text and _BEGINS_UNIT.search(text) is not None


def _misspelled_units(name: str, text: str) -> str:
    """What is wrong with a field that holds speech as no record does, and would be trained on as text; empty where nothing is."""
    if "><" not in text and "][" not in text and "> <" not in text and "] [" not in text and text.lstrip()[:1] not in ("<", "["):
        return ""  # no row of units, and not nothing else: found without the patterns, which take longer than the rest of a record
    if name == "instruction":
        return "holds speech units, which belong to input or output" if _UNIT_ROW.search(text) else ""
    found = None if holds_units(text) else _MISSPELLED.search(text)
    return f"spells speech units as {found[0].strip()[:40]!r}; {_UNITS_RULE}" if found else ""


def _with_units(raw: dict[str, Any], units: Mapping[str, np.ndarray | RecordError]) -> Record | RecordError:
    """The Record of a raw one; the units of a side, where it has any, replace its text."""
    for side, found in units.items():
        if isinstance(found, RecordError):
            return RecordError(f"field {side!r} {found}")
    if len(units) == 2:
        return RecordError("has speech in both input and output")
    if "output" in units and not raw["input"].strip():
        return RecordError("has speech to produce but an empty input")
    record_id = raw["id"] if isinstance(raw["id"], str) else json.dumps(raw["id"])
    given, output = (units.get(side, raw[side]) for side in ("input", "output"))
    return Record(record_id, raw["instruction"], given, output, raw.get("metadata") or {})


def _encodable(text: str) -> bool:
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def asr_to_tts(raw: Mapping[str, Any], dataset: str, timestamp: dt.datetime) -> dict[str, Any]:
    """Convert an ASR record (JSON object) to the TTS record of the same utterance: sides swapped, `tts_` before the id, metadata extended.

    The data set's name and the time of the conversion are for the metadata.
    """
    conversion = {
        "task": "tts",
        "original_task": "asr",
        "dataset": dataset,
        "conversion_timestamp": timestamp.isoformat(timespec="seconds"),
    }
    metadata = {**(raw.get("metadata") or {}), **conversion}
    sides = {"input": raw["output"], "output": raw["input"]}
    return {"id": f"tts_{raw['id']}", "instruction": TTS_INSTRUCTION, **sides, "metadata": metadata}


def units_hash(manifest: Mapping[str, Any]) -> str:
    """Hash of a units manifest's `identity`: records whose hashes are equal have units of the same meaning."""
    identity = json.dumps(manifest.get("identity", manifest), sort_keys=True)
    return hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
