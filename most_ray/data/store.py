"""The token store: the records of one directory as token ids, in memory-mapped Arrow shards with a JSON manifest.

Shards belong to parts, and a part is built from one file or byte range of the directory. Parts are named by a digest of what they follow
from (content, tokenizer, template, limits). They are stored in `parts/` beside the stores, which share them: where one file of a directory
changes, only its parts are built again. Parts and stores are complete or do not exist: the file that lists the others is written last.

Everything has checksums: those of index files are checked when a store is opened, those of records when they are read; a shard's size is
checked when it is opened; `verify` reads every byte.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import xxhash

from most_ray.errors import DataError, count_of, one_line
from most_ray.io import storage
from most_ray.io.json_values import parse_json
from most_ray.io.node_cache import node_cache
from most_ray.records.files import REJECTED
from most_ray.records.keys import KEYS, ROW_BYTES, id_key
from most_ray.records.template import EncodedRecord

STORE_VERSION = 2
PART_FILES = ("index.npy", REJECTED)  # files of a part in addition to its shards and part.json
SCRATCH = ".part-"  # prefix of the names of folders whose part is not finished
_SCHEMA = pa.schema([("id", pa.string()), ("input_ids", pa.large_list(pa.int32())), ("checksum", pa.uint64())])
_SHARD_TOKENS = 1 << 24  # tokens after which a shard is written
_OPEN_SHARDS = 128  # shards kept open, each with a file descriptor
_BUILT_AGAIN = "the next start builds it again."


def digest(data: Any) -> str:
    """The xxh3_128 digest of bytes or a contiguous array, in hexadecimal."""
    return str(xxhash.xxh3_128_hexdigest(data))


def file_digest(path: Path) -> str:
    """The `digest` of a file's content."""
    state = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            state.update(chunk)
    return str(state.hexdigest())


def record_checksum(record_id: str, tokens: np.ndarray) -> int:
    """The 64-bit checksum of a record's id and tokens."""
    return int(xxhash.xxh3_64_intdigest(tokens.data, seed=xxhash.xxh32_intdigest(record_id)))


class TokenStore:
    """A token store, open for reading. Arrays are memory-mapped, so opening is quick at any size.

    Raises:
        DataError: the store is missing, damaged or of another version; names the file.
    """

    def __init__(self, uri: str | Path) -> None:
        self.uri = str(uri)
        self._cache = node_cache() if storage.is_remote(self.uri) else None
        # What the store was built from, its counts and its shards.
        self.manifest = read_checksummed_json(storage.join(self.uri, "manifest.json"), "token store")
        if (version := self.manifest.get("version")) != STORE_VERSION:
            raise DataError("token store", self.uri, f"is of version {version}, not {STORE_VERSION}.", f"Delete it; {_BUILT_AGAIN}")
        self.lengths: np.ndarray = self._index("lengths.npy")  # tokens of each record, int32 (records,)
        self.prompt_lengths: np.ndarray = self._index("prompt_lengths.npy")  # unsupervised ones at its start, int32 (records,)
        self._starts = np.cumsum([0] + [shard["rows"] for shard in self.manifest["shards"]])
        self._shard = lru_cache(maxsize=_OPEN_SHARDS)(self._open_shard)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def task(self) -> str:
        """The task of its records."""
        return str(self.manifest["task"])

    @property
    def name(self) -> str:
        """The name of the directory that it was built from, without suffixes."""
        return str(self.manifest["name"])

    def _fetch(self, uri: str) -> Path:
        """A local file with the content of `uri`."""
        return self._cache.fetch(uri) if self._cache else storage.local(uri)

    def _index(self, name: str) -> np.ndarray:
        """An index file's array, memory-mapped, after a check of its digest."""
        uri = storage.join(self.uri, name)
        with _reading("token store", uri):
            path = self._fetch(uri)
            if file_digest(path) != self.manifest["index"][name]:
                raise DataError("token store", uri, "does not match its checksum.", _remedy(uri))
            return np.load(path, mmap_mode="r", allow_pickle=False)

    def shard_uri(self, index: int) -> str:
        """The URI of the shard at `index`."""
        shard = self.manifest["shards"][index]
        return storage.join(storage.parent(self.uri), "parts", shard["part"], shard["name"])

    def _corrupt(self, index: int, why: str) -> DataError:
        """The error for a shard that cannot be used."""
        uri = self.shard_uri(index)
        # Of a remote store missing parts are not looked for at each start, so the store is to be deleted too.
        copy = f", {storage.redact(self.uri)} and this node's copies ({self._cache.directory})" if self._cache else ""
        return DataError("shard", storage.redact(uri), f"{why}.", f"Delete {storage.redact(storage.parent(uri))}{copy}; {_BUILT_AGAIN}")

    def _open_shard(self, index: int) -> pa.RecordBatch:
        """A shard's columns, memory-mapped, after a check of its size and structure."""
        shard, uri = self.manifest["shards"][index], self.shard_uri(index)

        def map_shard() -> pa.MemoryMappedFile:
            return pa.memory_map(str(self._fetch(uri)))

        try:
            try:
                content = storage.with_retries(map_shard, uri)
            except FileNotFoundError:
                content = map_shard()  # other files may just have evicted it from this node's cache
            if content.size() != shard["bytes"]:
                raise self._corrupt(index, f"has {count_of(content.size(), 'byte')} instead of {shard['bytes']}")
            batch = pa.ipc.open_file(content).get_batch(0)
            batch.validate(full=True)  # offsets out of range would crash the process where they are used
            if batch.schema != _SCHEMA or batch.num_rows != shard["rows"]:
                raise self._corrupt(index, "has other columns or rows than were written")
            return batch
        except (OSError, pa.ArrowException) as error:
            raise self._corrupt(index, f"cannot be read ({error})") from error

    def _locate(self, row: int) -> tuple[int, int]:
        """The shard of a record, and its index in the shard."""
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        return shard, row - int(self._starts[shard])

    def record(self, row: int) -> tuple[str, np.ndarray]:
        """The id and the tokens of a record, int32 (tokens,), without a copy; both are checked against the record's checksum.

        Raises:
            DataError: they are not what was written; names the shard.
        """
        shard, index = self._locate(row)
        batch = self._shard(shard)
        column = batch.column(1)
        try:
            record_id = str(batch.column(0)[index].as_py())
            start, stop = column.offsets[index].as_py(), column.offsets[index + 1].as_py()
            tokens: np.ndarray = column.values.slice(start, stop - start).to_numpy()
            good = len(tokens) == self.lengths[row] and record_checksum(record_id, tokens) == batch.column(2)[index].as_py()
        except (ValueError, IndexError, OverflowError, pa.ArrowException) as error:
            raise self._corrupt(shard, f"has broken columns at record {index} ({error})") from error
        if not good:
            raise self._corrupt(shard, f"is damaged: record {index} does not match its checksum")
        return record_id, tokens

    def record_id(self, row: int) -> str:
        """The id of a record. Raises DataError as `record`."""
        return self.record(row)[0]

    def input_ids(self, row: int) -> np.ndarray:
        """The tokens of a record, int32 (tokens,). Raises DataError as `record`."""
        return self.record(row)[1]

    def instruction_lines(self, row: int) -> int | None:
        """The lines of a TTS record's instruction; None where the store, as those of earlier versions, does not say."""
        runs = self.manifest.get("instruction_lines")
        return None if runs is None else int(runs[bisect.bisect_right(runs, row, key=lambda run: run[0]) - 1][1])

    def verify(self, max_bytes: int | None = None) -> bool:
        """Check the size of every shard and, unless all together exceed `max_bytes`, every byte. Returns whether bytes were checked.

        Raises:
            DataError: names the shard.
        """
        shards = self.manifest["shards"]
        whole = max_bytes is None or sum(shard["bytes"] for shard in shards) <= max_bytes
        for index, shard in enumerate(shards):
            if self._cache and not whole:
                continue  # a remote shard's size is checked when it is fetched
            try:
                path = self._fetch(self.shard_uri(index))
                size = path.stat().st_size
            except OSError as error:
                raise self._corrupt(index, f"cannot be read ({error.strerror or error})") from error
            if size != shard["bytes"]:
                raise self._corrupt(index, f"has {count_of(size, 'byte')} instead of {shard['bytes']}")
            if whole and file_digest(path) != shard["digest"]:
                raise self._corrupt(index, "is damaged: it does not match its checksum")
        return whole

    def rejected_lines(self) -> bytes:
        """The content of rejected.jsonl. Raises DataError where it is missing."""
        uri = storage.join(self.uri, REJECTED)
        with _reading("token store", uri):
            return storage.read_bytes(uri)

    def open_keys(self) -> BinaryIO | None:
        """The file of the records' keys (see `records.keys`); None where the store, as those of earlier versions, has no whole one."""
        try:
            stream = storage.open_read(storage.join(self.uri, KEYS))
        except FileNotFoundError:
            return None
        if stream.seek(0, io.SEEK_END) != ROW_BYTES * len(self):
            stream.close()
            return None
        stream.seek(0)
        return stream


@lru_cache(maxsize=64)
def open_store(uri: str) -> TokenStore:
    """The store at `uri`, opened once per process."""
    return TokenStore(uri)


def _remedy(uri: str) -> str:
    """The remedy for a damaged file of a store or part."""
    return f"Delete {storage.redact(storage.parent(uri))}; {_BUILT_AGAIN}"


@contextlib.contextmanager
def _reading(what: str, uri: str) -> Iterator[None]:
    """Raise DataError where `uri`, called `what`, cannot be read."""
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise DataError(what, storage.redact(uri), f"cannot be read ({one_line(error)}).", _remedy(uri)) from error


def checksummed_json(content: Mapping[str, Any]) -> bytes:
    """`content` as JSON with its own digest in it."""
    return json.dumps({**content, "digest": digest(json.dumps(content, sort_keys=True).encode())}, indent=1).encode()


def read_checksummed_json(uri: str, what: str) -> dict[str, Any]:
    """Read a file that `checksummed_json` has built. Raises DataError, in which `what` names it, if it is damaged or does not exist."""
    with _reading(what, uri):
        content = parse_json(storage.read_bytes(uri))
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
        found = content.pop("digest", None)
    if found != digest(json.dumps(content, sort_keys=True).encode()) and content.get("version", STORE_VERSION) == STORE_VERSION:
        raise DataError(what, storage.redact(uri), "does not match its checksum.", _remedy(uri))
    return content


class PartWriter:
    """Writes one part to a temporary folder in `scratch`; `publish` moves it to its URI. At most one shard's tokens are in memory.

    A part is shard-NNNN.arrow, index.npy (lengths and prompt lengths, int32 (2, records)), rejected.jsonl, keys.bin (see `records.keys`)
    and, last, part.json. There and in a store's manifest, `instruction_lines` is a list of [row, lines]: from that row on, TTS records have
    instructions of so many lines.
    """

    def __init__(self, scratch: Path) -> None:
        self.folder = scratch / f"{SCRATCH}{uuid.uuid4().hex[:12]}"
        self.folder.mkdir(parents=True)
        self._shards: list[dict[str, Any]] = []
        self._ids: list[str] = []  # of the records that are not in a shard yet
        self._tokens: list[np.ndarray] = []  # of these records
        self._speech: list[int] = []  # the keys of their speech
        self._buffered = 0  # the number of these tokens
        self._lengths: list[np.ndarray] = []
        self._prompts: list[int] = []
        self._rejected = (self.folder / REJECTED).open("wb")
        self._keys = (self.folder / KEYS).open("wb")
        self._counts = {"n_rejected": 0, "n_set_aside": 0}
        self._instruction_lines: list[tuple[int, int]] = [(0, 1)]

    def add(self, ids: Sequence[str], encoded: Sequence[EncodedRecord], speech: Sequence[int] = ()) -> None:
        """Append records. `speech`: their `speech_key`s; by default unknown."""
        self._ids += ids
        self._speech += speech or [0] * len(ids)
        for item in encoded:
            if item.task == "tts" and item.instruction_lines != self._instruction_lines[-1][1]:
                self._instruction_lines.append((len(self._prompts), item.instruction_lines))
            self._tokens.append(item.input_ids)
            self._prompts.append(item.prompt_length)
            self._buffered += len(item.input_ids)
        if self._buffered >= _SHARD_TOKENS:
            self._flush()

    def reject(self, index: int, byte: int, reason: str, record_id: str | None = None, *, set_aside: bool = False) -> None:
        """Note a rejected record: its index in the part, its byte in the file, the reason; `set_aside`: it does not count as bad."""
        self._counts["n_set_aside" if set_aside else "n_rejected"] += 1
        line = {"index": index, "byte": byte, "reason": reason, "id": record_id} | ({"set_aside": True} if set_aside else {})
        self._rejected.write(json.dumps(line).encode() + b"\n")

    def _flush(self) -> None:
        """Write the buffered records to a shard."""
        if not self._ids:
            return
        lengths = np.array([len(tokens) for tokens in self._tokens], np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        flat = np.concatenate(self._tokens)
        lists = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(flat, pa.int32()))
        sums = np.fromiter(map(record_checksum, self._ids, self._tokens), np.uint64, len(self._ids))
        batch = pa.RecordBatch.from_arrays([pa.array(self._ids, pa.string()), lists, pa.array(sums)], schema=_SCHEMA)
        keys = np.stack([np.fromiter(map(id_key, self._ids), np.uint64), np.array(self._speech, np.uint64), sums], axis=1)
        self._keys.write(keys.astype("<u8").tobytes())
        path = self.folder / f"shard-{len(self._shards):04d}.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
            writer.write_batch(batch)
        self._shards.append({"name": path.name, "rows": len(lengths), "bytes": path.stat().st_size, "digest": file_digest(path)})
        self._lengths.append(lengths.astype(np.int32))
        self._ids, self._tokens, self._speech, self._buffered = [], [], [], 0

    def publish(self, uri: str, n_seen: int) -> None:
        """Finish the part and move it to `uri`. `n_seen`: records of the input, good and bad."""
        self._flush()
        self._close_files()
        index = np.stack([np.concatenate([np.zeros(0, np.int32), *self._lengths]), np.array(self._prompts, np.int32)])
        np.save(self.folder / "index.npy", index)
        content = {
            "version": STORE_VERSION,
            "n_records": index.shape[1],
            "n_tokens": int(index[0].sum(dtype=np.int64)),
            "n_seen": n_seen,
            **self._counts,
            "instruction_lines": self._instruction_lines,
            "shards": self._shards,
            "files": {name: file_digest(self.folder / name) for name in PART_FILES},
        }
        (self.folder / "part.json").write_bytes(checksummed_json(content))
        storage.publish(self.folder, uri, "part.json")

    def _close_files(self) -> None:
        self._rejected.close()
        self._keys.close()

    def close(self) -> None:
        """Remove the temporary folder, if it still exists."""
        self._close_files()
        shutil.rmtree(self.folder, ignore_errors=True)
