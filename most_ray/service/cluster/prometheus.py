"""A run's figures as Ray's metrics: rank 0's node exports them, Prometheus reads them there, under `ray_most_ray_*`.

Ray exports a gauge for 20 s after it was last set. So all are set anew every few seconds while the run lives, by a thread that a step which
hangs does not hold up; behind its end they vanish. All are gauges, the sums as well: a counter of Ray's is not there before its first
event, so that the first event could not be seen to be one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.util.metrics import Gauge

from most_ray.config import RunConfig
from most_ray.io import storage
from most_ray.io.journal import journal_lines

_REFRESH_S = 5.0  # half of Ray's interval between exports
ALL = "(all)"  # the tag of a figure over all tasks, or over all sets: no folder's name


@dataclass(frozen=True)
class Metric:
    """What a metric tells, with its unit, and by which tags beside `run`."""

    description: str
    tags: tuple[str, ...] = ()


METRICS: Mapping[str, Metric] = {
    "most_ray_step": Metric("Steps made"),
    "most_ray_total_steps": Metric("Steps that the run is to make"),
    "most_ray_epoch": Metric("Passes over the source that has been seen least"),
    "most_ray_starts": Metric("Times that the run was started or gone on with"),
    "most_ray_workers": Metric("Ranks"),
    "most_ray_last_step_timestamp_seconds": Metric("Unix time of the last line of training; of the start, before the first"),
    "most_ray_line_seconds": Metric("Seconds between the last two lines of training"),
    "most_ray_loss": Metric("Training loss in nats per supervised token, of a task or all", ("task",)),
    "most_ray_learning_rate": Metric("Learning rate of the last step"),
    "most_ray_gradient_norm": Metric("Euclidean norm of the gradient before clipping"),
    "most_ray_tokens_per_second": Metric("Tokens of all ranks per second"),
    "most_ray_step_seconds": Metric("Seconds per step"),
    "most_ray_data_wait_seconds": Metric("Seconds per step spent waiting for data, on rank 0"),
    "most_ray_mfu": Metric("Model FLOPs utilisation, 0 to 1"),
    "most_ray_memory_bytes": Metric("Most memory since the process began, on rank 0"),
    "most_ray_save_stall_seconds": Metric("Seconds in which checkpoints held up training, in the run so far"),
    "most_ray_skipped_steps": Metric("Steps not made as a loss or gradient was not finite, in the run so far"),
    "most_ray_leaked_selections": Metric("Selections of an expert by a token of the other modality, in the run so far"),
    "most_ray_mix_share": Metric("Share of a source in what was trained on, 0 to 1", ("source",)),
    "most_ray_mix_target": Metric("Share of a source that was asked for, 0 to 1", ("source",)),
    "most_ray_expert_max_over_mean": Metric("Busiest expert's load over its modality's mean, in the worst layer", ("modality",)),
    "most_ray_rank_load_max_over_mean": Metric("Busiest expert-parallel rank's load over the mean, in the worst layer"),
    "most_ray_wer": Metric("Word error rate of recognition, of a set or all, 0 to 1 and above", ("set",)),
    "most_ray_cycle_wer": Metric("Word error rate of the model's own speech as it recognises it, of a set or all", ("set",)),
    "most_ray_validation_loss": Metric("Validation loss in nats per supervised token, of a set or all", ("task", "set")),
    "most_ray_validation_perplexity": Metric("exp of the validation loss, of a set or all", ("task", "set")),
    "most_ray_evaluation_step": Metric("Step of the newest evaluation"),
    "most_ray_evaluation_seconds": Metric("Seconds that the newest evaluation took"),
    "most_ray_failed_evaluations": Metric("Evaluations that failed, in the run so far"),
    "most_ray_checkpoint_step": Metric("Step of the newest checkpoint"),
    "most_ray_checkpoint_timestamp_seconds": Metric("Unix time at which this start has committed its newest checkpoint"),
    "most_ray_checkpoints": Metric("Checkpoints committed since this start"),
}

_OF_A_LINE = {  # by key of a `train` line, see docs/metrics.md
    "step": "most_ray_step",
    "epoch": "most_ray_epoch",
    "learning_rate": "most_ray_learning_rate",
    "grad_norm": "most_ray_gradient_norm",
    "tokens_per_second": "most_ray_tokens_per_second",
    "step_time": "most_ray_step_seconds",
    "data_wait": "most_ray_data_wait_seconds",
    "mfu": "most_ray_mfu",
    "rank_load_max_over_mean": "most_ray_rank_load_max_over_mean",
}
_SUMS = {
    "save_stall": "most_ray_save_stall_seconds",
    "skipped_steps": "most_ray_skipped_steps",
    "leaked": "most_ray_leaked_selections",
}
_LOSSES = {"loss": ALL, "asr_loss": "asr", "tts_loss": "tts", "text_loss": "text"}


class RayMetrics:
    """A tracker that holds the newest of each figure; needs a process of Ray's around it."""

    failure: str | None = None  # it raises instead

    def __init__(self, config: RunConfig) -> None:
        self._run = storage.redact(config.name)
        self._gauges: dict[str, Gauge] = {}
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._changing = threading.Lock()  # of the values
        self._closed = threading.Event()
        self._sums = dict.fromkeys((*_SUMS.values(), "most_ray_starts", "most_ray_failed_evaluations"), 0.0)
        self._evaluated = -1
        self._line_time: float | None = None
        self._checkpoints = 0
        self._newest_start: float | None = None
        self._behind_it = self._counted_already = 0

    def begin(self, step: int, metrics: Path) -> None:
        self._gauges = {name: Gauge(name, metric.description, ("run", *metric.tags)) for name, metric in METRICS.items()}
        newest: dict[str, dict[str, Any]] = {}
        for line in journal_lines(metrics):
            self._count(line)
            newest[line.get("kind", "train")] = line
            if line.get("kind") == "start":
                self._newest_start, self._behind_it = line["time"], 0
            self._behind_it += (line.get("kind"), line.get("what")) != ("failure", "tracking")  # no tracker gets that one
        self._show_sums()
        self._set("most_ray_checkpoints", 0)
        if step:
            self._set("most_ray_checkpoint_step", step)
        if "train" in newest:
            self._show_training(newest["train"])
        if "evaluation" in newest:
            self._show_evaluation(newest["evaluation"])
        self._set("most_ray_step", step)
        self._set("most_ray_line_seconds", 0)
        self._set("most_ray_last_step_timestamp_seconds", time.time())
        threading.Thread(target=self._refresh, name="Ray's metrics", daemon=True).start()

    def log(self, line: dict[str, Any]) -> None:
        kind = line.get("kind", "train")
        if kind == "start" and line["time"] == self._newest_start:  # `begin` came late, and has found what this start had written
            self._counted_already = self._behind_it
        if self._counted_already:
            self._counted_already -= 1
        else:
            self._count(line)
        self._show_sums()
        if kind == "start":
            self._set("most_ray_total_steps", line.get("total_steps"))
            self._set("most_ray_workers", line.get("workers"))
        elif kind == "train":
            self._show_training(line)
            if self._line_time is not None:
                self._set("most_ray_line_seconds", line["time"] - self._line_time)
            self._line_time = line["time"]
            self._set("most_ray_last_step_timestamp_seconds", self._line_time)
        elif kind == "evaluation":
            self._show_evaluation(line)

    def checkpoint(self, step: int, uri: str) -> None:
        del uri
        self._checkpoints += 1
        self._set("most_ray_checkpoints", self._checkpoints)
        self._set("most_ray_checkpoint_step", step)
        self._set("most_ray_checkpoint_timestamp_seconds", time.time())

    def close(self) -> None:
        """The figures vanish soon."""
        self._closed.set()

    def _count(self, line: Mapping[str, Any]) -> None:
        for key, name in _SUMS.items():
            self._sums[name] += line.get(key) or 0
        self._sums["most_ray_starts"] += line.get("kind") == "start"
        self._sums["most_ray_failed_evaluations"] += line.get("kind") == "failure" and line.get("what") == "evaluation"

    def _show_sums(self) -> None:
        for name, value in self._sums.items():
            self._set(name, value)

    def _show_training(self, line: Mapping[str, Any]) -> None:
        for key, name in _OF_A_LINE.items():
            self._set(name, line.get(key))
        for key, task in _LOSSES.items():
            self._set("most_ray_loss", line.get(key), task=task)
        if line.get("memory_gb") is not None:
            self._set("most_ray_memory_bytes", line["memory_gb"] * 1e9)
        for source, part in line.get("mix", {}).items():
            self._set("most_ray_mix_share", part["share"], source=source)
            self._set("most_ray_mix_target", part["target"], source=source)
        for modality, ratio in line.get("expert_max_over_mean", {}).items():
            self._set("most_ray_expert_max_over_mean", ratio, modality=modality)

    def _show_evaluation(self, line: Mapping[str, Any]) -> None:
        if line["step"] < self._evaluated:
            return  # that of an earlier step has taken longer
        self._evaluated = line["step"]
        self._set("most_ray_evaluation_step", line["step"])
        self._set("most_ray_evaluation_seconds", line.get("seconds"))
        sections = [(name.partition("/")[2], figures) for name, figures in line.get("sets", {}).items()]
        for name, figures in [*sections, *((ALL, figures) for figures in line.get("overall", {}).values())]:
            self._set("most_ray_wer", (figures.get("words") or {}).get("rate"), set=name)
            self._set("most_ray_cycle_wer", (figures.get("cycle") or {}).get("rate"), set=name)
            self._set("most_ray_validation_loss", figures.get("loss"), task=figures["task"], set=name)
            self._set("most_ray_validation_perplexity", figures.get("perplexity"), task=figures["task"], set=name)

    def _set(self, name: str, value: float | None, **tags: str) -> None:
        """A figure that is none (null in metrics.jsonl) leaves the one before."""
        if value is not None:
            with self._changing:
                self._values[name, (("run", self._run), *tags.items())] = float(value)
                self._gauges[name].set(float(value), {"run": self._run, **tags})

    def _refresh(self) -> None:
        while not self._closed.wait(_REFRESH_S):
            with self._changing:
                for (name, tags), value in self._values.items():
                    self._gauges[name].set(value, dict(tags))
