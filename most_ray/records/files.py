"""A folder of records: the names of its files, and how records are read from them."""

from __future__ import annotations

import contextlib
import fnmatch
import itertools
import zlib
from collections.abc import Iterator
from pathlib import Path

from most_ray.errors import DataError, RecordError
from most_ray.io import storage
from most_ray.io.json_stream import open_compressed, read_lines, read_values
from most_ray.io.outputs import Kind, begins_with
from most_ray.io.storage import Entry

RECORD_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
UNITS_MANIFEST = "units.json"  # says what the units of the records mean
KMEANS = "kmeans.npy"  # centroids of the units
VOCODER = "vocoder.safetensors"  # turns the units into sound
REJECTED = "rejected.jsonl"  # one line for each entry that gave no record, with the reason
REJECTED_LIST = Kind("list of rejected entries", begins_with(rb'\{"file": ?"[^\n]*"reason": ?"'))
PREPARED = "prepared.json"  # what `prepare units` wrote, and from what
CONVERTED = "converted.json"  # what `prepare tts` wrote
UNFINISHED = ".unfinished"  # present while the records are being replaced: until it is gone, they may not match units.json
SPEECH_FOLDER = "speech"  # in the folder of a run and of an export: copies of ASSET_FILES
ASSET_FILES = (KMEANS, VOCODER, UNITS_MANIFEST)  # the manifest last: where it exists, the others have been copied
_HEAD = 4096  # bytes of a file that show its form
_NOT_RECORDS = frozenset({UNITS_MANIFEST, REJECTED, PREPARED, CONVERTED})


def record_files(directory: str | Path, pattern: str = "*") -> list[Entry]:
    """List the record files of a directory or URI, or the one file given, sorted by name; `pattern` is a shell pattern of base names.

    Raises:
        DataError: the directory does not exist, cannot be listed, or has no record file.
    """
    try:
        entries = storage.list_files(str(directory), RECORD_SUFFIXES)
    except OSError as error:
        reason = f"cannot be listed ({error.strerror or error}: {error.filename})."
        raise DataError("directory", storage.redact(str(directory)), reason, "Check its permissions and links.") from error
    if len(entries) == 1 and entries[0].uri.rstrip("/") == str(directory).rstrip("/"):
        return entries
    found = [e for e in entries if (base := e.name.rsplit("/", 1)[-1]) not in _NOT_RECORDS and fnmatch.fnmatchcase(base, pattern)]
    if not found:
        raise DataError("directory", storage.redact(str(directory)), f"holds no records ({', '.join(RECORD_SUFFIXES)}).")
    return found


def is_json_lines(name: str) -> bool:
    """Whether a file of this name is JSON Lines, gzipped or not."""
    return name.removesuffix(".gz").endswith(".jsonl")


def read_raw(uri: str | Path) -> Iterator[tuple[int, object]]:
    """Stream `(index, decoded JSON value)` of every record of a file: a list, `{"data": [...]}`, one object, or JSON Lines.

    Memory does not grow with the file. A broken record comes as a `RecordError` in its place; reading continues with the next one.
    """
    for index, (_, value) in enumerate(read_with_offsets(str(uri))):
        yield index, value


def read_with_offsets(uri: str, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, object]]:
    """Stream `(byte offset, value)` as `read_raw` does; offsets count bytes of the decompressed content.

    `start`, `stop`: of uncompressed JSON Lines, the records that begin at these bytes (see `read_lines`).
    """
    name = storage.base_name(uri)  # without a URI's options
    with storage.open_read(uri) as stream:
        head = stream.read(_HEAD) if start == 0 else b""
        stream.seek(max(0, start - 1))
        content = open_compressed(stream) if name.endswith(".gz") else stream
        values = read_lines(content, start, stop) if is_json_lines(name) else read_values(content)
        for byte, value in itertools.islice(values, 1):
            yield byte, _explained(value, name, head) if start == 0 else value
        yield from values


def _explained(value: object, name: str, head: bytes) -> object:
    """The first value of a file; where it is no record, with what the file's first bytes say about its name."""
    if isinstance(value, RecordError | list) and (hint := _form_hint(name, head)):
        return RecordError(f"{value if isinstance(value, RecordError) else 'is a JSON list, not an object'}: {hint}")
    return value


def _form_hint(name: str, head: bytes) -> str:
    """What to do about a file whose name says another form than its first bytes; empty where nothing is known."""
    zipped, lines = head.startswith(b"\x1f\x8b"), is_json_lines(name)
    if zipped != name.endswith(".gz"):
        return "the file is gzipped, so its name must end in .gz" if zipped else "the file is not gzipped, so its name must not end in .gz"
    with contextlib.suppress(zlib.error):
        head = zlib.decompressobj(wbits=31).decompress(head, _HEAD) if zipped else head
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "the file is UTF-16; save it as UTF-8"
    if lines and text.startswith(b"["):
        return "the file holds one JSON list, not a record on each line, so its name must end in .json"
    if lines and text.startswith(b"{") and not text.partition(b"\n")[0].rstrip().endswith(b"}") and b"\n" in text:
        return "a record has more than one line, so the name of its file must end in .json"
    return ""
