"""Places: files and folders on a local or shared path or behind a URI, tried again when an operation fails for the moment.

A place is a path, `file://...` or `scheme://authority/key[?options]`; keys are taken as written (no percent-encoding), options are those
of pyarrow (`?region=...`). Credentials and endpoints come from the environment, which must be the same on every node. What is missing
raises FileNotFoundError unless said otherwise; refused credentials, missing buckets, unknown schemes and errors that last raise DataError.

Over 400 lines on purpose: every way to a file goes through one retry and one redaction, which stand here once.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import logging
import os
import random
import re
import secrets
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import unquote

import fsspec
from pyarrow import fs

from most_ray.errors import DataError, nearest

T = TypeVar("T")
TRIES = 5
FIRST_WAIT = 0.5  # seconds, doubled after each try
_CHUNK = 4 << 20  # bytes: a range request costs tens of milliseconds whatever its length
_FLUSH = 16  # chunks between two flushes: pyarrow queues uploads without bound
_ARROW = ("s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss")
_STAMPS = ("mtime", "LastModified", "last_modified", "updated", "created", "ETag", "etag", "md5Hash", "checksum", "sha256", "oid")
_PLACE = re.compile(r"([A-Za-z][\w+.-]*)(://[^/?]*)/*(.*?)/*(\?[\w.-]+=.*)?", re.DOTALL)
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError, io.UnsupportedOperation)
_TRANSIENT = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EREMOTEIO, errno.ENOTCONN, errno.ENETRESET}
_TRANSIENT |= {errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH}
_LIBRARIES = ("aiohttp", "azure", "botocore", "gcsfs", "google", "http", "requests", "urllib3")  # whose own errors fsspec passes on
_DENIED = (
    "may not be used with these credentials.",
    "Check them (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, ...) on every node.",
)
_REFUSALS = {  # what errors without an errno say, the rule and the remedy
    r"AWS Error (\w*ACCESS_DENIED|INVALID_ACCESS_KEY_ID|\w*SIGNATURE\w*|\w*TOKEN\w*|UNRECOGNIZED_CLIENT)": _DENIED,
    r"HTTP status 40[13]\b|Status\((PERMISSION_DENIED|UNAUTHENTICATED)|OAuth2 access token": _DENIED,
    r"AWS Error NO_SUCH_BUCKET|^Bucket '.*' not found|specified (bucket|container) does not exist": (
        "names a bucket that does not exist.",
        "Create it, or check its name, the region and AWS_ENDPOINT_URL.",
    ),
    r"AWS Error VALIDATION": ("has a malformed bucket name or endpoint.", "Check the place and AWS_ENDPOINT_URL (http://host:port)."),
    r"libjvm|libhdfs": ("needs Java and Hadoop's libhdfs.", "Install both and set JAVA_HOME, HADOOP_HOME and CLASSPATH."),
}
_random = random.SystemRandom()  # jitter must not draw from a generator that a run has seeded
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One file of a listing. Its place holds the credentials that the listed root held: show it through `redact` only."""

    uri: str  # full path or URI
    name: str  # relative to the listed root, with "/"; the base name where the root is a file itself
    size: int  # bytes
    stamp: str  # changes when the file changes (object stores behind pyarrow: modification time, by the second with S3)


def redact(text: str) -> str:
    """`text` with the user parts and the options of all URIs in it blotted out."""
    text = re.sub(r"://(?:[^/@:\s]*:[^\s'\"]*|[^/@\s'\"]*)@", "://***@", text)
    return re.sub(r"\?[\w.-]+=[^\s'\"]*", "?***", text)


def with_retries(operation: Callable[[], T], what: str) -> T:
    """`operation()`, tried up to 5 times, 0.5, 1, 2 and 4 s (and up to half as much again) apart, while its errors may pass.

    `what` is a place, or says otherwise what is being done.

    Raises:
        DataError: all tries failed, or a remote place refuses for good.
        OSError: one that no further try mends (missing, not permitted, disk full).
    """
    tries = 0
    while True:
        try:
            return operation()
        except Exception as error:  # each file system has its own: judged below, and raised again where nothing here knows better
            tries += 1
            shown = redact(str(error))
            reason = (shown.strip().splitlines() or [""])[0][:300] or type(error).__name__
            cause = error if shown == str(error) else None  # a traceback would show what the message hides
            if isinstance(error, FileNotFoundError) and cause is None:
                raise FileNotFoundError(errno.ENOENT, "No such file", redact(what)) from None
            refusal = _refusal(error, what)
            if not refusal and not _is_transient(error):
                raise
            if not refusal and tries == TRIES:
                refusal = (f"failed after {TRIES} tries ({reason}).", "Check the network, the endpoint and the server, then run it again.")
            if refusal:
                raise DataError("storage", redact(what), *refusal) from cause
        wait = FIRST_WAIT * 2 ** (tries - 1) * _random.uniform(1.0, 1.5)
        _logger.warning("%s: try %d of %d failed (%s), the next in %.1f s", redact(what), tries, TRIES, reason, wait)
        sleep(wait)


def is_remote(uri: str | Path) -> bool:
    """Whether a place has a scheme other than file://."""
    match = _PLACE.fullmatch(uri) if isinstance(uri, str) else None
    return match is not None and match[1].lower() != "file"


def local(uri: str | Path) -> Path:
    """The path of a local place. Raises DataError for a remote one, also where a Path has taken a slash from its scheme."""
    text = str(uri)
    if is_remote(text) or re.match(rf"({'|'.join(_ARROW)}|memory):/", text):
        raise DataError("path", redact(text), "is not a local place.", "Give a path; keep URIs as text.")
    return Path(unquote(re.sub("(?i)^file://(localhost(?=/))?", "", text)) if text.lower().startswith("file://") else text)


def join(uri: str, *names: str) -> str:
    """A place below `place`; names may hold "/". Raises DataError for one that could lead elsewhere ("..", "/x", "a//b", "?a=b")."""
    for name in names:
        if {"", ".", ".."} & set(name.split("/")) or "\0" in name or (is_remote(uri) and re.search(r"\?[\w.-]+=", name)):
            raise DataError("name", redact(name), "is not a plain name of a file below its folder.", "Rename the file.")
    if not is_remote(uri):
        return str(local(uri).joinpath(*names))
    root, key, options = _parts(uri)
    return "/".join(part for part in (root, key, *names) if part) + options


def absolute(uri: str | Path) -> str:
    """The place in a form that means the same in another process, whatever its working directory."""
    return str(uri) if is_remote(uri) else str(local(uri).absolute())


def absolute_if_exists(uri: str) -> str:
    """The same for what exists; anything else is left as it is, for it may be a name on a hub."""
    return absolute(uri) if exists(uri) else uri


def parent(uri: str) -> str:
    """The folder that a place lies in."""
    if not is_remote(uri):
        return str(local(uri).parent)
    root, key, options = _parts(uri)
    return "/".join(part for part in (root, *key.split("/")[:-1]) if part) + options


def base_name(uri: str) -> str:
    """The last part of a place."""
    return _base_name(uri) if is_remote(uri) else local(uri).name


def exists(uri: str | Path) -> bool:
    """Whether a file or a folder is there. (Object stores have no empty folders.)"""
    if is_remote(uri):
        return _remote(str(uri), lambda system, path: system.get_file_info(path).type != fs.FileType.NotFound)
    return with_retries(local(uri).exists, str(uri))


def list_files(root: str, suffixes: tuple[str, ...]) -> list[Entry]:
    """The files below `root`, or `root` itself, whose names end in one of `suffixes`, sorted by name, without hidden ones (".name").

    Raises DataError where nothing is there, or where a file has a name that could lead elsewhere.
    """
    if not exists(root):
        raise DataError("directory", redact(root), "does not exist.", "Check the path.")
    found = _remote(root, _list_remote) if is_remote(root) else with_retries(lambda: _list_local(local(root), suffixes), root)
    entries = []
    for name, size, stamp in sorted(found):
        shown = name or _base_name(root)
        hidden = re.search(r"(^|/)\.(?!\.?(/|$))", name)  # "." and ".." are not hidden: `join` complains of them
        if shown.endswith(suffixes) and not hidden:
            entries.append(Entry(join(root, name) if name else root, shown, size, stamp))
    return entries


def open_read(uri: str | Path) -> BinaryIO:
    """A file, buffered and seekable; a remote one is read by ranges, each of which is tried again when it fails."""
    if is_remote(uri):
        return cast(BinaryIO, io.BufferedReader(_Reader(str(uri)), _CHUNK))
    return with_retries(lambda: local(uri).open("rb"), str(uri))


def read_bytes(uri: str | Path) -> bytes:
    """A whole file."""
    if not is_remote(uri):
        return with_retries(local(uri).read_bytes, str(uri))
    with open_read(uri) as stream:
        return stream.read()


def write_bytes(uri: str | Path, data: bytes) -> None:
    """Make or replace a file: readers see the old bytes or the new ones. Missing folders are made."""
    if is_remote(uri):
        return _upload(str(uri), lambda: io.BytesIO(data), len(data))
    path = local(uri)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    return with_retries(write, str(path))


def publish(folder: Path, uri: str, last: str) -> None:
    """Bring a finished local folder to its place. Where `last` stands there already, another process has made the same: that stays.

    A local place takes the folder itself by renaming (on one filesystem): it is gone afterwards in any case. A remote place takes copies,
    `last` after all others as the mark of completeness. Raises DataError where a local place exists without `last`.
    """
    if not (folder / last).is_file() and not exists(join(uri, last)):
        raise FileNotFoundError(errno.ENOENT, "No such file", str(folder / last))
    if not is_remote(uri):
        return with_retries(lambda: _rename(folder, local(uri), last), uri)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path != folder / last)
    for name in [] if exists(join(uri, last)) else [*names, last]:
        source = folder / name
        _upload(join(uri, name), functools.partial(io.FileIO, source, "rb"), source.stat().st_size)


def download(uri: str, target: Path) -> None:
    """A remote file as the local file `target`, whole or not at all."""
    _remote(uri, lambda system, path: _download(system, path, target))


def remove(uri: str | Path) -> None:
    """Remove a file, or a folder with all that is in it; a missing one is fine. Raises DataError for a whole bucket or file system."""
    text = str(uri)
    if not (_parts(text)[1] if is_remote(uri) else local(uri).absolute().name):
        raise DataError("path", redact(text), "is a whole bucket or file system.", "Name what to remove in it.")
    with contextlib.suppress(FileNotFoundError):
        if is_remote(uri):
            _remote(text, lambda system, path: (system.delete_file if system.get_file_info(path).is_file else system.delete_dir)(path))
        else:
            path = local(uri)
            with_retries(lambda: shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(), text)


class _Reader(io.RawIOBase):
    """A remote file by ranges, opened anew after an error."""

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
            except Exception:  # whatever it was: the next try opens the file anew
                self._file = None
                raise

        return with_retries(attempt, self._uri)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = max(0, offset + (0, self._position, self._size)[whence])
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._size - self._position))

        def read(file: Any) -> bytes:
            data: bytes = file.read_at(wanted, self._position)
            if not data:
                raise OSError(errno.EIO, "the file ends before its size")
            return data

        data = self._retry(read) if wanted else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def readall(self) -> bytes:
        # The inherited one would ask for 8 KiB at a time.
        rest, filled = bytearray(max(0, self._size - self._position)), 0
        while filled < len(rest):
            filled += self.readinto(memoryview(rest)[filled : filled + _FLUSH * _CHUNK])
        return bytes(rest)


def _is_transient(error: Exception) -> bool:
    if isinstance(error, OSError):  # pyarrow's remote errors have no errno, those of name resolution a negative one
        passing = error.errno is None or error.errno < 0 or error.errno in _TRANSIENT or isinstance(error, (ConnectionError, TimeoutError))
        return passing and not isinstance(error, _FINAL)
    return type(error).__module__.partition(".")[0] in _LIBRARIES


def _refusal(error: Exception, what: str) -> tuple[str, str] | None:
    if isinstance(error, PermissionError) and is_remote(what):
        return _DENIED
    silent = isinstance(error, OSError) and error.errno is None
    return next((answer for pattern, answer in _REFUSALS.items() if silent and re.search(pattern, str(error))), None)


def _parts(uri: str) -> tuple[str, str, str]:
    """Scheme with authority ("s3://bucket"), key without slashes around it, and options ("?..." or "") of a remote place."""
    match = _PLACE.fullmatch(uri)
    assert match is not None, "called for remote places only"
    return match[1].lower() + match[2], match[3], match[4] or ""


def _base_name(uri: str) -> str:
    return _parts(uri)[1].rpartition("/")[2] if is_remote(uri) else local(uri).name


def _remote(uri: str, operation: Callable[[Any, str], T]) -> T:
    return with_retries(lambda: operation(*_filesystem(uri)), uri)


def _filesystem(uri: str) -> tuple[Any, str]:
    """The file system of a remote place, and what the place is called in it."""
    root, key, options = _parts(uri)
    scheme = root.partition(":")[0]
    if scheme in ("gs", "gcs"):
        options = options or "?retry_limit_seconds=30"  # pyarrow itself would try for 15 minutes
    try:
        if scheme in _ARROW:
            if {".", ".."} & set(key.split("/")) or "//" in key:  # which an HTTP client would resolve, into another bucket even
                raise ValueError('it has a part that is empty, "." or ".."')
            with contextlib.suppress(NotImplementedError):  # built without this scheme
                system, base = _arrow_filesystem(root, options, os.getpid(), *sorted(os.environ.items()))
                return system, (base + key).rstrip("/") or "/"
        system, path = fsspec.core.url_to_fs(uri)
        return fs.PyFileSystem(fs.FSSpecHandler(system)), path
    except ImportError as error:
        raise DataError("path", redact(uri), f"needs a package for {scheme}://.", f"{error}.") from error
    except ValueError as error:
        if "Protocol not known" not in str(error):
            raise DataError("path", redact(uri), f"cannot be used ({redact(str(error))}).", "Check it.") from None
        known = nearest(scheme, [*_ARROW, "file", "memory", "http", "https"])
        raise DataError("path", redact(uri), f"has the unknown scheme {scheme}://.", known) from None


@functools.lru_cache(maxsize=32)
def _arrow_filesystem(root: str, options: str, *_settings: object) -> tuple[Any, str]:
    """pyarrow's file system and the prefix of its keys; another one after a fork and after a change of the environment."""
    # `from_uri` heeds AWS_ENDPOINT_URL, which `S3FileSystem()` does not; but it decodes keys and refuses some, so it sees a harmless one.
    system, path = fs.FileSystem.from_uri(f"{root}/-{options}")
    return system, path.removesuffix("-")


def _list_local(root: Path, suffixes: tuple[str, ...]) -> list[tuple[str, int, str]]:
    """Names, sizes and stamps; the name "" is `root` itself. Links to folders are followed, each folder once."""

    def fail(error: OSError) -> None:
        raise error

    names, seen = [""] if root.is_file() else [], set()
    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True) if not names else ():
        real = os.path.realpath(folder)
        new = real not in seen  # links may run in circles
        seen.add(real)
        folders[:] = sorted(name for name in folders if new and not name.startswith("."))
        names.extend(os.path.relpath(os.path.join(folder, name), root) for name in files if new and name.endswith(suffixes))
    stats = [(name, (root / name).stat()) for name in names]
    odd = next((name for name, status in stats if not stat.S_ISREG(status.st_mode)), None)
    if odd is not None:  # a pipe would be waited for, for ever
        raise DataError("file", str(root / odd), "is not a regular file.", "Move it away.")
    return [(name, status.st_size, f"{status.st_mtime_ns}-{status.st_ino}") for name, status in stats]


def _list_remote(system: Any, path: str) -> list[tuple[str, int, str]]:
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
    def put(system: Any, path: str) -> None:
        if system.type_name not in ("s3", "gcs", "abfs"):  # those have no folders
            system.create_dir(path.rpartition("/")[0] or "/", recursive=True)
        with open_source() as source:
            target = system.open_output_stream(path, compression=None)  # by default names decide: .gz would be packed once more
            for count, chunk in enumerate(iter(lambda: source.read(_CHUNK), b""), 1):
                target.write(chunk)
                if count % _FLUSH == 0:
                    target.flush()
            target.close()  # no `with`: after an error it would complete the upload
        if system.get_file_info(path).size != size:
            raise OSError(errno.EIO, "the uploaded file has another size")

    _remote(uri, put)


def _download(system: Any, path: str, target: Path) -> None:
    partial = target.with_name("." + target.name)
    try:
        size = system.get_file_info(path).size
        with system.open_input_stream(path, compression=None) as source, partial.open("wb") as sink:
            shutil.copyfileobj(source, sink, _CHUNK)
        if size is not None and partial.stat().st_size != size:
            raise OSError(errno.EIO, f"{partial.stat().st_size} of {size} bytes came")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _rename(folder: Path, target: Path, last: str) -> None:
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
