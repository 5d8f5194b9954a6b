"""What a run writes down while it lives: metrics, evaluations, the trace; by rank 0."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from most_ray.data.batch import Batch
from most_ray.data.plan import Plan
from most_ray.train.folder import RunFolder
from most_ray.train.journal import Journal, read_journal
from most_ray.train.ranks import world_size

logger = logging.getLogger(__name__)


class RunReporter:
    """Rank 0 writes metrics.jsonl, evaluations.jsonl and the trace, and hands the lines to the trackers."""

    def __init__(
        self,
        trace_records: str | None,
        plan: Plan,
        folder: RunFolder,
        resume_step: int,
        rank: int,
        trackers: Sequence[Any],
        accepted: Sequence[str],
    ) -> None:
        self._plan, self._rank, self._folder, self._trackers = plan, rank, folder, trackers
        self._tracing = trace_records is not None
        self._metrics = self._trace = self._evaluations = None
        if rank == 0:
            folder.pull("metrics.jsonl", "evaluations.jsonl")
            self._metrics = Journal(folder.local / "metrics.jsonl", resume_step)
            self._evaluations = Journal(folder.local / "evaluations.jsonl", resume_step, ordered=False)
            if trace_records:
                self._trace = Journal(Path(trace_records), resume_step)
            epoch, consumed = plan.cursor(resume_step).epoch, plan.consumed(resume_step)
            exact = f"no, changed since: {', '.join(accepted)}" if accepted else "yes"
            logger.info("starting after step %d, epoch %.3f, records %s, exact: %s", resume_step, epoch, consumed, exact)

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
        if self._metrics:
            line = {**line, "epoch": round(self._plan.cursor(line["step"]).epoch, 6), "mix": self._plan.mix(line["step"])}
            self._metrics.write(line)
            for tracker in self._trackers:
                tracker.log(line)

    def evaluation(self, step: int, wer: dict[str, float], losses: dict[str, float]) -> None:
        line = {"step": step, "wer": wer, "validation_loss": losses}
        if self._evaluations:
            self._evaluations.write(line)
            for tracker in self._trackers:
                tracker.log(line)

    def evaluated(self) -> dict[int, dict[str, Any]]:
        """Lines of evaluations.jsonl by step."""
        return {line["step"]: line for line in read_journal(self._folder.local / "evaluations.jsonl")}

    def push(self) -> None:
        """Bring what was written so far to the run's place; by rank 0, before a checkpoint counts."""
        self._folder.push("metrics.jsonl", "evaluations.jsonl")

    def close(self, push: bool) -> None:
        """`push`: bring the last lines to the run's place. Not after a failure: the run may be another attempt's by now."""
        for journal in (self._metrics, self._trace, self._evaluations):
            if journal:
                journal.close()
        if self._rank == 0:
            if push:
                self.push()
            for tracker in self._trackers:
                tracker.close()
