"""What a node is asked before anything is started on it. Runs in the driver, or as a task on each node of a cluster."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import resource
import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import most_ray
from most_ray.errors import DataError
from most_ray.io import storage

LIBRARIES = ("ray", "torch", "transformers", "numpy", "pyarrow")


@dataclass(frozen=True)
class Probe:
    """mark: what the driver has written to `.probe-MARK` in each of `writes`, with the same text in it. reads: what must be there.
    Both by the name of the setting that they come from."""

    mark: str
    writes: tuple[tuple[str, str], ...] = ()
    reads: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Trouble:
    """A place that fails on a node. `missing`: the driver has it, this node does not."""

    field: str
    uri: str
    rule: str
    missing: bool = False


@dataclass(frozen=True)
class NodeReport:
    """host: its name. time: its clock, UNIX seconds. open_files: how many a process may have (negative: no limit)."""

    host: str
    versions: dict[str, str]
    time: float
    open_files: int
    troubles: tuple[Trouble, ...] = ()


def examine(probe: Probe) -> NodeReport:
    """Everything that `probe` asks, tried here. Never raises for what it finds."""
    troubles = [_write(name, uri, probe.mark) for name, uri in probe.writes] + [_read(name, uri) for name, uri in probe.reads]
    return NodeReport(
        host=socket.gethostname(),
        versions=versions(),
        time=time.time(),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        troubles=tuple(trouble for trouble in troubles if trouble),
    )


@functools.cache
def versions() -> dict[str, str]:
    """Of Python, of the libraries that must be alike on all nodes (without loading them), and a hash of this package's own files."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    root, content = Path(most_ray.__file__).parent, hashlib.blake2b(digest_size=6)
    for path in sorted(root.rglob("*.py")):
        content.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return {**found, "most_ray": content.hexdigest()}


def leave_mark(uri: str, mark: str) -> None:
    """Write the driver's mark, which every node then looks for."""
    storage.write_bytes(storage.join(uri, f".probe-{mark}"), mark.encode())


def remove_mark(uri: str, mark: str) -> None:
    storage.remove(storage.join(uri, f".probe-{mark}"))


def _write(name: str, uri: str, mark: str) -> Trouble | None:
    """The driver's mark is seen, and a file of this node's can be written, renamed, read back and removed."""
    try:
        if not storage.is_remote(uri) and not os.path.isdir(storage.local(uri)):
            return Trouble(name, uri, "is not there", missing=True)  # and is not made: it would be this node's own
        if storage.read_bytes(storage.join(uri, f".probe-{mark}")) != mark.encode():
            return Trouble(name, uri, "reads other bytes than were written")
    except FileNotFoundError:
        return Trouble(name, uri, "is another folder than the driver's", missing=True)
    except (OSError, DataError) as error:
        return Trouble(name, uri, _reason(error, "read"))
    own = storage.join(uri, f".probe-{mark}-{uuid.uuid4().hex[:8]}")
    text = os.urandom(4096)
    try:
        storage.write_bytes(own, text)
        if not storage.is_remote(uri):  # object stores are never asked to rename
            os.replace(storage.local(own), storage.local(own + "-renamed"))
            own += "-renamed"
        back = storage.read_bytes(own)
        storage.remove(own)
    except (OSError, DataError) as error:
        return Trouble(name, uri, _reason(error, "written to"))
    return None if back == text else Trouble(name, uri, "reads other bytes than were written")


def _read(name: str, uri: str) -> Trouble | None:
    """A folder's first file, or the file, can be opened and read."""
    try:
        if not storage.exists(uri):
            return Trouble(name, uri, "is not there", missing=True)
        if storage.is_remote(uri):
            return None if storage.list_files(uri, ("",)) else Trouble(name, uri, "is empty", missing=True)
        local = storage.local(uri)
        if local.is_dir() and not any(local.iterdir()):  # as where a file system is not mounted
            return Trouble(name, uri, "is empty", missing=True)
        first = next((path for path in sorted(local.iterdir()) if path.is_file()), None) if local.is_dir() else local
        if first is not None:
            with first.open("rb") as stream:
                stream.read(4096)
    except (OSError, DataError) as error:
        return Trouble(name, uri, _reason(error, "read"))
    return None


def _reason(error: OSError | DataError, what: str) -> str:
    return error.rule.rstrip(".") if isinstance(error, DataError) else f"cannot be {what} ({error.strerror or error})"
