"""`most-ray prepare tts`: converts directories of ASR records to TTS records."""

from __future__ import annotations

import datetime as dt
import gzip
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from most_ray.errors import ConfigError, DataError, RecordError, nearest, one_line
from most_ray.io import storage
from most_ray.io.json_values import parse_json
from most_ray.io.outputs import check_file, check_folder, named
from most_ray.io.uris import expand
from most_ray.records.files import ASSET_FILES, CONVERTED, REJECTED, REJECTED_LIST, UNFINISHED, read_raw, record_files
from most_ray.records.record import asr_to_tts, parse_record

_FORM = "An entry is {dataset_name, input_dir, output_dir, file_pattern}; the last is optional."


@dataclass(frozen=True)
class Conversion:
    """One directory to convert."""

    input_dir: Path  # of ASR records
    output_dir: Path  # for the TTS records
    dataset_name: str | None = None  # for the records' metadata; None: the name of input_dir
    file_pattern: str = "*"  # shell pattern of the files to convert


def read_conversions(path: Path) -> list[Conversion]:
    """Read a JSON list of {"dataset_name", "input_dir", "output_dir", "file_pattern"}, or one such object, the original MoST's form.

    Relative paths are relative to the folder that the command runs in.

    Raises:
        ConfigError: the file cannot be read, or has another form.
    """
    try:
        value = parse_json(storage.read_small(path))
    except DataError:  # it is a pipe, a device, or far too large
        raise
    except (OSError, ValueError) as error:
        raise ConfigError("config", str(path), f"cannot be read as JSON ({one_line(error)}).", _FORM) from error
    entries = value if isinstance(value, list) else [value]
    if not entries:
        raise ConfigError("config", str(path), "names no data set.", _FORM)
    found = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ConfigError("config", str(path), f"entry {index} is a JSON {type(entry).__name__}.", _FORM)
        for key, given in entry.items():
            if key not in Conversion.__dataclass_fields__:
                raise ConfigError(key, given, f"is not a key of entry {index}.", nearest(key, Conversion.__dataclass_fields__))
            if not isinstance(given, str):
                raise ConfigError(key, given, f"of entry {index} is not a string.")
        if missing := [key for key in ("input_dir", "output_dir") if not entry.get(key)]:
            raise ConfigError(missing[0], None, f"is missing in entry {index} of {path}.", _FORM)
        given = {key: entry[key] for key in ("dataset_name", "file_pattern") if entry.get(key)}
        source, output = (storage.local(expand(key, entry[key])) for key in ("input_dir", "output_dir"))
        found.append(Conversion(source, output, **given))
    outputs = [each.output_dir.absolute() for each in found]
    if twice := next((output for output in outputs if outputs.count(output) > 1), None):
        raise ConfigError("output_dir", str(twice), "is named by two entries, which would overwrite each other.", "Name different ones.")
    return found


def prepare_tts(conversion: Conversion) -> dict[str, int]:
    """Convert a directory's ASR records to TTS records, file by file, and copy the units manifest and the other ASSET_FILES.

    Memory does not grow with the files. Records that are not valid ASR records go to rejected.jsonl. Running it again gives the same
    files: the conversion's time stamp is the source file's. Returns the counts: records, rejected, files.

    Raises:
        ConfigError: the output directory is the input directory or inside it.
        DataError: there are no record files, or no ASR record in them.
    """
    output = conversion.output_dir
    check_conversion(conversion)
    entries = record_files(conversion.input_dir, conversion.file_pattern)
    targets = _targets(entries, output)
    _check_own(output, targets)
    output.mkdir(parents=True, exist_ok=True)
    name = conversion.dataset_name or conversion.input_dir.absolute().name
    counts = {"records": 0, "rejected": 0, "files": 0}
    rejected_path = output / ".rejected.jsonl.tmp"
    with rejected_path.open("w", encoding="utf-8") as rejected:
        for target, entry in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            counts["records"] += _write(_unfinished(target), _converted(storage.local(entry.uri), name, rejected, counts))
            counts["files"] += 1
    if counts["records"] == 0:  # what an earlier command wrote stays
        for target in targets:
            _unfinished(target).unlink()
        rejected_path.replace(output / REJECTED)
        reason = f"holds no ASR record; {counts['rejected']} others are in {output / 'rejected.jsonl'}."
        raise DataError("input_dir", str(conversion.input_dir), reason)
    (output / UNFINISHED).touch()
    for old in _converted_before(output) - {target.relative_to(output).as_posix() for target in targets}:
        if _is_inside(output / old, output):
            (output / old).unlink(missing_ok=True)
    for target in targets:
        _unfinished(target).replace(target)
    rejected_path.replace(output / REJECTED)
    if not counts["rejected"]:
        (output / REJECTED).unlink()
    root = conversion.input_dir if conversion.input_dir.is_dir() else conversion.input_dir.parent
    for asset in ASSET_FILES:
        if (root / asset).exists():
            shutil.copyfile(root / asset, output / asset)
        else:
            (output / asset).unlink(missing_ok=True)
    names = sorted(target.relative_to(output).as_posix() for target in targets)
    (output / CONVERTED).write_text(json.dumps({"files": names}) + "\n", encoding="utf-8")
    (output / UNFINISHED).unlink()
    return counts


def _targets(entries: Sequence[storage.Entry], output: Path) -> dict[Path, storage.Entry]:
    """The source files by the file that their records are written to. Raises DataError where two have the same one."""
    targets: dict[Path, storage.Entry] = {}
    for entry in entries:
        target = output / f"{entry.name.removesuffix('.gz').removesuffix('.jsonl').removesuffix('.json')}.jsonl.gz"
        if target in targets:
            rule = f"would be written to {target}, as {targets[target].name} would."
            raise DataError("input_dir", storage.redact(entry.uri), rule, "Rename one.")
        targets[target] = entry
    return targets


def _converted_before(output: Path) -> set[str]:
    """Names of the files that an earlier conversion wrote to this folder; none if it kept no valid list of them."""
    try:
        names = parse_json(storage.read_small(output / CONVERTED))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    names = names if isinstance(names, list) else []
    return {name for name in names if isinstance(name, str) and name.endswith(".jsonl.gz") and not {"..", "/"} & set(Path(name).parts)}


def _check_own(output: Path, targets: Mapping[Path, storage.Entry]) -> None:
    """Check that what would be replaced is an earlier conversion's, and that no link leads out of the folder: else raise ConfigError."""
    for target in targets:
        if not _is_inside(target, output):
            rule = f"has a link in it, by which {target.relative_to(output)} would be written elsewhere."
            raise ConfigError("output_dir", str(output), rule, "Name the folder itself.")
    check_file("output_dir", output / REJECTED, REJECTED_LIST)
    written = _converted_before(output)
    if (output / UNFINISHED).exists() or ((output / CONVERTED).exists() and not written):
        return  # an earlier conversion was stopped, or its list is damaged
    replaced = [target.relative_to(output).as_posix() for target in targets] + ([] if written else list(ASSET_FILES))
    if mine := next((name for name in replaced if os.path.lexists(output / name) and name not in written), None):
        rule = f"holds {mine}, which no earlier conversion has written: it would be lost."
        raise ConfigError("output_dir", str(output), rule, "Name another folder, or move it away.")


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether the folder of a path, without links, is in `folder` or is `folder` itself."""
    return Path(os.path.realpath(path.parent)).is_relative_to(os.path.realpath(folder))


def check_conversion(conversion: Conversion) -> None:
    """Check that the output is a folder, that no input is overwritten, and that the output is not read as input the next time: else raise
    ConfigError."""
    check_folder("output_dir", conversion.output_dir)
    source, output = (Path(os.path.realpath(uri)) for uri in (conversion.input_dir, conversion.output_dir))
    shown = str(conversion.output_dir)
    if output in (source, source.parent if source.is_file() else source):
        raise ConfigError("output_dir", shown, "is the input_dir: its records would be overwritten.", "Name another folder.")
    if source in output.parents:
        raise ConfigError("output_dir", shown, "is inside the input_dir: its records would be read as input.", "Name another folder.")


def _converted(path: Path, name: str, rejected: TextIO, counts: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Yield the file's ASR records as TTS records; others are written to `rejected` and counted."""
    stamp = dt.datetime.fromtimestamp(int(path.stat().st_mtime), tz=dt.UTC)
    for index, raw in read_raw(path):
        try:
            if isinstance(raw, RecordError):
                raise raw
            if parse_record(raw).task != "asr":
                raise RecordError("is not an ASR record")
        except RecordError as error:
            rejected.write(json.dumps({"file": str(path), "index": index, "reason": str(error)}) + "\n")
            counts["rejected"] += 1
        else:
            assert isinstance(raw, dict)
            yield asr_to_tts(raw, name, stamp)


def _write(path: Path, records: Iterator[dict[str, Any]]) -> int:
    """Write gzipped JSON Lines; equal records always give equal bytes. Returns their number."""
    count = 0
    with named(path), path.open("wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as sink:
        for record in records:
            sink.write(_line(record))
            count += 1
    return count


def _line(record: dict[str, Any]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # metadata may hold half a surrogate pair, which only an escape spells
        return json.dumps(record).encode() + b"\n"


def _unfinished(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp")
