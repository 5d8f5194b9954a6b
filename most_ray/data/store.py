"""The token store: records of one directory as token ids, in memory-mapped Arrow shards beside a JSON manifest.

A store is complete or is not there: it is written under a temporary name and renamed. Its folder's name ends in a digest of what it
was made from (content, tokenizer, template, length limit), so that a changed file or tokenizer makes another store.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from most_ray.errors import DataError
from most_ray.template import Encoded

STORE_VERSION = 1
_SCHEMA = pa.schema([("id", pa.string()), ("input_ids", pa.large_list(pa.int32())), ("prompt_length", pa.int32())])
_SHARD_TOKENS = 1 << 26


class TokenStore:
    """Read access. Arrays are mapped, not loaded: opening costs the same at any size.

    Attributes:
        manifest: what the store was made from and holds.
        lengths: tokens of each record, int32 (records,).
        prompt_lengths: unsupervised tokens at the start of each record, int32 (records,).
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            self.manifest: dict[str, Any] = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError("token store", str(directory), f"has no readable manifest ({error}).", "Delete it; it is made anew.") from error
        if self.manifest["version"] != STORE_VERSION:
            raise DataError("token store", str(directory), f"is of version {self.manifest['version']}, not {STORE_VERSION}.", "Delete it.")
        self.lengths: np.ndarray = np.load(directory / "lengths.npy", mmap_mode="r")
        self.prompt_lengths: np.ndarray = np.load(directory / "prompt_lengths.npy", mmap_mode="r")
        self._batches = [_open_shard(directory / name) for name in self.manifest["shards"]]
        self._starts = np.cumsum([0] + [batch.num_rows for batch in self._batches])

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def task(self) -> str:
        return str(self.manifest["task"])

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    def _locate(self, row: int) -> tuple[pa.RecordBatch, int]:
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._batches[shard], row - int(self._starts[shard])

    def record_id(self, row: int) -> str:
        batch, index = self._locate(row)
        return str(batch.column(0)[index].as_py())

    def input_ids(self, row: int) -> np.ndarray:
        """Tokens of a record, int32 (tokens,), without a copy."""
        batch, index = self._locate(row)
        column = batch.column(1)
        start, stop = column.offsets[index].as_py(), column.offsets[index + 1].as_py()
        return column.values.slice(start, stop - start).to_numpy()


def _open_shard(path: Path) -> pa.RecordBatch:
    return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)


@lru_cache(maxsize=64)
def open_store(directory: str) -> TokenStore:
    """A store, opened once per process."""
    return TokenStore(Path(directory))


class StoreWriter:
    """Writes one store; `commit` makes it visible."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}")
        self._temporary.mkdir(parents=True)
        self._shards: list[str] = []
        self._ids: list[str] = []
        self._tokens: list[np.ndarray] = []
        self._prompts: list[int] = []
        self._buffered = 0
        self._lengths: list[int] = []
        self._prompt_lengths: list[int] = []
        self._rejected: list[dict[str, Any]] = []

    def add(self, ids: Sequence[str], encoded: Sequence[Encoded]) -> None:
        for record_id, item in zip(ids, encoded, strict=True):
            self._ids.append(record_id)
            self._tokens.append(item.input_ids)
            self._prompts.append(item.prompt_length)
            self._buffered += len(item.input_ids)
        if self._buffered >= _SHARD_TOKENS:
            self._flush()

    def reject(self, file: str, index: int, reason: str, record_id: str | None = None) -> None:
        self._rejected.append({"file": file, "index": index, "reason": reason, "id": record_id})

    @property
    def n_rejected(self) -> int:
        return len(self._rejected)

    def _flush(self) -> None:
        if not self._ids:
            return
        lengths = [len(tokens) for tokens in self._tokens]
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        lists = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(np.concatenate(self._tokens), pa.int32()))
        batch = pa.RecordBatch.from_arrays([pa.array(self._ids), lists, pa.array(self._prompts, pa.int32())], schema=_SCHEMA)
        name = f"shard-{len(self._shards):05d}.arrow"
        with pa.OSFile(str(self._temporary / name), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
            writer.write_batch(batch)
        self._shards.append(name)
        self._lengths += lengths
        self._prompt_lengths += self._prompts
        self._ids, self._tokens, self._prompts, self._buffered = [], [], [], 0

    def commit(self, manifest: Mapping[str, Any]) -> None:
        self._flush()
        np.save(self._temporary / "lengths.npy", np.array(self._lengths, np.int32))
        np.save(self._temporary / "prompt_lengths.npy", np.array(self._prompt_lengths, np.int32))
        with (self._temporary / "rejected.jsonl").open("w", encoding="utf-8") as sink:
            sink.writelines(json.dumps(entry) + "\n" for entry in self._rejected)
        content = {
            **manifest,
            "version": STORE_VERSION,
            "n_records": len(self._lengths),
            "n_tokens": int(sum(self._lengths)),
            "n_rejected": len(self._rejected),
            "shards": self._shards,
        }
        (self._temporary / "manifest.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        try:
            self._temporary.rename(self.directory)
        except OSError:
            if not (self.directory / "manifest.json").exists():
                raise
            self.abort()  # another process made the same store first

    def abort(self) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)
