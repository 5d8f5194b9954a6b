"""Streams tables, JSON Lines and text lines of a corpus, and lists its folders. Broken rows come as `Unusable`; reading continues."""

from __future__ import annotations

import contextlib
import csv
import gzip
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

from most_ray.errors import DataError, RecordError, count_of, nearest
from most_ray.io.json_stream import open_compressed, read_lines
from most_ray.speech.corpora.entries import OUTSIDE, Entries, Entry, Unusable

Row = TypeVar("Row")


def walk_folders(root: Path) -> Iterator[tuple[Path, list[str]] | Unusable]:
    """Yield every folder from `root` downwards with its sorted file names. Hidden ones are left out; links are followed, but not in
    circles."""
    stack: list[tuple[Path, tuple[str, ...]]] = [(root, ())]
    while stack:
        folder, above = stack.pop()
        real = os.path.realpath(folder)
        if real in above:
            continue
        try:
            below, files = list_folder(folder)
        except DataError as error:
            yield Unusable(str(folder), 0, error.rule.rstrip("."))
            continue
        yield folder, files
        stack += [(folder / name, (*above, real)) for name in reversed(below)]


def list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """Sorted names of the folders and of the files in `folder`, without hidden ones. Raises DataError if it cannot be listed."""
    try:
        with os.scandir(folder) as found:
            entries = sorted((entry.name, _is_folder(entry)) for entry in found if not entry.name.startswith("."))
    except OSError as error:
        raise DataError("folder", str(folder), f"cannot be listed ({error.strerror or error}).", "Check its permissions.") from error
    return [name for name, is_folder in entries if is_folder], [name for name, is_folder in entries if not is_folder]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def path_below(folder: Path, relative: str) -> Path:
    """The path of a name that a corpus gives, relative to `folder`. Raises RecordError if the name leads out of it."""
    normal = os.path.normpath(relative)
    if os.path.isabs(normal) or normal.split(os.sep)[0] == os.pardir:
        raise RecordError(OUTSIDE)
    return folder / normal


def check_utf8(path: Path) -> None:
    """Read a whole table before its first row is used, so that no hour's work is lost to its last row. Raises DataError if it is not
    UTF-8, or cannot be read."""
    done = 0
    with _readable(path), path.open("rb") as stream:
        for line in stream:
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise DataError(path.name, str(path), f"is not UTF-8 at byte {done + error.start}.", "Save it as UTF-8.") from error
            done += len(line)


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield `(line number from 1, text)`. Bytes that are not UTF-8 become lone surrogates, so that only their entry is lost. Raises
    DataError if the file cannot be read."""
    with _opened(path) as stream:
        for number, line in enumerate(stream, start=1):
            yield number, line.rstrip("\r\n")


def tsv_cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield `(number of a row's last line, cells)` of a table with tabs. Quotes mean what they mean in CSV where the whole table was
    written so, by Python's csv module or pandas; elsewhere they are text, but for cells that are quoted alone as CSV does. Raises DataError
    if the file cannot be read, or it cannot be known which of the two it is."""
    if not _is_quoted(path):
        yield from ((number, [_unquote(cell) for cell in line.split("\t")]) for number, line in text_lines(path) if line)
        return
    with _opened(path) as stream:
        yield from ((number, cells) for number, _, cells in _csv_rows(stream) if cells)


def _is_quoted(path: Path) -> bool:
    """Whether a table with tabs is CSV throughout: every cell with a quote is quoted and whole, and in one of them at least, or in the
    header, the quotes are needed. (Text that merely stands in quotes is text.) A row's lines are kept in memory, no more."""
    with _readable(path), path.open("rb") as raw:
        if not any(b'"' in block for block in iter(lambda: raw.read(1 << 20), b"")):
            return False
    needed, width, unclear = False, 0, 0
    with _opened(path) as stream:
        try:
            for number, row, cells in _csv_rows(stream):
                if '"' in row:
                    if (found := _needs_quotes(row, cells)) is None:
                        return False
                    if width and "\n" in row[:-1] and all(line.count("\t") == width - 1 for line in row.rstrip("\n").split("\n")):
                        unclear = unclear or number  # each of its lines is a whole row as well
                    else:
                        needed = needed or found or not width
                width = width or len(cells)
        except csv.Error:
            return False
    if unclear and not needed:
        rule = "ends a quote that begins in another row: whether that is one text of several lines is not known."
        raise DataError(path.name, f"{path}:{unclear}", rule, "Double the quotes that are text, or write .jsonl.")
    return needed


def _csv_rows(stream: TextIO) -> Iterator[tuple[int, str, list[str]]]:
    """Yield `(number of a row's last line, its text, its cells)`. Raises csv.Error where the text is not CSV with tabs."""
    lines: list[str] = []

    def remembered() -> Iterator[str]:
        for line in stream:
            lines.append(line)
            yield line

    reader = csv.reader(remembered(), delimiter="\t", strict=True)
    for cells in reader:
        yield reader.line_num, "".join(lines), cells
        lines.clear()


def _needs_quotes(row: str, cells: Sequence[str]) -> bool | None:
    """Whether a cell of a row is quoted that must be; None where the row has a quote that CSV's writers would have quoted."""
    position, needed = 0, False
    for cell in cells:
        quoted, special = '"' + cell.replace('"', '""') + '"', any(mark in cell for mark in '"\t\r\n')
        if row.startswith(quoted, position):
            needed, position = needed or special, position + len(quoted) + 1
        elif special:
            return None
        else:
            position += len(cell) + 1
    return needed


def _unquote(cell: str) -> str:
    """A cell without CSV's quotes, where it has them: around doubled quotes or around nothing."""
    inner = cell[1:-1]
    if len(cell) < 2 or cell[0] != '"' or cell[-1] != '"' or '"' in inner.replace('""', "") or (inner and '""' not in inner):
        return cell
    return inner.replace('""', '"')


def one_line(text: str) -> str:
    """The lines of a text joined by spaces."""
    return text if text.isprintable() else " ".join(line.strip() for line in re.split("[\r\n]+", text) if line.strip())


def csv_cells(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield `(number of a row's last line, cells)` of a table with CSV's quoting; `.gz` is decompressed. Raises DataError if the file
    cannot be read, or its quotes do not match."""
    try:
        opened = (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="")
        with cast(TextIO, opened) as stream:
            reader = csv.reader(stream, delimiter=delimiter)
            try:
                yield from ((reader.line_num, cells) for cells in reader if cells)
            except csv.Error as error:
                line = f"{path}:{reader.line_num}"
                raise DataError(path.name, line, f"is not CSV ({error}).", "Look for a quote that is not closed.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(path.name, str(path), f"cannot be read ({error}).", "Check its permissions, and whether it is whole.") from error


def dict_rows(path: Path, rows: Iterable[tuple[int, list[str]]], *needed: Sequence[str]) -> Iterator[tuple[int, dict[str, str]] | Unusable]:
    """Yield `(number, cells by column)` of a table whose first row is the header. Cells missing at a row's end are left out. Raises
    DataError if one of the columns `needed`, each given with its other spellings, is missing."""
    rows = iter(rows)
    _, header = next(rows, (0, []))
    for spellings in needed:
        if not set(spellings) & set(header):
            raise DataError(path.name, str(path), f"has no column {spellings[0]!r}.", nearest(spellings[0], header))
    for number, cells in rows:
        if len(cells) > len(header):
            yield Unusable(str(path), number, f"has {len(cells)} cells for {count_of(len(header), 'column')}")
        else:
            yield number, dict(zip(header, cells, strict=False))


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]] | Unusable]:
    """Yield `(number from 1, object)` of JSON Lines, gzipped where the name ends in .gz. Raises DataError if the file cannot be read."""
    with _readable(path), path.open("rb") as stream:
        content = open_compressed(stream) if path.suffix == ".gz" else stream
        for number, (_, value) in enumerate(read_lines(content), start=1):
            if isinstance(value, dict):
                yield number, value
            else:
                reason = str(value) if isinstance(value, RecordError) else f"is a JSON {type(value).__name__}, not an object"
                yield Unusable(str(path), number, reason)


def entries_of(
    path: Path,
    rows: Iterable[tuple[int, Row] | Unusable],
    convert: Callable[[int, Row], Iterable[Entry]],
    id_of: Callable[[Row], str | None] = lambda _: None,
) -> Entries:
    """Convert the rows of the table `path` to entries; where `convert(number, row)` raises RecordError, its message is the reason of an
    `Unusable`, and `id_of(row)` its id."""
    for item in rows:
        if isinstance(item, Unusable):
            yield item
            continue
        number, row = item
        try:
            yield from convert(number, row)
        except RecordError as error:
            yield Unusable(str(path), number, str(error), id_of(row))


def parse_seconds(value: object, least: float = 0.0) -> float | None:
    """A number of seconds of at least `least` and below four months, from a number or its text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if least <= number < 1e7 else None  # false for NaN


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(path.name, str(path), f"cannot be read ({error.strerror or error}).", "Check its permissions.") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """A text file, in lines that end with a line feed."""
    with _readable(path), path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as stream:
        yield stream
