"""Folders, tables and lines that corpora are made of, streamed. What is broken in them comes as `Unusable`, and reading goes on."""

from __future__ import annotations

import csv
import gzip
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from most_ray.errors import DataError, RecordError, nearest
from most_ray.io.json_stream import open_compressed, read_lines


@dataclass(frozen=True)
class Unusable:
    """An entry that is no utterance.

    Attributes:
        file: where it stands: a table, a transcript or a recording.
        index: line in that file from 1 (of JSON Lines: blank lines aside), 0 where the file itself is meant.
        reason: goes on after "the entry".
        id: what its utterance would have been called, where that is known.
    """

    file: str
    index: int
    reason: str
    id: str | None = None


def folders(root: Path) -> Iterator[tuple[Path, list[str]] | Unusable]:
    """Every folder from `root` downwards with its sorted file names; hidden ones are left out, links are followed but not in circles."""
    stack: list[tuple[Path, tuple[str, ...]]] = [(root, ())]
    while stack:
        folder, above = stack.pop()
        real = os.path.realpath(folder)
        if real in above:
            continue
        try:
            below, files = listing(folder)
        except DataError as error:
            yield Unusable(str(folder), 0, error.rule.rstrip("."))
            continue
        yield folder, files
        stack += [(folder / name, (*above, real)) for name in reversed(below)]


def listing(folder: Path) -> tuple[list[str], list[str]]:
    """Sorted names of the folders and of the files in `folder`, hidden ones left out.

    Raises:
        DataError: it cannot be listed.
    """
    below: list[str] = []
    files: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    (below if entry.is_dir() else files).append(entry.name)
    except OSError as error:
        raise DataError("folder", str(folder), f"cannot be listed ({error.strerror or error}).", "Check its permissions.") from error
    return sorted(below), sorted(files)


def within(folder: Path, relative: str) -> Path | None:
    """The path of a name that a corpus gives, None where it climbs out of `folder`."""
    normal = os.path.normpath(relative)
    return None if os.path.isabs(normal) or normal.split(os.sep)[0] == os.pardir else folder / normal


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """`(line from 1, text)`; bytes that are not UTF-8 become lone surrogates, so that only their entry is lost.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as stream:
            for number, line in enumerate(stream, start=1):
                yield number, line.rstrip("\r\n")
    except OSError as error:
        raise DataError(path.name, str(path), f"cannot be read ({error.strerror or error}).", "Check its permissions.") from error


def tabbed(path: Path) -> Iterator[tuple[int, list[str]]]:
    """`(line, cells)` where quotes mean nothing. The csv module would stop at a carriage return inside a cell."""
    return ((number, line.split("\t")) for number, line in lines_of(path) if line)


def quoted(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """`(line at which the row ends, cells)` of a table with CSV's quoting; `.gz` is decompressed.

    Raises:
        DataError: the file cannot be read, or its quotes do not match.
    """
    try:
        opened = (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="")
        with cast(TextIO, opened) as stream:
            reader = csv.reader(stream, delimiter=delimiter)
            try:
                yield from ((reader.line_num, cells) for cells in reader if cells)
            except csv.Error as error:
                uri = f"{path}:{reader.line_num}"
                raise DataError(path.name, uri, f"is not CSV ({error}).", "Look for a quote that is not closed.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(path.name, str(path), f"cannot be read ({error}).", "Check its permissions, and whether it is whole.") from error


def with_header(
    path: Path, rows: Iterable[tuple[int, list[str]]], *needed: Sequence[str]
) -> Iterator[tuple[int, dict[str, str]] | Unusable]:
    """Rows by column. Missing cells at a row's end are left out.

    Args:
        needed: columns that must be there, each with its other spellings.

    Raises:
        DataError: one of them is not.
    """
    rows = iter(rows)
    _, header = next(rows, (0, []))
    for spellings in needed:
        if not set(spellings) & set(header):
            raise DataError(path.name, str(path), f"has no column {spellings[0]!r}.", nearest(spellings[0], header))
    for number, cells in rows:
        if len(cells) > len(header):
            yield Unusable(str(path), number, f"has {len(cells)} cells for {len(header)} columns")
        else:
            yield number, dict(zip(header, cells, strict=False))


def json_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]] | Unusable]:
    """`(number from 1, object)` of JSON Lines, gzipped where the name ends so.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            content = open_compressed(stream) if path.suffix == ".gz" else stream
            for number, (_, value) in enumerate(read_lines(content), start=1):
                if isinstance(value, dict):
                    yield number, value
                else:
                    reason = str(value) if isinstance(value, RecordError) else f"is a JSON {type(value).__name__}, not an object"
                    yield Unusable(str(path), number, reason)
    except OSError as error:
        raise DataError(path.name, str(path), f"cannot be read ({error.strerror or error}).", "Check its permissions.") from error


def seconds(value: object, least: float = 0.0) -> float | None:
    """A number of seconds >= `least` and below four months, from a number or its text; None where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if least <= number < 1e7 else None  # false for NaN
