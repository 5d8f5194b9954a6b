"""Readers of published corpora: each streams what a corpus' files say of its utterances; `corpus.read_corpus` checks them.

To add a corpus, write a reader here and name it in PUBLISHED.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from most_ray.errors import RecordError, count_of, shown
from most_ray.speech.corpora import tables
from most_ray.speech.corpora.audio import ANY_CHANNEL
from most_ray.speech.corpora.entries import NOT_THERE, CorpusOptions, Entries, Entry, Unusable

_CUTS = "libriheavy_cuts_"  # start of the names of LibriHeavy's files
_LIBRILIGHT = ("", "download/", "download/librilight/")  # what may be missing at the start of LibriHeavy's paths
_LEAST_RATE = 16_000  # Hz that lose nothing of what features are made of
_MOST_DIGITS = 18  # of a number of votes
_VOXPOPULI = ("train", "dev", "test")  # splits
_AN4_SUFFIXES = (".wav", ".sph", ".ogg", ".flac")
_AN4_LINE = re.compile(r"(?:<s>)?(.*?)(?:</s>)?\s*\(([^()\s]+)\)")  # text, utterance


def read_librispeech(options: CorpusOptions) -> Entries:
    """`[LibriSpeech/][SPLIT/]SPEAKER/CHAPTER/` with `*.flac` and `S-C.trans.txt`; the sex comes from SPEAKERS.TXT where it exists. Columns:
    speaker, chapter, split, sex."""
    root = options.directory / "LibriSpeech"
    root = Path(os.path.abspath(root if root.is_dir() else options.directory))
    below = tables.list_folder(root)[0]
    if any(map(str.isdecimal, below)):  # a speaker: the folder is one split
        splits, root = {root.name: root}, root.parent
    else:
        splits = {name: root / name for name in below if any(map(str.isdecimal, tables.list_folder(root / name)[0]))}
    if not splits:
        raise options.not_found("LibriSpeech", "Give the folder of the splits, or one split: SPLIT/SPEAKER/CHAPTER/*.flac.")
    table = root / "SPEAKERS.TXT"
    lines = tables.text_lines(table) if table.is_file() else ()
    cells = ([cell.strip() for cell in line.split("|")] for _, line in lines if line[:1] != ";")
    sexes = {row[0]: row[1] for row in cells if len(row) > 1}
    for split in options.choose_splits(list(splits)):
        for speaker in tables.list_folder(splits[split])[0]:
            sex = {"sex": sexes[speaker]} if speaker in sexes else {}
            for chapter in tables.list_folder(splits[split] / speaker)[0]:
                columns = {"speaker": speaker, "chapter": chapter, "split": split, **sex}
                yield from _chapter(splits[split] / speaker / chapter, f"{split}_", columns)


def _chapter(folder: Path, prefix: str, columns: Mapping[str, Any]) -> Entries:
    files = tables.list_folder(folder)[1]
    without_text = {name.removesuffix(".flac"): name for name in files if name.endswith(".flac")}
    known = set(without_text)
    for transcript in (folder / name for name in files if name.endswith(".trans.txt")):
        for number, line in tables.text_lines(transcript):
            name, _, text = line.partition(" ")
            without_text.pop(name, None)
            if name in known:
                yield Entry(transcript, number, prefix + name, folder / f"{name}.flac", text, columns)
            elif line.strip():
                yield Unusable(str(transcript), number, "has text but no recording", prefix + name)
    for name, file in without_text.items():
        yield Entry(folder / file, 0, prefix + name, folder / file, "", columns)


def read_libriheavy(options: CorpusOptions) -> Entries:
    """Lhotse cuts: `libriheavy_cuts_SUBSET.jsonl[.gz]` in a folder, or one such file; the texts are those of the supervisions. A relative
    recording is looked for in the folder of the cuts and in the one above it, each time as the cut names it, without `download/` and
    without `download/librilight/`. Columns: speaker, split, language, recording_id."""
    source = options.directory
    names = [source.name] if source.is_file() else [name for name in tables.list_folder(source)[1] if name.startswith(_CUTS)]
    names = [name for name in names if name.endswith((".jsonl", ".jsonl.gz"))]
    root = source.parent if source.is_file() else source
    if not names:
        raise options.not_found(f"{_CUTS}*.jsonl.gz", "Give the folder of the cuts or one file of them.")
    splits = {name: name.removesuffix(".gz").removesuffix(".jsonl").removeprefix(_CUTS) for name in names}
    chosen = options.choose_splits(sorted(set(splits.values())))
    find = functools.lru_cache(maxsize=1)(functools.partial(_librilight, root))  # the cuts of a recording follow one another
    for name in (name for name in names if splits[name] in chosen):
        convert = functools.partial(_cut_entries, root / name, find, splits[name], options.casing)
        rows = tables.json_rows(root / name)
        yield from tables.entries_of(root / name, rows, convert, lambda cut: cut["id"] if isinstance(cut.get("id"), str) else None)


def _librilight(root: Path, recorded: str) -> Path | None:
    """Where a recording is stored; None where it is not found. Raises RecordError if its path leads out of the folder."""
    if os.path.isabs(recorded):
        return Path(recorded)
    names = [recorded.removeprefix(start) for start in _LIBRILIGHT if recorded.startswith(start)]
    paths = [tables.path_below(base, name) for base in (root, Path(os.path.abspath(root)).parent) for name in names]
    return next((path for path in paths if os.path.isfile(path)), None)


def _cut_entries(
    file: Path, find: Callable[[str], Path | None], split: str, casing: str, number: int, cut: Mapping[str, Any]
) -> Iterator[Entry]:
    """Yield an entry for each supervision: one cut may hold several utterances, which are not one sentence."""
    recorded, channel = _recorded(cut)
    path = find(recorded)
    if path is None:
        raise RecordError(NOT_THERE)
    supervisions, parse = cut.get("supervisions"), tables.parse_seconds
    if not isinstance(supervisions, list) or not supervisions or not all(isinstance(s, dict) for s in supervisions):
        raise RecordError("has no text")
    begin, length = parse(cut.get("start")), parse(cut.get("duration"), 1e-9)
    spans = [(parse(s.get("start", 0), -math.inf), parse(s.get("duration", length), 1e-9)) for s in supervisions]
    for index, (supervision, (offset, lasts)) in enumerate(zip(supervisions, spans, strict=True)):
        if begin is None or length is None or offset is None or lasts is None:
            raise RecordError("has a start or a duration that is not a number of seconds")
        inside = max(0.0, offset)
        left = min(length, offset + lasts) - inside
        if left <= 0:
            raise RecordError("has a supervision outside its cut")
        known = {"speaker": supervision.get("speaker"), "split": split, "language": supervision.get("language")}
        known["recording_id"] = supervision.get("recording_id", cut["recording"].get("id"))
        columns = {key: value for key, value in known.items() if value is not None}
        name = cut["id"] if len(supervisions) == 1 else f"{cut['id']}_{index}"
        other = supervision.get("channel", cut.get("channel"))
        if "channel" in cut and _listed(other) != _listed(cut["channel"]):
            raise RecordError(f"has a supervision of channel {shown(other)}, which is not the cut's, {shown(cut['channel'])}")
        yield Entry(file, number, name, path, _text_of(supervision, casing), columns, round(begin + inside, 6), round(left, 6), channel)


def _recorded(cut: Mapping[str, Any]) -> tuple[str, int | None]:
    """The recording's path as the cut names it, and the channel of that file, None for its only one. Raises RecordError if it is not a cut
    of one channel of a file as it is."""
    recording = cut.get("recording")
    recording = recording if isinstance(recording, dict) else {}
    sources = _listed(recording.get("sources"))
    mono = cut.get("type", "MonoCut") == "MonoCut" and isinstance(cut.get("id"), str)
    if not mono or not sources or not all(isinstance(source, dict) for source in sources):
        raise RecordError("is not a MonoCut with an id and a recording")
    if changed := [_transform_name(each) for each in _listed(recording.get("transforms")) if not _is_harmless(each)]:
        raise RecordError(f"has a recording that is changed by {', '.join(changed)[:100]}, which is not done here: store what it gives")
    source, channel = _source_of(sources, cut.get("channel"))
    if source.get("type") != "file" or not isinstance(source.get("source"), str):
        raise RecordError(f"has a recording of type {shown(source.get('type'))}, not a file")
    return str(source["source"]), channel


def _source_of(sources: Sequence[Mapping[str, Any]], wanted: object) -> tuple[Mapping[str, Any], int | None]:
    """The source that has the channel `wanted` (None: the only one) of a recording, and which of its channels that is; None if it is alone.
    Raises RecordError where there is no such channel, or several could be meant."""
    if wanted is not None and (not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 0):
        raise RecordError(f"has a channel that is no number of one: {shown(wanted)}")
    channels = [_listed(source.get("channels")) for source in sources]
    if not any(channels) and len(sources) == 1:  # they are not listed: the file has the last word
        return sources[0], ANY_CHANNEL if wanted is None else int(wanted)
    found = [index for index, each in enumerate(channels) if wanted in each or (wanted is None and each)]
    if len(found) != 1 or (wanted is None and sum(map(len, channels)) != 1):
        known = sorted({str(channel) for each in channels for channel in each})[:8]
        raise RecordError(f"is of channel {shown(wanted)} of a recording with the channels {', '.join(known)}")
    own = channels[found[0]]
    return sources[found[0]], None if len(own) == 1 else own.index(wanted)


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _transform_name(transform: object) -> str:
    return str(transform.get("name") if isinstance(transform, dict) else transform)


def _is_harmless(transform: object) -> bool:
    """Whether a transform changes nothing that is used: recordings are resampled here in any case."""
    settings = transform.get("kwargs") if isinstance(transform, dict) else None
    rate = settings.get("target_sampling_rate", settings.get("sampling_rate")) if isinstance(settings, dict) else None
    return _transform_name(transform) == "Resample" and isinstance(rate, int) and rate >= _LEAST_RATE


def _text_of(supervision: Mapping[str, Any], casing: str) -> str:
    """Of the two published texts the book's (cased) or the recogniser's (upper); of an extracted manifest its only one, if it fits."""
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
    """`SPLIT.tsv` (validated, unless splits are named) beside `clips/`. Older releases quote a sentence that contains quotes as CSV does,
    newer ones leave all quotes alone. Columns: speaker, split, up_votes, down_votes, age, gender, accent, locale."""
    known = [name.removesuffix(".tsv") for name in tables.list_folder(options.directory)[1] if name.endswith(".tsv")]
    if not options.splits and "validated" not in known:
        raise options.not_found("validated.tsv", "Give the folder of one language, with validated.tsv and clips, or name its splits.")
    for split in options.choose_splits(known) if options.splits else ["validated"]:
        table = options.directory / f"{split}.tsv"
        rows = tables.dict_rows(table, tables.tsv_cells(table), ("path",), ("sentence",), ("client_id",))
        yield from tables.entries_of(table, rows, functools.partial(_clip, table, options.directory / "clips", split))


def _clip(table: Path, clips: Path, split: str, number: int, row: Mapping[str, str]) -> Iterator[Entry]:
    clip = row.get("path", "")
    if not clip:
        raise RecordError("names no recording")
    path = tables.path_below(clips, clip if PurePosixPath(clip).suffix else f"{clip}.mp3")  # the first releases give no suffix
    columns: dict[str, Any] = {"speaker": row.get("client_id", ""), "split": split}
    votes = {key: row[key] for key in ("up_votes", "down_votes") if row.get(key, "").isdecimal()}
    if wrong := next((key for key, cell in votes.items() if len(cell) > _MOST_DIGITS), None):
        raise RecordError(f"has {wrong} of {count_of(len(votes[wrong]), 'digit')}")
    columns |= {key: int(cell) for key, cell in votes.items()}
    columns |= {key.removesuffix("s"): row[key] for key in ("age", "gender", "accent", "accents", "locale") if key in row}
    yield Entry(table, number, path.stem, path, tables.one_line(row.get("sentence", "")), columns)


def read_voxpopuli(options: CorpusOptions) -> Entries:
    """`[transcribed_data/]LANG/YEAR/ID.ogg` with `asr_SPLIT.tsv`, or else with the annotations `asr_LANG.tsv[.gz]`. The text is the
    normalised one, or where there is none the original. The speaker "None" stands for many people and is left out. Columns: speaker, split,
    gender, language, accent, is_gold_transcript."""
    root = options.directory / "transcribed_data"
    root = Path(os.path.abspath(root if root.is_dir() else options.directory))
    languages = [root] if _manifests(root) else [root / name for name in tables.list_folder(root)[0] if _manifests(root / name)]
    if not languages:
        raise options.not_found("asr_SPLIT.tsv", "Give the folder that holds transcribed_data, or one language of it.")
    splits = options.choose_splits(_VOXPOPULI)
    others = {f"asr_{split}.tsv" for split in _VOXPOPULI if split not in splits}
    for folder in languages:
        for table in (folder / name for name in _manifests(folder) if name not in others):
            # Manifests are cells joined by tabs; annotations are CSV with "|".
            piped = table.suffix == ".gz" or "|" in next(tables.text_lines(table), (0, ""))[1]
            needed = (("id", "id_"), ("normalized_text", "normed_text"), ("split",))
            rows = tables.dict_rows(table, tables.csv_cells(table, "|") if piped else tables.tsv_cells(table), *needed)
            yield from tables.entries_of(table, rows, functools.partial(_event, table, splits))


def _manifests(folder: Path) -> list[str]:
    files = set(tables.list_folder(folder)[1])
    splits = [name for name in (f"asr_{split}.tsv" for split in _VOXPOPULI) if name in files]
    return splits or [name for name in (f"asr_{folder.name}.tsv", f"asr_{folder.name}.tsv.gz") if name in files][:1]


def _event(table: Path, splits: Sequence[str], number: int, row: Mapping[str, str]) -> Iterator[Entry]:
    """Yield the row's entry if it is of one of `splits`: annotations have splits of which no recording is published."""
    name = f"{row.get('session_id', '')}-{row['id_']}" if "id_" in row else row.get("id", "")
    split = row.get("split")
    if split is None or not name:
        raise RecordError("names no recording or no split")
    if split in splits:
        path = tables.path_below(table.parent, f"{name[:4]}/{name}.ogg")
        text = row.get("normalized_text", row.get("normed_text", "")).strip()
        columns: dict[str, Any] = {"split": split, "language": table.parent.name.removesuffix("_accented")}
        cells = {"speaker": row.get("speaker_id")} | {key: row.get(key) for key in ("gender", "accent", "is_gold_transcript")}
        columns |= {key: cell for key, cell in cells.items() if cell not in (None, "", "None")}
        yield Entry(table, number, name, path, tables.one_line(text or row.get("raw_text", row.get("original_text", ""))), columns)


def read_an4(options: CorpusOptions) -> Entries:
    """`etc/an4_SPLIT.fileids` and `.transcription` ("<s> TEXT </s> (UTTERANCE)", in the test split without the marks) with `wav/`. One
    split's transcription (a thousand lines) is kept in memory. Columns: speaker, split."""
    etc = options.directory / "etc"
    lists = [name for name in tables.list_folder(etc)[1] if name.endswith(".fileids")] if etc.is_dir() else []
    by_split = {name.removesuffix(".fileids").rpartition("_")[2]: etc / name for name in lists}
    if not by_split:
        raise options.not_found("etc/*.fileids", "Give the folder that holds etc and wav.")
    for split in options.choose_splits(list(by_split)):
        transcript = by_split[split].with_suffix(".transcription")
        texts: dict[str, tuple[int, str]] = {}
        for number, line in tables.text_lines(transcript):
            match = _AN4_LINE.fullmatch(line.strip())
            if match and match[2] not in texts:
                texts[match[2]] = (number, match[1])
            elif line.strip():
                yield Unusable(str(transcript), number, "gives a text a second time" if match else "is not of the form TEXT (UTTERANCE)")
        convert = functools.partial(_an4_entry, by_split[split], options.directory / "wav", split, texts)
        yield from tables.entries_of(by_split[split], tables.text_lines(by_split[split]), convert)
        for utterance, (number, _) in texts.items():
            yield Unusable(str(transcript), number, "has text but no recording", utterance)


def _an4_entry(file: Path, wav: Path, split: str, texts: dict[str, tuple[int, str]], number: int, line: str) -> Iterator[Entry]:
    """Yield the entry of a line of fileids; its text is removed from `texts`, (line, text) by utterance."""
    name = PurePosixPath(line.strip())
    if name.name:
        path = tables.path_below(wav, str(name))
        found = (each for suffix in _AN4_SUFFIXES if os.path.isfile(each := path.with_name(path.name + suffix)))
        _, text = texts.pop(name.name, (0, ""))
        yield Entry(file, number, name.name, next(found, path), text, {"speaker": name.parent.name, "split": split})


@dataclass(frozen=True)
class Layout:
    """How a kind of corpus is stored on disk."""

    read: Callable[[CorpusOptions], Entries]
    signs: tuple[str, ...]  # glob patterns: a folder in which one of them finds a file is taken for a corpus of this layout
    licence: str = ""  # under which its recordings and texts are published; empty: unknown
    files: str = ""  # what such a folder holds, for the help of commands: a few words


PUBLISHED = {
    "librispeech": Layout(
        read_librispeech,
        ("*/*/*.trans.txt", "*/*/*/*.trans.txt", "LibriSpeech/*/*/*/*.trans.txt"),
        "CC BY 4.0",
        "[SPLIT/]SPEAKER/CHAPTER/*.flac, *.trans.txt",
    ),
    "libriheavy": Layout(
        read_libriheavy,
        (f"{_CUTS}*.jsonl.gz", f"{_CUTS}*.jsonl"),
        "recordings: public domain (LibriVox); texts: Apache 2.0",
        "libriheavy_cuts_SPLIT.jsonl.gz, Libri-Light beside",
    ),
    "common_voice": Layout(read_common_voice, ("validated.tsv",), "CC0 1.0", "validated.tsv or SPLIT.tsv, clips/*.mp3"),
    "voxpopuli": Layout(
        read_voxpopuli,
        ("asr_*.tsv", "transcribed_data/*/asr_*.tsv", "*/asr_*.tsv"),
        "CC0 1.0",
        "asr_SPLIT.tsv, the recordings in folders by year",
    ),
    "an4": Layout(read_an4, ("etc/*.fileids",), "BSD-style, Carnegie Mellon University", "etc/*.fileids, etc/*.transcription, wav/"),
}
