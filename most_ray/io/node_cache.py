"""Copies of remote files on each node."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import stat
import tempfile
from pathlib import Path

from most_ray.errors import ConfigError, DataError
from most_ray.io import storage
from most_ray.io.uris import expand


class NodeCache:
    """A folder with copies of remote files that never change, shared by all processes of a node.

    Open or map the path that `fetch` returns at once: above `max_bytes` the least recently used files are removed. (What is open or mapped
    stays readable.)
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory, self.max_bytes = directory, max_bytes

    def fetch(self, uri: str | Path) -> Path:
        """The path of the node's copy of `uri`, downloaded if there is none yet. A local URI is its own copy."""
        if not storage.is_remote(uri):
            return storage.local(uri)
        text = str(uri)
        digest = hashlib.sha256(text.encode()).hexdigest()[:32]
        target = self.directory / f"{digest}-{re.sub('[^A-Za-z0-9._-]', '_', storage.base_name(text))[-80:]}"
        if not _touch(target):
            # One of 256 lock files, which are never removed: one process could wait for a removed file while another locks a new one.
            with (self.directory / f".lock-{digest[:2]}").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not _touch(target):
                    storage.download(text, target)
                    self._evict(target)
        return target

    def _evict(self, keep: Path) -> None:
        """Remove the least recently used files until the rest fits into `max_bytes`; only files that a cache has written are removed."""
        files = []
        for path in self.directory.glob("[0-9a-f]" * 32 + "-*"):
            with contextlib.suppress(FileNotFoundError):  # another process has removed it
                files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        excess = sum(size for _, size, _ in files) - self.max_bytes
        for used, size, path in sorted(files):
            with contextlib.suppress(FileNotFoundError):  # another process has removed it
                if excess > 0 and path != keep and path.stat().st_mtime_ns == used:  # not used in the meantime
                    path.unlink()
                    excess -= size


def node_cache() -> NodeCache:
    """The cache of this node, by the environment variables MOST_RAY_CACHE_DIR (default: a folder in the temporary directory) and
    MOST_RAY_CACHE_GB (10^9 bytes; default 64).

    Raises:
        DataError: the directory belongs to another user, who could put other data there.
        ConfigError: MOST_RAY_CACHE_GB is not a positive number.
    """
    given, size = os.environ.get("MOST_RAY_CACHE_DIR"), os.environ.get("MOST_RAY_CACHE_GB") or "64"
    if not re.fullmatch(r"(?=.*[1-9])\d{1,9}(\.\d*)?", size):
        raise ConfigError("MOST_RAY_CACHE_GB", size, "must be a positive number of gigabytes.")
    directory = (
        Path(expand("MOST_RAY_CACHE_DIR", given)).resolve() if given else Path(tempfile.gettempdir(), f"most_ray-cache-{os.getuid()}")
    )
    with contextlib.suppress(FileExistsError):  # what exists is checked below
        directory.mkdir(mode=0o700, parents=True)
    status = directory.lstat()  # the default's name is predictable: another user could have made a link of that name
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise DataError("MOST_RAY_CACHE_DIR", str(directory), "is not a directory of this user.", "Set it to one that is.")
    if not given:
        directory.chmod(0o700)
    return NodeCache(directory, int(float(size) * 1e9))


def _touch(path: Path) -> bool:
    """Mark a file as used now. Returns whether it exists."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True
