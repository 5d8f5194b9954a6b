"""A user's own folder of recordings: with a table of texts, or with a text file beside each recording."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from most_ray.errors import ConfigError, DataError, RecordError
from most_ray.speech.corpora import tables
from most_ray.speech.corpora.entries import CorpusOptions, Entries, Entry, Unusable

TABLES = ("transcripts.tsv", "transcripts.jsonl", "metadata.csv", "metadata.jsonl")
_PATH, _TEXT = ("path", "file_name"), ("text", "transcription")  # spellings of columns: ours, then Hugging Face's
_AUDIO = frozenset({".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64", ".sph"})  # libsndfile's


def read_user_folder(options: CorpusOptions) -> Entries:
    """Read a user's folder: a table of recordings and texts, or each recording beside NAME.txt. Raises ConfigError if splits are requested,
    which only published corpora have; DataError if there are two tables, or neither a table nor a recording, or the table is unusable."""
    if options.splits:
        raise ConfigError("splits", list(options.splits), "are unknown in a folder.", "Where its table has a column for them, use where.")
    found = [name for name in TABLES if (options.directory / name).is_file()]
    if len(found) > 1:
        raise DataError("input", str(options.directory), f"holds {' and '.join(found)}.", "Keep the one that is meant.")
    return _by_table(options.directory, options.directory / found[0]) if found else _by_name(options.directory)


def _by_table(root: Path, table: Path) -> Entries:
    """Yield an entry for each row. `start` and `duration` (seconds) cut an utterance out of its recording; other columns are metadata. The
    id is the recording's name without suffix, followed by the milliseconds of `start` where the row has one. Recordings in the folder that
    no row names come last, as unusable."""
    tables.check_utf8(table)
    cells = tables.tsv_cells(table) if table.suffix == ".tsv" else tables.csv_cells(table, ",")
    rows = tables.json_rows(table) if table.suffix == ".jsonl" else tables.dict_rows(table, cells, _PATH, _TEXT)
    named: set[int] = set()  # hashes of the paths: the table may be long
    yield from tables.entries_of(table, rows, functools.partial(_row_entry, root, table, named))
    for found in tables.walk_folders(root):
        if isinstance(found, Unusable):
            yield found
            continue
        for path in (found[0] / name for name in found[1] if PurePath(name).suffix.lower() in _AUDIO):
            if hash(os.path.abspath(path)) not in named:
                yield Unusable(str(path), 0, "is named by no row: a recording without text")


def _row_entry(root: Path, table: Path, named: set[int], number: int, row: Mapping[str, Any]) -> Iterator[Entry]:
    name, text = row.get(_spelling(row, _PATH)), row.get(_spelling(row, _TEXT))
    if not isinstance(name, str) or not name.strip():
        raise RecordError("names no recording")
    # A table that its user wrote may point anywhere, but a relative path that leaves the folder is a mistake.
    path = Path(name) if os.path.isabs(name) else tables.path_below(root, name)
    named.add(hash(os.path.abspath(path)))
    columns = {key: row[key] for key in row if key not in (_spelling(row, _PATH), _spelling(row, _TEXT), "start", "duration")}
    # Without a start, the duration is that of the whole recording, which the recording itself gives more exactly.
    start, duration = (row.get("start"), row.get("duration")) if "start" in row else (None, None)
    begin = 0.0 if start in (None, "") else tables.parse_seconds(start)
    length = None if duration in (None, "") else tables.parse_seconds(duration, 1e-9)
    if begin is None or (length is None and duration not in (None, "")):
        raise RecordError(f"has a start or a duration that is not a number of seconds: {start!r}, {duration!r}")
    stem = path.stem if start in (None, "") else f"{path.stem}_{round(begin * 1000)}"
    yield Entry(table, number, stem, path, text if isinstance(text, str) else "", columns, begin, length)


def _spelling(row: Mapping[str, Any], spellings: Sequence[str]) -> str:
    return next((key for key in spellings if key in row), spellings[0])


def _by_name(root: Path) -> Entries:
    """Yield each recording with NAME.txt beside it; the id is its path below the folder, joined by underscores. Column: folder."""
    found = False
    for item in tables.walk_folders(root):
        if isinstance(item, Unusable):
            yield item
            continue
        (folder, files), inner = item, item[0].relative_to(root)
        columns = {"folder": inner.as_posix()} if inner.parts else {}
        texts = {name.removesuffix(".txt") for name in files if name.endswith(".txt")}
        recordings = [path for name in files if (path := folder / name).suffix.lower() in _AUDIO]
        found = found or bool(recordings)
        for path in recordings:
            text = _text_beside(path) if path.stem in texts else ""
            yield Entry(path, 0, "_".join((*inner.parts, path.stem)), path, text, columns)
        for stem in sorted(texts - {path.stem for path in recordings}):
            yield Unusable(str(folder / f"{stem}.txt"), 0, "has text but no recording", "_".join((*inner.parts, stem)))
    if not found:
        remedy = "Write transcripts.tsv with the columns path and text, tab-separated, or put NAME.txt beside each recording."
        raise DataError("input", str(root), f"holds no {', '.join(TABLES)} and no recording.", remedy)


def _text_beside(path: Path) -> str:
    """The lines of NAME.txt joined by spaces. Bytes that are not UTF-8 become lone surrogates, which `read_corpus` rejects."""
    try:
        text = path.with_name(f"{path.stem}.txt").read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError:
        return ""  # the entry is rejected for having no text
    return " ".join(line.strip() for line in text.split("\n") if line.strip())
