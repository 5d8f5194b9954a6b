"""What `prepare units` has made, put in place in its output folder: whole, and never beside another command's."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from most_ray.errors import DataError
from most_ray.records.files import KMEANS, PREPARED, REJECTED, UNFINISHED, UNITS_MANIFEST, VOCODER
from most_ray.speech.units.clustering import save_kmeans
from most_ray.speech.units.corpus_parts import EncodeUnits, Scan, summary_path

SHARD_BYTES = 64 << 20
_OWN = re.compile(r"records(-\d{5})?\.(jsonl\.gz|jsonl|json)|units\.json|kmeans\.npy")  # what a command like this one has made


def find_prepared(output: Path, key: str) -> dict[str, Any] | None:
    """What an earlier command has made, where it is what this one would make and is still there."""
    try:
        done = json.loads((output / PREPARED).read_text(encoding="utf-8"))
        whole = all((output / name).stat().st_size == size for name, size in done["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return {name: value for name, value in done.items() if name != "key"} if done.get("key") == key and whole else None


def publish_records(
    corpus: Path, output: Path, scan: Scan, work: EncodeUnits, manifest: Mapping[str, Any], centroids: np.ndarray
) -> dict[str, Any]:
    """Put the parts together in the output folder, in place of what was there. While that is going on the folder says so, and readers
    refuse it: records must never stand beside another command's manifest. Returns records, rejected, hours, and sizes of files.

    Raises:
        DataError: there is no record; what was there before is left.
    """
    targets = [work.target(part) for part in scan.parts]
    abouts = [json.loads(summary_path(target).read_text(encoding="utf-8")) for target in targets]
    records = sum(about["records"] for about in abouts)
    rejected = _write_rejected(output, scan, abouts)
    if not records:
        with (output / REJECTED).open(encoding="utf-8") as lines:
            reason = f"holds no usable recording; the first one {json.loads(lines.readline())['reason']}."
        raise DataError("input", str(corpus), reason, f"See {output / REJECTED}.")
    shards = _write_shards(work.scratch, work.form, [target for target, about in zip(targets, abouts, strict=True) if about["records"]])
    (output / UNFINISHED).touch()
    (output / PREPARED).unlink(missing_ok=True)
    for old in output.iterdir():
        if _OWN.fullmatch(old.name):
            old.unlink()
    written = [shard.replace(output / shard.name) for shard in shards]
    if _vocoder_units(output / VOCODER) not in (None, manifest["identity"]):
        (output / VOCODER).unlink()
    save_kmeans(output / KMEANS, centroids, {})
    (output / UNITS_MANIFEST).write_text(json.dumps(manifest) + "\n", encoding="utf-8")
    files = {path.name: path.stat().st_size for path in (*written, output / KMEANS, output / UNITS_MANIFEST)}
    seconds = sum(about["seconds"] for about in abouts)
    longest = max(about["longest"] for about in abouts)
    return {"records": records, "rejected": rejected, "hours": seconds / 3600.0, "longest": longest, "files": files}


def mark_prepared(output: Path, made: Mapping[str, Any]) -> None:
    """From now on the folder may be read. Write down what was made and with which `key`: last, for what stands there is not done again."""
    (output / UNFINISHED).unlink()
    (output / PREPARED).write_text(json.dumps(made) + "\n", encoding="utf-8")


def _write_rejected(output: Path, scan: Scan, abouts: Iterable[Mapping[str, Any]]) -> int:
    """rejected.jsonl: entries of the corpus that are no utterances, then utterances that gave no record. Returns their number."""
    temporary, count = output / f".{REJECTED}.tmp", 0
    with temporary.open("w", encoding="utf-8") as sink, scan.unusable.open(encoding="utf-8") as unusable:
        for line in unusable:
            sink.write(line)
            count += 1
        for about in abouts:
            for entry in sorted(about["rejected"], key=lambda entry: entry["index"]):
                sink.write(json.dumps(entry, ensure_ascii=False) + "\n")
                count += 1
    if count:
        temporary.replace(output / REJECTED)
    else:
        temporary.unlink()
        (output / REJECTED).unlink(missing_ok=True)
    return count


def _vocoder_units(path: Path) -> Any:
    """The identity of the units that a vocoder speaks; None where there is no vocoder that tells."""
    try:
        with safe_open(path, framework="numpy") as tensors:
            return json.loads((tensors.metadata() or {})["vocoder"])["units"]
    except (OSError, SafetensorError, ValueError, KeyError):
        return None


def _write_shards(scratch: str, form: str, parts: Sequence[Path]) -> list[Path]:
    """Parts' bytes one after the other (gzip members make one gzip file), in files of some 64 MiB, in the folder `scratch`."""
    shards: list[list[Path]] = [[]]
    size = 0
    for part in parts:
        if size >= SHARD_BYTES and form != "json":  # a JSON list ends with its file
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += part.stat().st_size
    written = []
    for index, shard in enumerate(shards):
        path = Path(scratch) / (f"records.{form}" if len(shards) == 1 else f"records-{index:05d}.{form}")
        with path.open("wb") as sink:
            if form == "json":
                sink.writelines(_as_list(shard))
            else:
                for part in shard:
                    with part.open("rb") as source:
                        shutil.copyfileobj(source, sink)
        written.append(path)
    return written


def _as_list(parts: Iterable[Path]) -> Iterator[bytes]:
    """Lines of JSON as one JSON list."""
    before = b"[\n"
    for part in parts:
        with part.open("rb") as lines:
            for line in lines:
                yield before + line.rstrip(b"\n")
                before = b",\n"
    yield b"\n]\n"
