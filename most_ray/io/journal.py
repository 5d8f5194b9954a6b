"""Files of a run that grow line by line (metrics, traces): appended as things happen, cut back to the step that a restart begins at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

EVALUATION = b'"kind": "evaluation"'  # lines that come when an evaluation ends: behind lines of steps after their own


class Journal:
    """JSON Lines with a "step" in each, ascending but for those of evaluations. Opening it at step k drops every line beyond k, and a last
    line cut off by a crash, so that after any number of restarts each step stands there once.

    evaluations: the evaluations' lines that stayed.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        keep, self.evaluations, moved = _up_to(path, resume_step)
        if moved:  # evaluations of steps that stay, among lines that go: in one move, so that a kill now loses none
            temporary = path.with_name(f".{path.name}.tmp")
            with path.open("rb") as source, temporary.open("wb") as target:
                _copy(source, target, keep)
                target.writelines(moved)
            temporary.replace(path)
            keep += sum(map(len, moved))
        self._stream = path.open("ab")
        self._stream.truncate(keep)

    def write(self, line: dict[str, Any]) -> None:
        self._stream.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def _up_to(path: Path, step: int) -> tuple[int, list[dict[str, Any]], list[bytes]]:
    """Bytes of the leading lines whose step is at most `step`; the evaluations' lines that stay; those of them behind the leading lines."""
    length, evaluations, moved, leading = 0, [], [], True
    if not path.exists():
        return 0, [], []
    with path.open("rb") as stream:
        for raw in stream:
            if not leading and EVALUATION not in raw:
                continue
            line = decoded(raw)
            within = line is not None and line["step"] <= step
            leading = leading and within
            length += len(raw) if leading else 0
            if line and within and line.get("kind") == "evaluation":
                evaluations.append(line)
            if within and not leading:
                moved.append(raw)
    return length, evaluations, moved


def decoded(raw: bytes) -> dict[str, Any] | None:
    """A whole line with a step; None: it is none, as a kill or a full disk may leave it."""
    try:
        line = json.loads(raw) if raw.endswith(b"\n") else None
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def _copy(source: Any, target: Any, size: int) -> None:
    while size > 0:
        block = source.read(min(size, 1 << 20))
        target.write(block)
        size -= len(block)


def read_journal(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """All whole lines; of one kind: `kind`."""
    lines = [decoded(raw) for raw in path.read_bytes().splitlines(keepends=True)] if path.exists() else []
    return [line for line in lines if line and kind in (None, line.get("kind"))]


def parse_lines(content: bytes) -> list[dict[str, Any]]:
    """The objects of JSON Lines, with a step or without, but for lines that are torn or are none."""
    found = []
    for line in content.split(b"\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
