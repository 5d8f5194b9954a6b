"""Records to a token store: read, check, encode once. Bad records are set aside with their reasons, never dropped in silence.

A directory is taken in by parts, each a file or a byte range of one (JSON Lines can be entered anywhere; other forms are streamed
whole). Making a part is a pure function of its bytes and the recipe, and is done once: parts may be made in any order, by any number
of processes, and what a killed ingest had finished stays.
"""

from __future__ import annotations

import io
import itertools
import json
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from most_ray.config import Overlong
from most_ray.data.store import (
    PART_FILES,
    SCRATCH,
    STORE_VERSION,
    PartWriter,
    TokenStore,
    checksummed_json,
    digest,
    file_digest,
    read_checksummed_json,
)
from most_ray.errors import DataError, RecordError
from most_ray.io import storage
from most_ray.io.json_stream import MAX_RECORD, read_lines
from most_ray.io.storage import Entry
from most_ray.records.files import RECORD_SUFFIXES, REJECTED, UNFINISHED, UNITS_MANIFEST, is_json_lines, read_with_offsets, record_files
from most_ray.records.record import Record, Task, parse_records
from most_ray.records.template import EncodedRecord, Vocabulary, encode_records

logger = logging.getLogger(__name__)
RANGE = MAX_RECORD  # bytes of a part's range; no record reaches further than the next one
_BATCH = 256  # records parsed and encoded at once: their bytes stay in the cache
_READERS = 16  # parts read at once: on object stores it is the waiting that takes long
_STALE_S = 86_400.0
_SETTLED_NS = 2 * 10**9  # a file younger than this may change again within its time stamp's resolution


@dataclass(frozen=True)
class Recipe:
    """What makes tokens of records, besides their bytes."""

    task: Task
    vocabulary: Vocabulary
    max_seq_length: int
    overlong: Overlong

    def fingerprint(self) -> dict[str, Any]:
        return {
            "version": STORE_VERSION,
            "task": self.task,
            "vocabulary": self.vocabulary.fingerprint(),
            "max_seq_length": self.max_seq_length,
            "overlong": self.overlong,
        }


@dataclass(frozen=True)
class Part:
    """One file, or the records that begin in start..stop-1 of it; `place` is where its tokens go."""

    file: str
    start: int
    stop: int | None
    key: str
    uri: str
    bytes: int


@dataclass(frozen=True)
class IngestPlan:
    """A directory to take in: what its store is called and which parts it is made of, in order."""

    uri: str
    manifest: dict[str, Any]
    parts: tuple[Part, ...]
    missing: tuple[Part, ...]


Runner = Callable[[Sequence[Part], Recipe], None]


def run_here(parts: Sequence[Part], recipe: Recipe) -> None:
    """Make the parts one after the other."""
    for part in parts:
        make_part(part, recipe)


def ingest_directory(directory: str | Path, recipe: Recipe, store_root: str | Path, run: Runner = run_here) -> TokenStore:
    """The token store of a directory (or URI, or file) of records of one task: the one that is there, or a new one.

    Args:
        run: makes the parts that are missing.

    Raises:
        DataError: the directory is missing or holds no good record.
    """
    ingest = plan_ingest(directory, recipe, store_root)
    if ingest.missing:
        logger.info("making %d of %d parts of the token store of %s", len(ingest.missing), len(ingest.parts), directory)
        run(ingest.missing, recipe)
        _sweep(storage.parent(ingest.parts[0].uri))
    manifest = storage.join(ingest.uri, "manifest.json")
    if not storage.exists(manifest):
        _assemble(ingest)
    store = TokenStore(ingest.uri)
    if len(store) == 0:
        lines = store.rejected_lines().splitlines()
        why = f"; the first one {json.loads(lines[0])['reason']}" if lines else ""
        raise DataError("directory", str(directory), f"holds no usable {recipe.task} record{why}.")
    return store


def _sweep(parts: str) -> None:
    """Remove what processes that were killed while they made a part have left, a day later: until then one may still be at it."""
    if storage.is_remote(parts):
        return
    for folder in storage.local(parts).glob(f"{SCRATCH}*"):
        if time.time() - folder.stat().st_mtime > _STALE_S:
            shutil.rmtree(folder, ignore_errors=True)


def plan_ingest(directory: str | Path, recipe: Recipe, store_root: str | Path) -> IngestPlan:
    """Which parts a directory has and which of them are there."""
    root, directory = storage.absolute(store_root), storage.absolute(directory)
    entries = record_files(directory)
    digests = _digests(directory, entries, root)
    base = storage.base_name(directory)
    manifest = {
        "name": base.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json"),
        "source": storage.redact(directory),
        "content": _content(entries, digests),
        "units": read_units_manifest(directory),
        **recipe.fingerprint(),
    }
    identity = {key: value for key, value in manifest.items() if key not in ("name", "source")}
    key = digest(json.dumps(identity, sort_keys=True).encode())[:16]
    parts = tuple(part for entry in entries for part in _parts(entry, digests[entry.name], recipe, storage.join(root, "parts")))
    uri = storage.join(root, f"{re.sub(r'[^A-Za-z0-9_-]', '_', base)}-{key}")
    if storage.is_remote(root) and storage.exists(storage.join(uri, "manifest.json")):
        return IngestPlan(uri, manifest, parts, ())  # to list all parts of all stores would take a second for each few thousand
    pool = storage.join(root, "parts")
    there = {e.name.split("/")[0] for e in storage.list_files(pool, ("part.json",))} if storage.exists(pool) else set()
    missing = {part.key: part for part in parts if part.key not in there}
    return IngestPlan(uri, manifest, parts, tuple(missing.values()))


def content_digest(directory: str | Path, store_root: str | Path) -> str:
    """Digest of names and bytes of a directory's records."""
    uri = storage.absolute(directory)
    entries = record_files(uri)
    return _content(entries, _digests(uri, entries, storage.absolute(store_root)))


def _content(entries: Sequence[Entry], digests: Mapping[str, list[str]]) -> str:
    return digest(json.dumps([[e.name, e.size, digests[e.name]] for e in entries]).encode())


def _splits(entry: Entry) -> bool:
    return is_json_lines(entry.name) and not entry.name.endswith(".gz")


def _digests(directory: str, entries: Sequence[Entry], root: str) -> dict[str, list[str]]:
    """Digests of each file's ranges, by name. Files that have not changed since their last reading, by size and time stamp, are not read
    again."""
    memory = storage.join(root, "files", f"{digest(directory.encode())}.json")
    known: dict[str, Any] = {}
    if storage.exists(memory):
        try:
            known = read_checksummed_json(memory, "file list").get("files", {})
        except DataError:
            known = {}  # a memory of what was read, no more: the files are read again
    now = time.time_ns()
    fresh = [e for e in entries if e.name not in known or known[e.name][:2] != [e.size, e.stamp]]
    with ThreadPoolExecutor() as pool:
        read = dict(zip((e.name for e in fresh), pool.map(_read_digests, fresh), strict=True))
    digests = {e.name: read.get(e.name) or known[e.name][2] for e in entries}
    settled = {e.name: [e.size, e.stamp, digests[e.name]] for e in entries if storage.is_remote(e.uri) or _age(e, now) > _SETTLED_NS}
    if read and settled:
        storage.write_bytes(memory, checksummed_json({"version": STORE_VERSION, "directory": directory, "files": settled}))
    return digests


def _age(entry: Entry, now: int) -> int:
    return now - int(entry.stamp.split("-")[0])


def _read_digests(entry: Entry) -> list[str]:
    """Raises DataError where the file cannot be read."""
    try:
        return _digests_of(entry)
    except OSError as error:
        shown = storage.redact(entry.uri)
        raise DataError("file", shown, f"cannot be read ({error.strerror or error}).", "Check its permissions, or move it away.") from error


def _digests_of(entry: Entry) -> list[str]:
    size = RANGE if _splits(entry) else None
    digests, state, left = [], xxhash.xxh3_128(), size
    with storage.open_read(entry.uri) as stream:
        while chunk := stream.read(1 << 20 if left is None else min(1 << 20, left)):
            state.update(chunk)
            if left is not None:
                left -= len(chunk)
                if left == 0:
                    digests.append(state.hexdigest())
                    state, left = xxhash.xxh3_128(), size
    return [*digests, state.hexdigest()]


def _parts(entry: Entry, digests: Sequence[str], recipe: Recipe, root: str) -> Iterator[Part]:
    """The parts of a file. A range's first record depends on the byte before it, its last one on the two ranges behind it."""
    made_with = json.dumps({**recipe.fingerprint(), "form": _form(entry.name)}, sort_keys=True)
    n = max(1, -(-entry.size // RANGE)) if _splits(entry) else 1
    for i in range(n):
        around = [digests[j] if 0 <= j < len(digests) else "" for j in range(i - 1, i + 3)] if n > 1 else [*digests]
        key = digest(json.dumps([made_with, i > 0, around]).encode())
        start, stop = i * RANGE, None if i == n - 1 else (i + 1) * RANGE
        yield Part(entry.uri, start, stop, key, storage.join(root, key), min(entry.size - start, RANGE) if n > 1 else entry.size)


def _form(name: str) -> str:
    return f"{'lines' if is_json_lines(name) else 'values'}{'.gz' if name.endswith('.gz') else ''}"


def make_part(part: Part, recipe: Recipe) -> None:
    """Read, check and encode one part; nothing where it is there already. Memory does not grow with the part.

    Raises:
        DataError: storage failed for good.
    """
    if storage.exists(storage.join(part.uri, "part.json")):
        return
    remote = storage.is_remote(part.uri)
    scratch = Path(tempfile.mkdtemp(prefix="most_ray-")) if remote else storage.local(part.uri).parent
    writer = PartWriter(scratch)
    try:
        n_seen = 0
        values = enumerate(_values(part))
        while batch := list(itertools.islice(values, _BATCH)):
            n_seen += len(batch)
            _add_batch(writer, recipe, batch)
        writer.publish(part.uri, n_seen)
    finally:
        writer.abort()  # whatever happened, Ctrl-C too: no half-written folder stays
        if remote:
            scratch.rmdir()


def _values(part: Part) -> Iterator[tuple[int, object]]:
    if part.start == 0 and part.stop is None:
        yield from read_with_offsets(part.file)
        return
    with storage.open_read(part.file) as stream:
        stream.seek(max(0, part.start - 1), io.SEEK_SET)
        yield from read_lines(stream, part.start, part.stop)


def _add_batch(writer: PartWriter, recipe: Recipe, batch: Sequence[tuple[int, tuple[int, object]]]) -> None:
    good: list[tuple[int, int, Record]] = []
    for (index, (byte, raw)), record in zip(batch, parse_records([raw for _, (_, raw) in batch]), strict=True):
        if isinstance(record, RecordError):
            record_id = raw.get("id") if isinstance(raw, dict) else None
            writer.reject(index, byte, str(record), None if record_id is None else str(record_id))
        elif record.task != recipe.task:
            writer.reject(index, byte, f"is a {record.task} record in a source of {recipe.task} records", record.id)
        else:
            good.append((index, byte, record))
    ids: list[str] = []
    kept: list[EncodedRecord] = []
    for (index, byte, record), item in zip(good, encode_records([r for _, _, r in good], recipe.vocabulary), strict=True):
        if len(item.input_ids) <= recipe.max_seq_length:
            ids.append(record.id)
            kept.append(item)
        elif recipe.overlong == "split" and (pieces := _split(item, recipe.max_seq_length)):
            ids += [f"{record.id}#{number}" for number in range(1, len(pieces) + 1)]
            kept += pieces
        else:
            reason = f"has {len(item.input_ids)} tokens, more than max_seq_length ({recipe.max_seq_length})"
            writer.reject(index, byte, reason, record.id, set_aside=recipe.overlong == "set_aside")
    writer.add(ids, kept)


def _split(item: EncodedRecord, limit: int) -> list[EncodedRecord]:
    """A long text's output in pieces behind its prompt, every supervised token in one of them; none where speech would have to be cut, for
    which words belong to which units is not known, or where the prompt leaves less than half of a row."""
    room = limit - item.prompt_length
    if item.task != "text" or 2 * room < limit:
        return []
    prompt, output = np.split(item.input_ids, [item.prompt_length])
    cuts = [output[start : start + room] for start in range(0, len(output), room)]
    return [EncodedRecord(np.concatenate([prompt, cut]), item.prompt_length, item.task) for cut in cuts]


def _read_part(part: Part) -> tuple[dict[str, Any], bytes, list[bytes]]:
    """What part.json says, index.npy, the lines of rejected.jsonl; checked.

    Raises:
        DataError: names the file that is damaged.
    """
    content = read_checksummed_json(storage.join(part.uri, "part.json"), "part")
    files = {}
    for name in PART_FILES:
        uri = storage.join(part.uri, name)
        files[name] = storage.read_bytes(uri)
        if digest(files[name]) != content["files"][name]:
            raise DataError(
                "part", storage.redact(uri), "does not match its checksum.", f"Delete {storage.redact(part.uri)}; it is made anew."
            )
    return content, files["index.npy"], files[REJECTED].splitlines()


def _assemble(ingest: IngestPlan) -> None:
    """The store's manifest and index over its parts."""
    remote = storage.is_remote(ingest.uri)
    scratch = Path(tempfile.mkdtemp(prefix="most_ray-")) if remote else storage.local(ingest.uri).parent
    scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".store-", dir=scratch))
    try:
        totals = dict.fromkeys(("n_records", "n_tokens", "n_seen", "n_rejected", "n_set_aside"), 0)
        shards: list[dict[str, Any]] = []
        index: list[np.ndarray] = []
        seen_of: dict[str, int] = {}
        with (folder / REJECTED).open("wb") as sink, ThreadPoolExecutor(_READERS) as pool:
            for part, (content, part_index, rejected) in zip(ingest.parts, pool.map(_read_part, ingest.parts), strict=True):
                shards += [{"part": part.key, **shard} for shard in content["shards"]]
                # Here and not in the pool: numpy parses a file's header with `ast`, which Python 3.11 cannot do in several threads at
                # once ("AST constructor recursion depth mismatch").
                index.append(np.load(io.BytesIO(part_index), allow_pickle=False))
                for line in map(json.loads, rejected):
                    line = {"file": storage.redact(part.file), **line, "index": line["index"] + seen_of.get(part.file, 0)}
                    sink.write(json.dumps(line).encode() + b"\n")
                seen_of[part.file] = seen_of.get(part.file, 0) + content["n_seen"]
                for name in totals:
                    totals[name] += content[name]
        lengths, prompts = np.concatenate(index, axis=1)
        np.save(folder / "lengths.npy", lengths)
        np.save(folder / "prompt_lengths.npy", prompts)
        digests = {name: file_digest(folder / name) for name in ("lengths.npy", "prompt_lengths.npy")}
        (folder / "manifest.json").write_bytes(checksummed_json({**ingest.manifest, **totals, "index": digests, "shards": shards}))
        folder.chmod(0o755)  # made for this user alone; a shared store is read by others
        storage.publish(folder, ingest.uri, "manifest.json")
    finally:
        shutil.rmtree(scratch if remote else folder, ignore_errors=True)


def read_units_manifest(directory: str | Path) -> dict[str, object] | None:
    """What the units of a directory's records were made with, where its maker wrote that down."""
    folder = str(directory)
    folder = storage.parent(folder) if storage.base_name(folder).endswith(RECORD_SUFFIXES) else folder
    if storage.exists(storage.join(folder, UNFINISHED)):
        rule = "is not finished: the command that was replacing its records was stopped, or is still at it."
        raise DataError("directory", storage.redact(folder), rule, "Run that command (`most-ray prepare ...`) again.")
    uri = storage.join(folder, UNITS_MANIFEST)
    if not storage.exists(uri):
        return None
    try:
        loaded = json.loads(storage.read_bytes(uri))
    except ValueError as error:
        raise DataError("units manifest", uri, f"is not JSON ({error}).") from error
    return loaded if isinstance(loaded, dict) else None


def check_rejected(stores: Iterable[TokenStore], limit: float, report: str | Path) -> int:
    """Write every rejected record of the stores to `report` and return their number.

    Raises:
        DataError: a store's share of bad records is above `limit`. Records set aside for their length do not count.
    """
    stores = list(stores)
    storage.write_bytes(str(report), b"".join(store.rejected_lines() for store in stores))
    total = sum(store.manifest["n_rejected"] + store.manifest["n_set_aside"] for store in stores)
    for store in stores:
        rejected, seen = store.manifest["n_rejected"], store.manifest["n_seen"]
        if rejected > limit * seen:
            lines = [json.loads(line) for line in store.rejected_lines().splitlines()]
            bad = [line for line in lines if not line.get("set_aside")]
            first = next((line for line in bad if "not JSON at" in line["reason"] or "gzip" in line["reason"]), bad[0])  # the worst of them
            raise DataError(
                "max_rejected_fraction",
                limit,
                f"is exceeded: {rejected} of {seen} records of {store.manifest['source']} are bad; the first, "
                f"{first['file']} record {first['index']}, {first['reason']}.",
                f"See {report}; mend the records or raise max_rejected_fraction.",
            )
    return total
