"""TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from most_ray.io.journal import journal_lines
from most_ray.io.run_folder import RunFolder
from most_ray.metrics.rows import AXES, Key, exchange, key_of, lines_in_event_files, row_of

_GROWTH = 1.25  # of TensorBoard's files before they go to the run's place again: all in all a few times their size


def _markdown(samples: list[dict[str, Any]]) -> str:
    def cell(value: object) -> str:
        return str(value).replace("|", "\\|").replace("\n", " ")

    columns = ("set", "id", "reference", "hypothesis")
    rows = ["| " + " | ".join(cell(sample.get(name, "")) for name in columns) + " |" for sample in samples]
    return "\n".join(["| " + " | ".join(columns) + " |", "|---|---|---|---|", *rows])


class TensorBoard:
    """Event files in the run's folder, under the names that W&B has. A start at step k hides what older files hold beyond it; lines up to
    it that a kill took from them are written again."""

    failure: str | None = None  # it raises instead

    def __init__(self, run_uri: str) -> None:
        self._folder = RunFolder(run_uri)
        self._root = self._folder.local / "tensorboard"
        self._start: Mapping[str, Any] = {}
        self._logged: set[Key] = set()
        self._pushed = 0
        self._writer: Any = None

    def begin(self, step: int, metrics: Path) -> None:
        from tensorboardX import SummaryWriter  # heavy, and used by few runs

        exchange(self._folder, "tensorboard")
        self._root.mkdir(parents=True, exist_ok=True)
        self._logged = {key for key in lines_in_event_files(self._root) if key[1] <= step}
        # Two starts within a second would otherwise write to one file.
        suffix = f".{time.time_ns()}"
        self._writer = SummaryWriter(logdir=str(self._root), purge_step=step + 1, flush_secs=10, filename_suffix=suffix)
        for line in journal_lines(metrics):
            self.log(line)

    def log(self, line: dict[str, Any]) -> None:
        kind, step = key = key_of(line)
        if kind == "start":
            self._start = line
        if kind not in AXES or key in self._logged:
            return
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.summary import text

        values = [Summary.Value(tag=name, simple_value=value) for name, value in row_of(line, self._start).items()]
        if kind == "evaluation" and line.get("samples"):
            values += text("eval/samples", _markdown(line["samples"])).value
        self._writer.file_writer.add_summary(Summary(value=values), step, line.get("time"))
        self._logged.add(key)

    def checkpoint(self, step: int, uri: str) -> None:
        del step, uri
        size = sum(path.stat().st_size for path in self._root.iterdir())
        if size > _GROWTH * self._pushed:
            self._pushed = size
            exchange(self._folder, "tensorboard")

    def close(self) -> None:
        if self._writer:
            self._writer.close()
            exchange(self._folder, "tensorboard")
