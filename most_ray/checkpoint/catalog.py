"""The checkpoints of a run: which are complete, which are corrupt, and which are deleted.

A checkpoint is a folder `step-NNNNNNNNN`. Its commit marker, commit.json, is written last and lists every file with its size and xxh3_128
hash; a folder without the marker is not a checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import xxhash

from most_ray.checkpoint.content import STATE, check_files, check_state, parse_marker, parse_state
from most_ray.checkpoint.files import BLOCK_BYTES, DamagedFileError, read_header
from most_ray.checkpoint.retention import steps_to_delete
from most_ray.distributed.collectives import all_gather_or_raise
from most_ray.distributed.ranks import this_rank, world_size
from most_ray.errors import CheckpointError, count_of
from most_ray.io import storage
from most_ray.io.run_folder import COMMIT, STEP, find_steps, step_uri

FORMAT = 2  # of a checkpoint's files; others are refused
DEEP_BYTES = 16 << 30  # a checkpoint is hashed before use if no process has to read more than this
Corrupt = list[tuple[str, str]]  # URI and reason of each corrupt checkpoint, newest first


def step_of(uri: str) -> int:
    """Return the step that a checkpoint's folder is named after. Raises CheckpointError if the name is not that of a step."""
    match = STEP.fullmatch(storage.base_name(uri))
    if match is None:
        raise CheckpointError("checkpoint", storage.redact(uri), "is not named step-NNNNNNNNN.")
    return int(match[1])


def committed(checkpoints: str) -> list[str]:
    """Return the URIs of the complete checkpoints, oldest first."""
    return [step_uri(checkpoints, step) for step, complete in sorted(find_steps(checkpoints).items()) if complete]


def read_marker(uri: str) -> dict[str, Any]:
    """Read commit.json: `step`, and `files` as name -> [bytes, xxh3_128]. Raises CheckpointError if the folder is missing, was never
    committed, or has another format; DamagedFileError if the marker cannot be parsed."""
    try:
        data = storage.read_bytes(storage.join(uri, COMMIT))
    except FileNotFoundError:
        raise CheckpointError("checkpoint", storage.redact(uri), f"is missing or was never completed (no {COMMIT}).") from None
    marker = parse_marker(data)
    check_format(uri, marker["format"])
    check_files(marker)
    return marker


def check_format(uri: str, found: object) -> None:
    """Raise CheckpointError unless a checkpoint has the format that this version reads."""
    if found != FORMAT:
        remedy = "Read it with the version that wrote it (export, then start from the exported model), or give the run another name."
        raise CheckpointError("checkpoint", storage.redact(uri), f"has format {found}, not {FORMAT}.", remedy)


def find_corruption(uri: str, rank: int = 0, world: int = 1, *, deep: bool = False, limit: float = math.inf) -> str | None:
    """Compare a complete checkpoint's files with its commit marker. Returns what is wrong with the first bad file, or None.

    Args:
        rank, world: hash only the share of files of caller `rank` out of `world`. Every caller checks all sizes, which cost one listing.
        deep: compare hashes too, if the checkpoint has at most `limit` bytes.

    Raises:
        CheckpointError: the checkpoint was never completed, or has another format.
        DataError: the storage fails.
    """
    try:
        marker = read_marker(uri)
    except DamagedFileError as error:
        return str(error)
    files = marker["files"]
    sizes = {entry.name: entry.size for entry in storage.list_files(uri, ("",))}
    deep = deep and sum(size for size, _ in files.values()) <= limit
    for number, (name, (size, digest)) in enumerate(sorted(files.items())):
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != size:
            return f"{name} has {count_of(sizes[name], 'byte')}, not {size:,}"
        if deep and number % world == rank and hash_file(storage.join(uri, name)) != digest:
            return f"{name} has other content than was written (its hash differs)"
        if number % world == rank and (reason := _find_wrong_content(uri, name, marker["step"], deep)):
            return reason
    return None


def _find_wrong_content(uri: str, name: str, step: int, deep: bool) -> str | None:
    """What is wrong in a file, though it is the one that was written: in state.json of step `step` and, if `deep`, in the header of a
    safetensors file. None if nothing is."""
    try:
        if name == STATE:
            content = parse_state(storage.read_bytes(storage.join(uri, name)))
            check_format(uri, content["format"])
            check_state(content, step)
        elif deep and name.endswith(".safetensors"):
            with storage.open_read(storage.join(uri, name)) as stream:
                read_header(stream)
    except DamagedFileError as error:
        return str(error) if name == STATE else f"{name}: {error}"
    return None


def hash_file(uri: str | Path) -> str:
    """Return the xxh3_128 of a file, as hexadecimal digits."""
    state = xxhash.xxh3_128()
    with storage.open_read(uri) as stream:
        while block := stream.read(BLOCK_BYTES):
            state.update(block)
    return state.hexdigest()


def latest_valid(checkpoints: str, deep_bytes: int = DEEP_BYTES, *, on_all_ranks: bool = False) -> tuple[str | None, Corrupt]:
    """Find the newest checkpoint that is not corrupt.

    Args:
        deep_bytes: checkpoints larger than this are checked by file sizes alone, smaller ones by hashes too.
        on_all_ranks: every rank of the default group calls; they share the hashing, with a limit of `deep_bytes` for each, and return the
            same. Otherwise this process checks alone.

    Returns:
        Its URI (None if there is none), and the corrupt checkpoints that are newer.

    Raises:
        CheckpointError: the newest has another format.
        DataError: the storage fails.
    """
    rank, world = (this_rank(), world_size()) if on_all_ranks else (0, 1)
    gather: Callable[[Callable[[], Any]], list[Any]] = all_gather_or_raise if on_all_ranks else lambda work: [work()]
    corrupt: Corrupt = []
    for uri in reversed(gather(lambda: committed(checkpoints) if rank == 0 else [])[0]):
        reasons = gather(functools.partial(find_corruption, uri, rank, world, deep=True, limit=deep_bytes * world))
        reason = next(filter(None, reasons), None)
        if reason is None:
            return uri, corrupt
        corrupt.append((uri, reason))
    return None, corrupt


def require_valid(valid: str | None, corrupt: Corrupt) -> None:
    """Raise CheckpointError, which names the newest, if all checkpoints of a run are corrupt: it must not start from scratch unnoticed."""
    if valid is None and corrupt:
        uri, reason = corrupt[0]
        rule = f"is damaged ({reason}), and so are all {len(corrupt)} of the run."
        raise CheckpointError("checkpoint", storage.redact(uri), rule, "Repair the storage, or delete them to start from scratch.")


def invalidate(uri: str) -> None:
    """Rename a corrupt checkpoint's marker to commit.json.damaged: it no longer counts, and its step may be saved again."""
    with contextlib.suppress(FileNotFoundError):  # without a marker it does not count either
        storage.write_bytes(storage.join(uri, f"{COMMIT}.damaged"), storage.read_bytes(storage.join(uri, COMMIT)))
    storage.remove(storage.join(uri, COMMIT))


def prune(
    checkpoints: str, keep_last: int, keep_best: int = 0, scores: Mapping[int, float] | None = None, pending: Collection[int] = ()
) -> list[int]:
    """Delete the checkpoints that `steps_to_delete` names, marker first, and incomplete folders of older steps, left by dead attempts. One
    process calls it, at any time: a checkpoint that is being written is newer than all complete ones. Returns the steps of the deleted
    checkpoints, ascending."""
    found = find_steps(checkpoints)
    complete = [step for step, is_complete in found.items() if is_complete]
    deleted = steps_to_delete(complete, keep_last, keep_best, scores, pending)
    leftovers = [step for step, is_complete in found.items() if not is_complete and complete and step < max(complete)]
    for step in (*deleted, *sorted(leftovers)):
        uri = step_uri(checkpoints, step)
        storage.remove(storage.join(uri, COMMIT))
        storage.remove(uri)
    return deleted
