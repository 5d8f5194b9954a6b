"""How published corpora lie on disk: each reader streams what a layout says of its utterances, unchecked. `corpora` checks it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from most_ray.errors import ConfigError, DataError, RecordError, nearest
from most_ray.speech.corpora.tables import Unusable, json_objects, lines_of, listing, quoted, seconds, tabbed, with_header, within

NOT_THERE = "names a recording that is not there"
OUTSIDE = "names a recording outside the folder"
_CUTS = "libriheavy_cuts_"
_LIBRILIGHT = ("", "download/", "download/librilight/")  # what may be missing of the start of LibriHeavy's paths
_VOXPOPULI = ("train", "dev", "test")
_AN4_SUFFIXES = (".wav", ".sph", ".ogg", ".flac")
_AN4_LINE = re.compile(r"(?:<s>)?(.*?)(?:</s>)?\s*\(([^()\s]+)\)")


@dataclass(frozen=True)
class CorpusOptions:
    """A corpus to read.

    Attributes:
        layout: one of corpora.READERS.
        directory: where the corpus lies (LibriHeavy: or one file of cuts).
        name: the data set's name, the start of each id; default: the layout's name, for a folder the folder's.
        casing: which of LibriHeavy's texts, the book's or the upper-case one without punctuation.
        splits: only these; none: all (Common Voice: validated).
    """

    layout: str
    directory: Path
    name: str | None = None
    casing: Literal["cased", "upper"] = "cased"
    splits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """What a layout says of one utterance; `id` without the data set's name, times in seconds."""

    file: Path
    index: int
    id: str
    path: Path
    text: str
    columns: Mapping[str, Any]
    start: float = 0.0
    duration: float | None = None


Entries = Iterator[Entry | Unusable]


def _chosen(options: CorpusOptions, known: Sequence[str]) -> list[str]:
    """The splits asked for, all where none is named.

    Raises:
        ConfigError: one of them is not there.
    """
    for split in options.splits:
        if split not in known:
            raise ConfigError("splits", split, f"is not in {options.directory}.", nearest(split, known))
    return [split for split in known if not options.splits or split in options.splits]


def _nothing(options: CorpusOptions, what: str, remedy: str) -> DataError:
    return DataError("input", str(options.directory), f"holds no {what}.", remedy)


def read_librispeech(options: CorpusOptions) -> Entries:
    """`[LibriSpeech/][SPLIT/]SPEAKER/CHAPTER/` with `*.flac` and `S-C.trans.txt`; sex from SPEAKERS.TXT where it is there.

    Columns: speaker, chapter, split, sex.
    """
    root = options.directory / "LibriSpeech"
    root = Path(os.path.abspath(root if root.is_dir() else options.directory))
    below = listing(root)[0]
    if any(map(str.isdecimal, below)):  # a speaker: the folder is one split
        splits, root = {root.name: root}, root.parent
    else:
        splits = {name: root / name for name in below if any(map(str.isdecimal, listing(root / name)[0]))}
    if not splits:
        raise _nothing(options, "LibriSpeech", "Give the folder of the splits, or one split: SPLIT/SPEAKER/CHAPTER/*.flac.")
    table = root / "SPEAKERS.TXT"
    cells = ([cell.strip() for cell in line.split("|")] for _, line in (lines_of(table) if table.is_file() else ()) if line[:1] != ";")
    sexes = {row[0]: row[1] for row in cells if len(row) > 1}
    for split in _chosen(options, list(splits)):
        for speaker in listing(splits[split])[0]:
            sex = {"sex": sexes[speaker]} if speaker in sexes else {}
            for chapter in listing(splits[split] / speaker)[0]:
                columns = {"speaker": speaker, "chapter": chapter, "split": split, **sex}
                yield from _chapter(splits[split] / speaker / chapter, f"{split}_", columns)


def _chapter(folder: Path, prefix: str, columns: Mapping[str, Any]) -> Entries:
    files = listing(folder)[1]
    silent = {name.removesuffix(".flac"): name for name in files if name.endswith(".flac")}  # recordings that no line names
    known = set(silent)
    for transcript in (folder / name for name in files if name.endswith(".trans.txt")):
        for number, line in lines_of(transcript):
            name, _, text = line.partition(" ")
            silent.pop(name, None)
            if name in known:
                yield Entry(transcript, number, prefix + name, folder / f"{name}.flac", text, columns)
            elif line.strip():
                yield Unusable(str(transcript), number, "has text but no recording", prefix + name)
    for name, file in silent.items():
        yield Entry(folder / file, 0, prefix + name, folder / file, "", columns)


def read_libriheavy(options: CorpusOptions) -> Entries:
    """Lhotse cuts, `libriheavy_cuts_SUBSET.jsonl[.gz]` in a folder or one such file; the texts are the supervisions'.

    A relative recording is looked for in the folder of the cuts and in the one above it, each time as the cut names it, without
    `download/` and without `download/librilight/`. Columns: speaker, split, language, recording_id.
    """
    source = options.directory
    names = [source.name] if source.is_file() else [name for name in listing(source)[1] if name.startswith(_CUTS)]
    names = [name for name in names if name.endswith((".jsonl", ".jsonl.gz"))]
    root = source.parent if source.is_file() else source
    if not names:
        raise _nothing(options, f"{_CUTS}*.jsonl.gz", "Give the folder of the cuts or one file of them.")
    splits = {name: name.removesuffix(".gz").removesuffix(".jsonl").removeprefix(_CUTS) for name in names}
    chosen = _chosen(options, sorted(set(splits.values())))
    for name in (name for name in names if splits[name] in chosen):
        last: tuple[object, Path | None] = (None, None)  # the cuts of a recording follow one another
        for item in json_objects(root / name):
            if isinstance(item, Unusable):
                yield item
                continue
            number, cut = item
            try:
                recorded = _recorded(cut)
                last = last if last[0] == recorded else (recorded, _librilight(root, recorded))
                yield from _supervised(root / name, number, cut, last[1], splits[name], options.casing)
            except RecordError as error:
                yield Unusable(str(root / name), number, str(error), cut["id"] if isinstance(cut.get("id"), str) else None)


def _recorded(cut: Mapping[str, Any]) -> str:
    """The recording's path as the cut names it.

    Raises:
        RecordError: it is no cut of a file.
    """
    recording = cut.get("recording")
    sources = recording.get("sources") if isinstance(recording, dict) else None
    source = sources[0] if isinstance(sources, list) and sources else None
    if cut.get("type", "MonoCut") != "MonoCut" or not isinstance(cut.get("id"), str) or not isinstance(source, dict):
        raise RecordError("is no MonoCut with an id and a recording")
    if source.get("type") != "file" or not isinstance(source.get("source"), str):
        raise RecordError(f"has a recording of type {source.get('type')!r}, not a file")
    return str(source["source"])


def _librilight(root: Path, recorded: str) -> Path | None:
    """Where a recording lies; None where it is nowhere.

    Raises:
        RecordError: it climbs out of the folder.
    """
    if os.path.isabs(recorded):
        return Path(recorded)
    names = [recorded.removeprefix(start) for start in _LIBRILIGHT if recorded.startswith(start)]
    paths = [within(base, name) for base in (root, Path(os.path.abspath(root)).parent) for name in names]
    if None in paths:
        raise RecordError(OUTSIDE)
    return next((path for path in paths if path and os.path.isfile(path)), None)


def _supervised(file: Path, number: int, cut: Mapping[str, Any], path: Path | None, split: str, casing: str) -> Iterator[Entry]:
    """An entry for each supervision: one cut may hold several utterances, which are not one sentence."""
    if path is None:
        raise RecordError(NOT_THERE)
    supervisions = cut.get("supervisions")
    if not isinstance(supervisions, list) or not supervisions or not all(isinstance(s, dict) for s in supervisions):
        raise RecordError("has no text")
    begin, length = seconds(cut.get("start")), seconds(cut.get("duration"), 1e-9)
    spans = [(seconds(s.get("start", 0), -math.inf), seconds(s.get("duration", length), 1e-9)) for s in supervisions]
    for index, (supervision, (offset, lasts)) in enumerate(zip(supervisions, spans, strict=True)):
        if begin is None or length is None or offset is None or lasts is None:
            raise RecordError("has a start or a duration that is no number of seconds")
        inside = max(0.0, offset)
        left = min(length, offset + lasts) - inside
        if left <= 0:
            raise RecordError("has a supervision outside its cut")
        known = {"speaker": supervision.get("speaker"), "split": split, "language": supervision.get("language")}
        known["recording_id"] = supervision.get("recording_id", cut["recording"].get("id"))
        columns = {key: value for key, value in known.items() if value is not None}
        name = cut["id"] if len(supervisions) == 1 else f"{cut['id']}_{index}"
        yield Entry(file, number, name, path, _text_of(supervision, casing), columns, round(begin + inside, 6), round(left, 6))


def _text_of(supervision: Mapping[str, Any], casing: str) -> str:
    """Of the published texts the book's (cased) or the recogniser's (upper); of extracted manifests the only one, if it fits."""
    custom = supervision.get("custom")
    texts = custom.get("texts") if isinstance(custom, dict) else None
    if isinstance(texts, list) and len(texts) > 1:
        text = texts[casing == "upper"]
    else:
        text = texts[0] if isinstance(texts, list) and texts else supervision.get("text")
        if casing == "upper" and text != str(text).upper():
            return ""
    return text if isinstance(text, str) else ""


def read_common_voice(options: CorpusOptions) -> Entries:
    """`SPLIT.tsv` (validated, unless splits are named) beside `clips/`.

    Older releases quote a sentence that holds quotes as CSV does, newer ones leave all quotes alone; a quote in a row of the newer
    ones must not swallow the rows behind it. Columns: speaker, split, up_votes, down_votes, age, gender, accent, locale.
    """
    known = [name.removesuffix(".tsv") for name in listing(options.directory)[1] if name.endswith(".tsv")]
    if not options.splits and "validated" not in known:
        raise _nothing(options, "validated.tsv", "Give the folder of one language, with validated.tsv and clips, or name its splits.")
    clips = options.directory / "clips"
    for split in _chosen(options, known) if options.splits else ["validated"]:
        table = options.directory / f"{split}.tsv"
        for item in with_header(table, tabbed(table), ("path",), ("sentence",), ("client_id",)):
            if isinstance(item, Unusable):
                yield item
                continue
            number, row = item
            clip = row.get("path", "")
            if not clip:
                yield Unusable(str(table), number, "names no recording")
                continue
            path = within(clips, clip if PurePosixPath(clip).suffix else f"{clip}.mp3")  # the first releases give no suffix
            if path is None:
                yield Unusable(str(table), number, OUTSIDE)
                continue
            columns: dict[str, Any] = {"speaker": row.get("client_id", ""), "split": split}
            columns |= {key: int(row[key]) for key in ("up_votes", "down_votes") if row.get(key, "").isdecimal()}
            columns |= {key.removesuffix("s"): row[key] for key in ("age", "gender", "accent", "accents", "locale") if key in row}
            yield Entry(table, number, path.stem, path, _unquoted(row.get("sentence", "")), columns)


def _unquoted(cell: str) -> str:
    """A cell without CSV's quotes, where it has them: around doubled quotes or around nothing."""
    inner = cell[1:-1]
    if len(cell) < 2 or cell[0] != '"' or cell[-1] != '"' or '"' in inner.replace('""', "") or (inner and '""' not in inner):
        return cell
    return inner.replace('""', '"')


def read_voxpopuli(options: CorpusOptions) -> Entries:
    """`[transcribed_data/]LANG/YEAR/ID.ogg` with `asr_SPLIT.tsv`, or with the annotations `asr_LANG.tsv[.gz]` where those are not there.

    The text is the normalised one, or where there is none the original. The speaker "None" is many people: it is left out. Columns:
    speaker, split, gender, language, accent, is_gold_transcript.
    """
    root = options.directory / "transcribed_data"
    root = Path(os.path.abspath(root if root.is_dir() else options.directory))
    languages = [root] if _manifests(root) else [root / name for name in listing(root)[0] if _manifests(root / name)]
    if not languages:
        raise _nothing(options, "asr_SPLIT.tsv", "Give the folder that holds transcribed_data, or one language of it.")
    splits = _chosen(options, _VOXPOPULI)
    for folder in languages:
        others = {f"asr_{split}.tsv" for split in _VOXPOPULI if split not in splits}
        for name in (name for name in _manifests(folder) if name not in others):
            yield from _voxpopuli(folder, folder / name, splits)


def _manifests(folder: Path) -> list[str]:
    files = set(listing(folder)[1])
    splits = [name for name in (f"asr_{split}.tsv" for split in _VOXPOPULI) if name in files]
    return splits or [name for name in (f"asr_{folder.name}.tsv", f"asr_{folder.name}.tsv.gz") if name in files][:1]


def _voxpopuli(folder: Path, table: Path, splits: Sequence[str]) -> Entries:
    """Manifests are cells joined by tabs, where quotes mean nothing; annotations are CSV with `|`."""
    piped = table.suffix == ".gz" or "|" in next(lines_of(table), (0, ""))[1]
    needed = (("id", "id_"), ("normalized_text", "normed_text"), ("split",))
    for item in with_header(table, quoted(table, "|") if piped else tabbed(table), *needed):
        if isinstance(item, Unusable):
            yield item
            continue
        number, row = item
        name = f"{row.get('session_id', '')}-{row['id_']}" if "id_" in row else row.get("id", "")
        split = row.get("split")
        if split is None or not name:
            yield Unusable(str(table), number, "names no recording or no split")
        elif split in splits:  # annotations hold splits of which no recording is published
            path = within(folder, f"{name[:4]}/{name}.ogg")
            if path is None:
                yield Unusable(str(table), number, OUTSIDE)
                continue
            text = row.get("normalized_text", row.get("normed_text", "")).strip()
            columns: dict[str, Any] = {"split": split, "language": folder.name.removesuffix("_accented")}
            cells = {"speaker": row.get("speaker_id")} | {key: row.get(key) for key in ("gender", "accent", "is_gold_transcript")}
            columns |= {key: cell for key, cell in cells.items() if cell not in (None, "", "None")}
            yield Entry(table, number, name, path, text or row.get("raw_text", row.get("original_text", "")), columns)


def read_an4(options: CorpusOptions) -> Entries:
    """`etc/an4_SPLIT.fileids` and `.transcription` ("<s> TEXT </s> (UTTERANCE)", in the test split without the marks) with `wav/`.

    One split's transcription (a thousand lines) is held in memory. Columns: speaker, split.
    """
    etc = options.directory / "etc"
    lists = (
        {name.removesuffix(".fileids").rpartition("_")[2]: name for name in listing(etc)[1] if name.endswith(".fileids")}
        if etc.is_dir()
        else {}
    )
    if not lists:
        raise _nothing(options, "etc/*.fileids", "Give the folder that holds etc and wav.")
    for split in _chosen(options, list(lists)):
        fileids = etc / lists[split]
        transcript = fileids.with_suffix(".transcription")
        texts: dict[str, tuple[int, str]] = {}
        for number, line in lines_of(transcript):
            match = _AN4_LINE.fullmatch(line.strip())
            if match and match[2] not in texts:
                texts[match[2]] = (number, match[1])
            elif line.strip():
                yield Unusable(str(transcript), number, "gives a text a second time" if match else "is not of the form TEXT (UTTERANCE)")
        for number, line in lines_of(fileids):
            name = PurePosixPath(line.strip())
            if not name.name:
                continue
            path = within(options.directory / "wav", str(name))
            if path is None:
                yield Unusable(str(fileids), number, OUTSIDE)
                continue
            recordings = (path.with_name(path.name + suffix) for suffix in _AN4_SUFFIXES)
            _, text = texts.pop(name.name, (0, ""))
            columns = {"speaker": name.parent.name, "split": split}
            yield Entry(fileids, number, name.name, next((p for p in recordings if os.path.isfile(p)), path), text, columns)
        for utterance, (number, _) in texts.items():
            yield Unusable(str(transcript), number, "has text but no recording", utterance)
