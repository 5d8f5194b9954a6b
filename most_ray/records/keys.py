"""Keys of records: hashes by which the same record, or the same speech, is found again, in time linear in the records and bounded memory.

A record has three, 64 bits each: of its id (`tts_` before it does not count: `prepare tts` puts it there), of its speech or, where it has
none, of its tokens, and of id and tokens together. A token store and its parts keep them in a file, `KEYS`, a row of three for each record.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import xxhash

from most_ray.records.record import Record

KEYS = "keys.bin"  # little-endian uint64 (records, 3)
ID, SPEECH, WHOLE = 0, 1, 2  # columns
ROW_BYTES = 24
COMPARED = 1 << 21  # keys of a column in memory; of more records those with the smallest keys are compared
_FEWEST_UNITS = 10  # of speech that is recognised: shorter ones may be equal by chance
_BLOCK = 1 << 16  # rows read at once


def id_key(record_id: str) -> int:
    """The key of an id."""
    return int(xxhash.xxh3_64_intdigest(record_id.removeprefix("tts_")))


def speech_key(record: Record, tokens: np.ndarray) -> int:
    """The key of a record's units, of whichever side; of its tokens where it has no speech; 0, which is equal to none, where the speech is
    short."""
    units = record.output if isinstance(record.input, str) else record.input
    if isinstance(units, str):
        return int(xxhash.xxh3_64_intdigest(tokens.data))
    return int(xxhash.xxh3_64_intdigest(units.data)) if len(units) >= _FEWEST_UNITS else 0


def share_compared(records: int) -> float:
    """The share of so many records whose keys are compared: all of them, or as many as `COMPARED`."""
    return min(1.0, COMPARED / max(1, records))


def read_keys(stream: BinaryIO, share: float, column: int) -> tuple[np.ndarray, np.ndarray]:
    """The smallest keys of a column, a share of all, ascending, and the rows that they belong to: uint64 and int64 (keys,). Equal keys are
    in the order of their rows."""
    most = np.uint64(min(2**64 - 1, int(share * 2**64)))
    found, rows, start = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], 0
    for block in _blocks(stream):
        keys = block[:, column]
        chosen = np.flatnonzero((keys <= most) & (keys != 0))
        found.append(keys[chosen])
        rows.append(chosen + start)
        start += len(block)
    keys, numbers = np.concatenate(found), np.concatenate(rows)
    order = np.argsort(keys, kind="stable")
    return keys[order], numbers[order]


def _blocks(stream: BinaryIO) -> Iterator[np.ndarray]:
    while content := stream.read(_BLOCK * ROW_BYTES):
        yield np.frombuffer(content[: len(content) // ROW_BYTES * ROW_BYTES], "<u8").reshape(-1, 3)


def repeated(keys: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows whose key an earlier row has, and for each the nearest such row. `keys`, `rows`: as of `read_keys`."""
    same = np.flatnonzero(keys[1:] == keys[:-1])
    return rows[same + 1], rows[same]


def among(keys: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which of the ascending `keys` are among the ascending `others`, bool (keys,)."""
    if not len(others):
        return np.zeros(len(keys), bool)
    return others[np.minimum(np.searchsorted(others, keys), len(others) - 1)] == keys
