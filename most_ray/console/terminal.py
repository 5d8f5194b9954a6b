"""Where text goes to a screen: nothing of users', files' or models' text is taken for markup there, acts on the terminal, or shows
credentials. Screens are printed to a `Terminal`, lines of commands by `say`, warnings by logging with a `LogFormatter`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import textwrap
import threading
from collections.abc import Sequence
from typing import IO, Any, TextIO, cast

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn
from rich.table import Column, Table
from rich.text import Text

from most_ray.console.library_log import LIBRARIES, debugging, is_own
from most_ray.console.streams import drop_stream
from most_ray.console.tables import fitting
from most_ray.errors import printable, redact

logger = logging.getLogger(__name__)
LOG_WIDTH = 120  # characters of a line where a run's output is no terminal
_MOST_LOG_WIDTH = 120  # characters of a line of a table in a log
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def shown_text(text: str) -> str:
    """Text as it may go to a screen or a log: in one line, with escapes for control characters, without credentials."""
    return printable(redact(text))


class _Output:
    """Standard output, whose reader may go away, as `head` does: the work that is shown continues without it."""

    def write(self, text: str) -> int:
        self._try(lambda: sys.stdout.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(sys.stdout.flush)

    def _try(self, call: Any) -> None:
        try:
            call()
        except OSError as error:
            drop_stream(sys.stdout.fileno())
            logger.warning("nothing more can be shown (%s); the work continues", error.strerror)

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)


class Terminal(Console):
    """A console that shows text as it is: without markup or highlighting, with control characters as escapes, without credentials.

    Where the output is no terminal, tables are the lines of `table_lines`: viewers of logs, Ray's among them, make one blank of several.

    Args:
        log_width: characters of a line where the output is no terminal: a log file has no width of its own.
        options: those of rich's Console; with `width` the output is a screen of that width, whatever it is written to.
    """

    def __init__(self, log_width: int | None = None, **options: Any) -> None:
        file = options.pop("file", None) or _Output()
        self.is_log = not (file.isatty() or options.get("force_terminal") or options.get("width"))
        width = options.pop("width", None) or (None if file.isatty() else log_width)
        super().__init__(file=cast(IO[str], file), width=width, markup=False, highlight=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        # Of all texts: arguments of print, cells, headings and titles of tables.
        return super().render_str(shown_text(text), **{**options, "markup": False, "emoji": False})

    def print(self, *objects: Any, **options: Any) -> None:
        if not any(isinstance(each, Table) for each in objects):
            super().print(*objects, **options)
            return
        for each in objects:
            if isinstance(each, Table) and self.is_log:
                for line in table_lines(each, min(self.width, _MOST_LOG_WIDTH)):
                    print_line(self, line)
                continue
            for part in fitting(each, self.width) if isinstance(each, Table) else (each,):
                super().print(part, **options)


def table_lines(table: Table, width: int) -> list[str]:
    """A table as lines that read the same in any font, at any width, and without their leading blanks: its title, then for each row
    `- heading: cell | heading: cell ...`, in further lines from a `|` on where it is wider than `width` characters. Empty cells are left
    out."""
    lines = [shown_text(str(table.title))] if table.title else []
    headings = [str(column.header) for column in table.columns]
    for row in zip(*(column.cells for column in table.columns), strict=True):
        cells = [(heading, str(cell).strip()) for heading, cell in zip(headings, row, strict=True)]
        lines += _row_lines([shown_text(f"{heading}: {text}" if heading else text) for heading, text in cells if text], width)
    return [*lines, *([shown_text(str(table.caption))] if table.caption else [])]


def _row_lines(parts: Sequence[str], width: int) -> list[str]:
    """A row of `table_lines`, from its parts."""
    lines: list[str] = []
    for part in parts:
        if lines and cell_len(lines[-1]) + cell_len(part) + 3 <= width:
            lines[-1] += f" | {part}"
        else:
            first = "  | " if lines else "- "
            lines += textwrap.wrap(
                part, width, initial_indent=first, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
            )
    return lines


class _TextColumn(ProgressColumn):
    """A column of a progress bar: a text with the names of the task's fields, as it is."""

    def __init__(self, text: str) -> None:
        self._text = text
        super().__init__(Column(no_wrap=True))

    def render(self, task: Any) -> Text:
        return Text(shown_text(self._text.format(task=task)))


def progress_bar(console: Console, before: str, *after: str | ProgressColumn) -> Progress:
    """A bar between texts, which may name the task's fields as `{task.completed:.0f}`; it is shown on terminals only."""
    columns = [_TextColumn(each) if isinstance(each, str) else each for each in (before, BarColumn(), *after)]
    return Progress(*columns, console=console, disable=not console.is_terminal)


def print_line(console: Console, text: str) -> None:
    """Print text as it is: without markup or highlighting, and without breaking lines."""
    console.print(shown_text(text), highlight=False, soft_wrap=True, markup=False, emoji=False)


def print_words(console: Console, text: str, indent: str = "  ") -> None:
    """Print text as `print_line` does, on a screen broken between words where it is wider, and continued after `indent`."""
    wrap = isinstance(console, Terminal) and not console.is_log
    more = {"subsequent_indent": indent, "break_long_words": False, "break_on_hyphens": False}
    for line in textwrap.wrap(shown_text(text), console.width, **more) if wrap else [text]:  # type: ignore[arg-type]
        print_line(console, line)


def say(text: str, stream: TextIO | None = None) -> None:
    """Write a line of a command to a stream (None: standard output)."""
    (stream or sys.stdout).write(f"{shown_text(text)}\n")


def say_in_handler(text: str) -> None:
    """Write a line to standard error from a signal's handler: on a thread of its own, for the handler may have interrupted just such a
    write, and a stream takes no other meanwhile."""

    def write() -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            say(text, sys.stderr)

    threading.Thread(target=write, name="say-in-handler", daemon=True).start()


def say_meanwhile(text: str) -> None:
    """Say on a terminal what a command does before its first result; files and pipes get results alone."""
    if sys.stderr.isatty():
        say(text, stream=sys.stderr)


def write_log(text: str) -> None:
    """Write a part of another process's log to standard output: its lines, without colours, as `shown_text` makes them."""
    lines = _COLOUR.sub("", text).expandtabs(4).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    sys.stdout.write("\n".join(map(shown_text, lines)))
    sys.stdout.flush()


class LogFormatter(logging.Formatter):
    """Messages in one line each, as `shown_text` makes them; a traceback below them stays as it is."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return shown_text(super().formatMessage(record))


class _Screen(logging.StreamHandler[TextIO]):
    """Writes to the standard error of the moment, which may be replaced: see `library_log.divert_native`."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(LogFormatter())
        self.addFilter(lambda record: debugging() or is_own(record))

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def log_to_stderr(level: int) -> None:
    """Write this program's warnings to standard error, and those of libraries to `LIBRARIES`."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning" if debugging() else "error")  # its lines come to no handler of ours
    root = logging.getLogger()
    if root.handlers:  # whoever embeds this has chosen
        return
    root.setLevel(level)
    root.addHandler(_Screen())
    if not debugging():
        root.addHandler(LIBRARIES)
        logging.captureWarnings(True)
