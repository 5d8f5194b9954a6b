"""Corpora as streams of utterances: a user's folder, or one of the published layouts. Memory does not grow with the corpus but by a
digest for each id."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any

from most_ray.errors import ConfigError, DataError, nearest
from most_ray.speech.corpora.published import (
    NOT_THERE,
    OUTSIDE,
    CorpusOptions,
    Entries,
    Entry,
    read_an4,
    read_common_voice,
    read_libriheavy,
    read_librispeech,
    read_voxpopuli,
)
from most_ray.speech.corpora.tables import Unusable, folders, json_objects, quoted, seconds, tabbed, with_header, within

__all__ = [
    "READERS",
    "Condition",
    "CorpusOptions",
    "Unusable",
    "Utterance",
    "check_conditions",
    "dataset_name",
    "matches_all",
    "parse_condition",
    "read_corpus",
]
FOLD = "fold"
_TABLES = ("transcripts.tsv", "transcripts.jsonl", "metadata.csv", "metadata.jsonl")
_PATH, _TEXT = ("path", "file_name"), ("text", "transcription")  # ours, then Hugging Face's
_AUDIO = frozenset({".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64", ".sph"})  # libsndfile's
_CHUNK = 1 << 20  # bytes


@dataclass(frozen=True)
class Utterance:
    """A stretch of a recording with its text.

    Attributes:
        id: unique in the corpus; begins with the data set's name.
        path: the recording, which was there when it was read; any format that libsndfile knows.
        text: what is said, never empty.
        columns: metadata, ready for JSON: `speaker` and `split` where the layout knows them, and the layout's own.
        start: seconds into the recording.
        duration: seconds; None: to the recording's end.
    """

    id: str
    path: Path
    text: str
    columns: Mapping[str, Any]
    start: float = 0.0
    duration: float | None = None


@dataclass(frozen=True)
class Condition:
    """`column=value` or `column!=value`; several values, joined by commas, are alternatives. A column that is not there is empty; every
    utterance has a `fold` from 0 to 9, drawn by its id."""

    column: str
    values: tuple[str, ...]
    negated: bool

    def matches(self, utterance: Utterance) -> bool:
        found = utterance.columns.get(self.column, _digest(utterance.id) % 10 if self.column == FOLD else "")
        return (str(found) in self.values) != self.negated


def parse_condition(text: str) -> Condition:
    """A Condition from the command line.

    Raises:
        ConfigError: it has no `=`.
    """
    name, sign, values = text.partition("=")
    if not sign or not name.rstrip("!"):
        raise ConfigError("where", text, "is not of the form column=value or column!=value.")
    return Condition(name.removesuffix("!"), tuple(values.split(",")), name.endswith("!"))


def matches_all(utterance: Utterance, conditions: Sequence[Condition]) -> bool:
    """Whether all conditions hold."""
    return all(condition.matches(utterance) for condition in conditions)


def check_conditions(conditions: Sequence[Condition], columns: Collection[str]) -> None:
    """To be called with the columns of all utterances of a corpus: a stream cannot know them before its end.

    Raises:
        ConfigError: a condition names a column that no utterance has.
    """
    for condition in conditions:
        if condition.column not in (FOLD, *columns):
            raise ConfigError("where", condition.column, "is no column of the corpus.", nearest(condition.column, [FOLD, *columns]))


def dataset_name(options: CorpusOptions) -> str:
    """The start of each id: the name given, else the layout's, for a folder the folder's."""
    folder = Path(os.path.abspath(options.directory)).name if options.layout == "folder" else ""
    return options.name or folder or options.layout


def read_corpus(options: CorpusOptions) -> Iterator[Utterance | Unusable]:
    """Stream a corpus, always in the same order. Recordings are not opened; that one is there is checked.

    Raises, before or at the first item:
        ConfigError: the layout, the casing or a split is unknown.
        DataError: the folder, its table or its recordings are missing, or a table is not UTF-8 or lacks a column.
    """
    if options.layout not in READERS:
        raise ConfigError("corpus", options.layout, "is no layout of a corpus.", nearest(options.layout, READERS))
    if options.casing not in ("cased", "upper"):
        raise ConfigError("casing", options.casing, "must be cased or upper.")
    if options.casing != "cased" and options.layout != "libriheavy":
        raise ConfigError("casing", options.casing, f"is a choice of libriheavy; {options.layout} has one text only.", "Leave it out.")
    if not options.directory.exists():
        raise DataError("input", str(options.directory), "does not exist.", "Check the path.")
    if not options.directory.is_dir() and options.layout != "libriheavy":
        raise DataError("input", str(options.directory), "is no folder.", f"Give the folder of the corpus, as {options.layout} has it.")
    return _checked(READERS[options.layout](options), dataset_name(options))


def _checked(entries: Entries, name: str) -> Iterator[Utterance | Unusable]:
    """Entries as utterances, or with the reason why they are none."""
    seen: set[int] = set()
    for entry in entries:
        known = entry.id if entry.id is None or entry.id.startswith(f"{name}_") else f"{name}_{entry.id}"
        if isinstance(entry, Unusable):
            yield Unusable(_shown(entry.file), entry.index, _shown(entry.reason), known and _shown(known))
            continue
        assert known is not None
        reason = _fault(known, entry)
        if reason is None and _first(known, seen):
            yield Utterance(known, entry.path, entry.text.strip(), entry.columns, entry.start, entry.duration)
        else:
            reason = reason or f"gives the id {known!r} a second time"
            yield Unusable(_shown(str(entry.file)), entry.index, reason, _shown(known))


def _fault(known: str, entry: Entry) -> str | None:
    if not entry.text.strip():
        return "has no text"
    try:
        json.dumps([known, entry.text, entry.columns], ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        return "holds bytes that are not UTF-8, or half a surrogate pair, which is no text"
    except ValueError:
        return "has a column with a number that is not finite"
    return None if os.path.isfile(entry.path) else NOT_THERE


def _digest(text: str) -> int:
    """64 bits: among ten million ids two different ones share theirs once in 370,000 corpora."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _first(known: str, seen: set[int]) -> bool:
    before = len(seen)
    seen.add(_digest(known))
    return len(seen) > before


def _shown(text: str) -> str:
    """Text that can be written as UTF-8: names of files need not be."""
    return text.encode("utf-8", "replace").decode()


def _read_folder(options: CorpusOptions) -> Entries:
    """A user's folder: a table of recordings and texts, or each recording beside NAME.txt.

    Raises:
        ConfigError: splits are named.
        DataError: there are two tables, or neither a table nor a recording, or the table is unusable.
    """
    if options.splits:
        raise ConfigError("splits", list(options.splits), "are unknown in a folder.", "Where its table has a column for them, use where.")
    tables = [name for name in _TABLES if (options.directory / name).is_file()]
    if len(tables) > 1:
        raise DataError("input", str(options.directory), f"holds {' and '.join(tables)}.", "Keep the one that is meant.")
    return _by_table(options.directory, options.directory / tables[0]) if tables else _by_name(options.directory)


def _by_table(root: Path, table: Path) -> Entries:
    """A row for each utterance; a `start` and a `duration` (seconds) beside it cut it out of its recording, any other columns are metadata.

    The id is the recording's name without suffix, followed by the milliseconds of `start` where the row has one.
    """
    _check_utf8(table)
    named: set[int] = set()
    for item in json_objects(table) if table.suffix == ".jsonl" else with_header(table, _cells(table), _PATH, _TEXT):
        if isinstance(item, Unusable):
            yield item
            continue
        number, row = item
        name = row.get(_spelt(row, _PATH))
        if not isinstance(name, str) or not name.strip():
            yield Unusable(str(table), number, "names no recording")
            continue
        # A table that its user wrote may point anywhere, but a relative path that leaves the folder is a slip.
        path = Path(name) if os.path.isabs(name) else within(root, name)
        if path is None:
            yield Unusable(str(table), number, OUTSIDE)
            continue
        named.add(_digest(os.path.abspath(path)))
        yield _row(table, number, path, row)
    for found in folders(root):
        if isinstance(found, Unusable):
            yield found
            continue
        for path in (found[0] / name for name in found[1] if PurePath(name).suffix.lower() in _AUDIO):
            if _digest(os.path.abspath(path)) not in named:
                yield Unusable(str(path), 0, "is named by no row: a recording without text")


def _cells(table: Path) -> Iterator[tuple[int, list[str]]]:
    return tabbed(table) if table.suffix == ".tsv" else quoted(table, ",")


def _spelt(row: Mapping[str, Any], spellings: Sequence[str]) -> str:
    return next((key for key in spellings if key in row), spellings[0])


def _row(table: Path, number: int, path: Path, row: Mapping[str, Any]) -> Entry | Unusable:
    known = {_spelt(row, _PATH), _spelt(row, _TEXT), "start", "duration"}
    columns = {key: value for key, value in row.items() if key not in known}
    text = row.get(_spelt(row, _TEXT))
    # Without a start, a duration tells how long the whole recording is, which the recording itself knows better.
    start, duration = (row.get("start"), row.get("duration")) if "start" in row else (None, None)
    begin = 0.0 if start in (None, "") else seconds(start)
    length = None if duration in (None, "") else seconds(duration, 1e-9)
    if begin is None or (length is None and duration not in (None, "")):
        return Unusable(str(table), number, f"has a start or a duration that is no number of seconds: {start!r}, {duration!r}")
    stem = path.stem if start in (None, "") else f"{path.stem}_{round(begin * 1000)}"
    return Entry(table, number, stem, path, text if isinstance(text, str) else "", columns, begin, length)


def _check_utf8(table: Path) -> None:
    """Before the first row, so that no hour's work is lost to the last one."""
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        with table.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                pending = len(decoder.getstate()[0])
                decoder.decode(chunk)
                done += len(chunk)
            pending = len(decoder.getstate()[0])
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        rule = f"is not UTF-8 at byte {done - pending + error.start}."
        raise DataError(table.name, str(table), rule, "Save it as UTF-8.") from error
    except OSError as error:
        raise DataError(table.name, str(table), f"cannot be read ({error.strerror or error}).", "Check its permissions.") from error


def _by_name(root: Path) -> Entries:
    """Each recording with NAME.txt beside it; the id is its path below the folder, joined by underscores. Column: folder."""
    found = False
    for item in folders(root):
        if isinstance(item, Unusable):
            yield item
            continue
        folder, files = item
        inner = folder.relative_to(root)
        columns = {"folder": inner.as_posix()} if inner.parts else {}
        texts = {name.removesuffix(".txt") for name in files if name.endswith(".txt")}
        spoken = set()
        for name in files:
            path = folder / name
            if path.suffix.lower() in _AUDIO:
                found = True
                spoken.add(path.stem)
                known = "_".join((*inner.parts, path.stem))
                yield Entry(path, 0, known, path, _text_beside(path) if path.stem in texts else "", columns)
        for stem in sorted(texts - spoken):
            yield Unusable(str(folder / f"{stem}.txt"), 0, "has text but no recording", "_".join((*inner.parts, stem)))
    if not found:
        remedy = "Write transcripts.tsv with the columns path and text, tab-separated, or put NAME.txt beside each recording."
        raise DataError("input", str(root), f"holds no {', '.join(_TABLES)} and no recording.", remedy)


def _text_beside(path: Path) -> str:
    """The lines of NAME.txt as one; what is not UTF-8 becomes lone surrogates, which are told later."""
    try:
        text = path.with_name(f"{path.stem}.txt").read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError:
        return ""
    return " ".join(line.strip() for line in text.split("\n") if line.strip())


READERS: Mapping[str, Callable[[CorpusOptions], Entries]] = MappingProxyType(
    {
        "folder": _read_folder,
        "librispeech": read_librispeech,
        "libriheavy": read_libriheavy,
        "common_voice": read_common_voice,
        "voxpopuli": read_voxpopuli,
        "an4": read_an4,
    }
)
