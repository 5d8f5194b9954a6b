"""Files of a run that grow line by line (metrics, traces): appended as things happen, cut back to the step that a restart begins at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from most_ray import storage


class Journal:
    """JSON Lines with a "step" in each. Opening it at step k drops every line beyond k, and a last line cut off by a crash, so that
    after any number of restarts each step stands there once."""

    def __init__(self, path: Path, resume_step: int, ordered: bool = True) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not ordered:  # lines come as things end, not by step; there are few
            kept = [line for line in read_journal(path) if line["step"] <= resume_step]
            storage.write_bytes(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept).encode())
        keep = _length_up_to(path, resume_step)
        self._stream = path.open("ab")
        self._stream.truncate(keep)

    def write(self, line: dict[str, Any]) -> None:
        self._stream.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def _length_up_to(path: Path, step: int) -> int:
    """Bytes of the leading lines whose step is at most `step`."""
    length = 0
    if path.exists():
        with path.open("rb") as stream:
            for line in stream:
                try:
                    within = line.endswith(b"\n") and json.loads(line)["step"] <= step
                except (ValueError, KeyError, TypeError):
                    within = False
                if not within:
                    break
                length += len(line)
    return length


def read_journal(path: Path) -> list[dict[str, Any]]:
    """All whole lines."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines if line.strip()]
