"""The lock on a run or a sweep: one process at a time drives it, whichever command has started it, and another is refused at once.

In a local folder it is an advisory lock (flock) on `.lock`, which ends with the process, however that ends. At a URI, and where the
file system has no such locks, it is a lease: a file that the holder renews every few seconds. A holder that was killed renews no more, and
after `LEASE_S` seconds the lease is free; at once where the new process is on the holder's machine, which can see that it has gone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any, TextIO

from most_ray.errors import ConfigError, DataError
from most_ray.io import storage
from most_ray.io.json_values import parse_json
from most_ray.io.outputs import remove_empty
from most_ray.io.run_folder import RunFolder

LOCK, LEASE = ".lock", ".lease.json"  # in the run's folder, or its working copy; at its URI
LEASE_S = 60.0  # seconds after which a lease that was not renewed is free
LOST_S = 100.0  # seconds for which a lost machine's locks stay: NFS keeps them for 90
RENEW_S = 5.0  # seconds between two renewals
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # of flock on file systems without it
_HERE = f" on {socket.gethostname()}"  # ends the description of this machine's processes
logger = logging.getLogger(__name__)


class RunLock:
    """Held from its making to `close`.

    Args:
        uri: the run's or the sweep's folder.
        doing: what its holder does with it, for errors: "trained".

    Raises:
        ConfigError: another process holds it, or the folder cannot be written to.
    """

    def __init__(self, uri: str, doing: str) -> None:
        remote = storage.is_remote(uri)
        self._missing = [] if remote else [each for each in (storage.local(uri), *storage.local(uri).parents) if not each.exists()]
        self._lease: _Lease | None = None
        try:
            folder = RunFolder(uri)
            self._path = folder.local / LOCK
            self._file, supported = _lock_or_wait(self._path)
            try:
                self._mark = _mark_of(self._file, keep=remote and supported)
                if remote or not supported:
                    self._lease = _Lease(folder.at(LEASE), self._mark)
            except BaseException:  # an interrupt frees the lock too
                self._file.close()
                raise
        except _HeldError as held:
            rule, remedy = f"is being {doing} by another process.", f"Wait for it ({held}), or choose another name."
            raise ConfigError("name", storage.redact(uri), rule, remedy) from None
        except OSError as error:
            remedy = "Name a folder or URI that can be written to."
            raise ConfigError("output_dir", storage.redact(uri), f"cannot be locked ({error.strerror or error}).", remedy) from error

    def close(self) -> None:
        """Free the run. Of a folder that holds nothing else, nothing stays."""
        if self._lease:
            self._lease.close()
        else:
            with contextlib.suppress(OSError):  # while it is locked: whoever has opened it as well looks whether it is still there
                self._path.unlink()
        self._file.close()
        remove_empty(self._missing)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_held(uri: str) -> bool:
    """Whether a process drives the run in a folder now, as far as can be seen at once."""
    folder = RunFolder(uri)
    try:
        file, supported = _lock_file(folder.local / LOCK)
    except _HeldError:
        return True
    with file:
        if folder.remote or not supported:
            lease = _read(folder.at(LEASE))
            return lease is not None and time.time() - lease["time"] < LEASE_S
        (folder.local / LOCK).unlink(missing_ok=True)
        return False


class _HeldError(Exception):
    """Another process holds the lock. The message names it."""


def _lock_or_wait(path: Path) -> tuple[TextIO, bool]:
    """`_lock_file`, but where another machine holds the lock: that may be lost, and its locks on a shared file system end only with its
    lease there. Then a warning is logged, and the lock is tried for for `LOST_S` seconds."""
    until = None
    while True:
        try:
            return _lock_file(path)
        except _HeldError as held:
            if str(held).endswith(_HERE) or (until is not None and time.monotonic() >= until):
                raise
            if until is None:
                until = time.monotonic() + LOST_S
                logger.warning("%s: %s has the run; waiting up to %.0f s, in case that machine is lost", path.parent, held, LOST_S)
        time.sleep(min(1.0, RENEW_S))


def _lock_file(path: Path) -> tuple[TextIO, bool]:
    """Open and lock a file, which is made where it is missing. Returns it, and whether the file system has locks. Raises _HeldError."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return file, False
            file.seek(0)
            holder = file.read(300).partition("\n")[0].strip()
            file.close()
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise _HeldError(holder or f"a process{_HERE}") from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file, True
        file.close()  # its last holder has removed it in the meantime


def _mark_of(file: TextIO, keep: bool) -> str:
    """Write this process down in a lock's file, for those that it keeps out. Returns the mark of the file: with `keep` the one that an
    earlier holder wrote, by which a lease is known to be of a holder on this machine."""
    file.seek(0)
    known = file.read(1000).split("\n")[1:2]
    mark = known[0] if keep and known and known[0] else uuid.uuid4().hex
    file.truncate(0)
    file.write(f"{_this_process()}\n{mark}\n")
    file.flush()
    return mark


def _this_process() -> str:
    return f"process {os.getpid()}{_HERE}"


class _Lease:
    """A lease at a URI, taken and renewed by a thread. `mark`: of the lock's file on this machine, which this process has locked."""

    def __init__(self, uri: str, mark: str) -> None:
        self._uri, self._mark, self._id = uri, mark, uuid.uuid4().hex
        self._count, self._ended = 0, threading.Event()
        _wait_until_free(uri, mark)
        self._renew()
        if (found := _read(uri)) and found["id"] != self._id:  # another has taken it at the same moment
            raise _HeldError(found["holder"])
        self._thread = threading.Thread(target=self._keep, name="run-lease", daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        self._count += 1
        content = {"id": self._id, "holder": _this_process(), "mark": self._mark, "time": round(time.time(), 3), "count": self._count}
        storage.write_bytes(self._uri, json.dumps(content).encode())

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_S):
            try:
                if (found := _read(self._uri)) and found["id"] != self._id:
                    text = "%s: another process has taken the run over (%s); checkpoints of this one are no longer committed"
                    logger.error(text, storage.redact(self._uri), found["holder"])
                    return
                self._renew()
            except (OSError, DataError) as error:  # the next renewal may succeed in time
                logger.warning("the lease on the run could not be renewed: %s", error)

    def close(self) -> None:
        """End the renewals and remove the lease, unless it is another's by now."""
        self._ended.set()
        self._thread.join()
        try:
            if (found := _read(self._uri)) and found["id"] == self._id:
                storage.remove(self._uri)
        except (OSError, DataError) as error:  # it ends by itself
            logger.warning("the lease on the run could not be removed: %s", error)


def _wait_until_free(uri: str, mark: str) -> None:
    """Return where a lease is free. One that may be a killed process's is watched, for at most `LEASE_S` seconds in all; one that is
    renewed meanwhile raises _HeldError. No two machines' clocks are compared, but for leases that are hours old."""
    first = _read(uri)
    # Whoever holds the lock's file on this machine knows that the holder with the same file has gone.
    if first is None or first["mark"] == mark or time.time() - first["time"] > 60 * LEASE_S:
        return
    text = "%s: %s has the run; waiting up to %.0f s for its next sign of life"
    logger.warning(text, storage.redact(uri), first["holder"], LEASE_S)
    until = time.monotonic() + LEASE_S
    while time.monotonic() < until:
        time.sleep(min(1.0, RENEW_S))
        found = _read(uri)
        if found is None:
            return
        if (found["id"], found["count"]) != (first["id"], first["count"]):
            raise _HeldError(found["holder"])


def _read(uri: str) -> dict[str, Any] | None:
    """A lease; None where there is none, or one that cannot be read, which is not renewed."""
    try:
        content = storage.read_bytes(uri)
    except FileNotFoundError:
        return None
    try:
        found = parse_json(content)
        return {**{key: str(found[key]) for key in ("id", "holder", "mark", "count")}, "time": float(found["time"])}
    except (ValueError, KeyError, TypeError):
        return None
