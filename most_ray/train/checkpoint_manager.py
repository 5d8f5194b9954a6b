"""When a run saves, evaluates and deletes checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from most_ray.checkpoint import catalog, retention
from most_ray.checkpoint.writer import CheckpointWriter
from most_ray.config import to_yaml
from most_ray.data.plan import Plan
from most_ray.distributed.collectives import all_gather_or_raise
from most_ray.io.run_folder import RunFolder, local_copy
from most_ray.model.build import config_json
from most_ray.optim.train_state import TrainState
from most_ray.records.template import template_hash
from most_ray.records.tokenizer import load_tokenizer
from most_ray.runs.job import Job
from most_ray.train.hooks import TrainHooks
from most_ray.train.meter import Meter
from most_ray.train.reporter import RunReporter


class CheckpointManager:
    """Checkpoints at save_steps, at evaluations, where a run stops and at its end; which of them are kept."""

    def __init__(
        self,
        job: Job,
        plan: Plan,
        folder: RunFolder,
        rank: int,
        attempt: str,
        reporter: RunReporter,
        hooks: TrainHooks,
        meter: Meter,
    ) -> None:
        self._job, self._plan, self._folder, self._rank, self._attempt, self._reporter = job, plan, folder, rank, attempt, reporter
        self._meter = meter
        self._writer = CheckpointWriter(background=job.config.async_save, overlap=True)
        self._told = 0.0  # of the writer's stall: part of it comes before the optimizer step behind a save
        self._evaluate_here = hooks.evaluate_here if job.has_validation else None
        beside = hooks.validator if rank == 0 and job.has_validation else None
        self._validator = beside(self._report) if beside else None

    def begin(self, state: TrainState) -> None:
        """Room for the first checkpoint; evaluations that an interruption cut off, once more."""
        self._writer.prepare(state)
        missing = [
            (step, uri)
            for uri in (catalog.committed(self._folder.checkpoints) if self._rank == 0 else [])
            if self._due(step := catalog.step_of(uri)) and step <= state.step and step not in self._reporter.evaluations
        ]
        if self._validator:
            for step, uri in missing:
                self._validator.start(step, uri)
        elif self._evaluate_here and all_gather_or_raise(lambda: any(step == state.step for step, _ in missing))[0]:
            self._evaluate(state)  # of the older ones the weights are no longer there

    def _due(self, step: int) -> bool:
        """Whether a step's checkpoint is to be evaluated."""
        every, last = self._job.config.eval_steps, self._job.total_steps
        return self._job.has_validation and (step == last or (every is not None and step % every == 0))

    def _report(self, line: dict[str, Any]) -> None:
        """Write an evaluation down, where the run is still this attempt's."""
        if self._folder.owner() == self._attempt:
            self._reporter.evaluation(line)

    def _evaluate(self, state: TrainState) -> None:
        """Score the model as it is, training standing still. Collective."""
        assert self._evaluate_here is not None
        began = time.perf_counter()
        line = self._evaluate_here(state.model, state.step)
        if line:
            self._report(line)
        self._meter.paused(time.perf_counter() - began)

    def at_step(self, state: TrainState, last: bool) -> float:
        """Save where it is due; seconds for which checkpoints have held up training since the call before."""
        if state.step % self._job.config.save_steps == 0 or self._due(state.step) or last:
            self._save(state)
            if self._evaluate_here and self._due(state.step):
                self._evaluate(state)
        self._follow()
        stalled, self._told = self._writer.stall_seconds - self._told, self._writer.stall_seconds
        return stalled

    def _save(self, state: TrainState) -> None:
        job, folder = self._job, self._folder
        content = {
            "cursor": asdict(self._plan.cursor(state.step)),
            "ingredients": self._plan.ingredients,
            "template": template_hash(),
            "units": job.units_identity,
            "meter": self._meter.state(),
            "bf16": bool(job.config.bf16),
        }
        model_config = config_json(state.model_config)

        def files(directory: Path) -> None:
            (directory / "config.json").write_text(model_config, encoding="utf-8")
            (directory / "config.yaml").write_text(to_yaml(job.config.redacted()), encoding="utf-8")
            load_tokenizer(local_copy(job.model_path)).save_pretrained(directory)
            self._reporter.push()

        uri = catalog.step_uri(folder.checkpoints, state.step)
        self._writer.save(uri, state, content, files, lambda: folder.owner() == self._attempt)

    def _follow(self) -> None:
        """What comes after a commit: its evaluation, and the end of those that need not be kept."""
        saved = self._writer.poll()
        if self._rank != 0:
            return
        for commit in saved:
            self._reporter.checkpoint(commit.step, commit.uri)
            if self._validator and self._due(commit.step):
                self._validator.start(commit.step, commit.uri)
        if self._validator:
            self._validator.collect(wait_s=0.0)
        if saved:
            self._prune()

    def _prune(self) -> None:
        config = self._job.config
        scores = {}
        for step, line in self._reporter.evaluations.items():
            score = retention.score_of(line, config.best_metric)
            if score is not None:
                scores[step] = score
        pending = self._reporter.held | (self._validator.pending() if self._validator else set())
        catalog.prune(self._folder.checkpoints, config.keep_last, config.keep_best, scores, pending=pending)

    def finish(self, reached: bool, wants_stop: Callable[[], bool]) -> None:
        """The last checkpoint is on disk, and every evaluation in; who is to stop does not wait for those: the run makes them once more
        when it goes on."""
        self._writer.wait()
        self._follow()
        while self._validator and reached and self._validator.pending() and not wants_stop():
            self._validator.collect(wait_s=1.0)
            self._prune()

    def close(self) -> None:
        self._writer.close()
