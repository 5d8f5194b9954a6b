"""What commands write: checked before any work is done for it, written beside its place, and moved there when it is whole.

A check refuses what would vanish or destroy something: a URI where a path is meant, a device, pipe or socket, a folder where a file is
meant and the reverse, a place that cannot be written to, and what is there already and is no earlier output of the same kind. It changes
nothing on disk. Which files are of a kind is declared where they are written, as a `Kind`.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from most_ray.errors import ConfigError, DataError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HEAD = 1 << 16  # bytes of a file by which its kind is known


@dataclass(frozen=True)
class Kind:
    """A kind of file that a command writes, and may replace."""

    what: str  # for errors: "a trace"
    is_own: Callable[[Path], bool]  # whether a regular file is one; an empty file is any kind's


def begins_with(pattern: bytes) -> Callable[[Path], bool]:
    """Whether a file's beginning matches a regular expression."""
    compiled = re.compile(pattern, re.DOTALL)

    def matches(path: Path) -> bool:
        with path.open("rb") as stream:
            return compiled.match(stream.read(_HEAD)) is not None

    return matches


def check_file(field: str, path: Path, kind: Kind) -> None:
    """Check the path of a file that a command will write.

    Raises:
        ConfigError: it is a URI or a folder, not a regular file, cannot be written to, or holds something else than a file of this kind.
    """
    status = _status(field, path, "file")
    if status is not None:
        if stat.S_ISDIR(status.st_mode):
            raise ConfigError(field, str(path), "is a folder.", "Name a file.")
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(field, str(path), "is not a regular file.", "Name a file.")
        try:
            own = status.st_size == 0 or kind.is_own(path)
        except OSError as error:
            raise ConfigError(field, str(path), f"cannot be read ({error.strerror}).", "Name another file.") from error
        if not own:
            raise ConfigError(field, str(path), f"exists and is no {kind.what}.", "Name another file, or remove this one.")
    _check_writable(field, path, Path(os.path.realpath(path)).parent, "file")


def check_folder(field: str, path: Path) -> None:
    """Check the path of a folder that a command will write to; what is in it is the caller's concern.

    Raises:
        ConfigError: it is a URI, is no folder, or cannot be written to.
    """
    status = _status(field, path, "folder")
    if status is not None and not stat.S_ISDIR(status.st_mode):
        what = "is a file" if stat.S_ISREG(status.st_mode) else "is not a folder"
        raise ConfigError(field, str(path), f"{what}.", "Name a folder.")
    _check_writable(field, path, path, "folder")


def check_new_folder(field: str, path: Path) -> None:
    """`check_folder` for a folder that must be empty, or not exist."""
    check_folder(field, path)
    if path.is_dir() and (names := sorted(each.name for each in path.iterdir())):
        raise ConfigError(field, str(path), f"exists and holds {names[0]}.", "Name a new folder, or remove this one.")


@contextlib.contextmanager
def replacing(field: str, path: Path) -> Iterator[Path]:
    """The path of a new file beside `path`, with its suffix, which replaces `path` at the end unless there was an error. Missing folders
    are made; where `path` is a link, what it leads to is replaced. Raises ConfigError where it cannot be written."""
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp{target.suffix}")
    with _explained(field, path, temporary, target), made_folder(target.parent):
        try:
            yield temporary
            open_to_readers(temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(field: str, path: Path) -> Iterator[Path]:
    """The path of a folder beside `path`, which is to be made and replaces `path` as a whole at the end unless there was an error. Raises
    ConfigError where it cannot be written."""
    target = Path(os.path.realpath(path))
    temporary, old = target.with_name(f".{target.name}.tmp"), target.with_name(f".{target.name}.old")
    with _explained(field, path, temporary, old, target), made_folder(target.parent):
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            yield temporary
            open_to_readers(temporary)
            if target.exists():
                target.rename(old)
            try:
                temporary.rename(target)
            except OSError:
                if old.exists():
                    old.rename(target)
                raise
        finally:
            for leftover in (temporary, old):
                shutil.rmtree(leftover, ignore_errors=True)


def open_to_readers(path: Path) -> None:
    """Give a file, or a folder and all that is in it, the rights that the umask leaves to new files, where a library has made it for this
    user alone: what is a temporary file to the library is an output, which others may read like those beside it."""
    probe = path.with_name(f".{secrets.token_hex(8)}.tmp")
    with probe.open("xb") as stream:
        rights = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
    probe.unlink()
    for each in (path, *path.rglob("*")):
        mode = each.lstat().st_mode
        if stat.S_ISREG(mode) and not mode & 0o077:
            each.chmod(rights | mode & 0o100)
        elif stat.S_ISDIR(mode) and not mode & 0o077:
            each.chmod(rights | (rights & 0o444) >> 2)  # a folder that may be read may be entered


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Let errors of the system name `path` where they name no file, as that of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder and those that it is in; after an error, those that were made and are empty are removed again."""
    missing = list(itertools.takewhile(lambda each: not each.exists(), (folder, *folder.parents)))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:  # an interrupt leaves nothing either
        remove_empty(missing)
        raise


def remove_empty(folders: list[Path]) -> None:
    """Remove those of the folders, the innermost first, that are empty."""
    for each in folders:
        with contextlib.suppress(OSError):
            each.rmdir()


def nearest_folder(path: Path) -> Path:
    """`path`, or the nearest folder that it would be made in."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def failure_rule(error: OSError | DataError, what: str) -> str:
    """Why a path or URI cannot be `what` ("read", "written to"), as the end of a sentence, without its full stop."""
    return error.rule.rstrip(".") if isinstance(error, DataError) else f"cannot be {what} ({error.strerror or error})"


@contextlib.contextmanager
def _explained(field: str, path: Path, *written: Path) -> Iterator[None]:
    """Raise ConfigError for errors of writing `path`, in fact the files or folders `written`, or of a full disk. Those of other files,
    which a block may read, are left as they are."""
    try:
        yield
    except OSError as error:
        at = Path(str(error.filename or os.devnull))
        if error.errno not in DISK_FULL and not any(at.is_relative_to(each) or each.is_relative_to(at) for each in written):
            raise
        remedy = "Free some space, or name another place." if error.errno in DISK_FULL else "Name another place."
        raise ConfigError(field, str(path), f"{failure_rule(error, 'written to')}.", remedy) from error


def _status(field: str, path: Path, what: str) -> os.stat_result | None:
    """What is at a path; None: nothing. Raises ConfigError for a URI, and for a path that cannot be."""
    if uri := re.match(r"([A-Za-z][\w+.-]*):/+", str(path)):  # it would become a folder of that name here
        shown = f"{uri[1]}://{str(path)[uri.end() :]}"  # a Path has lost one slash, without which no credentials are seen
        raise ConfigError(field, shown, "is not a local path.", f"Name a {what} on this machine.")
    try:
        return path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(field, str(path), f"{failure_rule(error, 'written to')}.", f"Name another {what}.") from error
    except ValueError as error:
        raise ConfigError(field, str(path), "holds a NUL character.", f"Name another {what}.") from error


def _check_writable(field: str, path: Path, folder: Path, what: str) -> None:
    """Raise ConfigError unless files can be made in `folder`, or in the nearest one above that exists."""
    try:
        with tempfile.TemporaryFile(dir=nearest_folder(folder)):
            pass
    except OSError as error:
        raise ConfigError(field, str(path), f"{failure_rule(error, 'written to')}.", f"Name another {what}.") from error
