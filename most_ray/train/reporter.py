"""What a run writes down while it lives: metrics.jsonl and the trace; by rank 0."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from most_ray.data.batch import Batch
from most_ray.data.plan import Plan
from most_ray.distributed.ranks import world_size
from most_ray.errors import DataError
from most_ray.io.journal import Journal
from most_ray.io.run_folder import RunFolder
from most_ray.trackers.base import Tracker

logger = logging.getLogger(__name__)


class RunReporter:
    """Rank 0 writes metrics.jsonl and the trace, and hands the lines to the trackers.

    Args:
        about: what a line of kind `start` says of this attempt (see docs/metrics.md).

    held: steps whose evaluations are not on storage yet, so that their checkpoints must stay.
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
    ) -> None:
        self._plan, self._rank, self._folder, self._trackers = plan, rank, folder, trackers
        self._tracing = trace_records is not None
        self._metrics = self._trace = None
        self.held: set[int] = set()
        self._told: set[str] = set()
        self._last = resume_step
        self._pushing = threading.Lock()  # a save's thread pushes too: what was read first must not be written last
        self.evaluations: dict[int, dict[str, Any]] = {}
        if rank == 0:
            folder.pull("metrics.jsonl")
            path = folder.local / "metrics.jsonl"
            self._metrics = Journal(path, resume_step)
            self.evaluations = {line["step"]: line for line in self._metrics.evaluations}
            if trace_records:
                self._trace = Journal(Path(trace_records), resume_step)
            epoch, consumed = plan.cursor(resume_step).epoch, plan.consumed(resume_step)
            exact = "yes" if about["exact"] else f"no, changed since: {', '.join(about['changed'])}"
            logger.info("starting after step %d, epoch %.3f, records %s, exact: %s", resume_step, epoch, consumed, exact)
            for tracker in trackers:
                tracker.begin(resume_step, path)
            mix = {name: figures["target"] for name, figures in plan.mix(resume_step).items()}
            self._write({"kind": "start", "step": resume_step, **about, "wanted_mix": mix})

    def trained(self, batch: Batch) -> None:
        if not self._tracing:
            return
        ids = [batch.record_ids]
        if world_size() > 1:
            ids = [[] for _ in range(world_size())] if self._rank == 0 else []
            dist.gather_object(batch.record_ids, ids if self._rank == 0 else None, dst=0)
        if self._trace:
            self._trace.write({"step": batch.step, "records": sorted(itertools.chain.from_iterable(ids))})

    def log(self, line: dict[str, Any]) -> None:
        """A line that the meter has made."""
        if line["kind"] == "train" and self._metrics:
            line = {**line, "epoch": round(self._plan.cursor(line["step"]).epoch, 6), "mix": self._plan.mix(line["step"])}
        self._write(line)

    def evaluation(self, line: dict[str, Any]) -> None:
        """A line of kind `evaluation`, or `failure` of one."""
        self._write(line)
        if line["kind"] == "evaluation":
            self.evaluations[line["step"]] = line
            self.held.add(line["step"])
        try:
            self.push()
        except DataError as error:  # storage may come back: the next save, which needs it too, pushes again
            logger.warning("the evaluation of step %d is not on storage yet: %s", line["step"], error)

    def checkpoint(self, step: int, uri: str) -> None:
        for tracker in self._trackers:
            tracker.checkpoint(step, uri)

    def _write(self, line: dict[str, Any]) -> None:
        if self._metrics:
            line = {"kind": line["kind"], "step": line["step"], "time": round(time.time(), 3), **line}
            self._last = line["step"]
            self._metrics.write(line)
            for tracker in self._trackers:
                tracker.log(line)
            self._tell_failures(line["step"])

    def _tell_failures(self, step: int) -> None:
        """A line, once, of each tracker that has failed."""
        assert self._metrics is not None
        for tracker in self._trackers:
            if tracker.failure and tracker.failure not in self._told:
                self._told.add(tracker.failure)
                line = {"kind": "failure", "step": step, "time": round(time.time(), 3), "what": "tracking", "reason": tracker.failure}
                self._metrics.write(line)

    def push(self) -> None:
        """Bring what was written so far to the run's place; by rank 0, before a checkpoint counts."""
        with self._pushing:
            held = set(self.held)
            self._folder.push("metrics.jsonl")
            self.held -= held

    def close(self, push: bool) -> None:
        """`push`: bring the last lines to the run's place. Not after a failure: the run may be another attempt's by now."""
        for tracker in self._trackers if self._rank == 0 else ():
            tracker.close()
        if self._metrics:
            self._tell_failures(self._last)
        for journal in (self._metrics, self._trace):
            if journal:
                journal.close()
        if self._rank == 0 and push:
            self.push()
