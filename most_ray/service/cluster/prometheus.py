"""A run's newest metrics as gauges of Ray: rank 0's node exports them, and Prometheus reads them there as `ray_most_ray_*`.

Names, help texts and tags are declared in `metrics.schema`. Ray exports a gauge for 20 s after it was last set. So a thread sets all of
them every few seconds while the run lives, also while a step hangs; after the run's end they vanish. Totals are gauges too: Ray's counters
do not exist before their first event, so that this event could not be seen as an increase.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping

from ray.util.metrics import Gauge as RayGauge

from most_ray.config import RunConfig
from most_ray.errors import one_line, printable
from most_ray.io import storage
from most_ray.metrics.keys import Gauge, Key, Parts, leaves, nested
from most_ray.metrics.rows import kind_of
from most_ray.metrics.schema import ALL, KINDS
from most_ray.trackers.base import Line

logger = logging.getLogger(__name__)
_TAG = 255  # characters of a tag's value
_REFRESH_S = 5.0  # half of Ray's interval between exports
_EVENTS = (  # gauges that follow from events instead of a key of a line
    Gauge("most_ray_starts", "Times that the run was started or resumed"),
    Gauge("most_ray_failed_evaluations", "Evaluations that failed, in the run so far"),
    Gauge("most_ray_last_step_timestamp_seconds", "Unix time of the last line of training; of the start, before the first"),
    Gauge("most_ray_line_seconds", "Seconds between the last two lines of training"),
    Gauge("most_ray_checkpoint_step", "Step of the newest checkpoint"),
    Gauge("most_ray_checkpoint_timestamp_seconds", "Unix time at which this start has committed its newest checkpoint"),
    Gauge("most_ray_checkpoints", "Checkpoints committed since this start"),
)
_OF_KEYS = [key.gauge for keys in KINDS.values() for key in nested(keys) if key.gauge]
METRICS: Mapping[str, Gauge] = {gauge.name: gauge for gauge in (*_EVENTS, *_OF_KEYS)}


class RayMetrics:
    """A tracker that exports the newest value of each metric; it needs a process of Ray."""

    failure: str | None = None  # it raises instead

    def __init__(self, config: RunConfig) -> None:
        self._run = tag_value(storage.redact(config.name))
        self._gauges: dict[str, RayGauge] = {}
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._changing = threading.Lock()  # of the values
        self._closed = threading.Event()
        self._totals = {name: 0.0 for name, gauge in METRICS.items() if gauge.total}
        self._totals |= {"most_ray_starts": 0.0, "most_ray_failed_evaluations": 0.0}
        self._evaluated = -1  # step of the newest evaluation
        self._line_time: float | None = None
        self._checkpoints = 0
        self._failed: set[str] = set()  # names of gauges that could not be set

    def begin(self, step: int, lines: Iterable[Line]) -> None:
        self._gauges = {name: RayGauge(name, gauge.description, ("run", *gauge.tags)) for name, gauge in METRICS.items()}
        newest: dict[str, Line] = {}
        for line in lines:
            self._count(line)
            newest[kind_of(line)] = line
        self._set_all(self._totals)
        self._set_all({"most_ray_checkpoints": 0, "most_ray_checkpoint_step": step or None})
        for kind in ("train", "evaluation"):
            if kind in newest:
                self._show(newest[kind])
        self._set_all({"most_ray_step": step, "most_ray_line_seconds": 0, "most_ray_last_step_timestamp_seconds": time.time()})
        threading.Thread(target=self._refresh, name="Ray's metrics", daemon=True).start()

    def log(self, line: Line) -> None:
        self._count(line)
        self._set_all(self._totals)
        self._show(line)
        if kind_of(line) == "train":
            if self._line_time is not None:
                self._set("most_ray_line_seconds", line["time"] - self._line_time)
            self._line_time = line["time"]
            self._set("most_ray_last_step_timestamp_seconds", line["time"])

    def checkpoint(self, step: int, uri: str) -> None:
        del uri
        self._checkpoints += 1
        self._set_all({"most_ray_checkpoints": self._checkpoints, "most_ray_checkpoint_step": step})
        self._set("most_ray_checkpoint_timestamp_seconds", time.time())

    def close(self) -> None:
        """Stop exporting."""
        self._closed.set()

    def _count(self, line: Line) -> None:
        """Add a line to the totals."""
        for name, key in KINDS.get(kind_of(line), {}).items():
            if key.gauge and key.gauge.total:
                self._totals[key.gauge.name] += line.get(name) or 0
        self._totals["most_ray_starts"] += line.get("kind") == "start"
        self._totals["most_ray_failed_evaluations"] += line.get("kind") == "failure" and line.get("what") == "evaluation"

    def _set_all(self, values: Mapping[str, float | None]) -> None:
        for name, value in values.items():
            self._set(name, value)

    def _show(self, line: Line) -> None:
        """Set the gauges of a line's keys, unless the line is of an evaluation that took longer than one of a later step."""
        if kind_of(line) == "evaluation":
            if line["step"] < self._evaluated:
                return
            self._evaluated = line["step"]
        for key, parts, value in leaves(line, KINDS.get(kind_of(line), {})):
            if key.gauge and not key.gauge.total:
                number = value.get(key.type.number) if isinstance(value, dict) else value
                self._set(key.gauge.name, number, **_tags(key, parts))

    def _set(self, name: str, value: float | None, **tags: str) -> None:
        """Set a gauge. A value that is null in metrics.jsonl leaves the one before."""
        if value is not None:
            value *= METRICS[name].scale
            with self._changing:
                key = (name, (("run", self._run), *((tag, tag_value(text)) for tag, text in tags.items())))
                self._values[key] = float(value)
                self._export(*key)

    def _export(self, name: str, tags: tuple[tuple[str, str], ...]) -> None:
        """Give Ray a gauge's value. A failure is logged once for each gauge, and ends no other one."""
        try:
            self._gauges[name].set(self._values[name, tags], dict(tags))
        except Exception as error:  # noqa: BLE001 - whatever Ray refuses
            if name not in self._failed:
                logger.warning("%s is not exported to Prometheus: %s", name, one_line(error))
            self._failed.add(name)

    def _refresh(self) -> None:
        while not self._closed.wait(_REFRESH_S):
            with self._changing:
                for name, tags in self._values:
                    self._export(name, tags)


def tag_value(text: str) -> str:
    """A text as Ray takes it for the value of a tag: at most 255 printable ASCII characters, with escapes (`\\u6570`) for others."""
    safe = printable(text).encode("ascii", "backslashreplace").decode()
    return safe if len(safe) <= _TAG else f"{safe[: _TAG // 2 - 2]}...{safe[-_TAG // 2 + 2 :]}"


def _tags(key: Key, parts: Parts) -> dict[str, str]:
    """The tags of a gauge's value. Figures of an evaluation are of a set, task/SET, or of all sets of a task, TASK."""
    assert key.gauge is not None
    if "set" in key.gauge.tags:
        task, slash, name = parts[0].partition("/")
        known = {"task": task, "set": name if slash else ALL}
        return {tag: known[tag] for tag in key.gauge.tags}
    return {tag: key.labels.get(tag) or parts[0] for tag in key.gauge.tags}
