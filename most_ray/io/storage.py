"""Reads and writes files and folders on local or shared paths and at remote URIs; transient failures are retried.

What a URI is, says `uris`; its functions are available here too (`storage.join`, `storage.is_remote`, ...). Credentials and endpoints come
from the environment, which must be equal on every node. Unless a function says otherwise, a missing file raises FileNotFoundError;
refused credentials, missing buckets, unknown schemes and failures that last raise DataError.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
from pyarrow import fs

from most_ray.errors import DataError, nearest
from most_ray.io.outputs import made_folder, named
from most_ray.io.retries import with_retries
from most_ray.io.uris import (  # noqa: F401
    ARROW_SCHEMES,
    absolute,
    base_name,
    is_remote,
    join,
    local,
    located,
    parent,
    redact,
    relative_to,
    split,
)
from most_ray.io.waits import waiting_for

T = TypeVar("T")
SMALL = 64 << 20  # bytes of the largest file that people write, or that describes others
_CHUNK = 4 << 20  # bytes of a range request, which takes tens of milliseconds whatever its length
_FLUSH = 16  # chunks between two flushes: pyarrow queues uploads without bound
# Fields of fsspec's listings that change when a file does.
_STAMPS = ("mtime", "LastModified", "last_modified", "updated", "created", "ETag", "etag", "md5Hash", "checksum", "sha256", "oid")


@dataclass(frozen=True)
class Entry:
    """One file of a listing."""

    uri: str  # full path or URI, with the credentials of the listed root: show it through `redact` only
    name: str  # relative to the listed root, with "/"; the base name where the root is a file itself
    size: int  # bytes
    stamp: str  # changes when the file changes (modification time for object stores through pyarrow, whole seconds with S3)


def absolute_if_exists(uri: str) -> str:
    """The absolute form of a URI that exists; anything else is returned unchanged, since it may be a model's name on a hub."""
    return absolute(uri) if exists(uri) else uri


def exists(uri: str | Path) -> bool:
    """Whether a file or a folder exists. Object stores have no empty folders."""
    if is_remote(uri):
        return _remote(str(uri), lambda system, path: system.get_file_info(path).type != fs.FileType.NotFound)
    return with_retries(local(uri).exists, str(uri))


def list_files(root: str, suffixes: tuple[str, ...]) -> list[Entry]:
    """List the files below `root` (or `root` itself) whose names end in one of `suffixes`, sorted by name, without hidden ones (".name").

    Raises:
        DataError: `root` does not exist, or a file has a name that could lead elsewhere.
    """
    if not exists(root):
        raise DataError("directory", redact(root), "does not exist.", "Check the path.")
    found = _remote(root, _list_remote) if is_remote(root) else with_retries(lambda: _list_local(local(root), suffixes), root)
    hidden = re.compile(r"(^|/)\.(?!\.?(/|$))")  # "." and ".." do not count as hidden: `join` refuses them
    return [
        Entry(join(root, name) if name else root, name or base_name(root), size, stamp)
        for name, size, stamp in sorted(found)
        if (name or base_name(root)).endswith(suffixes) and not hidden.search(name)
    ]


def open_read(uri: str | Path) -> BinaryIO:
    """Open a file for reading, buffered and seekable. A remote file is read by ranges; a range that fails is read again. Raises DataError
    where it is a pipe, a socket or a device."""
    if is_remote(uri):
        return cast(BinaryIO, io.BufferedReader(_Reader(str(uri)), _CHUNK))
    return with_retries(lambda: _open_regular(local(uri)), str(uri))


def _open_regular(path: Path) -> BinaryIO:
    """Open a local file for reading; at once, where reading a pipe could block and reading a device could have no end."""
    try:
        stream = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY))  # noqa: SIM115
    except OSError as error:
        if error.errno not in (errno.ENXIO, errno.ENODEV):  # as sockets have
            raise
        raise _odd(path) from None
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise _odd(path)
    return stream


def _odd(path: Path) -> DataError:
    return DataError("file", str(path), "is not a regular file.", "Name a file that holds what is read, or move this one away.")


def read_bytes(uri: str | Path) -> bytes:
    """The content of a file. Raises DataError where it is a pipe, a socket or a device."""
    return _read(uri, -1)


def read_small(uri: str | Path, most: int = SMALL) -> bytes:
    """The content of a file that people write, or that describes others, which has at most `most` bytes. Raises DataError where it has
    more, or is a pipe, a socket or a device."""
    content = _read(uri, most + 1)
    if len(content) > most:
        rule = f"has more than {most >> 20} MiB, which no file of its kind has." if most >> 20 else f"has more than {most} bytes."
        raise DataError("file", redact(str(uri)), rule, "Check that it is the right file.")
    return content


def _read(uri: str | Path, size: int) -> bytes:
    """The first `size` bytes of a file, all of them if `size` is -1."""
    if is_remote(uri):
        with open_read(uri) as stream:
            return stream.read(size)

    def read() -> bytes:
        with _open_regular(local(uri)) as stream:
            return stream.read(size)

    return with_retries(read, str(uri))


def write_bytes(uri: str | Path, data: bytes) -> None:
    """Create or replace a file; readers see the old content or the new. Missing folders are created."""
    if is_remote(uri):
        return _upload(str(uri), lambda: io.BytesIO(data), len(data))
    path = local(uri)

    def write() -> None:
        with made_folder(path.parent), _replacing(path, f".{secrets.token_hex(8)}.tmp") as temporary:
            temporary.write_bytes(data)

    return with_retries(write, str(path))


@contextlib.contextmanager
def _replacing(path: Path, name: str) -> Iterator[Path]:
    """A temporary file called `name` beside `path`, which replaces it at the end unless there was an error. Raises DataError where `path`
    is a device, a pipe or a socket."""
    temporary = path.with_name(name)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise DataError("file", str(path), "is not a regular file.", "Move it away.")
    try:
        with named(path):
            yield temporary
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def publish(folder: Path, uri: str, last: str) -> None:
    """Move a finished local folder to a local URI, or copy it to a remote one. `uri` counts as complete when it contains the file `last`.

    Where `uri` is complete already, another process has written the same content, which is kept. A local folder is renamed (within one
    file system) and is gone afterwards in either case; to a remote URI `last` is copied after all other files.

    Raises:
        DataError: a local folder `uri` exists without `last`.
    """
    if not (folder / last).is_file() and not exists(join(uri, last)):
        raise FileNotFoundError(errno.ENOENT, "No such file", str(folder / last))
    if not is_remote(uri):
        return with_retries(lambda: _rename(folder, local(uri), last), uri)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / last)
    for file in [] if exists(join(uri, last)) else [*files, folder / last]:
        _upload(join(uri, file.relative_to(folder).as_posix()), functools.partial(io.FileIO, file, "rb"), file.stat().st_size)


def download(uri: str, target: Path) -> None:
    """Copy a remote file to the local file `target`, which appears when it is complete."""
    _remote(uri, lambda system, path: _download(system, path, target))


def remove(uri: str | Path) -> None:
    """Remove a file, or a folder with its content, if it exists.

    Raises:
        DataError: `uri` is a whole bucket or file system.
    """
    text = str(uri)
    if not (split(text)[1] if is_remote(uri) else local(uri).absolute().name):
        raise DataError("path", redact(text), "is a whole bucket or file system.", "Name what to remove in it.")
    with contextlib.suppress(FileNotFoundError):
        if is_remote(uri):
            _remote(text, lambda system, path: (system.delete_file if system.get_file_info(path).is_file else system.delete_dir)(path))
        else:
            path = local(uri)
            with_retries(lambda: shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(), text)


class _Reader(io.RawIOBase):
    """A remote file, read by ranges and opened again after an error."""

    def __init__(self, uri: str) -> None:
        self._uri, self._position, self._file = uri, 0, None
        self._size: int = self._retry(lambda file: file.size())

    def _retry(self, operation: Callable[[Any], T]) -> T:
        def attempt() -> T:
            try:
                if self._file is None:
                    system, path = _filesystem(self._uri)
                    self._file = system.open_input_file(path)
                return operation(self._file)
            except Exception:  # of any kind: the next try opens the file again
                self._file = None
                raise

        return with_retries(attempt, self._uri)

    def readable(self) -> bool:
        return True

    seekable = readable

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = max(0, offset + (0, self._position, self._size)[whence])
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._size - self._position))

        def read(file: Any) -> bytes:
            if data := file.read_at(wanted, self._position):
                return cast(bytes, data)
            raise OSError(errno.EIO, "the file ends before its size")

        data = self._retry(read) if wanted else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def readall(self) -> bytes:
        # The inherited method would request 8 KiB at a time.
        rest, filled = bytearray(max(0, self._size - self._position)), 0
        while filled < len(rest):
            filled += self.readinto(memoryview(rest)[filled : filled + _FLUSH * _CHUNK])
        return bytes(rest)


def _remote(uri: str, operation: Callable[[Any, str], T]) -> T:
    """`operation(file system, path)` for a remote URI, with retries."""
    try:
        with waiting_for(uri):
            return with_retries(lambda: operation(*_filesystem(uri)), uri)
    except NotImplementedError as error:  # fsspec's, as of writing over http
        rule = f"is of a kind of storage, {split(uri)[0].partition(':')[0]}://, that cannot do this."
        raise DataError("path", redact(uri), rule, "Name a folder on a disk or in an object store.") from error


def _filesystem(uri: str) -> tuple[Any, str]:
    """pyarrow's file system of a remote URI, and the path of the URI in it."""
    root, key, options = split(uri)
    scheme = root.partition(":")[0]
    if scheme in ("gs", "gcs"):
        options = options or "?retry_limit_seconds=30"  # pyarrow itself would try for 15 minutes
    try:
        if scheme in ARROW_SCHEMES:
            if {".", ".."} & set(key.split("/")) or "//" in key:  # an HTTP client would resolve these, even into another bucket
                raise ValueError('it has a part that is empty, "." or ".."')
            with contextlib.suppress(NotImplementedError):  # pyarrow was built without this scheme: fsspec is tried
                system, base = _arrow_filesystem(root, options, os.getpid(), *sorted(os.environ.items()))
                return system, (base + key).rstrip("/") or "/"
        system, path = fsspec.core.url_to_fs(uri)
        return fs.PyFileSystem(fs.FSSpecHandler(system)), path
    except ImportError as error:
        raise DataError("path", redact(uri), f"needs a package for {scheme}://.", f"{error}.") from error
    except ValueError as error:
        if "Protocol not known" not in str(error):
            raise DataError("path", redact(uri), f"cannot be used ({redact(str(error))}).", "Check it.") from None
        known = nearest(scheme, [*ARROW_SCHEMES, "file", "memory", "http", "https"])
        raise DataError("path", redact(uri), f"has the unknown scheme {scheme}://.", known) from None


@functools.lru_cache(maxsize=32)
def _arrow_filesystem(root: str, options: str, *_settings: object) -> tuple[Any, str]:
    """pyarrow's file system and the prefix of its keys. `_settings` (process and environment) make a new one after a fork or a change."""
    # `from_uri` respects AWS_ENDPOINT_URL, which `S3FileSystem()` does not; but it decodes keys and refuses some, so it is given "-".
    system, path = fs.FileSystem.from_uri(f"{root}/-{options}")
    return system, path.removesuffix("-")


def _list_local(root: Path, suffixes: tuple[str, ...]) -> list[tuple[str, int, str]]:
    """Name (relative to `root`, "" for `root` itself), size and stamp of each file. Links to folders are followed, each folder once."""

    def fail(error: OSError) -> None:
        raise error

    names, seen = [""] if root.is_file() else [], set()
    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True) if not names else ():
        real = os.path.realpath(folder)
        new = real not in seen  # links may form a cycle
        seen.add(real)
        folders[:] = sorted(name for name in folders if new and not name.startswith("."))
        names.extend(os.path.relpath(os.path.join(folder, name), root) for name in files if new and name.endswith(suffixes))
    stats = [(name, (root / name).stat()) for name in names]
    odd = next((name for name, status in stats if not stat.S_ISREG(status.st_mode)), None)
    if odd is not None:
        raise _odd(root / odd)
    return [(name, status.st_size, f"{status.st_mtime_ns}-{status.st_ino}") for name, status in stats]


def _list_remote(system: Any, path: str) -> list[tuple[str, int, str]]:
    """Name (relative to `path`, "" for `path` itself), size and stamp of each file."""
    if isinstance(system, fs.PyFileSystem):
        system.handler.fs.invalidate_cache()
        found = system.handler.fs.find(path, detail=True)
        rows = [(name, info["size"] or 0, " ".join(str(info[key]) for key in _STAMPS if key in info)) for name, info in found.items()]
    else:
        info = system.get_file_info(path)
        infos = [info] if info.is_file else system.get_file_info(fs.FileSelector(path, recursive=True))
        rows = [(info.path, info.size, str(info.mtime_ns)) for info in infos if info.is_file]
    root = path.strip("/")
    return [(name.strip("/")[len(root) :].lstrip("/"), size, stamp) for name, size, stamp in rows]


def _upload(uri: str, open_source: Callable[[], BinaryIO], size: int) -> None:
    """Write `size` bytes of a source, opened again for each try, to a remote URI."""

    def put(system: Any, path: str) -> None:
        if system.type_name not in ("s3", "gcs", "abfs"):  # object stores have no folders
            system.create_dir(path.rpartition("/")[0] or "/", recursive=True)
        with open_source() as source:
            target = system.open_output_stream(path, compression=None)  # by default ".gz" would be compressed once more
            for count, chunk in enumerate(iter(lambda: source.read(_CHUNK), b""), 1):
                target.write(chunk)
                if count % _FLUSH == 0:
                    target.flush()
            target.close()  # not by `with`, which would complete the upload after an error
        if system.get_file_info(path).size != size:
            raise OSError(errno.EIO, "the uploaded file has another size")

    _remote(uri, put)


def _download(system: Any, path: str, target: Path) -> None:
    """Copy a file of a file system to `target`."""
    with _replacing(target, f".{target.name}") as partial:
        size = system.get_file_info(path).size
        with system.open_input_stream(path, compression=None) as source, partial.open("wb") as sink:
            shutil.copyfileobj(source, sink, _CHUNK)
        if size is not None and partial.stat().st_size != size:
            raise OSError(errno.EIO, f"{partial.stat().st_size} of {size} bytes came")


def _rename(folder: Path, target: Path, last: str) -> None:
    """Move `folder` to `target` unless that contains `last`; `folder` is gone afterwards."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if folder.resolve() == target.resolve():
        return
    if not (target / last).is_file():
        try:
            folder.rename(target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            if not (target / last).is_file():
                raise DataError("directory", str(target), f"exists, but without {last}.", "Remove it, or choose another.") from None
    shutil.rmtree(folder, ignore_errors=True)
