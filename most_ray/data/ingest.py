"""Records to a token store: read, check, encode once. Bad records are set aside with their reasons, never dropped in silence."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from most_ray.data.store import StoreWriter, TokenStore
from most_ray.errors import DataError
from most_ray.records import Record, RecordError, Task, parse_record, read_raw, record_files
from most_ray.template import Vocabulary, encode_records

logger = logging.getLogger(__name__)
_BATCH = 1024


def content_hash(files: Sequence[Path], root: Path) -> str:
    """Digest of names and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        digest.update(f"{path.relative_to(root) if path != root else path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def units_manifest(directory: Path) -> dict[str, object] | None:
    """What the units of a directory's records were made with, where its maker wrote that down."""
    path = (directory if directory.is_dir() else directory.parent) / "units.json"
    if not path.exists():
        return None
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError("units manifest", str(path), f"is not JSON ({error}).") from error
    return loaded if isinstance(loaded, dict) else None


def ingest_directory(directory: Path, task: Task, vocabulary: Vocabulary, max_seq_length: int, store_root: Path) -> TokenStore:
    """The token store of a directory of records of one task: the one that is there, or a new one.

    Raises:
        DataError: the directory is missing or holds no good record, or a file is not JSON.
    """
    files = record_files(directory)
    manifest = {
        "name": directory.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json"),
        "source": str(directory),
        "task": task,
        "content": content_hash(files, directory),
        "max_seq_length": max_seq_length,
        "vocabulary": vocabulary.fingerprint(),
        "units": units_manifest(directory),
    }
    keys = {key: manifest[key] for key in ("task", "content", "max_seq_length", "vocabulary", "units")}
    key = hashlib.blake2b(json.dumps(keys, sort_keys=True).encode(), digest_size=8).hexdigest()
    target = store_root / f"{re.sub(r'[^A-Za-z0-9_-]', '_', directory.name)}-{key}"
    if not (target / "manifest.json").exists():
        logger.info("making the token store of %s", directory)
        _write_store(files, task, vocabulary, max_seq_length, target, manifest)
    store = TokenStore(target)
    if len(store) == 0:
        lines = (target / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
        why = f"; the first one {json.loads(lines[0])['reason']}" if lines else ""
        raise DataError("directory", str(directory), f"holds no usable {task} record{why}.")
    return store


def _write_store(files: Sequence[Path], task: Task, vocabulary: Vocabulary, limit: int, target: Path, manifest: dict[str, object]) -> None:
    writer = StoreWriter(target)
    try:
        for batch in _batched(_good_records(files, task, writer), _BATCH):
            kept_ids, kept = [], []
            for (file, index, record), item in zip(batch, encode_records([record for _, _, record in batch], vocabulary), strict=True):
                if len(item.input_ids) > limit:
                    writer.reject(file, index, f"has {len(item.input_ids)} tokens, more than max_seq_length ({limit})", record.id)
                else:
                    kept_ids.append(record.id)
                    kept.append(item)
            writer.add(kept_ids, kept)
        writer.commit(manifest)
    except BaseException:  # whatever it was, and Ctrl-C: no half-written folder stays, and the error goes on
        writer.abort()
        raise


def _good_records(files: Sequence[Path], task: Task, writer: StoreWriter) -> Iterator[tuple[str, int, Record]]:
    for path in files:
        for index, raw in read_raw(path):
            try:
                if isinstance(raw, RecordError):
                    raise raw
                record = parse_record(raw)
                if record.task != task:
                    raise RecordError(f"is a {record.task} record in a source of {task} records")
            except RecordError as error:
                record_id = raw.get("id") if isinstance(raw, dict) else None
                writer.reject(str(path), index, str(error), None if record_id is None else str(record_id))
            else:
                yield str(path), index, record


def _batched(items: Iterator[tuple[str, int, Record]], size: int) -> Iterator[list[tuple[str, int, Record]]]:
    while batch := list(itertools.islice(items, size)):
        yield batch


def check_rejected(stores: Sequence[TokenStore], limit: float, report: Path) -> int:
    """Write every rejected record of the stores to `report` and return their number.

    Raises:
        DataError: a store's share of rejected records is above `limit`.
    """
    total = 0
    report.parent.mkdir(parents=True, exist_ok=True)
    with report.open("w", encoding="utf-8") as sink:
        for store in stores:
            sink.write((store.directory / "rejected.jsonl").read_text(encoding="utf-8"))
            total += store.manifest["n_rejected"]
    for store in stores:
        rejected = store.manifest["n_rejected"]
        if rejected > limit * (rejected + len(store)):
            with (store.directory / "rejected.jsonl").open(encoding="utf-8") as lines:
                first = json.loads(next(lines))
            raise DataError(
                "max_rejected_fraction",
                limit,
                f"is exceeded: {rejected} of {rejected + len(store)} records of {store.manifest['source']} are bad; the first, "
                f"{first['file']} record {first['index']}, {first['reason']}.",
                f"See {report}; mend the records or raise max_rejected_fraction.",
            )
    return total
