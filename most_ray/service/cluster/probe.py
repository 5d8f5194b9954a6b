"""Checks of one node before anything is started on it: storage, data, versions, clock and limits. Run in the driver and, as a task, on
each node of a cluster."""

from __future__ import annotations

import functools
import hashlib
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
from most_ray.io.outputs import failure_rule
from most_ray.runs.environment import version_of

LIBRARIES = ("ray", "torch", "transformers", "numpy", "pyarrow")  # whose versions are compared between nodes


@dataclass(frozen=True)
class Probe:
    """What to check on a node. URIs stand with the name of the setting that they come from."""

    marker: str  # the driver has written this text to `.probe-MARKER` in each of `writes`
    writes: tuple[tuple[str, str], ...] = ()  # (setting, URI) of folders that the run writes to
    reads: tuple[tuple[str, str], ...] = ()  # (setting, URI) of files and folders that the run reads


@dataclass(frozen=True)
class UriProblem:
    """A path or URI that cannot be used on a node."""

    field: str  # the setting that names it
    uri: str
    rule: str  # what is wrong, as the end of a sentence
    missing: bool = False  # the driver has it, this node does not


@dataclass(frozen=True)
class NodeReport:
    """The results of a probe on one node."""

    host: str
    versions: dict[str, str]  # see `versions`
    time: float  # of the node's clock, UNIX seconds
    open_files: int  # limit of a process; negative: none
    problems: tuple[UriProblem, ...] = ()


def run_probe(probe: Probe) -> NodeReport:
    """Make all checks of a probe on this machine. Problems are returned, not raised."""
    found = [_check_writable(name, uri, probe.marker) for name, uri in probe.writes]
    found += [_check_readable(name, uri) for name, uri in probe.reads]
    open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return NodeReport(socket.gethostname(), versions(), time.time(), open_files, tuple(problem for problem in found if problem))


@functools.cache
def versions() -> dict[str, str]:
    """The versions that must be equal on all nodes, by name: Python, the libraries (read without loading them), and a hash of this
    package's source files."""
    root, content = Path(most_ray.__file__).parent, hashlib.blake2b(digest_size=6)
    for path in sorted(root.rglob("*.py")):
        content.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    libraries = {name: version_of(name) or "missing" for name in LIBRARIES}
    return {"python": ".".join(platform.python_version_tuple()[:2]), **libraries, "most_ray": content.hexdigest()}


def write_marker(uri: str, marker: str) -> None:
    """Write the driver's marker to a folder, where every node then looks for it."""
    storage.write_bytes(storage.join(uri, f".probe-{marker}"), marker.encode())


def remove_marker(uri: str, marker: str) -> None:
    storage.remove(storage.join(uri, f".probe-{marker}"))


def _check_writable(name: str, uri: str, marker: str) -> UriProblem | None:
    """The problem with a folder, unless it holds the driver's marker and this node can write, rename, read and remove a file there."""
    try:
        if not storage.is_remote(uri) and not os.path.isdir(storage.local(uri)):
            return UriProblem(name, uri, "is not there", missing=True)  # it is not created: it would be on this node's own disk
        if storage.read_bytes(storage.join(uri, f".probe-{marker}")) != marker.encode():
            return UriProblem(name, uri, "reads other bytes than were written")
    except FileNotFoundError:
        return UriProblem(name, uri, "is another folder than the driver's", missing=True)
    except (OSError, DataError) as error:
        return UriProblem(name, uri, failure_rule(error, "read"))
    own, content = storage.join(uri, f".probe-{marker}-{uuid.uuid4().hex[:8]}"), os.urandom(4096)
    try:
        storage.write_bytes(own, content)
        if not storage.is_remote(uri):  # nothing is ever renamed in an object store
            os.replace(storage.local(own), storage.local(own + "-renamed"))
            own += "-renamed"
        found = storage.read_bytes(own)
        storage.remove(own)
    except (OSError, DataError) as error:
        return UriProblem(name, uri, failure_rule(error, "written to"))
    return None if found == content else UriProblem(name, uri, "reads other bytes than were written")


def _check_readable(name: str, uri: str) -> UriProblem | None:
    """The problem with a file or folder, unless the file, or the folder's first file, can be opened and read."""
    try:
        if not storage.exists(uri):
            return UriProblem(name, uri, "is not there", missing=True)
        if storage.is_remote(uri):
            return None if storage.list_files(uri, ("",)) else UriProblem(name, uri, "is empty", missing=True)
        local = storage.local(uri)
        if local.is_dir() and not any(local.iterdir()):  # the mount point of a file system that is not mounted
            return UriProblem(name, uri, "is empty", missing=True)
        first = next((path for path in sorted(local.iterdir()) if path.is_file()), None) if local.is_dir() else local
        if first is not None:
            with first.open("rb") as stream:
                stream.read(4096)
    except (OSError, DataError) as error:
        return UriProblem(name, uri, failure_rule(error, "read"))
    return None
