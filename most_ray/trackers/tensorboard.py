"""TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from most_ray.io import storage
from most_ray.io.run_folder import RunFolder
from most_ray.metrics.rows import AXES, kind_of, row_of
from most_ray.metrics.schema import EVALUATION
from most_ray.trackers.base import SAMPLE_COLUMNS, Line, push_files, sample_cells

_GROWTH = 1.25  # of the event file before it is copied to the run's URI again, so that all copies together are a few times its size


def _markdown(samples: list[dict[str, Any]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in sample_cells(sample)] for sample in samples]
    return "\n".join(f"| {' | '.join(row)} |" if row else "|---|---|---|---|" for row in (SAMPLE_COLUMNS, (), *cells))


class TensorBoard:
    """An event file in the run's folder, with the names of W&B. Each start writes all lines of metrics.jsonl to a file of its own, which
    begins with a session start at step 0: TensorBoard then drops what it has read from older files. So no line is missing or shown twice,
    whatever a kill took from the older files."""

    failure: str | None = None  # it raises instead

    def __init__(self, run_uri: str) -> None:
        self._folder = RunFolder(run_uri)
        self._root = self._folder.local / "tensorboard"
        self._suffix = ""  # of this start's file
        self._start: Line = {}
        self._pushed = 0  # size of what was copied to the run's URI
        self._is_first_push = True
        self._writer: Any = None

    def begin(self, step: int, lines: Iterable[Line]) -> None:
        from tensorboardX import SummaryWriter  # heavy, and used by few runs

        del step  # the lines are those up to it
        self._root.mkdir(parents=True, exist_ok=True)
        self._suffix = f".{time.time_ns()}"  # otherwise two starts within a second would write to one file
        self._writer = SummaryWriter(logdir=str(self._root), purge_step=0, flush_secs=10, filename_suffix=self._suffix)
        for line in lines:
            self.log(line)
        self._writer.flush()
        self._empty_older(str(self._root))

    def log(self, line: Line) -> None:
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.summary import text

        kind = kind_of(line)
        if kind == "start":
            self._start = line
        if kind not in AXES:
            return
        values = [Summary.Value(tag=name, simple_value=value) for name, value in row_of(line, self._start).items()]
        if kind == "evaluation" and line.get("samples"):
            values += text(EVALUATION["samples"].tracker, _markdown(line["samples"])).value
        self._writer.file_writer.add_summary(Summary(value=values), line["step"], line.get("time"))

    def checkpoint(self, step: int, uri: str) -> None:
        del step, uri
        size = sum(path.stat().st_size for path in self._root.iterdir())
        if size > _GROWTH * self._pushed:
            self._pushed = size
            self._push()

    def close(self) -> None:
        if self._writer:
            self._writer.close()
            self._push()

    def _push(self) -> None:
        push_files(self._folder, "tensorboard")
        if self._folder.remote and self._is_first_push:
            self._is_first_push = False
            self._empty_older(self._folder.at("tensorboard"))

    def _empty_older(self, folder: str) -> None:
        """Empty the files of earlier starts, and delete those that are empty already: a running TensorBoard goes to the next file when the
        one that it reads is empty, but not when it is gone."""
        for entry in storage.list_files(folder, ("",)):
            if entry.name.endswith(self._suffix):
                continue
            if entry.size:
                storage.write_bytes(entry.uri, b"")
            else:
                storage.remove(entry.uri)
