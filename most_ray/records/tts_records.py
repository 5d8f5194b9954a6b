"""`most-ray prepare tts`: ASR records to TTS records, one directory or many."""

from __future__ import annotations

import datetime as dt
import gzip
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from most_ray.errors import ConfigError, DataError, RecordError, nearest
from most_ray.io import storage
from most_ray.records.files import ASSET_FILES, CONVERTED, REJECTED, UNFINISHED, read_raw, record_files
from most_ray.records.record import asr_to_tts, parse_record

_FORM = "An entry is {dataset_name, input_dir, output_dir, file_pattern}; the last is optional."


@dataclass(frozen=True)
class Conversion:
    """What `prepare tts` is asked for. Without a name, the data set is called as its directory."""

    input_dir: Path
    output_dir: Path
    dataset_name: str | None = None
    file_pattern: str = "*"


def read_conversions(path: Path) -> list[Conversion]:
    """The conversions of a configuration file in the original's form: a JSON list of {"dataset_name", "input_dir", "output_dir",
    "file_pattern"}, or one such object. Paths are taken from where the command runs.

    Raises:
        ConfigError: it cannot be read, or has another form.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("config", str(path), f"cannot be read as JSON ({error}).") from error
    entries = value if isinstance(value, list) else [value]
    if not entries:
        raise ConfigError("config", str(path), "names no data set.", _FORM)
    found = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ConfigError("config", str(path), f"entry {index} is a JSON {type(entry).__name__}.", _FORM)
        for key, given in entry.items():
            if key not in Conversion.__dataclass_fields__:
                raise ConfigError(key, given, f"is no key of entry {index}.", nearest(key, Conversion.__dataclass_fields__))
            if not isinstance(given, str):
                raise ConfigError(key, given, f"of entry {index} is no string.")
        if missing := [key for key in ("input_dir", "output_dir") if not entry.get(key)]:
            raise ConfigError(missing[0], None, f"is missing in entry {index} of {path}.", _FORM)
        given = {key: entry[key] for key in ("dataset_name", "file_pattern") if entry.get(key)}
        found.append(Conversion(Path(entry["input_dir"]), Path(entry["output_dir"]), **given))
    outputs = [each.output_dir.absolute() for each in found]
    if twice := next((output for output in outputs if outputs.count(output) > 1), None):
        raise ConfigError("output_dir", str(twice), "is named by two entries, which would overwrite each other.", "Name different ones.")
    return found


def prepare_tts(conversion: Conversion) -> dict[str, int]:
    """TTS records of a directory's ASR records, a file for each file, with the units manifest and what else goes with the units beside
    them. Memory does not grow with the files. Records that are no good ASR records go to rejected.jsonl.

    Running it again gives the same files: the conversion's time stamp is the source file's.

    Raises:
        DataError: no record files, or none with an ASR record.
    """
    output = conversion.output_dir
    _check_apart(conversion)
    entries = record_files(conversion.input_dir, conversion.file_pattern)
    targets = _targets(entries, output)
    output.mkdir(parents=True, exist_ok=True)
    name = conversion.dataset_name or conversion.input_dir.absolute().name
    counts = {"records": 0, "rejected": 0, "files": 0}
    aside = output / ".rejected.jsonl.tmp"
    with aside.open("w", encoding="utf-8") as rejected:
        for target, entry in targets.items():
            path = storage.local(entry.uri)
            target.parent.mkdir(parents=True, exist_ok=True)
            counts["records"] += _write(_unfinished(target), _converted(path, name, rejected, counts))
            counts["files"] += 1
    if counts["records"] == 0:  # what an earlier command has made stays
        for target in targets:
            _unfinished(target).unlink()
        aside.replace(output / REJECTED)
        reason = f"holds no ASR record; {counts['rejected']} others are in {output / 'rejected.jsonl'}."
        raise DataError("input_dir", str(conversion.input_dir), reason)
    (output / UNFINISHED).touch()
    for old in _made_before(output) - {target.relative_to(output).as_posix() for target in targets}:
        (output / old).unlink(missing_ok=True)
    for target in targets:
        _unfinished(target).replace(target)
    aside.replace(output / REJECTED)
    if not counts["rejected"]:
        (output / REJECTED).unlink()
    root = conversion.input_dir if conversion.input_dir.is_dir() else conversion.input_dir.parent
    for beside in ASSET_FILES:
        if (root / beside).exists():
            shutil.copyfile(root / beside, output / beside)
        else:
            (output / beside).unlink(missing_ok=True)
    names = sorted(target.relative_to(output).as_posix() for target in targets)
    (output / CONVERTED).write_text(json.dumps({"files": names}) + "\n", encoding="utf-8")
    (output / UNFINISHED).unlink()
    return counts


def _targets(entries: Sequence[storage.Entry], output: Path) -> dict[Path, storage.Entry]:
    """Where each file's records go.

    Raises:
        DataError: two go to one place.
    """
    targets: dict[Path, storage.Entry] = {}
    for entry in entries:
        relative = Path(entry.name)
        stem = relative.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json")
        target = output / relative.parent / f"{stem}.jsonl.gz"
        if target in targets:
            rule = f"would be written to {target}, as {targets[target].name} would."
            raise DataError("input_dir", storage.redact(entry.uri), rule, "Rename one.")
        targets[target] = entry
    return targets


def _made_before(output: Path) -> set[str]:
    """Names of the files that an earlier conversion has written here."""
    try:
        names = json.loads((output / CONVERTED).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {name for name in names if isinstance(name, str) and name.endswith(".jsonl.gz") and not {"..", "/"} & set(Path(name).parts)}


def _check_apart(conversion: Conversion) -> None:
    """Nothing of the input may be overwritten, and what is written must not be input the next time.

    Raises:
        ConfigError: the output is the input's folder, or lies in it.
    """
    source, output = (Path(os.path.realpath(uri)) for uri in (conversion.input_dir, conversion.output_dir))
    shown = str(conversion.output_dir)
    if output in (source, source.parent if source.is_file() else source):
        raise ConfigError("output_dir", shown, "is the input_dir: its records would be overwritten.", "Name another folder.")
    if source in output.parents:
        raise ConfigError("output_dir", shown, "lies in the input_dir: its records would be read as input.", "Name another folder.")


def _converted(path: Path, name: str, rejected: TextIO, counts: dict[str, int]) -> Iterator[dict[str, Any]]:
    """The file's records as TTS records; others are told to `rejected` and counted."""
    stamp = dt.datetime.fromtimestamp(int(path.stat().st_mtime), tz=dt.UTC)
    for index, raw in read_raw(path):
        try:
            if isinstance(raw, RecordError):
                raise raw
            if parse_record(raw).task != "asr":
                raise RecordError("is no ASR record")
        except RecordError as error:
            rejected.write(json.dumps({"file": str(path), "index": index, "reason": str(error)}) + "\n")
            counts["rejected"] += 1
        else:
            assert isinstance(raw, dict)
            yield asr_to_tts(raw, name, stamp)


def _write(path: Path, records: Iterator[dict[str, Any]]) -> int:
    """JSON Lines, gzipped; the same records always give the same bytes. Returns their number."""
    count = 0
    with path.open("wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as sink:
        for record in records:
            sink.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            count += 1
    return count


def _unfinished(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp")
