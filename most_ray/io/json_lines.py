"""JSON Lines that this package writes itself: metrics, traces, ledgers, hypotheses. One object a line.

A process that is killed, or a disk that is full, leaves a last line that is cut off, or bytes that are NUL. `parse_line` returns None for
such a line, so that all readers skip it in the same way. Records that users give are read by `json_stream`, which reports what is damaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from most_ray.io.json_values import parse_json


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object of one line; None where the line is damaged or is no object."""
    try:
        value = parse_json(line)
    except ValueError:  # the documented result, which callers skip: the writer was killed in the middle of the line
        return None
    return value if isinstance(value, dict) else None


def parse_lines(lines: bytes | Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The objects of a file's content, or of its lines (an open file), without damaged ones."""
    for line in lines.split(b"\n") if isinstance(lines, bytes) else lines:
        if (value := parse_line(line)) is not None:
            yield value


def read_lines(path: Path, size: int | None = None) -> Iterator[dict[str, Any]]:
    """The objects of a local file, one at a time, without damaged ones; none if there is no file. `size`: read so many bytes, else all."""
    if path.exists():
        with path.open("rb") as stream:
            lines = iter(stream) if size is None else iter(lambda: stream.readline(size - stream.tell()), b"")
            yield from parse_lines(lines)
