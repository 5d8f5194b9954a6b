"""What trackers have kept of a run, read back from their own files."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from most_ray.metrics.rows import _log_records


def wandb_rows(run: Path) -> list[dict[str, Any]]:
    """The history of all local files by the library's own messages, in order."""
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


def times_logged(rows: list[dict[str, Any]]) -> dict[str, Counter[int]]:
    """By metric, how often it was logged for each of its steps."""
    found: dict[str, Counter[int]] = {}
    for row in rows:
        axis = next((axis for axis in ("train/step", "layers/step", "eval/step") if axis in row), None)
        for name in row if axis else ():
            if not name.startswith("_"):
                found.setdefault(name, Counter())[row[axis]] += 1
    return found
