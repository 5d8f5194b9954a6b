"""When a run saves checkpoints, and which of them it keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from most_ray.checkpoint import catalog, retention
from most_ray.checkpoint.writer import CheckpointWriter
from most_ray.config import portable_yaml
from most_ray.data.plan import Plan
from most_ray.io.run_folder import local_copy
from most_ray.model.build import config_json
from most_ray.optim.train_state import TrainState
from most_ray.records.template import template_hash
from most_ray.records.tokenizer import load_tokenizer
from most_ray.train.attempt import Attempt
from most_ray.train.evaluation_scheduler import EvaluationScheduler
from most_ray.train.meter import Meter
from most_ray.train.reporter import RunReporter


class CheckpointManager:
    """Saves checkpoints at save_steps, at evaluations, when a run stops and at its end; deletes those that are not kept."""

    def __init__(self, attempt: Attempt, plan: Plan, reporter: RunReporter, evaluations: EvaluationScheduler, meter: Meter) -> None:
        self._attempt, self._config, self._plan = attempt, attempt.job.config, plan
        self._reporter, self._evaluations, self._meter = reporter, evaluations, meter
        self._writer = CheckpointWriter(background=self._config.async_save, overlap=True)
        self._reported_stall = 0.0  # seconds of the writer's that `at_step` has returned; the optimizer step after a save adds more

    def prepare(self, state: TrainState) -> None:
        """Allocate the buffers for the first checkpoint."""
        self._writer.prepare(state)

    def at_step(self, state: TrainState, last: bool) -> float:
        """Save if it is due or training ends after this step for now, and handle what was committed. Collective. Returns the seconds that
        checkpoints have held up training since the previous call."""
        if state.step % self._config.save_steps == 0 or self._evaluations.is_due(state.step) or last:
            self._save(state)
            self._evaluations.at_step(state)
        self._handle_commits()
        stalled, self._reported_stall = self._writer.stall_seconds - self._reported_stall, self._writer.stall_seconds
        return stalled

    def _save(self, state: TrainState) -> None:
        job = self._attempt.job
        content = {
            "cursor": asdict(self._plan.cursor(state.step)),
            "ingredients": self._plan.ingredients,
            "template": template_hash(),
            "units": job.units_identity,
            "meter": self._meter.state(),
            "bf16": bool(self._config.bf16),
            "total_steps": job.total_steps,
        }
        model_config = config_json(state.model_config)

        def write_files(directory: Path) -> None:
            (directory / "config.json").write_text(model_config, encoding="utf-8")
            (directory / "config.yaml").write_text(portable_yaml(self._config, uri), encoding="utf-8")
            load_tokenizer(local_copy(job.model_path)).save_pretrained(directory)
            self._reporter.push()

        uri = catalog.step_uri(self._attempt.folder.checkpoints, state.step)
        self._writer.save(uri, state, content, write_files, self._attempt.owns_run)

    def _handle_commits(self) -> None:
        """On rank 0, evaluate what was committed since the last call, and delete what need not be kept."""
        saved = self._writer.poll()
        if self._attempt.rank != 0:
            return
        for commit in saved:
            self._reporter.checkpoint(commit.step, commit.uri)
            self._evaluations.committed(commit.step, commit.uri)
        self._evaluations.collect(wait_s=0.0)
        if saved:
            self._prune()

    def _prune(self) -> None:
        config = self._config
        scored = ((step, retention.score_of(line, config.best_metric)) for step, line in self._reporter.evaluations.items())
        scores = {step: score for step, score in scored if score is not None}
        pending = self._reporter.unpushed | self._evaluations.pending()
        catalog.prune(self._attempt.folder.checkpoints, config.keep_last, config.keep_best, scores, pending)

    def finish(self, reached: bool, should_stop: Callable[[], bool]) -> None:
        """Wait until the last checkpoint is committed and, if the run's goal was reached, until every evaluation has finished or a stop is
        requested: evaluations that are left then are repeated when the run resumes."""
        self._writer.wait()
        self._handle_commits()
        while reached and self._evaluations.pending() and not should_stop():
            self._evaluations.collect(wait_s=1.0)
            self._prune()

    def close(self) -> None:
        """Release the writer's buffers and process group."""
        self._writer.close()
