"""Tensors of any layout as chunks, and chunks in safetensors files.

A rank holds of a tensor one or several chunks: those parts of its local tensor whose rows are neighbours in the whole one. Files hold
chunks under the place that they have in the whole tensor, so what one layout wrote every other can read, each rank only its slices.

`torch.distributed.checkpoint` takes a shard for one chunk, and its planner demands that one call sees the whole of each tensor, for
which it gathers pickled plans: who writes what follows from the placements alone here. Its arithmetic of overlaps is used for reading.
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
from typing import Any, BinaryIO

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement

from most_ray.distributed.ranks import this_rank
from most_ray.io import storage

CHUNK = 8 << 20  # bytes that are written, hashed or copied at a time: large enough for all three to let go of the interpreter
_CHUNKS_KEY = "rectangles"  # in a file's metadata, what each entry is a chunk of: the file format's word, so it stays
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TYPES = {name: dtype for dtype, name in _NAMES.items()}


class DamagedFileError(Exception):
    """A file is missing, cut off or not what its header says."""


@dataclass(frozen=True)
class Chunk:
    """`local` is the part of a whole tensor that begins at `offsets`; it shares memory with the tensor that is trained."""

    offsets: tuple[int, ...]
    local: torch.Tensor


@dataclass(frozen=True)
class TensorShard:
    """What this rank holds of the tensor `name` of global shape `shape`. `owned`: this rank, and no other, writes it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]
    owned: bool

    @property
    def whole_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def part_of(name: str, tensor: torch.Tensor, order: Sequence[int] | None = None, rank: int | None = None) -> TensorShard:
    """A plain tensor (alike on all ranks: rank 0 writes it) or a DTensor as chunks.

    Args:
        order: for tensors whose first dimension is kept in another order than in files: the index in the file of each row.
        rank: the calling rank, by default that of the default group.
    """
    if rank is None:
        rank = this_rank()
    shape = tuple(tensor.shape)
    if tensor.numel() == 0 or not isinstance(tensor, DTensor):
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        indices: tuple[np.ndarray | None, ...] = (None,) * len(shape)
        owned = rank == 0
    else:
        local, coordinate = tensor.to_local(), tensor.device_mesh.get_coordinate()
        if coordinate is None:
            return TensorShard(name, shape, tensor.dtype, (), owned=False)
        indices = _held(shape, tuple(tensor.placements), tuple(tensor.device_mesh.shape), tuple(coordinate))
        owned = all(at == 0 for at, placement in zip(coordinate, tensor.placements, strict=True) if isinstance(placement, Replicate))
    if order is not None and indices:
        logical = np.asarray(order)
        indices = (logical if indices[0] is None else logical[indices[0]], *indices[1:])
    return TensorShard(name, shape, tensor.dtype, tuple(_chunks(local.detach(), indices)), owned)


@functools.lru_cache(maxsize=4096)
def _held(
    shape: tuple[int, ...], placements: tuple[Placement, ...], mesh: tuple[int, ...], coordinate: tuple[int, ...]
) -> tuple[np.ndarray | None, ...]:
    """For each dimension the global indices that the local tensor holds, in its order; None for all of them."""
    held: list[torch.Tensor | None] = [None] * len(shape)
    for placement, size, at in zip(placements, mesh, coordinate, strict=True):
        if isinstance(placement, Replicate):
            continue
        assert not placement.is_partial(), "what is saved has been reduced"
        dim: int = placement.dim  # type: ignore[attr-defined]
        before = held[dim]
        index = torch.arange(shape[dim]) if before is None else before
        # The split that laid the tensor out, on its indices: right for strided shards (experts over two mesh dimensions) as for plain ones.
        shards, _ = placement._split_tensor(index.view([1] * dim + [-1]), size, with_padding=False, contiguous=False)  # type: ignore[attr-defined]
        held[dim] = shards[at].flatten()
    return tuple(None if index is None else index.numpy() for index in held)


def _chunks(local: torch.Tensor, indices: Sequence[np.ndarray | None]) -> Iterator[Chunk]:
    """`local` cut wherever its indices in the whole tensor are no neighbours."""
    runs: list[list[tuple[int, int, int]]] = []  # per dimension: (start in local, start in the whole, length)
    for size, index in zip(local.shape, indices, strict=True):
        assert index is None or len(index) == size, "the placements describe the local tensor"
        runs.append([(0, 0, size)] if index is None else _runs(index))
    for corner in itertools.product(*runs):
        view = local
        for dim, (start, _, length) in enumerate(corner):
            view = view.narrow(dim, start, length)
        yield Chunk(tuple(begin for _, begin, _ in corner), view)


def _runs(index: np.ndarray) -> list[tuple[int, int, int]]:
    starts = np.flatnonzero(np.diff(index, prepend=index[:1] - 2) != 1)
    lengths = np.diff(starts, append=len(index))
    return [(int(start), int(index[start]), int(length)) for start, length in zip(starts, lengths, strict=True)]


class Staging:
    """This rank's owned chunks, copied into one buffer that is kept: a new one costs more than the copy, for its pages are new.

    The buffer is laid out as the file will be, which is therefore written without a second copy.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._header = b""
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.values: dict[str, int] = {}  # how many of each tensor are in the file
        self._copied: torch.cuda.Event | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return len(self._header) + self._used

    def prepare(self, parts: Sequence[TensorShard]) -> None:
        """Make room for `parts`."""
        needed = sum(chunk.local.nbytes for part in parts if part.owned for chunk in part.chunks)
        if needed > len(self._buffer):
            pinned = torch.cuda.is_available()
            self._buffer = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self._buffer = torch.empty(needed, dtype=torch.uint8, pin_memory=pinned)
            self._buffer.zero_()  # touches every page

    def plan(self, parts: Sequence[TensorShard]) -> None:
        """Lay out what this rank owns of `parts`; `copy` comes next, before any of it changes."""
        self.prepare(parts)
        found = [(part, number, piece) for part in parts if part.owned for number, piece in enumerate(part.chunks)]
        found.sort(key=lambda entry: -entry[0].dtype.itemsize)  # wide types first: everything stands at a multiple of its width
        entries: dict[str, Any] = {}
        where: dict[str, Any] = {}
        self._copies, position, self.values = [], 0, {}
        for part, number, piece in found:
            key = f"{part.name}#{number}" if number else part.name
            end = position + piece.local.nbytes
            entries[key] = {"dtype": _NAMES[part.dtype], "shape": list(piece.local.shape), "data_offsets": [position, end]}
            where[key] = [part.name, list(part.shape), list(piece.offsets)]
            self.values[part.name] = self.values.get(part.name, 0) + piece.local.numel()
            self._copies.append((self._buffer[position:end], piece.local))
            position = end
        header = json.dumps({"__metadata__": {_CHUNKS_KEY: json.dumps(where)}, **entries}).encode()
        header += b" " * (-len(header) % 8)
        self._header, self._used = len(header).to_bytes(8, "little") + header, position

    def copy(self, threads: int) -> None:
        """Copy what was planned. Afterwards the tensors may change (those of a GPU by what is queued behind it on the same stream)."""
        _copy(self._copies, threads)
        self._copies = []
        if torch.cuda.is_available():
            self._copied = torch.cuda.Event()
            self._copied.record()

    def write(self, path: Path) -> tuple[int, str]:
        """Write the file and bring it to the disk. Returns its size in bytes and its hash."""
        if self._copied is not None:
            self._copied.synchronize()
        data = self._buffer.numpy().data[: self._used]
        state = xxhash.xxh3_128(self._header)
        with path.open("wb", buffering=0) as file:
            write_all(file, memoryview(self._header))
            for start in range(0, len(data), CHUNK):
                chunk = data[start : start + CHUNK]
                state.update(chunk)
                write_all(file, chunk)
            os.fsync(file.fileno())
        return self.nbytes, state.hexdigest()


def write_all(file: Any, data: memoryview) -> None:
    """An unbuffered file may take less than it was given, on a disk that fills up for one."""
    while len(data):
        data = data[file.write(data) :]


def _copy(copies: Sequence[tuple[torch.Tensor, torch.Tensor]], threads: int) -> None:
    """Fill byte buffers with tensors. Those of the CPU are copied by plain threads, of which the calling one takes what the others do
    not get to: torch's own wait for each other at every tensor, which on busy cores costs ten times the copy."""
    batches: deque[list[tuple[np.ndarray, np.ndarray]]] = deque([[]])
    size = 0
    for target, source in copies:
        if source.device.type != "cpu" or not source.is_contiguous():
            target.view(source.dtype).view(source.shape).copy_(source, non_blocking=True)
            continue
        to, from_ = target.numpy(), source.reshape(-1).view(torch.uint8).numpy()
        for start in range(0, len(to), CHUNK):
            piece = to[start : start + CHUNK]
            batches[-1].append((piece, from_[start : start + CHUNK]))
            size += len(piece)
            if size >= CHUNK:
                batches.append([])
                size = 0

    def work() -> None:
        with contextlib.suppress(IndexError):  # none is left
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
class Stored:
    """A tensor as files hold it: `places[i]` is the file and key of `metadata.chunks[i]`."""

    metadata: TensorStorageMetadata
    places: list[tuple[str, str]]


def read_header(stream: BinaryIO) -> dict[str, Any]:
    """The header of a safetensors file.

    Raises:
        DamagedFileError: it is none.
    """
    length = int.from_bytes(stream.read(8), "little")
    if not 0 < length < 1 << 30:
        raise DamagedFileError("it has no header")
    data = stream.read(length)
    try:
        header = json.loads(data)
        return {**header, "__metadata__": json.loads(header["__metadata__"][_CHUNKS_KEY])}
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFileError("its header is broken") from error


def index_of(headers: dict[str, dict[str, Any]]) -> dict[str, Stored]:
    """What files hold of which tensor.

    Args:
        headers: file name -> its header.
    """
    index: dict[str, Stored] = {}
    for file, header in headers.items():
        for key, (name, shape, offsets) in header["__metadata__"].items():
            entry = header[key]
            if name not in index:
                properties = TensorProperties(dtype=_TYPES[entry["dtype"]])
                index[name] = Stored(TensorStorageMetadata(properties, torch.Size(shape), []), [])
            index[name].metadata.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(entry["shape"])))
            index[name].places.append((file, key))
    return index


@dataclass(frozen=True)
class _Read:
    key: str
    source: tuple[slice, ...]
    target: torch.Tensor


def read_parts(parts: Sequence[TensorShard], index: dict[str, Stored], fetch: Callable[[str], Path], done: Callable[[Path], None]) -> None:
    """Fill the live tensors behind `parts` from files, each rank with what it holds, one file after another.

    Args:
        fetch: the local file of a name; called once per file that is needed.
        done: called with that file when it has been read.

    Raises:
        DamagedFileError: a file cannot be read, or a chunk is not there in full.
    """
    reads: dict[str, list[_Read]] = {}
    for part in parts:
        for chunk in part.chunks:
            _plan_reads(part.name, chunk, index[part.name], reads)
    for file, wanted in sorted(reads.items()):
        path = fetch(file)
        try:
            storage.with_retries(functools.partial(_read_file, path, wanted), str(path))
        except DamagedFileError as error:
            raise DamagedFileError(f"{file}: {error}") from error
        finally:
            done(path)


def _read_file(path: Path, wanted: Sequence[_Read]) -> None:
    with torch.no_grad():
        try:
            handle = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise DamagedFileError(_line(error)) from error
        with handle:
            for read in wanted:
                try:
                    # A scalar has no slices.
                    data = handle.get_slice(read.key)[read.source] if read.source else handle.get_tensor(read.key)
                except (SafetensorError, RuntimeError, IndexError, ValueError) as error:  # what a header that lies leads to
                    raise DamagedFileError(_line(error)) from error
                read.target.copy_(data)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _plan_reads(name: str, chunk: Chunk, stored: Stored, reads: dict[str, list[_Read]]) -> None:
    wanted = ChunkStorageMetadata(torch.Size(chunk.offsets), chunk.local.shape)
    covered = 0
    for item in create_read_items_for_chunk_list(name, stored.metadata, [wanted]):
        assert item.storage_index.index is not None
        file, key = stored.places[item.storage_index.index]
        source = tuple(slice(start, start + length) for start, length in zip(item.storage_offsets, item.lengths, strict=True))
        target = chunk.local
        for dim, (start, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            target = target.narrow(dim, start, length)
        reads.setdefault(file, []).append(_Read(key, source, target))
        covered += math.prod(item.lengths)
    if covered != chunk.local.numel():
        raise DamagedFileError(f"they hold only {covered} of {chunk.local.numel()} values of {name}")
