"""The header of a checkpoint's safetensors files, read without torch: before a run starts, nothing else of them is needed."""

from __future__ import annotations

import math
from typing import Any, BinaryIO

from most_ray.io.json_values import parse_json

BLOCK_BYTES = 8 << 20  # written, hashed or copied at a time: large enough for all three to release the interpreter's lock
CHUNKS_KEY = "rectangles"  # in a file's metadata, what each entry is a chunk of: the file format's word, so it stays
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}  # by type


class DamagedFileError(Exception):
    """A file is missing, cut off, or differs from what its header describes."""


def read_header(stream: BinaryIO) -> dict[str, Any]:
    """Read the header of a safetensors file, with `__metadata__` as key -> [tensor, its global shape, the chunk's offsets]. Raises
    DamagedFileError if there is no header, or if it cannot be parsed."""
    length = int.from_bytes(stream.read(8), "little")
    if not 0 < length < 1 << 30:
        raise DamagedFileError("it has no header")
    data = stream.read(length)
    try:
        header = parse_json(data)
        chunks = parse_json(header["__metadata__"][CHUNKS_KEY])
        if not isinstance(chunks, dict) or not all(_is_chunk(header[key], *chunk) for key, chunk in chunks.items()):
            raise ValueError("a tensor's entry")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DamagedFileError("its header is broken") from error
    return {**header, "__metadata__": chunks}


def _is_chunk(entry: dict[str, Any], name: object, shape: list[int], offsets: list[int]) -> bool:
    """Whether an entry of a safetensors header can be a chunk, at `offsets`, of a tensor of that name and shape."""
    begin, end = entry["data_offsets"]
    size, numbers = entry["shape"], [*shape, *offsets, *entry["shape"], begin, end]
    if not isinstance(name, str) or not len(shape) == len(offsets) == len(size):
        return False
    if not all(isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 1 << 62 for number in numbers):
        return False
    inside = all(start + length <= most for start, length, most in zip(offsets, size, shape, strict=True))
    return inside and end - begin == math.prod(size) * _ITEM_BYTES[entry["dtype"]]
