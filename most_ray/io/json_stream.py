"""Reads JSON values from a byte stream one by one, in every form that users have: a list, `{"data": [...]}`, one object, JSON Lines.

Memory does not grow with the stream. In place of a broken value the iterators yield a `RecordError`, and reading continues after it: the
good records around a bad one are kept.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import orjson

from most_ray.errors import RecordError
from most_ray.io.json_values import TOO_LONG, check_depth, parse_json

MAX_RECORD = 64 << 20  # bytes of one JSON value; a longer one is rejected
_CHUNK = 1 << 18  # bytes read at once at least
_TRIES = 4  # closing braces at which the fast parser is tried before the object's end is found by counting braces
_SEARCHED = 16 << 20  # bytes parsed without success after one damage; from then on records are found after a closed value only
_SPACE = re.compile(rb"[ \t\r\n]*")
_KEY = re.compile(rb'"((?:[^"\\]|\\.)*)"[ \t\r\n]*:[ \t\r\n]*')
_MARKS = re.compile(rb'"(?:[^"\\]|\\.)*"|[{}]', re.DOTALL)  # strings, and braces outside of them
_RECORD_START = rb'\{[ \t\r\n]*"(?:id|instruction|input|output|metadata)"[ \t\r\n]*:'
_RECORD = re.compile(_RECORD_START)
_RECORD_AFTER = re.compile(rb"(?<=[}\]])[ \t\r\n]*,?[ \t\r\n]*" + _RECORD_START)  # after a closed value
_RECORD_KEYS = ("id", "instruction", "input", "output")


class _Window:
    """The part of a stream that is in memory: `data[position:]` is not consumed yet; `base` is the offset of data[0] in the stream."""

    def __init__(self, stream: BinaryIO, start: int = 0) -> None:
        self._stream = stream
        self.data, self.position, self.base = b"", 0, start
        self.ended = False  # whether the stream has been read to its end
        self.damage: str | None = None  # why a compressed stream ended early

    @property
    def offset(self) -> int:
        """Offset in the stream of the next byte."""
        return self.base + self.position

    def more(self) -> bool:
        """Read more of the stream; False at its end. The consumed part is dropped; chunks grow with the value that is incomplete."""
        if self.ended:
            return False
        try:
            chunk = self._stream.read(max(_CHUNK, len(self.data) - self.position))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            self.damage, chunk = f"is not a whole gzip file ({error})", b""
        if chunk:
            self.base, self.data, self.position = self.base + self.position, self.data[self.position :] + chunk, 0
        self.ended = not chunk
        return not self.ended

    def skip_space(self) -> int:
        """Consume white space. Returns the byte after it, which is not consumed; -1 at the end."""
        while True:
            self.position = _after_space(self.data, self.position)
            if self.position < len(self.data):
                return self.data[self.position]
            if not self.more():
                return -1


def _after_space(data: bytes, position: int) -> int:
    """The position after white space that begins at `position`."""
    match = _SPACE.match(data, position)
    assert match is not None, "the pattern matches nothing, too"
    return match.end()


def open_compressed(stream: BinaryIO) -> BinaryIO:
    """The decompressed content of a gzip stream."""
    return cast(BinaryIO, gzip.GzipFile(fileobj=stream, mode="rb"))


def read_lines(stream: BinaryIO, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, object]]:
    """Yield `(byte, value)` for every line of JSON Lines that begins in start..stop-1, except blank ones.

    Args:
        stream: positioned at `start`, or at start - 1 where start > 0: a line that began before `start` belongs to the range before.
        start, stop: byte offsets in the stream; None is its end.
    """
    source = _Window(stream, max(0, start - 1))
    skipping = start > 0  # to the end of a line: one that began before `start`, or one that is too long
    too_long: list[tuple[int, object]] = []  # the error of that one
    while source.more() or source.position < len(source.data):
        data, position = source.data, source.position
        while True:
            end = data.find(b"\n", position)
            begin = source.base + position
            if end < 0 and not source.ended:
                break
            if stop is not None and begin >= stop and not skipping:
                return
            line = data[position:] if end < 0 else data[position:end]
            position = len(data) if end < 0 else end + 1
            if skipping:
                yield from too_long
                skipping, too_long = False, []
            elif line and not line.isspace():
                yield begin, _line_value(line, begin)
            if end < 0:
                break
        source.position = position
        if len(data) - position > MAX_RECORD:
            if not skipping:
                skipping, too_long = True, [(source.base + position, RecordError(f"is longer than {MAX_RECORD >> 20} MiB"))]
            source.position = len(data)
    yield from too_long
    if source.damage:
        yield source.offset, RecordError(source.damage)


def _line_value(line: bytes, begin: int) -> object:
    """The value of a line at offset `begin`, or a RecordError."""
    try:
        return _shallow(_parse(line))
    except (orjson.JSONDecodeError, RecursionError):
        pass  # it may be valid for `json`, which accepts NaN, half surrogate pairs and a byte order mark
    try:
        return parse_json(line.decode("utf-8-sig"))
    except ValueError as error:
        position = begin + (error.pos if isinstance(error, json.JSONDecodeError) else 0)
        return RecordError(f"is not JSON at byte {position} ({error})")


def _shallow(value: object) -> object:
    """A value, or a RecordError in place of one that is nested too deep."""
    try:
        check_depth(value)
    except ValueError as error:
        return RecordError(str(error))
    return value


def _parse(text: bytes) -> Any:
    """The value by orjson, or by json where the id is a number that orjson would round."""
    value = orjson.loads(text)
    return json.loads(text) if type(value) is dict and type(value.get("id")) is float else value


def read_values(stream: BinaryIO) -> Iterator[tuple[int, object]]:
    """Yield `(byte, value)` for the records of a stream: the elements of a list, the elements of an object's "data" list, or objects
    that follow one another."""
    source = _Window(stream)
    if source.more() and source.data.startswith(b"\xef\xbb\xbf"):
        source.position = 3
    yield from ((byte, _shallow(value)) for byte, value in _ValueReader(source).values())
    if source.damage:
        yield source.offset, RecordError(source.damage)


class _ValueReader:
    """A recursive-descent reader of the top levels; each record is parsed by one call of orjson.

    In its methods "consume" means that the window's position moves past a value.
    """

    def __init__(self, source: _Window) -> None:
        self._source = source
        self._recovering = False  # after damage at the top level, where list punctuation may appear alone
        self._lost = False  # the end was reached inside a list or in search of a whole record, and that was reported
        self._entered = self._closed = False  # of an object around records: whether its "data", its end have been read

    def values(self) -> Iterator[tuple[int, object]]:
        """Yield `(byte, value)` for all records of the stream."""
        source = self._source
        if source.skip_space() < 0 and not source.damage:
            yield 0, RecordError("is not JSON at byte 0 (the file is empty)")
        while (byte := source.skip_space()) >= 0:
            if byte == ord("["):
                source.position += 1
                yield from self._list()
            elif byte == ord("{"):
                yield from self._top_object()
            elif self._recovering and byte in b",]}":
                source.position += 1
            else:
                begin = source.offset
                value = self._exact(begin)
                if isinstance(value, RecordError):
                    self._recovering = True
                    value = self._resume(value)
                yield begin, value

    def _list(self) -> Iterator[tuple[int, object]]:
        """Yield the elements of a list whose opening bracket is consumed; its closing bracket is consumed too."""
        source, first = self._source, True
        while True:
            byte = source.skip_space()
            if byte == ord("]"):
                source.position += 1
                return
            if byte < 0:
                if not (source.damage or self._lost):
                    yield source.offset, RecordError(f"is not JSON at byte {source.offset} (the file ends inside a list)")
                self._lost = True
                return
            if not first:
                if byte == ord(","):
                    source.position += 1
                    byte = source.skip_space()
                    if byte < 0:
                        continue
                elif byte == ord("{"):
                    yield source.offset, RecordError(f"is not JSON at byte {source.offset} (a comma is missing)")
            first = False
            begin = source.offset
            value: object = self._object(MAX_RECORD) if byte == ord("{") else None
            if value is None:
                value = self._exact(begin)
                if isinstance(value, RecordError):
                    value = self._resume(value)
                    first = True  # no comma is due before the next value
                elif isinstance(value, list):
                    value = RecordError("is a JSON list, not an object")
            if not (isinstance(value, RecordError) and source.damage):
                yield begin, value

    def _object(self, budget: int) -> dict[str, Any] | None:
        """Consume the object that begins here; None, with nothing consumed, where it is broken or longer than `budget` bytes.

        A slice up to some closing brace that parses is the object, since no proper prefix of a JSON object is one.
        """
        source, seek = self._source, self._source.position
        for _ in range(_TRIES):
            while (end := source.data.find(b"}", seek) + 1) == 0:
                searched = len(source.data) - source.position
                if searched > budget or not source.more():
                    return None
                seek = source.position + searched
            if end - source.position > budget:
                return None
            after = _after_space(source.data, end)
            if (after == len(source.data) or source.data[after] in b",]{[") and (value := self._taken(end)) is not None:
                return value
            seek = end
        length = self._length(budget)
        return None if length is None else self._taken(source.position + length)

    def _taken(self, end: int) -> dict[str, Any] | None:
        """Consume the bytes up to `end` if they are an object, else return None."""
        source = self._source
        try:
            value = _parse(source.data[source.position : end])
        except (ValueError, RecursionError):  # `_exact` finds out why
            return None
        source.position = end
        return cast("dict[str, Any]", value)

    def _length(self, budget: int) -> int | None:
        """Bytes of the object that begins here, by counting braces outside strings; None where they do not close within `budget` bytes."""
        source, depth, done = self._source, 0, 0
        while True:
            for match in _MARKS.finditer(source.data, source.position + done):
                mark = match[0]
                if mark == b"{":
                    depth += 1
                elif mark == b"}":
                    depth -= 1
                    if depth == 0:
                        return match.end() - source.position
                done = match.end() - source.position
            if len(source.data) - source.position > budget or not source.more():
                return None

    def _exact(self, begin: int) -> object:
        """Consume the value that begins here, at offset `begin`, by the exact parser (json); or return a RecordError that says where it
        is broken, with nothing consumed."""
        source, window = self._source, 1 << 12
        while True:
            while len(source.data) - source.position < window and source.more():
                pass
            text = source.data[source.position : source.position + window].decode("utf-8", "surrogateescape")
            whole = source.ended and len(source.data) - source.position <= window
            try:
                value, end = json.JSONDecoder().raw_decode(text)
            except RecursionError:
                return RecordError(f"is not JSON at byte {begin} (nested too deeply)")
            except json.JSONDecodeError as error:
                # Where the window cuts the value off, only a longer one shows what is wrong with it.
                if not whole and (error.pos > len(text) - 64 or "Unterminated string" in error.msg):
                    if window > MAX_RECORD:
                        return RecordError(f"is longer than {MAX_RECORD >> 20} MiB")
                    window *= 4
                    continue
                position = begin + len(text[: error.pos].encode("utf-8", "surrogateescape"))
                return RecordError(f"is not JSON at byte {position} ({error.msg})")
            except ValueError:
                return RecordError(f"is not JSON at byte {begin} ({TOO_LONG})")
            if end == len(text) and not whole and window <= MAX_RECORD:
                window *= 4  # a number may continue
                continue
            source.position += len(text[:end].encode("utf-8", "surrogateescape"))
            return value

    def _resume(self, error: RecordError) -> RecordError:
        """Skip to the beginning of the next whole record. Returns the error, completed by the number of skipped bytes."""
        source, begin, spent = self._source, self._source.offset, 0
        source.position += 1
        while True:
            match = (_RECORD if spent < _SEARCHED else _RECORD_AFTER).search(source.data, source.position)
            if match is None:
                source.position = max(source.position, len(source.data) - 64)  # a brace and its key may be cut by the window
                if not source.more():
                    source.position = len(source.data)
                    self._lost = True
                    break
                continue
            source.position = source.data.index(b"{", match.start())
            start = source.offset
            value = self._object(_SEARCHED)
            spent += source.offset - start if value else min(_SEARCHED, len(source.data) - source.position)
            source.position = start - source.base
            if isinstance(value, dict) and sum(key in value for key in _RECORD_KEYS) >= 2:
                break
            source.position += 1
        return RecordError(f"{error}; {source.offset - begin} bytes were skipped")

    def _top_object(self) -> Iterator[tuple[int, object]]:
        """Yield a record, or the records that an object holds in "data"."""
        source, begin = self._source, self._source.offset
        if (value := self._object(_CHUNK)) is not None:
            keys = list(value)
            if "data" not in value or "id" in keys[: keys.index("data")]:
                yield begin, value
                return
            source.position = begin - source.base  # read again, element by element
        self._closed = self._entered = False
        yield from self._wrapped()
        if self._closed or self._lost:
            return
        if not self._entered and begin >= source.base:
            source.position = begin - source.base
            found: object = self._object(MAX_RECORD) or self._exact(begin)
        else:  # its records have been yielded: what follows is read by itself, not from the beginning again
            found = RecordError(f"is not JSON at byte {source.offset} (in an object around records)")
        if isinstance(found, RecordError):
            self._recovering = True
            found = self._resume(found)
        if not (isinstance(found, RecordError) and source.damage):
            yield begin, found

    def _wrapped(self) -> Iterator[tuple[int, object]]:
        """Yield the records in an object's "data". Sets `_entered` where it has one, `_closed` where it could be read to its end."""
        source, opening, names = self._source, self._source.offset, set[bytes]()
        while True:
            if source.position < len(source.data) and source.offset == opening:
                source.position += 1
            byte = source.skip_space()
            if byte == ord("}"):
                source.position += 1
                self._closed = b"data" in names
                return
            if byte == ord(",") and names:
                source.position += 1
                source.skip_space()
            match = _KEY.match(source.data, source.position)
            while (match is None or match.end() == len(source.data)) and len(source.data) - source.position < _CHUNK and source.more():
                match = _KEY.match(source.data, source.position)
            if match is None:
                return
            name = match.group(1)
            if not names and name in (b"id", b"instruction", b"input", b"output", b"metadata"):
                return  # a record, large or broken
            source.position = match.end()
            if name == b"data" and b"id" not in names and source.data[match.end() : match.end() + 1] == b"[":
                source.position += 1
                self._entered = True
                yield from self._list()
            elif isinstance(self._exact(source.offset), RecordError):
                return
            elif name == b"data" and b"id" not in names:
                self._entered = True
                yield source.offset, RecordError("'data' is not a list of records")
            names.add(name)
