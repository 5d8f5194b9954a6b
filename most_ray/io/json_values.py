"""JSON from files, messages and metadata: the one place that parses it, so that what is hostile in it fails in one way.

JSON Lines that this package writes itself (metrics, traces, ledgers, hypotheses) have one object a line. A process that is killed, or a
disk that is full, leaves a last line that is cut off, or bytes that are NUL: `parse_line` returns None for such a line, so that all readers
skip it in the same way. Records that users give are read by `json_stream`, which reports what is damaged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

MAX_DEPTH = 100  # of values in each other; recursive code, as that of `json.dumps`, fails near a thousand
TOO_LONG = "holds a number of thousands of digits"  # the other ValueErrors of `json`, whose own advice is for programmers
_HALF_PAIRS = re.compile(r"[\ud800-\udfff]")
_CONTAINERS = (dict, list)
_TOO_DEEP = f"is nested more than {MAX_DEPTH} deep"


def parse_json(text: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, is nested more than `MAX_DEPTH` deep, or holds a number of thousands of digits.
    """
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        try:
            value = json.loads(text)  # NaN, half surrogate pairs, integers of more than 64 bits and other encodings than UTF-8
        except RecursionError:
            raise ValueError(_TOO_DEEP) from None
        except ValueError as error:
            raise (error if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else ValueError(TOO_LONG)) from None
    check_depth(value)
    return value


def json_text(value: Any, indent: int | None = None) -> str:
    """A value as JSON text that every encoding of Unicode can hold: with escapes where a text has half surrogate pairs."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return json.dumps(value, indent=indent) if _HALF_PAIRS.search(text) else text


def check_depth(value: Any) -> None:
    """Raise ValueError where a JSON value is nested more than `MAX_DEPTH` deep."""
    if isinstance(value, _CONTAINERS) and not _fits(value, MAX_DEPTH):
        raise ValueError(_TOO_DEEP)


def _fits(value: Any, levels: int) -> bool:
    """Whether a list or an object is nested at most so many levels deep."""
    for each in value.values() if isinstance(value, dict) else value:
        if isinstance(each, _CONTAINERS) and (levels == 1 or not _fits(each, levels - 1)):
            return False
    return True


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
