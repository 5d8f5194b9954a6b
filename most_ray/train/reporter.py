"""What rank 0 records of a run: metrics.jsonl, the trace, and the trackers' copies of the metrics."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from most_ray.config import RunConfig, portable_yaml
from most_ray.data.batch import Batch
from most_ray.data.plan import Plan
from most_ray.errors import DataError
from most_ray.io import storage
from most_ray.io.journal import Journal, journal_lines
from most_ray.io.run_folder import RunFolder
from most_ray.metrics.schema import undeclared_keys
from most_ray.metrics.texts import exactness
from most_ray.metrics.totals import RunClock, clock_of
from most_ray.trackers.base import Tracker
from most_ray.train.step import all_record_ids

logger = logging.getLogger(__name__)
ATTEMPTS = "attempts"  # folder in the run's folder, with the configuration of each attempt


class RunReporter:
    """Rank 0 writes metrics.jsonl and the trace, and passes the lines to the trackers. On other ranks it writes nothing.

    Args:
        resume_step: the step that the run resumes from; later lines are cut off both files.
        about: the keys of the line of kind `start` (see docs/metrics.md).
        config: of this attempt, kept in the run's folder; None: it is not kept.

    Attributes:
        evaluations: the newest line of kind `evaluation` of each step.
        unpushed: steps whose evaluations are not at the run's URI yet, so that their checkpoints must stay.
    """

    def __init__(
        self,
        trace_records: str | None,
        plan: Plan,
        folder: RunFolder,
        resume_step: int,
        rank: int,
        trackers: Sequence[Tracker],
        about: dict[str, Any],
        config: RunConfig | None = None,
    ) -> None:
        self._plan, self._rank, self._folder, self._trackers = plan, rank, folder, trackers
        self._tracing, self._last = trace_records is not None, resume_step
        self._metrics = self._trace = None
        self.unpushed: set[int] = set()
        self._reported: set[str] = set()  # failures of trackers that have a line
        self._undeclared: set[str] = set()  # keys that were reported
        self._pushing = threading.Lock()  # saves push from their thread: two pushes at once could leave the older content
        self.evaluations: dict[int, dict[str, Any]] = {}
        self._clock = RunClock()
        if rank == 0:
            folder.pull("metrics.jsonl")
            self._metrics = Journal(path := folder.local / "metrics.jsonl", resume_step)
            self.evaluations = {line["step"]: line for line in self._metrics.evaluations}
            self._clock = clock_of(journal_lines(path, size=path.stat().st_size))
            if trace_records:
                self._trace = Journal(Path(trace_records), resume_step)
            epoch, consumed = plan.cursor(resume_step).epoch, plan.consumed(resume_step)
            exact = exactness(about["changed"], about.get("also_changed", ()))
            logger.info("starting after step %d, epoch %.3f, records %s, %s", resume_step, epoch, consumed, exact)
            for tracker in trackers:  # later lines come to them one by one
                tracker.begin(resume_step, journal_lines(path, size=path.stat().st_size))
            mix = {name: figures["target"] for name, figures in plan.mix(resume_step).items()}
            kept = {} if config is None else {"config": keep_config(folder, config)}
            self._write({"kind": "start", "step": resume_step, **about, **kept, "wanted_mix": mix})

    def trained(self, batch: Batch) -> None:
        """Write a step's records to the trace. Collective if the run is traced."""
        records = all_record_ids(batch) if self._tracing else []
        if self._trace:
            self._trace.write({"step": batch.step, "records": records})

    def log(self, line: dict[str, Any]) -> None:
        """Write a line of the meter."""
        if line["kind"] == "train" and self._metrics:
            totals = self._clock.add(line).keys()
            line = {**line, **totals, "epoch": round(self._plan.cursor(line["step"]).epoch, 6), "mix": self._plan.mix(line["step"])}
        self._write(line)

    def evaluation(self, line: dict[str, Any]) -> None:
        """Write a line of kind `evaluation`, or of kind `failure` if the evaluation failed."""
        self._write(line)
        if line["kind"] == "evaluation":
            self.evaluations[line["step"]] = line
            self.unpushed.add(line["step"])
        try:
            self.push()
        except DataError as error:  # the next save pushes again
            logger.warning("the evaluation of step %d is not on storage yet: %s", line["step"], error)

    def checkpoint(self, step: int, uri: str) -> None:
        """Pass a committed checkpoint to the trackers."""
        for tracker in self._trackers:
            tracker.checkpoint(step, uri)

    def _write(self, line: dict[str, Any]) -> None:
        if not self._metrics:
            return
        line = {"kind": line["kind"], "step": line["step"], "time": round(time.time(), 3), **line}
        self._last = line["step"]
        for key in (key for key in undeclared_keys(line) if key not in self._undeclared):
            self._undeclared.add(key)  # logged once; the line is written all the same: it is no reason to end a run
            logger.error("metrics.jsonl gets a key that is not declared in most_ray/metrics/schema.py: %s", key)
        self._metrics.write(line)
        for tracker in self._trackers:
            tracker.log(line)
        self._report_trackers(line["step"])

    def _report_trackers(self, step: int) -> None:
        """Write a line of kind `failure` for each tracker that has failed, once."""
        assert self._metrics is not None
        for tracker in self._trackers:
            if tracker.failure and tracker.failure not in self._reported:
                self._reported.add(tracker.failure)
                line = {"kind": "failure", "step": step, "time": round(time.time(), 3), "what": "tracking", "reason": tracker.failure}
                self._metrics.write(line)

    def push(self) -> None:
        """Copy metrics.jsonl to the run's URI. On rank 0, before a checkpoint is committed."""
        with self._pushing:
            pushed = set(self.unpushed)
            self._folder.push("metrics.jsonl")
            self.unpushed -= pushed

    def close(self, push: bool) -> None:
        """Close files and trackers. `push`: copy the last lines to the run's URI; not after a failure: another attempt may own the run."""
        for tracker in self._trackers if self._rank == 0 else ():
            tracker.close()
        if self._metrics:
            self._report_trackers(self._last)
        for journal in (self._metrics, self._trace):
            if journal:
                journal.close()
        if self._rank == 0 and push:
            self.push()


def keep_config(folder: RunFolder, config: RunConfig) -> str:
    """Write an attempt's configuration beside those of earlier attempts, none of which is replaced. Returns its name in the folder."""
    found = [entry.name for entry in storage.list_files(folder.at(ATTEMPTS), ("",))] if storage.exists(folder.at(ATTEMPTS)) else []
    numbers = [int(match[1]) for each in found if (match := re.fullmatch(r"(\d{1,9})\.yaml", each))]
    name = f"{ATTEMPTS}/{max(numbers, default=0) + 1:03d}.yaml"
    storage.write_bytes(folder.local / name, portable_yaml(config, folder.at(ATTEMPTS)).encode())
    folder.push(name)
    return name
