"""JSON values out of a byte stream, one by one, in every form that users have: a list, `{"data": [...]}`, one object, JSON Lines.

Memory does not grow with the stream. What is broken comes as a `RecordError` in place of the value, and reading goes on behind it:
the good records around a bad one are kept.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Generator, Iterator
from typing import Any, BinaryIO, cast

import orjson

from most_ray.errors import RecordError

MAX_RECORD = 64 << 20  # bytes of one JSON value; a longer one is set aside
_CHUNK = 1 << 18
_TRIES = 32  # closing braces tried by the fast parser before the exact one is asked
_SPACE = re.compile(rb"[ \t\r\n]*")
_KEY = re.compile(rb'"((?:[^"\\]|\\.)*)"[ \t\r\n]*:[ \t\r\n]*')
_OBJECT = re.compile(rb'\{[ \t\r\n]*"')
_RECORD_KEYS = ("id", "instruction", "input", "output")


class _Bytes:
    """A window onto a stream: `data[position:]` is what has not been taken yet, `base` the offset of data[0] in the stream."""

    def __init__(self, stream: BinaryIO, start: int = 0) -> None:
        self._stream = stream
        self.data, self.position, self.base = b"", 0, start
        self.ended = False
        self.damage: str | None = None  # why a compressed stream ended early

    @property
    def offset(self) -> int:
        return self.base + self.position

    def more(self) -> bool:
        """Read on; False at the end. The taken part is dropped, and chunks grow with the value that is being waited for."""
        if self.ended:
            return False
        size = max(_CHUNK, len(self.data) - self.position)
        try:
            chunk = self._stream.read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            self.damage, chunk = f"is not a whole gzip file ({error})", b""
        if not chunk:
            self.ended = True
            return False
        self.base += self.position
        self.data = self.data[self.position :] + chunk
        self.position = 0
        return True

    def skip_space(self) -> int:
        """The next byte that is no space, not taken; -1 at the end."""
        while True:
            match = _SPACE.match(self.data, self.position)
            assert match is not None
            self.position = match.end()
            if self.position < len(self.data):
                return self.data[self.position]
            if not self.more():
                return -1


def open_compressed(stream: BinaryIO) -> BinaryIO:
    """The decompressed content of a gzip stream."""
    return cast(BinaryIO, gzip.GzipFile(fileobj=stream, mode="rb"))


def read_lines(stream: BinaryIO, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, object]]:
    """`(byte, value)` of every line of JSON Lines that begins in start..stop-1, blank ones aside. The stream stands at `start`, or,
    where start > 0, at start - 1: a line that began before belongs to the range before."""
    source = _Bytes(stream, max(0, start - 1))
    skipping = start > 0  # up to the end of a line: the one that began before, or one that is too long
    too_long: int | None = None
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
                skipping = False
                if too_long is not None:
                    yield too_long, RecordError(f"is longer than {MAX_RECORD >> 20} MiB")
                    too_long = None
            elif line and not line.isspace():
                yield begin, _line_value(line, begin)
            if end < 0:
                break
        source.position = position
        if len(data) - position > MAX_RECORD:
            if not skipping:
                skipping, too_long = True, source.base + position
            source.position = len(data)
    if too_long is not None:
        yield too_long, RecordError(f"is longer than {MAX_RECORD >> 20} MiB")
    if source.damage:
        yield source.offset, RecordError(source.damage)


def _line_value(line: bytes, begin: int) -> object:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        pass  # NaN, numbers beyond 64 bits, half surrogate pairs: the exact parser decides
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        position = begin + (error.pos if isinstance(error, json.JSONDecodeError) else 0)
        return RecordError(f"is not JSON at byte {position} ({error})")


def read_values(stream: BinaryIO) -> Iterator[tuple[int, object]]:
    """`(byte, value)` of the records of a stream: the elements of a list, the elements of an object's "data" list, or objects that
    follow one another."""
    source = _Bytes(stream)
    if source.more() and source.data.startswith(b"\xef\xbb\xbf"):
        source.position = 3
    yield from _Reader(source).values()
    if source.damage:
        yield source.offset, RecordError(source.damage)


class _Reader:
    """A recursive-descent reader of the top levels; records themselves are parsed by orjson, in one call each."""

    def __init__(self, source: _Bytes) -> None:
        self._source = source
        self._recovering = False  # behind damage at the top level, list punctuation may stand alone
        self._lost = False  # the end was reached in search of a whole record

    def values(self) -> Iterator[tuple[int, object]]:
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
        """Elements up to and with the closing bracket."""
        source, first = self._source, True
        while True:
            byte = source.skip_space()
            if byte == ord("]"):
                source.position += 1
                return
            if byte < 0:
                if not (source.damage or self._lost):
                    yield source.offset, RecordError(f"is not JSON at byte {source.offset} (the file ends inside a list)")
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
            value: object = self._object() if byte == ord("{") else None
            if value is None:
                value = self._exact(begin)
                if isinstance(value, RecordError):
                    value = self._resume(value)
                    first = True  # what follows stands behind no comma
                elif isinstance(value, list):
                    value = RecordError("is a JSON list, not an object")
            if not (isinstance(value, RecordError) and source.damage):
                yield begin, value

    def _object(self) -> dict[str, Any] | None:
        """The object that begins here, taken; None where it is broken, or too involved for the fast way. A slice that parses is the
        object: no proper prefix of a JSON object is one."""
        source = self._source
        seek = source.position
        tries = 0
        while tries < _TRIES:
            end = source.data.find(b"}", seek) + 1
            if end == 0:
                if len(source.data) - source.position > MAX_RECORD:
                    return None
                searched = len(source.data) - source.position
                if not source.more():
                    return None
                seek = source.position + searched
                continue
            match = _SPACE.match(source.data, end)
            assert match is not None
            if match.end() == len(source.data) and not source.ended:
                relative = end - source.position
                source.more()
                end = seek = source.position + relative
                seek -= 1
                if not source.ended:
                    continue
                match = _SPACE.match(source.data, end)
                assert match is not None
            if match.end() == len(source.data) or source.data[match.end()] in b",]{[":
                tries += 1
                try:
                    value = orjson.loads(source.data[source.position : end])
                except orjson.JSONDecodeError:
                    pass
                else:
                    source.position = end
                    return cast("dict[str, Any]", value)
            seek = end
        return None

    def _exact(self, begin: int) -> object:
        """The value that begins here by the exact parser, taken; a RecordError that says where it breaks, with nothing taken."""
        source, window = self._source, 1 << 12
        while True:
            while len(source.data) - source.position < window and source.more():
                pass
            text = source.data[source.position : source.position + window].decode("utf-8", "surrogateescape")
            whole = source.ended and len(source.data) - source.position <= window
            try:
                value, end = json.JSONDecoder().raw_decode(text)
            except RecursionError:
                return RecordError(f"is nested too deeply at byte {begin}")
            except json.JSONDecodeError as error:
                # Where the window cuts the value, only a longer one can tell what is wrong with it.
                if not whole and (error.pos > len(text) - 64 or "Unterminated string" in error.msg):
                    if window > MAX_RECORD:
                        return RecordError(f"is longer than {MAX_RECORD >> 20} MiB")
                    window *= 4
                    continue
                position = begin + len(text[: error.pos].encode("utf-8", "surrogateescape"))
                return RecordError(f"is not JSON at byte {position} ({error.msg})")
            if end == len(text) and not whole and window <= MAX_RECORD:
                window *= 4  # a number may go on
                continue
            source.position += len(text[:end].encode("utf-8", "surrogateescape"))
            return value

    def _resume(self, error: RecordError) -> RecordError:
        """Skip to the next place where a whole record stands. Returns the error with what was skipped."""
        source = self._source
        begin = source.offset
        source.position += 1
        while True:
            match = _OBJECT.search(source.data, source.position)
            if match is None:
                keep = max(source.position, len(source.data) - 64)  # a brace and its key may be cut by the window
                source.position = keep
                if not source.more():
                    source.position = len(source.data)
                    self._lost = True
                    break
                continue
            source.position = match.start()
            place = source.offset
            value = self._object()
            source_begin = place - source.base
            source.position = source_begin
            if isinstance(value, dict) and sum(key in value for key in _RECORD_KEYS) >= 2:
                break
            source.position += 1
        return RecordError(f"{error}; {source.offset - begin} bytes were skipped")

    def _top_object(self) -> Iterator[tuple[int, object]]:
        """A record, or an object that wraps its records in "data"."""
        source = self._source
        begin = source.offset
        value = self._object()
        if value is not None:
            keys = list(value)
            data = value.get("data")
            if "data" in value and "id" not in keys[: keys.index("data")]:
                if isinstance(data, list):
                    yield from ((begin, RecordError("is a JSON list, not an object") if isinstance(v, list) else v) for v in data)
                else:
                    yield begin, RecordError("'data' is not a list of records")
            else:
                yield begin, value
            return
        yield from self._members(begin)

    def _members(self, begin: int) -> Iterator[tuple[int, object]]:
        """An object that is broken or large, member by member: where it wraps records in "data", they are streamed."""
        source = self._source
        if (yield from self._wrapped()):
            return
        if begin >= source.base:
            source.position = begin - source.base
            value = self._exact(begin)
        else:
            value = RecordError(f"is not JSON at byte {source.offset}")
        if isinstance(value, RecordError):
            self._recovering = True
            value = self._resume(value)
        if not (isinstance(value, RecordError) and source.damage):
            yield begin, value

    def _wrapped(self) -> Generator[tuple[int, object], None, bool]:
        """True where the object could be read as a wrapper to its end."""
        source = self._source
        names: set[bytes] = set()
        opening = source.offset
        while True:
            if source.position < len(source.data) and source.offset == opening:
                source.position += 1
            byte = source.skip_space()
            if byte == ord("}"):
                source.position += 1
                return b"data" in names
            if byte == ord(",") and names:
                source.position += 1
                source.skip_space()
            match = _KEY.match(source.data, source.position)
            while (match is None or match.end() == len(source.data)) and len(source.data) - source.position < _CHUNK and source.more():
                match = _KEY.match(source.data, source.position)
            if match is None:
                return False
            name = match.group(1)
            if not names and name in (b"id", b"instruction", b"input", b"output"):
                return False  # a record, and broken
            source.position = match.end()
            if name == b"data" and b"id" not in names and source.data[match.end() : match.end() + 1] == b"[":
                source.position += 1
                yield from self._list()
            elif isinstance(self._exact(source.offset), RecordError):
                return False
            names.add(name)
