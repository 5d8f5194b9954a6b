"""Corpora as checked streams of utterances: a user's folder, or one of the published layouts.

Memory does not grow with the corpus, apart from two hashes of 64 bits for each id.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from most_ray.errors import ConfigError, DataError, nearest
from most_ray.io.json_values import check_depth
from most_ray.records.record import holds_units
from most_ray.speech.corpora.entries import NOT_THERE, CorpusOptions, Entries, Entry, Unusable
from most_ray.speech.corpora.published import PUBLISHED, Layout
from most_ray.speech.corpora.user_folder import TABLES, USER_FILES, read_user_folder

FOLD = "fold"  # a column that every utterance has
LAYOUTS: Mapping[str, Layout] = MappingProxyType({"folder": Layout(read_user_folder, TABLES, files=USER_FILES), **PUBLISHED})


@dataclass(frozen=True)
class Utterance:
    """A stretch of a recording with its text."""

    id: str  # unique in the corpus; begins with the data set's name
    path: Path  # of the recording, in any format that libsndfile reads; it existed when the corpus was read
    text: str  # never empty
    columns: Mapping[str, Any]  # metadata, JSON-ready: `speaker` and `split` where the layout knows them, and the layout's own
    start: float = 0.0  # seconds into the recording
    duration: float | None = None  # seconds; None: up to the recording's end
    channel: int | None = None  # counted from 0, or audio.ANY_CHANNEL; None: all of them, mixed
    length: float | None = None  # seconds of the whole recording, where the table gives them


@dataclass(frozen=True)
class Condition:
    """`column=value` or `column!=value`. A missing column counts as empty; `fold`, from 0 to 9, is drawn by the utterance's id."""

    column: str
    values: tuple[str, ...]  # alternatives
    negated: bool

    def matches(self, utterance: Utterance) -> bool:
        """Whether the utterance meets the condition; values are compared as text."""
        found = utterance.columns.get(self.column, _hash64(utterance.id) % 10 if self.column == FOLD else "")
        return (str(found) in self.values) != self.negated


def parse_condition(text: str) -> Condition:
    """Parse `column=value` or `column!=value`, with commas between alternative values. Raises ConfigError for anything else."""
    name, sign, values = text.partition("=")
    if not sign or not name.rstrip("!"):
        raise ConfigError("where", text, "is not of the form column=value or column!=value.")
    return Condition(name.removesuffix("!"), tuple(values.split(",")), name.endswith("!"))


def matches_all(utterance: Utterance, conditions: Sequence[Condition]) -> bool:
    """Whether the utterance meets all conditions."""
    return all(condition.matches(utterance) for condition in conditions)


def check_conditions(conditions: Sequence[Condition], columns: Collection[str]) -> None:
    """Raise ConfigError where a condition names a column that no utterance of the corpus has, which a stream only knows at its end."""
    for condition in conditions:
        if condition.column not in (FOLD, *columns):
            raise ConfigError("where", condition.column, "is not a column of the corpus.", nearest(condition.column, [FOLD, *columns]))


def check_speaker_column(column: str, columns: Collection[str]) -> None:
    """Raise ConfigError where no utterance has the column that names its speaker; only the default one, `speaker`, may be missing."""
    if column != "speaker" and column not in columns:
        raise ConfigError("speaker_column", column, "is not a column of the corpus.", nearest(column, columns))


def dataset_name(options: CorpusOptions) -> str:
    """The start of each id: the name given, else the layout's, for a user's folder the folder's."""
    folder = Path(os.path.abspath(options.directory)).name if options.layout == "folder" else ""
    return options.name or folder or options.layout


def guess_layout(directory: Path) -> str:
    """The layout whose files a folder has; `folder` where it has none's."""
    by_depth = sorted(LAYOUTS, key=lambda name: max(sign.count("/") for sign in LAYOUTS[name].signs))  # deep patterns list many folders
    return next((name for name in by_depth for sign in LAYOUTS[name].signs if next(directory.glob(sign), None)), "folder")


def read_corpus(options: CorpusOptions) -> Iterator[Utterance | Unusable]:
    """Stream a corpus, always in the same order. Recordings are not opened, but checked to exist.

    Raises, before or at the first item:
        ConfigError: the layout, the casing or a split is unknown.
        DataError: the folder, its table or its recordings are missing, or a table is not UTF-8 or lacks a column.
    """
    if options.layout not in LAYOUTS:
        raise ConfigError("corpus", options.layout, "is not a layout of a corpus.", nearest(options.layout, LAYOUTS))
    if options.casing not in ("cased", "upper"):
        raise ConfigError("casing", options.casing, "must be cased or upper.")
    if options.casing != "cased" and options.layout != "libriheavy":
        raise ConfigError("casing", options.casing, f"is a choice of libriheavy; {options.layout} has one text only.", "Leave it out.")
    if not os.path.exists(options.directory):
        raise DataError("input", str(options.directory), "does not exist.", "Check the path.")
    if not os.path.isdir(options.directory) and options.layout != "libriheavy":
        raise DataError("input", str(options.directory), "is not a folder.", f"Give the folder of the corpus, as {options.layout} has it.")
    return _checked(LAYOUTS[options.layout].read(options), dataset_name(options))


def _checked(entries: Entries, name: str) -> Iterator[Utterance | Unusable]:
    """Yield entries as utterances, or with the reason why they cannot be used."""
    seen: dict[int, int] = {}  # hashes of the ids, and of what each stands for
    for entry in entries:
        if isinstance(entry, Unusable):
            known = entry.id and _printable(_full_id(entry.id, name))
            yield replace(entry, file=_printable(entry.file), reason=_printable(entry.reason), id=known)
            continue
        known = _full_id(entry.id, name)
        reason = _fault(known, entry)
        if reason is None:
            meant = _hash64(f"{entry.start} {entry.channel} {os.path.abspath(entry.path)}")
            if found := _free_id([known, *(_full_id(each, name) for each in entry.other_ids)], meant, seen):
                seen[_hash64(found)] = meant
                text = entry.text.strip()
                yield Utterance(found, entry.path, text, entry.columns, entry.start, entry.duration, entry.channel, entry.length)
                continue
            reason = f"gives the id {known!r} a second time"
        yield Unusable(_printable(str(entry.file)), entry.index, reason, _printable(known))


def _full_id(name: str, dataset: str) -> str:
    return name if name.startswith(f"{dataset}_") else f"{dataset}_{name}"


def _free_id(ids: Iterable[str], meant: int, seen: Mapping[int, int]) -> str | None:
    """The first of `ids` that nothing has yet; None where all are taken, or one of them already stands for the same, `meant`."""
    for each in ids:
        if (taken_by := seen.get(_hash64(each))) is None:
            return each
        if taken_by == meant:
            return None
    return None


def _fault(known: str, entry: Entry) -> str | None:
    if not entry.text.strip():
        return "has no text"
    if holds_units(entry.text):
        return "has a text with speech units, which is no transcript"
    try:
        # As deep as the columns will be in a record and in a part's list of utterances.
        value = [[[known, entry.text, entry.columns]]]
        check_depth(value)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        return "holds bytes that are not UTF-8, or half a surrogate pair, which is not text"
    except ValueError as error:
        return "has a column that is nested too deep" if "nested" in str(error) else "has a column with a number that is not finite"
    return None if os.path.isfile(entry.path) else NOT_THERE


def _hash64(text: str) -> int:
    """64 bits of a hash: in one of 370,000 corpora of ten million ids, two different ids would have the same."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _printable(text: str) -> str:
    """Text that can be written as UTF-8: names of files need not be."""
    return text.encode("utf-8", "replace").decode()
