"""What libraries say goes to a file instead of the screen: their warnings and log lines, and what their native code writes.

Nothing is lost: the file is `libraries.log` in a run's folder, and of other commands a temporary one that the error of a failure names.
With MOST_RAY_DEBUG=1 everything is shown on the screen instead.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
from collections import deque
from pathlib import Path

LIBRARIES_LOG = "libraries.log"  # in a run's folder
DEBUG = "MOST_RAY_DEBUG"
_OWN = ("most_ray", "__main__")  # loggers of this program
_MOST_LINES = 1000  # that are kept until a file is chosen


def debugging() -> bool:
    """Whether the screen shows what libraries say."""
    return os.environ.get(DEBUG, "") not in ("", "0")


def is_own(record: logging.LogRecord) -> bool:
    """Whether a line is this program's, and not some library's."""
    return record.name.split(".", 1)[0] in _OWN


class LibraryLog(logging.Handler):
    """Appends the lines of libraries to a file, which is made with the first one. Until a file is chosen, the newest lines are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self.addFilter(lambda record: not is_own(record))
        self.path: Path | None = None
        self.temporary = False  # the file belongs to no run
        self._kept: deque[str] = deque(maxlen=_MOST_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):  # a line that cannot be formatted, a full disk: never the program's end
            self._kept.append(self.format(record))
            self._write()

    def write_to(self, path: Path) -> None:
        """Choose the file, for the lines that are kept and all that come."""
        self.path = path
        with contextlib.suppress(OSError):
            self._write()

    def _write(self) -> None:
        if self.path is not None and self._kept:
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as stream:
                while self._kept:
                    stream.write(self._kept.popleft() + "\n")

    def close_file(self, keep: bool) -> Path | None:
        """At the end of the command: remove the file where nothing was said, or a temporary one that is not to be kept. Returns the file if
        it is there; a temporary one where none was chosen and lines are to be kept."""
        with contextlib.suppress(OSError):
            if self.path is None and self._kept and keep:
                self.write_to(_temporary())
            if self.path is not None and self.path.exists():
                if self.path.stat().st_size and (keep or not self.temporary):
                    return self.path
                self.path.unlink()
        return None


LIBRARIES = LibraryLog()  # of this process


def divert_native(path: Path | None = None) -> bool:
    """Let what native code writes to standard error go to a file from now on, and what Python does stay where it is. Also chooses the file
    of `LIBRARIES`. Returns whether what libraries say is kept off the screen: not where someone debugs, or has set up logging otherwise.

    Args:
        path: the file; None: the one that was chosen before, else a temporary one.
    """
    if debugging() or LIBRARIES not in logging.getLogger().handlers:
        return False
    if path is None and LIBRARIES.path is not None:
        return True
    LIBRARIES.temporary = path is None
    try:
        LIBRARIES.write_to(path or _temporary())
        assert LIBRARIES.path is not None
        sink = os.open(LIBRARIES.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    except OSError:  # a folder that cannot be written to: the screen shows it
        return True
    try:
        if sys.stderr.fileno() == 2:  # or else it was replaced, as it is in tests
            screen = io.FileIO(os.dup(2), "w")
            sys.stderr = io.TextIOWrapper(screen, sys.stderr.encoding, "backslashreplace", line_buffering=True, write_through=True)
        os.dup2(sink, 2)
    except (OSError, ValueError, AttributeError):  # it is no stream of the system
        pass
    finally:
        os.close(sink)
    return True


def _temporary() -> Path:
    """A new temporary file."""
    number, name = tempfile.mkstemp(prefix="most_ray-", suffix=".log")
    os.close(number)
    return Path(name)
