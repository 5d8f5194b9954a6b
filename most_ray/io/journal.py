"""Files of a run that grow line by line (metrics, traces): appended to while training, cut back to the step that a restart resumes from."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from most_ray.io import storage
from most_ray.io.json_values import json_text, parse_line, parse_lines, read_lines
from most_ray.io.outputs import Kind, begins_with, named
from most_ray.io.run_folder import RunFolder

# First lines of the journals. (In metrics of earlier versions the step may come first.)
TRACE = Kind("trace", begins_with(rb'\{"step": ?\d+, ?"records": ?\['))
METRICS = Kind("run's metrics.jsonl", begins_with(rb'\{"kind": ?"|\{"step": ?\d[^\n]*"kind": ?"'))
_TAIL = 200  # bytes by which `Follower` recognises its position: those of a line of metrics hold the step and the time


class Journal:
    """JSON Lines with a "step" in each. Steps ascend, except in lines of kind `evaluation`: those are written when the evaluation ends,
    after lines of later steps. Opening the file at step k drops every line beyond k and a last line that a crash cut off. So each step has
    its lines once, after any number of restarts; `evaluations` are the lines of that kind which stayed.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        keep, self.evaluations, moved = _up_to(path, resume_step)
        if moved:  # evaluations that stay, among lines that go: replaced in one move, so that a kill at this moment loses none
            temporary = path.with_name(f".{path.name}.tmp")
            shutil.copyfile(path, temporary)
            with temporary.open("ab") as target:
                target.truncate(keep)
                target.writelines(moved)
            temporary.replace(path)
            keep += sum(map(len, moved))
        self._path, self._stream = path, path.open("ab")
        self._stream.truncate(keep)

    def write(self, line: dict[str, Any]) -> None:
        """Append a line; it survives the end of this process at once."""
        with named(self._path):
            self._stream.write(json_text(line).encode() + b"\n")
            self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def _up_to(path: Path, step: int) -> tuple[int, list[dict[str, Any]], list[bytes]]:
    """What stays of a file that is cut back to a step: the bytes of its leading lines whose step is at most `step`; all evaluations of such
    steps; those lines of them that come later than the leading lines."""
    length, evaluations, moved, leading = 0, [], [], True
    with path.open("rb") if path.exists() else contextlib.nullcontext(()) as lines:
        for raw in lines:
            line = parse_line(raw) if raw.endswith(b"\n") else None
            within = line is not None and _has_step(line) and line["step"] <= step
            leading = leading and within
            length += len(raw) if leading else 0
            if line and within and line.get("kind") == "evaluation":
                evaluations.append(line)
                moved += [] if leading else [raw]
    return length, evaluations, moved


def _has_step(line: Mapping[str, Any]) -> bool:
    return isinstance(line.get("step"), int)


def journal_lines(path: Path, kind: str | None = None, size: int | None = None) -> Iterator[dict[str, Any]]:
    """The whole lines that have a step, one at a time; with `kind`, those of this kind; with `size`, those of the first so many bytes."""
    return (line for line in read_lines(path, size) if _has_step(line) and kind in (None, line.get("kind")))


def read_journal(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """`journal_lines` as a list."""
    return list(journal_lines(path, kind))


def evaluated_steps(folder: RunFolder) -> set[int]:
    """The steps whose evaluations are in a run's metrics.jsonl. Not for a run that is being trained: the local copy is replaced."""
    folder.pull("metrics.jsonl")
    return {line["step"] for line in journal_lines(folder.local / "metrics.jsonl", "evaluation")}


class Follower:
    """Reads a journal that another process appends to, and cuts back when the run is restarted.

    The file may be missing. With `only_new`, what is in it now is skipped, and after a cut reading continues at its new end; otherwise it
    is read from its beginning, and after a cut once more.
    """

    def __init__(self, uri: str, only_new: bool = False) -> None:
        self._uri, self._only_new = uri, only_new
        self._position, self._tail = 0, b""  # bytes that were read, and the last of them
        if only_new and storage.exists(uri):
            with storage.open_read(uri) as stream:
                self._restart(stream)

    def new_lines(self) -> list[dict[str, Any]]:
        """The lines, with a step each, that were completed since the call before."""
        try:
            with storage.open_read(self._uri) as stream:
                stream.seek(self._position - len(self._tail))
                if stream.read(len(self._tail)) != self._tail:  # the file was cut back
                    self._restart(stream)
                content = stream.read()
        except FileNotFoundError:
            return []
        content = content[: content.rfind(b"\n") + 1]
        self._position += len(content)
        self._tail = (self._tail + content)[-_TAIL:]
        return [line for line in parse_lines(content) if _has_step(line)]

    def _restart(self, stream: BinaryIO) -> None:
        """Set the position to the end of the file where only new lines count, else to its beginning."""
        self._position = stream.seek(0, io.SEEK_END if self._only_new else io.SEEK_SET)
        stream.seek(max(0, self._position - _TAIL))
        self._tail = stream.read(min(_TAIL, self._position))
