"""Tensors of any layout as chunks, and chunks in safetensors files.

A rank's local tensor is cut into chunks: blocks of rows that are adjacent in the global tensor too. Files hold each chunk with its offsets
in the global tensor, so what one layout wrote every other can read, each rank only its slices.

`torch.distributed.checkpoint` (DCP) allows one chunk per shard, and its planner needs a single call that sees all of every tensor, for
which it gathers pickled plans; here the placements alone determine which rank writes what. Reading uses DCP's arithmetic of overlaps.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement

from most_ray.checkpoint.files import BLOCK_BYTES, CHUNKS_KEY, DamagedFileError
from most_ray.distributed.ranks import this_rank
from most_ray.errors import count_of
from most_ray.io import storage

_DTYPES = {  # by the names of safetensors
    **{f"F{bits}": getattr(torch, f"float{bits}") for bits in (64, 32, 16)},
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (64, 32, 16, 8)},
} | {"BF16": torch.bfloat16, "U8": torch.uint8, "BOOL": torch.bool}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Chunk:
    """A block of a global tensor."""

    offsets: tuple[int, ...]  # where it begins in the global tensor
    local: torch.Tensor  # its values; shares memory with the tensor that is trained


@dataclass(frozen=True)
class TensorShard:
    """What this rank holds of a tensor."""

    name: str
    shape: tuple[int, ...]  # of the global tensor
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]
    owned: bool  # this rank, and no other that holds the same, writes it

    @property
    def global_bytes(self) -> int:
        """Size of the global tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def shard_of(name: str, tensor: torch.Tensor, order: Sequence[int] | None = None, rank: int | None = None) -> TensorShard:
    """Cut this rank's part of a tensor into chunks.

    Args:
        name: in checkpoints.
        tensor: a DTensor, or a plain tensor, which is equal on all ranks and is written by rank 0.
        order: if the first dimension is kept in another order than in files, each row's index in files, `(rows,)`.
        rank: of the caller, by default that in the default group.
    """
    rank, shape = this_rank() if rank is None else rank, tuple(tensor.shape)
    if tensor.numel() == 0 or not isinstance(tensor, DTensor):
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        indices: tuple[np.ndarray | None, ...] = (None,) * len(shape)
        owned = rank == 0
    else:
        local, coordinate = tensor.to_local(), tensor.device_mesh.get_coordinate()
        if coordinate is None:
            return TensorShard(name, shape, tensor.dtype, (), owned=False)
        indices = _global_indices(shape, tuple(tensor.placements), tuple(tensor.device_mesh.shape), tuple(coordinate))
        owned = all(at == 0 for at, placement in zip(coordinate, tensor.placements, strict=True) if isinstance(placement, Replicate))
    if order is not None and indices:
        logical = np.asarray(order)
        indices = (logical if indices[0] is None else logical[indices[0]], *indices[1:])
    return TensorShard(name, shape, tensor.dtype, tuple(_chunks(local.detach(), indices)), owned)


@functools.lru_cache(maxsize=4096)
def _global_indices(
    shape: tuple[int, ...], placements: tuple[Placement, ...], mesh: tuple[int, ...], coordinate: tuple[int, ...]
) -> tuple[np.ndarray | None, ...]:
    """Return for each dimension the global indices of the local tensor's entries, in order; None if they are all of them."""
    indices: list[torch.Tensor | None] = [None] * len(shape)
    for placement, size, at in zip(placements, mesh, coordinate, strict=True):
        if isinstance(placement, Replicate):
            continue
        assert not placement.is_partial(), "what is saved has been reduced"
        dim: int = placement.dim  # type: ignore[attr-defined]
        index = torch.arange(shape[dim]) if (before := indices[dim]) is None else before
        # Split the indices as the tensor was split: correct for strided shards (experts over two mesh dimensions) as for plain ones.
        shards, _ = placement._split_tensor(index.view([1] * dim + [-1]), size, with_padding=False, contiguous=False)  # type: ignore[attr-defined]
        indices[dim] = shards[at].flatten()
    return tuple(None if index is None else index.numpy() for index in indices)


def _chunks(local: torch.Tensor, indices: Sequence[np.ndarray | None]) -> Iterator[Chunk]:
    """Cut `local` wherever the global indices of adjacent entries are not adjacent."""
    runs: list[list[tuple[int, int, int]]] = []  # per dimension: (start in the local tensor, start in the global one, length)
    for size, index in zip(local.shape, indices, strict=True):
        assert index is None or len(index) == size, "the placements describe the local tensor"
        runs.append([(0, 0, size)] if index is None else _runs(index))
    for corner in itertools.product(*runs):
        part = tuple(slice(start, start + length) for start, _, length in corner)
        yield Chunk(tuple(begin for _, begin, _ in corner), local[part])


def _runs(index: np.ndarray) -> list[tuple[int, int, int]]:
    """Return the runs of consecutive numbers in `index` as (position, first number, length)."""
    starts = np.flatnonzero(np.diff(index, prepend=index[:1] - 2) != 1)
    lengths = np.diff(starts, append=len(index))
    return [(int(start), int(index[start]), int(length)) for start, length in zip(starts, lengths, strict=True)]


class Staging:
    """A host buffer with copies of the chunks that this rank owns, laid out as the file will be, so that writing needs no other copy.

    The buffer is kept between saves: touching the pages of a new one takes longer than the copy.

    Attributes:
        values: name -> how many values of the tensor are in the file.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._header = b""
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.values: dict[str, int] = {}
        self._copied: torch.cuda.Event | None = None

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return len(self._header) + self._used

    def prepare(self, shards: Sequence[TensorShard]) -> None:
        """Make room for `shards`."""
        needed = sum(chunk.local.nbytes for shard in shards if shard.owned for chunk in shard.chunks)
        if needed > len(self._buffer):
            self._buffer = torch.empty(0, dtype=torch.uint8)  # frees the old one before the new one is allocated
            self._buffer = torch.empty(needed, dtype=torch.uint8, pin_memory=torch.cuda.is_available()).zero_()  # touches every page

    def plan(self, shards: Sequence[TensorShard]) -> None:
        """Lay out what this rank owns of `shards`. `copy` must follow before any of them changes."""
        self.prepare(shards)
        chunks = [(shard, number, chunk) for shard in shards if shard.owned for number, chunk in enumerate(shard.chunks)]
        chunks.sort(key=lambda entry: -entry[0].dtype.itemsize)  # wide types first: every offset is a multiple of its type's width
        entries, where = {}, {}
        self._copies, position, self.values = [], 0, {}
        for shard, number, chunk in chunks:
            key = f"{shard.name}#{number}" if number else shard.name
            end = position + chunk.local.nbytes
            entries[key] = {"dtype": _DTYPE_NAMES[shard.dtype], "shape": list(chunk.local.shape), "data_offsets": [position, end]}
            where[key] = [shard.name, list(shard.shape), list(chunk.offsets)]
            self.values[shard.name] = self.values.get(shard.name, 0) + chunk.local.numel()
            self._copies.append((self._buffer[position:end], chunk.local))
            position = end
        header = json.dumps({"__metadata__": {CHUNKS_KEY: json.dumps(where)}, **entries}).encode()
        header += b" " * (-len(header) % 8)
        self._header, self._used = len(header).to_bytes(8, "little") + header, position

    def copy(self, threads: int) -> None:
        """Copy what was planned. Afterwards the tensors may change; those of a GPU only by work queued later on the same stream."""
        _copy(self._copies, threads)
        self._copies = []
        if torch.cuda.is_available():
            self._copied = torch.cuda.Event()
            self._copied.record()

    def write(self, path: Path) -> tuple[int, str]:
        """Write the file and sync it to disk. Returns its size in bytes and its xxh3_128."""
        if self._copied is not None:
            self._copied.synchronize()
        data = self._buffer.numpy().data[: self._used]
        state = xxhash.xxh3_128(self._header)
        with path.open("wb", buffering=0) as file:
            write_all(file, memoryview(self._header))
            for start in range(0, len(data), BLOCK_BYTES):
                block = data[start : start + BLOCK_BYTES]
                state.update(block)
                write_all(file, block)
            os.fsync(file.fileno())
        return self.nbytes, state.hexdigest()


def write_all(file: Any, data: memoryview) -> None:
    """Write all of `data` to an unbuffered file, which may take less in one call, e.g. while a disk fills up."""
    while len(data):
        data = data[file.write(data) :]


def _copy(copies: Sequence[tuple[torch.Tensor, torch.Tensor]], threads: int) -> None:
    """Copy tensors into byte buffers: pairs of target, `(bytes,)` uint8, and source. CPU tensors are copied by plain threads, the calling
    one among them: torch's own threads wait for each other at every tensor, which on busy cores takes ten times as long as the copy."""
    batches: deque[list[tuple[np.ndarray, np.ndarray]]] = deque([[]])
    size = 0
    for target, source in copies:
        if source.device.type != "cpu" or not source.is_contiguous():
            target.view(source.dtype).view(source.shape).copy_(source, non_blocking=True)
            continue
        to, from_ = target.numpy(), source.reshape(-1).view(torch.uint8).numpy()
        for start in range(0, len(to), BLOCK_BYTES):
            block = to[start : start + BLOCK_BYTES]
            batches[-1].append((block, from_[start : start + BLOCK_BYTES]))
            size += len(block)
            if size >= BLOCK_BYTES:
                batches.append([])
                size = 0

    def work() -> None:
        with contextlib.suppress(IndexError):  # all batches are taken
            while True:
                for to, from_ in batches.popleft():
                    np.copyto(to, from_)

    helpers = [threading.Thread(target=work) for _ in range(min(threads, len(batches)) - 1)]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a checkpoint's files."""

    metadata: TensorStorageMetadata
    locations: list[tuple[str, str]]  # file and key of each of `metadata.chunks`


def index_tensors(headers: dict[str, dict[str, Any]]) -> dict[str, StoredTensor]:
    """Collect the tensors of several files, whose headers by name are as `read_header` returns them. Raises DamagedFileError if two files
    describe one tensor differently."""
    index: dict[str, StoredTensor] = {}
    for file, header in headers.items():
        for key, (name, shape, offsets) in header["__metadata__"].items():
            entry = header[key]
            dtype = _DTYPES[entry["dtype"]]
            if name not in index:
                index[name] = StoredTensor(TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), []), [])
            found = index[name].metadata
            if found.size != torch.Size(shape) or found.properties.dtype != dtype:
                raise DamagedFileError(f"{file}: {name} has another shape or type than in other files")
            found.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(entry["shape"])))
            index[name].locations.append((file, key))
    return index


_Read = tuple[str, tuple[slice, ...], torch.Tensor]  # a file's entry, the part of it, and the view of a live tensor that it goes to


def read_shards(
    shards: Sequence[TensorShard], index: dict[str, StoredTensor], fetched: Callable[[str], contextlib.AbstractContextManager[Path]]
) -> None:
    """Fill the live tensors that `shards` share memory with, one file after another. `fetched` gives the local path of a file while it is
    read; it is called once for each file that is needed. Raises DamagedFileError if a file cannot be read, or does not hold all of a
    chunk."""
    reads: dict[str, list[_Read]] = {}
    for shard in shards:
        for chunk in shard.chunks:
            _plan_reads(shard.name, chunk, index[shard.name], reads)
    for file, wanted in sorted(reads.items()):
        with fetched(file) as path:
            try:
                storage.with_retries(functools.partial(_read_file, path, wanted), str(path))
            except DamagedFileError as error:
                raise DamagedFileError(f"{file}: {error}") from error


def _read_file(path: Path, wanted: Sequence[_Read]) -> None:
    with torch.no_grad():
        try:
            handle = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise DamagedFileError(_one_line(error)) from error
        with handle:
            for key, source, target in wanted:
                try:
                    data = handle.get_slice(key)[source] if source else handle.get_tensor(key)  # a scalar has no slices
                    target.copy_(data)
                except (SafetensorError, RuntimeError, IndexError, ValueError) as error:  # the header describes something else
                    raise DamagedFileError(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _plan_reads(name: str, chunk: Chunk, stored: StoredTensor, reads: dict[str, list[_Read]]) -> None:
    """Add to `reads`, by file, what a live chunk needs."""
    wanted = ChunkStorageMetadata(torch.Size(chunk.offsets), chunk.local.shape)
    covered = 0
    for item in create_read_items_for_chunk_list(name, stored.metadata, [wanted]):
        assert item.storage_index.index is not None
        file, key = stored.locations[item.storage_index.index]
        source = tuple(slice(start, start + length) for start, length in zip(item.storage_offsets, item.lengths, strict=True))
        target = tuple(slice(start, start + length) for start, length in zip(item.dest_offsets, item.lengths, strict=True))
        reads.setdefault(file, []).append((key, source, chunk.local[target]))
        covered += math.prod(item.lengths)
    if covered != chunk.local.numel():
        raise DamagedFileError(f"they hold only {covered} of {count_of(chunk.local.numel(), 'value')} of {name}")
