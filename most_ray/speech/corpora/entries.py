"""What a reader of a corpus is given (`CorpusOptions`) and what it yields (`Entry`, `Unusable`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from most_ray.errors import ConfigError, DataError, nearest

NOT_THERE = "names a recording that is not there"
OUTSIDE = "names a recording outside the folder"


@dataclass(frozen=True)
class CorpusOptions:
    """Which corpus to read, and which part of it."""

    layout: str  # a key of corpus.LAYOUTS
    directory: Path  # the corpus' folder; LibriHeavy: or one file of cuts
    name: str | None = None  # of the data set, the start of each id; None: the layout's name, for a user's folder the folder's
    casing: Literal["cased", "upper"] = "cased"  # which of LibriHeavy's texts: as in the book, or upper case without punctuation
    splits: tuple[str, ...] = ()  # the splits to read; empty: all (Common Voice: validated)

    def choose_splits(self, known: Sequence[str]) -> list[str]:
        """The splits to read of those that the corpus has. Raises ConfigError if one was requested that it does not have."""
        for split in self.splits:
            if split not in known:
                raise ConfigError("splits", split, f"is not in {self.directory}.", nearest(split, known))
        return [split for split in known if not self.splits or split in self.splits]

    def not_found(self, what: str, remedy: str) -> DataError:
        """The error for a folder without `what`, by which the layout is recognised."""
        return DataError("input", str(self.directory), f"holds no {what}.", remedy)


@dataclass(frozen=True)
class Entry:
    """One utterance as a corpus lists it, not checked yet."""

    file: Path  # the table, transcript or recording that lists it
    index: int  # line in that file, from 1; 0 where the file is the recording itself
    id: str  # without the data set's name
    path: Path  # of the recording
    text: str
    columns: Mapping[str, Any]  # metadata, JSON-ready
    start: float = 0.0  # seconds into the recording
    duration: float | None = None  # seconds; None: up to the recording's end
    channel: int | None = None  # counted from 0, or audio.ANY_CHANNEL; None: all of them, mixed
    length: float | None = None  # seconds of the whole recording, where the table gives them
    other_ids: tuple[str, ...] = ()  # to be used in turn where `id` is another recording's


@dataclass(frozen=True)
class Unusable:
    """An entry that gives no utterance."""

    file: str  # the table, transcript or recording that lists it
    index: int  # line in that file, from 1 (JSON Lines: blank lines not counted); 0 where the file as a whole is meant
    reason: str  # continues a sentence that begins with "the entry"
    id: str | None = None  # the id that its utterance would have had, where that is known
    suffix: str | None = None  # of a recording in a format that is not read
    unlisted: bool = False  # it is a recording that the corpus' table does not list, perhaps on purpose


Entries = Iterator[Entry | Unusable]
