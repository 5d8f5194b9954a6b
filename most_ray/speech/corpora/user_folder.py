"""A user's own folder of recordings: with a table of texts, or with a text file beside each recording."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from most_ray.errors import ConfigError, DataError, RecordError
from most_ray.speech.corpora import tables
from most_ray.speech.corpora.audio import UNREAD
from most_ray.speech.corpora.entries import CorpusOptions, Entries, Entry, Unusable
from most_ray.speech.corpora.stretches import read_stretch

TABLES = ("transcripts.tsv", "transcripts.jsonl", "metadata.csv", "metadata.jsonl")
USER_FILES = "recordings with transcripts.tsv (columns path, text), or NAME.txt beside each"  # for the help of commands
_PATH, _TEXT = ("path", "file_name", "audio_filepath"), ("text", "transcription")  # spellings of columns: ours, Hugging Face's, NeMo's
AUDIO = frozenset(  # suffixes of what libsndfile reads
    {".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".aifc", ".au", ".snd", ".caf", ".w64", ".rf64", ".sph"}
)
_SPLITS = frozenset({"train", "test", "dev", "validation", "valid", "val", "eval"})  # names of folders that are splits


def read_user_folder(options: CorpusOptions) -> Entries:
    """Read a user's folder: a table of recordings and texts, or each recording beside NAME.txt; without a table, folders below may have one
    each. Raises ConfigError if splits are requested, which only published corpora have; DataError if there are two tables, or neither a
    table nor a recording, or the table is unusable."""
    if options.splits:
        raise ConfigError("splits", list(options.splits), "are unknown in a folder.", "Where its table has a column for them, use where.")
    table = _table_of(options.directory, [name for name in TABLES if (options.directory / name).is_file()])
    return _by_table(options.directory, table) if table else _by_name(options.directory)


def _table_of(folder: Path, files: Collection[str]) -> Path | None:
    """The table among a folder's files; None where there is none. Raises DataError if there are two."""
    found = [name for name in TABLES if name in files]
    if len(found) > 1:
        raise DataError("input", str(folder), f"holds {' and '.join(found)}.", "Keep the one that is meant.")
    return folder / found[0] if found else None


def _by_table(root: Path, table: Path, inner: Sequence[str] = ()) -> Entries:
    """Yield an entry for each row of the table of the folder `root`, which is `inner` below the corpus. `start` and `duration` or `end`
    (seconds) cut an utterance out of its recording; other columns are metadata. The id is the recording's name without suffix, followed by
    the milliseconds of `start` where the row has one, and where another recording has that id, the path below the folder as well.
    Recordings in the folder that no row names come last, as unusable."""
    tables.check_utf8(table)
    cells = tables.tsv_cells(table) if table.suffix == ".tsv" else tables.csv_cells(table, ",")
    rows = tables.json_rows(table) if table.suffix == ".jsonl" else tables.dict_rows(table, cells, _PATH, _TEXT)
    named: set[int] = set()  # hashes of the paths: the table may be long
    yield from tables.entries_of(table, rows, functools.partial(_row_entry, root, table, inner, named))
    for found in tables.walk_folders(root):
        if isinstance(found, Unusable):
            yield found
            continue
        folder, files = found
        for name in (name for name in files if _suffix(name) in AUDIO and hash(os.path.abspath(folder / name)) not in named):
            yield Unusable(str(folder / name), 0, "is named by no row: a recording without text", unlisted=True)
        others = [folder / name for name in _unread_names(files) if hash(os.path.abspath(folder / name)) not in named]
        yield from (replace(_unread(path), unlisted=True) for path in others)


def _row_entry(root: Path, table: Path, inner: Sequence[str], named: set[int], number: int, row: Mapping[str, Any]) -> Iterator[Entry]:
    name, text = row.get(_spelling(row, _PATH)), row.get(_spelling(row, _TEXT))
    if not isinstance(name, str) or not name.strip():
        raise RecordError("names no recording")
    # A table that its user wrote may point anywhere, but a relative path that leaves the folder is a mistake.
    path = Path(name) if os.path.isabs(name) else tables.path_below(root, name)
    named.add(hash(os.path.abspath(path)))
    part = read_stretch(row)
    columns = {key: row[key] for key in row if key not in (_spelling(row, _PATH), _spelling(row, _TEXT), *part.columns)}
    if inner:
        columns = {"folder": "/".join(inner), **({"split": inner[-1]} if inner[-1] in _SPLITS else {}), **columns}
    text = text if isinstance(text, str) else ""
    text = text if table.suffix == ".jsonl" else tables.one_line(text)
    begin = part.begin or 0.0
    time = "" if part.begin is None else f"_{round(begin * 1000)}"
    below = path.relative_to(root) if path.is_relative_to(root) else path.relative_to(path.anchor)
    names = ("_".join((*inner, path.stem)), "_".join((*inner, *below.parent.parts, path.stem)), "/".join((*inner, below.as_posix())))
    ids = [f"{each}{time}" for each in names]
    yield Entry(table, number, ids[0], path, text, columns, begin, part.duration, part.channel, part.length, tuple(ids[1:]))


def _spelling(row: Mapping[str, Any], spellings: Sequence[str]) -> str:
    return next((key for key in spellings if key in row), spellings[0])


def _by_name(root: Path) -> Entries:
    """Yield each recording with NAME.txt beside it; the id is its path below the folder, joined by underscores. Column: folder. A folder
    with a table, as Hugging Face's audiofolders have one for each split, is read by it."""
    found, unread, covered = False, Counter[str](), set[Path]()
    for item in tables.walk_folders(root):
        if isinstance(item, Unusable):
            yield item
            continue
        (folder, files), inner = item, item[0].relative_to(root)
        if covered and not covered.isdisjoint(folder.parents):
            continue  # its table has reported them
        texts = {name.removesuffix(".txt") for name in files if name.endswith(".txt")}
        recordings = [path for name in files if (path := folder / name).suffix.lower() in AUDIO]
        if inner.parts and not any(path.stem in texts for path in recordings) and (table := _table_of(folder, files)):
            found = True
            covered.add(folder)
            yield from _by_table(folder, table, inner.parts)
            continue
        found = found or bool(recordings)
        yield from _beside(inner.parts, recordings, texts)
        others = [folder / name for name in _unread_names(files)]
        unread.update(_suffix(path.name) for path in others)
        yield from map(_unread, others)
        for stem in sorted(texts - {path.stem for path in (*recordings, *others)}):
            yield Unusable(str(folder / f"{stem}.txt"), 0, "has text but no recording", "_".join((*inner.parts, stem)))
    if not found:
        but = f" that is read ({', '.join(f'{count} {suffix}' for suffix, count in sorted(unread.items()))})" if unread else ""
        remedy = "Write transcripts.tsv with the columns path and text, tab-separated, or put NAME.txt beside each recording."
        raise DataError("input", str(root), f"holds no {', '.join(TABLES)} and no recording{but}.", remedy)


def _beside(inner: Sequence[str], recordings: Sequence[Path], texts: Collection[str]) -> Iterator[Entry]:
    """The entries of a folder's recordings. Of two of the same name, in two formats, the second has no id of its own: it is the same."""
    columns = {"folder": "/".join(inner)} if inner else {}
    before: set[str] = set()
    for path in recordings:
        text = _text_beside(path) if path.stem in texts else ""
        others = () if path.stem in before else ("/".join((*inner, path.name)),)
        before.add(path.stem)
        yield Entry(path, 0, "_".join((*inner, path.stem)), path, text, columns, other_ids=others)


def _unread_names(files: Sequence[str]) -> list[str]:
    """The names of recordings in formats that are not read, without those that are there in another format as well."""
    read = {PurePath(name).stem for name in files if _suffix(name) in AUDIO}
    return [name for name in files if _suffix(name) in UNREAD and PurePath(name).stem not in read]


def _unread(path: Path) -> Unusable:
    suffix = _suffix(path.name)
    return Unusable(str(path), 0, f"is {suffix}, a format that is not read: convert it to WAV or FLAC", suffix=suffix)


def _suffix(name: str) -> str:
    return PurePath(name).suffix.lower()


def _text_beside(path: Path) -> str:
    """The lines of NAME.txt joined by spaces. Bytes that are not UTF-8 become lone surrogates, which `read_corpus` rejects."""
    try:
        text = path.with_name(f"{path.stem}.txt").read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError:
        return ""  # the entry is rejected for having no text
    return " ".join(line.strip() for line in text.split("\n") if line.strip())
