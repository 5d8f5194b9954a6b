"""What trackers have kept of a run, read from their own files; and a stand-in for W&B's server."""

from __future__ import annotations

import contextlib
import json
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from google.protobuf.message import DecodeError

_BLOCK = 32768  # bytes, of LevelDB's log format


def wandb_rows(run: Path) -> list[dict[str, Any]]:
    """The history of all offline files by the library's own messages, in order."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for data in _log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            with contextlib.suppress(DecodeError):  # where a killed writer was torn off
                record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
    return rows


def _log_records(data: bytes, start: int = 7) -> Iterator[bytes]:
    """The records after a header of `start` bytes (https://github.com/google/leveldb/blob/main/doc/log_format.md): blocks of chunks of
    checksum, length and type (1: whole; 2, 3, 4: first, middle, last)."""
    parts: list[bytes] = []
    while start + 7 <= len(data):
        room = _BLOCK - start % _BLOCK
        if room < 7:  # filled up with zeros
            start += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, start)
        chunk = data[start + 7 : start + 7 + length]
        start += 7 + length
        if kind in (1, 2):
            parts.clear()
        parts.append(chunk)
        if kind in (1, 4) and len(chunk) == length:
            yield b"".join(parts)


def times_logged(rows: list[dict[str, Any]]) -> dict[str, Counter[int]]:
    """By metric, how often it was logged for each of its steps."""
    found: dict[str, Counter[int]] = {}
    for row in rows:
        axis = next((axis for axis in ("train/step", "layers/step", "eval/step") if axis in row), None)
        for name in row if axis else ():
            if not name.startswith("_"):
                found.setdefault(name, Counter())[row[axis]] += 1
    return found


class WandbServer:
    """A run in W&B: `begin` stands for `wandb.init(resume="allow")`, and rows arrive in the order in which they were sent."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self._sent: list[tuple[int, dict[str, Any]]] = []

    def begin(self, folder: Path) -> SimpleNamespace:
        """A new start of the run; rows that were sent and have not arrived are lost."""
        self._sent = []
        step = self.rows[-1][0] + 1 if self.rows else 0
        summary = {name: value for _, row in self.rows for name, value in row.items()}
        folder.mkdir(parents=True, exist_ok=True)
        nothing = SimpleNamespace(update=lambda *_, **__: None)
        return SimpleNamespace(
            step=step, summary=summary, config=nothing, dir=str(folder / "files"), log=self._log, define_metric=lambda *_, **__: None
        )

    def _log(self, row: dict[str, Any], step: int, commit: bool) -> None:
        known = [*self.rows, *self._sent]
        assert commit and (not known or step > known[-1][0]), "W&B would drop this row"
        self._sent.append((step, row))

    def arrive(self, count: int | None = None) -> None:
        """The first `count` rows that were sent reach the server; None: all."""
        count = len(self._sent) if count is None else count
        self.rows += self._sent[:count]
        self._sent = self._sent[count:]


def event_records(data: bytes) -> Iterator[bytes]:
    """The whole records of a TFRecord file: length (8 bytes), its checksum (4), the data, its checksum (4)."""
    start = 0
    while start + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        if start + 16 + length > len(data):
            return
        yield data[start + 12 : start + 12 + length]
        start += 16 + length


def shown_by_tensorboard(run: Path) -> Counter[tuple[str, int]]:
    """The tags and steps that TensorBoard would show: a session that starts at a step hides what came before it, from this step on."""
    from tensorboardX.proto import event_pb2

    shown: list[tuple[str, int]] = []
    for path in sorted(run.glob("tensorboard/events.*")):
        for data in event_records(path.read_bytes()):
            event = event_pb2.Event.FromString(data)
            if event.session_log.status == event_pb2.SessionLog.START:
                shown = [(tag, step) for tag, step in shown if step < event.step]
            shown += [(value.tag, event.step) for value in event.summary.value]
    return Counter(shown)
