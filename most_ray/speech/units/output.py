"""Moves what `prepare units` has made to its output folder: completely, and never mixed with another command's files."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from most_ray.errors import ConfigError, DataError, count_of
from most_ray.io.json_values import parse_json
from most_ray.io.outputs import check_file, check_folder, named
from most_ray.records.files import KMEANS, PREPARED, REJECTED, REJECTED_LIST, UNFINISHED, UNITS_MANIFEST, VOCODER
from most_ray.speech.units.clustering import save_kmeans
from most_ray.speech.units.corpus_parts import Scan
from most_ray.speech.units.stages import EncodeUnits, summary_path

MOST_REJECTED = 0.5  # share of a corpus' entries: where more cannot be used, the layout, the table or the folder is likely another one
_FEW = 6  # entries that may be rejected in any corpus: of a handful, half says little
SHARD_BYTES = 64 << 20  # of a file of records, about
_REPLACED = re.compile(r"records(-\d{5})?\.(jsonl\.gz|jsonl|json)|units\.json|kmeans\.npy")  # files of an earlier command like this one


def check_records_folder(output: Path, kmeans: Path | None) -> None:
    """Check that a folder holds nothing of a user's that `publish_records` would replace. `kmeans`: the centroids that the user has named,
    which may be there already. Raises ConfigError."""
    check_folder("output", output)
    check_file("output", output / REJECTED, REJECTED_LIST)
    present = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    if UNFINISHED in present:  # an earlier command, stopped while it replaced its own files
        return
    written = _files_written(output, present)
    for name in present:
        given = kmeans is not None and name == KMEANS and kmeans.exists() and (output / name).samefile(kmeans)
        if _REPLACED.fullmatch(name) and name not in written and not given:
            rule = f"holds {name}, which no earlier command like this one has written: it would be lost."
            raise ConfigError("output", str(output), rule, "Name another folder, or move it away.")


def _files_written(output: Path, present: Sequence[str]) -> set[str]:
    """Names of the files in a folder that an earlier command wrote."""
    try:
        return set(parse_json((output / PREPARED).read_text(encoding="utf-8"))["files"])
    except FileNotFoundError:
        # Its list may be gone, but units and centroids that name each other are its own.
        return set(present) if {UNITS_MANIFEST, KMEANS} <= set(present) else set()
    except (OSError, ValueError, KeyError, TypeError):  # a damaged list of its files
        return set(present)


def find_prepared(output: Path, key: str) -> dict[str, Any] | None:
    """The counts of an earlier command, if its `key` is the same and its files still exist."""
    try:
        done = parse_json((output / PREPARED).read_text(encoding="utf-8"))
        whole = all((output / name).stat().st_size == size for name, size in done["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # no such command, or a damaged list of its files: the work is done again
    return {name: value for name, value in done.items() if name != "key"} if done.get("key") == key and whole else None


def publish_records(
    corpus: Path,
    output: Path,
    scan: Scan,
    task: EncodeUnits,
    manifest: Mapping[str, Any],
    centroids: np.ndarray,
    max_rejected_fraction: float | None,
) -> dict[str, Any]:
    """Join the parts and move them to the output folder, replacing an earlier command's files. Meanwhile the folder is marked as
    unfinished, so that readers refuse it: records must never be used with another command's manifest.

    Returns counts (records, rejected, hours, longest) and the sizes of the files. Raises DataError if there is no record, or too many
    entries were rejected; the earlier command's files are kept."""
    targets = [task.target(part) for part in scan.parts]
    summaries = [parse_json(summary_path(target).read_text(encoding="utf-8")) for target in targets]
    records = sum(summary["records"] for summary in summaries)
    rejected = _write_rejected(output, scan, summaries)
    if not records:
        with (output / REJECTED).open(encoding="utf-8") as lines:
            reason = f"holds no usable recording; the first one {parse_json(lines.readline())['reason']}."
        raise DataError("input", str(corpus), reason, f"See {output / REJECTED}.")
    share = check_rejected(scan, summaries, max_rejected_fraction, output / REJECTED)
    parts = [target for target, summary in zip(targets, summaries, strict=True) if summary["records"]]
    shards = _write_shards(task.scratch, task.form, parts)
    (output / UNFINISHED).touch()
    (output / PREPARED).unlink(missing_ok=True)
    for old in output.iterdir():
        if _REPLACED.fullmatch(old.name):
            old.unlink()
    written = [shard.replace(output / shard.name) for shard in shards]
    if _vocoder_units(output / VOCODER) not in (None, manifest["identity"]):
        (output / VOCODER).unlink()
    save_kmeans(output / KMEANS, centroids, {})
    (output / UNITS_MANIFEST).write_text(json.dumps(manifest) + "\n", encoding="utf-8")
    files = {path.name: path.stat().st_size for path in (*written, output / KMEANS, output / UNITS_MANIFEST)}
    hours = sum(summary["seconds"] for summary in summaries) / 3600.0
    longest = max(summary["longest"] for summary in summaries)
    found = {"records": records, "rejected": rejected, "hours": hours, "longest": longest, "files": files, "rejected_share": share}
    return {**found, "unread": dict(scan.unread)} if scan.unread else found


def check_rejected(scan: Scan, summaries: Sequence[Mapping[str, Any]], limit: float | None, report: Path | None = None) -> float:
    """The share of a corpus' entries that gave no record: of all entries those that are no utterances, and of the chosen utterances, by the
    parts' `summaries` (none: no part has been made yet), those that gave none. Raises DataError where it is above `limit` (None: above the
    usual one, and more than a few entries); `report` is the file that says why."""
    failed = sum(len(summary["rejected"]) for summary in summaries)
    read = max(1, sum(summary["records"] for summary in summaries) + failed)
    share = 1.0 - scan.utterances / (scan.utterances + scan.unusable_entries) * (1.0 - failed / read)
    if share <= (MOST_REJECTED if limit is None else limit) or (limit is None and scan.unusable_entries + failed <= _FEW):
        return share
    with scan.unusable.open(encoding="utf-8") as lines:
        first = parse_json(lines.readline()) if scan.unusable_entries else next(e for summary in summaries for e in summary["rejected"])
    where = f"{count_of(scan.unusable_entries + failed, 'entry')} cannot be used; the first, {first['file']}, {first['reason']}"
    remedy = f"{f'See {report}; fix' if report else 'Fix'} them, or raise max_rejected_fraction."
    raise DataError("max_rejected_fraction", MOST_REJECTED if limit is None else limit, f"is exceeded: {where}.", remedy)


def mark_prepared(output: Path, result: Mapping[str, Any]) -> None:
    """Allow the folder to be read, and write down the result and its `key`: last, because a command that finds its key does nothing."""
    (output / UNFINISHED).unlink()
    (output / PREPARED).write_text(json.dumps(result) + "\n", encoding="utf-8")


def _write_rejected(output: Path, scan: Scan, summaries: Iterable[Mapping[str, Any]]) -> int:
    """Write rejected.jsonl: entries of the corpus that are not utterances, then utterances that gave no record. Returns their number."""
    temporary, count = output / f".{REJECTED}.tmp", 0
    with temporary.open("w", encoding="utf-8") as sink, scan.unusable.open(encoding="utf-8") as unusable:
        entries = (entry for summary in summaries for entry in sorted(summary["rejected"], key=lambda entry: entry["index"]))
        lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        for line in itertools.chain(unusable, lines):
            count += bool(sink.write(line))
    if count:
        temporary.replace(output / REJECTED)
    else:
        temporary.unlink()
        (output / REJECTED).unlink(missing_ok=True)
    return count


def _vocoder_units(path: Path) -> Any:
    """The identity of the units that a vocoder was fitted to; None if there is no vocoder that names them."""
    try:
        with safe_open(path, framework="numpy") as tensors:
            return parse_json((tensors.metadata() or {})["vocoder"])["units"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None  # a file that is not ours is left alone


def _write_shards(scratch: str, form: str, parts: Sequence[Path]) -> list[Path]:
    """Write the parts' bytes one after the other (gzip members make one gzip file) to files of some 64 MiB in the folder `scratch`."""
    shards, size = [list[Path]()], 0
    for part in parts:
        if size >= SHARD_BYTES and form != "json":  # a JSON list ends with its file
            shards, size = [*shards, []], 0
        shards[-1].append(part)
        size += part.stat().st_size
    written = []
    for index, shard in enumerate(shards):
        path = Path(scratch) / (f"records.{form}" if len(shards) == 1 else f"records-{index:05d}.{form}")
        with named(path), path.open("wb") as sink:
            sink.writelines(_as_list(shard) if form == "json" else (part.read_bytes() for part in shard))
        written.append(path)
    return written


def _as_list(parts: Iterable[Path]) -> Iterator[bytes]:
    """Yield the lines of JSON Lines files as the lines of one JSON list."""
    before = b"[\n"
    for line in (line for part in parts for line in part.read_bytes().splitlines()):
        yield before + line
        before = b",\n"
    yield b"\n]\n"
