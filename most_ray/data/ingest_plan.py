"""Which parts a token store is made of, and which of them exist already.

A directory of records is ingested in parts, each a file or a byte range of one. The content of a part follows from the digests of its bytes
and the recipe, which its key is a digest of: where a part of that key exists, it is used again.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from most_ray.config import Overlong
from most_ray.data.store import STORE_VERSION, checksummed_json, digest, read_checksummed_json
from most_ray.errors import DataError
from most_ray.io import storage
from most_ray.io.json_stream import MAX_RECORD
from most_ray.io.storage import Entry
from most_ray.records.files import RECORD_SUFFIXES, UNFINISHED, is_json_lines, record_files
from most_ray.records.record import Task
from most_ray.records.template import Vocabulary
from most_ray.records.units_manifest import load_units_manifest

logger = logging.getLogger(__name__)
RANGE = MAX_RECORD  # bytes of a part's range; no record reaches further than the next one
_STABLE_AGE_NS = 2 * 10**9  # a file younger than this may change again without another time stamp


@dataclass(frozen=True)
class Recipe:
    """Everything except the records' bytes that their tokens follow from."""

    task: Task  # records of other tasks are rejected
    vocabulary: Vocabulary
    max_seq_length: int  # tokens of the longest record
    overlong: Overlong  # what happens to longer ones

    def fingerprint(self) -> dict[str, Any]:
        """The recipe as JSON, for digests and manifests."""
        own = {"task": self.task, "vocabulary": self.vocabulary.fingerprint()}
        return {"version": STORE_VERSION, **own, "max_seq_length": self.max_seq_length, "overlong": self.overlong}


@dataclass(frozen=True)
class Part:
    """One file of records, or the records that begin at the bytes start..stop-1 of it."""

    file: str  # URI of the records
    start: int
    stop: int | None  # None: the end of the file
    key: str  # digest of content and recipe
    uri: str  # of the folder for its tokens
    bytes: int  # of the file or range


@dataclass(frozen=True)
class IngestPlan:
    """A directory of records and the token store that it gives."""

    uri: str  # of the store
    manifest: dict[str, Any]  # of the store, without what is counted while the parts are built
    parts: tuple[Part, ...]  # in the order of the records
    missing: tuple[Part, ...]  # those to be built


def plan_ingest(directory: str | Path, recipe: Recipe, store_root: str | Path) -> IngestPlan:
    """Find the parts of a directory of records (or URI, or file) and which of them the stores in `store_root` have."""
    root, directory = storage.absolute(store_root), storage.absolute(directory)
    entries = record_files(directory)
    digests = _digests(directory, entries, root)
    base = storage.base_name(directory)
    manifest = {
        "name": base.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json"),
        "source": storage.redact(directory),
        "content": _content(entries, digests),
        "units": _what_units_mean(read_units_manifest(directory)),
        **recipe.fingerprint(),
    }
    identity = {key: value for key, value in manifest.items() if key not in ("name", "source")}
    key = digest(json.dumps(identity, sort_keys=True).encode())[:16]
    parts = tuple(part for entry in entries for part in _parts(entry, digests[entry.name], recipe, storage.join(root, "parts")))
    uri = storage.join(root, f"{re.sub(r'[^A-Za-z0-9_-]', '_', base)}-{key}")
    if storage.is_remote(root) and storage.exists(storage.join(uri, "manifest.json")):
        return IngestPlan(uri, manifest, parts, ())  # listing the parts of all stores would take a second for every few thousand
    pool = storage.join(root, "parts")
    existing = {e.name.split("/")[0] for e in storage.list_files(pool, ("part.json",))} if storage.exists(pool) else set()
    missing = {part.key: part for part in parts if part.key not in existing}
    return IngestPlan(uri, manifest, parts, tuple(missing.values()))


def content_digest(directory: str | Path, store_root: str | Path) -> str:
    """Digest of the names and bytes of a directory's record files."""
    uri = storage.absolute(directory)
    entries = record_files(uri)
    return _content(entries, _digests(uri, entries, storage.absolute(store_root)))


def _content(entries: Sequence[Entry], digests: Mapping[str, list[str]]) -> str:
    return digest(json.dumps([[e.name, e.size, digests[e.name]] for e in entries]).encode())


def _splits(entry: Entry) -> bool:
    """Whether a file is split into ranges."""
    return is_json_lines(entry.name) and not entry.name.endswith(".gz")


def _digests(directory: str, entries: Sequence[Entry], root: str) -> dict[str, list[str]]:
    """Digests of the ranges of each file, by its name. They are remembered in `root` with the file's size and time stamp: files that have
    not changed since are not read again."""
    memory = storage.join(root, "files", f"{digest(os.fsencode(directory))}.json")
    known: dict[str, Any] = {}
    if storage.exists(memory):
        try:
            known = read_checksummed_json(memory, "file list").get("files", {})
        except DataError as error:
            logger.warning("all files of %s are read again: %s", storage.redact(directory), error)
    now = time.time_ns()
    fresh = [e for e in entries if e.name not in known or known[e.name][:2] != [e.size, e.stamp]]
    with ThreadPoolExecutor() as pool:
        read = dict(zip((e.name for e in fresh), pool.map(_read_digests, fresh), strict=True))
    digests = {e.name: read.get(e.name) or known[e.name][2] for e in entries}
    # A local stamp is the time of modification and the number of the inode.
    stable = [e for e in entries if storage.is_remote(e.uri) or now - int(e.stamp.split("-")[0]) > _STABLE_AGE_NS]
    if read and stable:
        files = {e.name: [e.size, e.stamp, digests[e.name]] for e in stable}
        storage.write_bytes(memory, checksummed_json({"version": STORE_VERSION, "directory": directory, "files": files}))
    return digests


def _read_digests(entry: Entry) -> list[str]:
    """The digests of a file's ranges. Raises DataError where it cannot be read."""
    digests, state, done = [], xxhash.xxh3_128(), 0
    try:
        with storage.open_read(entry.uri) as stream:
            while chunk := stream.read(min(1 << 20, RANGE - done % RANGE)):
                state.update(chunk)
                done += len(chunk)
                if _splits(entry) and done % RANGE == 0:
                    digests.append(state.hexdigest())
                    state.reset()
    except OSError as error:
        shown = storage.redact(entry.uri)
        raise DataError("file", shown, f"cannot be read ({error.strerror or error}).", "Check its permissions, or move it away.") from error
    return [*digests, state.hexdigest()]


def _parts(entry: Entry, digests: Sequence[str], recipe: Recipe, root: str) -> Iterator[Part]:
    """Yield the parts of a file. The first record of a range depends on the byte before it, the last one on the two ranges after it."""
    form = f"{'lines' if is_json_lines(entry.name) else 'values'}{'.gz' if entry.name.endswith('.gz') else ''}"  # how it is parsed
    made_with = json.dumps({**recipe.fingerprint(), "form": form}, sort_keys=True)
    n = max(1, -(-entry.size // RANGE)) if _splits(entry) else 1
    for i in range(n):
        around = [digests[j] if 0 <= j < len(digests) else "" for j in range(i - 1, i + 3)] if n > 1 else [*digests]
        key = digest(json.dumps([made_with, i > 0, around]).encode())
        start, stop = i * RANGE, None if i == n - 1 else (i + 1) * RANGE
        yield Part(entry.uri, start, stop, key, storage.join(root, key), min(entry.size - start, RANGE) if n > 1 else entry.size)


def _what_units_mean(manifest: dict[str, object] | None) -> dict[str, object] | None:
    """A units manifest without what says nothing about the units, so that the store does not depend on it."""
    return manifest and {key: value for key, value in manifest.items() if key != "licence"}


def read_units_manifest(directory: str | Path) -> dict[str, object] | None:
    """The manifest (units.json) of what the units of a directory's records were made with; None where there is none.

    Raises:
        DataError: it is not JSON, or the records are being replaced.
    """
    folder = str(directory)
    folder = storage.parent(folder) if storage.base_name(folder).endswith(RECORD_SUFFIXES) else folder
    if storage.exists(storage.join(folder, UNFINISHED)):
        rule = "is not finished: the command that replaces its records was stopped, or is still running."
        raise DataError("directory", storage.redact(folder), rule, "Run that command (`most-ray prepare ...`) again.")
    return load_units_manifest(folder)
