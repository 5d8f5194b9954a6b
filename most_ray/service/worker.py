"""What runs in each training worker: lay out the model, find the place to go on from, train, checkpoint."""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

from most_ray.config import RunConfig
from most_ray.data.batch import Batch, TokenLayout, open_plan
from most_ray.data.plan import Cursor, Plan, PlanSpec, check_cursor
from most_ray.errors import CheckpointError
from most_ray.model.build import RoutingOverrides, config_json, load_model
from most_ray.model.tokenizer import load_tokenizer
from most_ray.service.journal import Journal
from most_ray.service.stream import StreamSpec, stream_batches
from most_ray.service.telemetry import Wandb
from most_ray.service.validation import Validation, ValidationJob
from most_ray.template import template_hash
from most_ray.train import checkpoint
from most_ray.train.loop import LoopSettings, train
from most_ray.train.state import TrainState, make_state
from most_ray.train.step import Precision
from most_ray.train.topology import Topology

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerJob:
    """All that a worker needs to know; made once by the driver, the same for every worker and attempt."""

    config: RunConfig
    run_dir: str
    model_path: str
    driver: str
    plan: PlanSpec
    layout: TokenLayout
    topology: Topology
    total_steps: int
    threads: int
    units_identity: str | None
    validation: ValidationJob | None
    stream: Any = field(default=stream_batches)


def overrides_of(config: RunConfig) -> RoutingOverrides:
    return RoutingOverrides(
        config.use_modality_aware_routing,
        config.text_expert_indices,
        config.audio_expert_indices,
        config.aux_loss_alpha,
        config.seq_aux,
    )


def train_worker(job: WorkerJob) -> None:
    """The training function that Ray Train runs in each worker; its process group is up."""
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    torch.set_num_threads(job.threads)
    _seed(job.config.seed, rank)
    plan = open_plan(job.plan)
    run_dir = Path(job.run_dir)
    attempt = _take_over(run_dir, job.driver, rank)
    start = _starting_point(job, run_dir)
    # The stream fills while the model is built.
    stream = StreamSpec(job.plan, job.layout, rank, world, job.config.train_batch_size, job.config.data_timeout_s)
    batches = job.stream(stream, start.step + 1, job.total_steps)
    model = _build_model(job, device)
    state = make_state(model, job.config, job.total_steps)
    _resume(start, state, plan, job.config)
    reporter = RunReporter(job, plan, state.step, rank)
    saver = Saver(job, plan, run_dir, rank, attempt, reporter)
    settings = LoopSettings(
        job.total_steps,
        job.config.logging_steps,
        job.config.max_grad_norm,
        _precision(job.config),
        device,
        job.config.asr_loss_weight,
    )
    try:
        train(state, batches, settings, reporter, saver.at_step)
        saver.finish()
    finally:
        reporter.close()


def _seed(seed: int, rank: int) -> None:
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def _precision(config: RunConfig) -> Precision:
    return Precision(torch.float16 if config.fp16 else torch.bfloat16 if config.bf16 else None)


def _build_model(job: WorkerJob, device: torch.device) -> torch.nn.Module:
    topology = job.topology
    distributed = None
    if topology.world_size > 1:
        # The library reads the layout's rank from the environment; Ray Train has set it, on every backend.
        os.environ.setdefault("LOCAL_RANK", str(ray.train.get_context().get_local_rank()))
        distributed = DistributedConfig(dp_replicate_size=topology.dp_replicate, fsdp_size=topology.fsdp, ep_size=topology.ep)
    model = load_model(job.model_path, overrides_of(job.config), distributed)
    model.config.template_hash = template_hash()
    model.config.units_identity = job.units_identity
    if job.config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if topology.world_size == 1:
        model.to(device)
    return model


def claim_run(run_dir: Path) -> str:
    """Make the run this driver's; workers of an older one can neither commit a checkpoint nor begin again. Returns the driver's mark."""
    mark = uuid.uuid4().hex
    (run_dir / ".attempt").write_text(f"{mark}.0", encoding="utf-8")
    return mark


def _take_over(run_dir: Path, driver: str, rank: int) -> str:
    """Mark the run as this attempt's, where it is still the driver's: an older attempt that lives on can no longer commit.

    Raises:
        CheckpointError: a newer driver runs under the same name.
    """
    attempt = [""]
    if rank == 0 and (run_dir / ".attempt").read_text(encoding="utf-8").startswith(f"{driver}."):
        attempt = [f"{driver}.{uuid.uuid4().hex}"]
        (run_dir / ".attempt").write_text(attempt[0], encoding="utf-8")
    if dist.is_initialized():
        dist.broadcast_object_list(attempt, src=0)
    if not attempt[0]:
        raise CheckpointError("attempt", None, "has been replaced by a newer start of the same run.", "One driver at a time.")
    return attempt[0]


@dataclass(frozen=True)
class _Start:
    """What a run goes on from: a checkpoint (None: nothing), whether only its weights are taken, the step that has been made."""

    place: str | None
    fresh: bool
    step: int


def _starting_point(job: WorkerJob, run_dir: Path) -> _Start:
    """Rank 0 decides, once per attempt, from commit markers; weights and data follow the same number."""
    decision: list[Any] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        own = checkpoint.committed(run_dir / "checkpoints")
        place = str(own[-1]) if own else job.config.resume_from_checkpoint
        fresh = not own and job.config.ignore_optimizer_state
        decision = [_Start(place, fresh, int(checkpoint.read_state(Path(place))["step"]) if place and not fresh else 0)]
    if dist.is_initialized():
        dist.broadcast_object_list(decision, src=0)
    start: _Start = decision[0]
    return start


def _resume(start: _Start, state: TrainState, plan: Plan, config: RunConfig) -> None:
    """Load what the run goes on from."""
    if start.place is None:
        return
    content = checkpoint.load(Path(start.place), state, with_optimizer=not start.fresh)
    if not start.fresh:
        check_cursor(plan, Cursor(**content["cursor"]), content["ingredients"], config.accept_data_change)
    assert state.step == start.step, "weights and data go on from the same step"


class RunReporter:
    """Rank 0 writes metrics.jsonl, evaluations.jsonl, the trace and W&B."""

    def __init__(self, job: WorkerJob, plan: Plan, resume_step: int, rank: int) -> None:
        self._plan, self._rank = plan, rank
        self._tracing = job.config.trace_records is not None
        self._metrics = self._trace = self._evaluations = self._wandb = None
        if rank == 0:
            self._metrics = Journal(Path(job.run_dir) / "metrics.jsonl", resume_step)
            self._evaluations = Journal(Path(job.run_dir) / "evaluations.jsonl", resume_step, ordered=False)
            self._wandb = Wandb(job.config, job.run_dir)
            if job.config.trace_records:
                self._trace = Journal(Path(job.config.trace_records), resume_step)
            cursor = plan.cursor(resume_step)
            logger.info(
                "starting after step %d, epoch %.3f, records %s, exact: yes",
                resume_step,
                cursor.epoch,
                plan.consumed(resume_step),
            )

    def trained(self, batch: Batch) -> None:
        if not self._tracing:
            return
        ids = [batch.record_ids]
        if dist.is_initialized() and dist.get_world_size() > 1:
            ids = [[] for _ in range(dist.get_world_size())] if self._rank == 0 else []
            dist.gather_object(batch.record_ids, ids if self._rank == 0 else None, dst=0)
        if self._trace:
            self._trace.write({"step": batch.step, "records": sorted(itertools.chain.from_iterable(ids))})

    def log(self, line: dict[str, Any]) -> None:
        if self._metrics and self._wandb:
            line = {**line, "epoch": round(self._plan.cursor(line["step"]).epoch, 6), "mix": self._plan.mix(line["step"])}
            self._metrics.write(line)
            self._wandb.log(line)

    def evaluation(self, step: int, wer: dict[str, float], losses: dict[str, float]) -> None:
        line = {"step": step, "wer": wer, "validation_loss": losses}
        if self._evaluations and self._wandb:
            self._evaluations.write(line)
            self._wandb.log(line)

    def close(self) -> None:
        for journal in (self._metrics, self._trace, self._evaluations):
            if journal:
                journal.close()
        if self._wandb:
            self._wandb.close()


class Saver:
    """Checkpoints at save_steps, at evaluations and at the end."""

    def __init__(self, job: WorkerJob, plan: Plan, run_dir: Path, rank: int, attempt: str, reporter: RunReporter) -> None:
        self._job, self._plan, self._run_dir, self._rank, self._attempt = job, plan, run_dir, rank, attempt
        self._validation = Validation(job.validation, run_dir, reporter.evaluation) if rank == 0 and job.validation else None

    def at_step(self, state: TrainState) -> None:
        config, last = self._job.config, state.step == self._job.total_steps
        evaluate = config.eval_steps is not None and state.step % config.eval_steps == 0 and not last
        if state.step % config.save_steps == 0 or evaluate or last:
            self._save(state)
            ray.train.report({"step": state.step})
            if evaluate and self._validation:
                self._validation.start(state.step, checkpoint.step_dir(self._run_dir / "checkpoints", state.step))
        if self._validation:
            self._validation.collect(wait=False)

    def _save(self, state: TrainState) -> None:
        job = self._job
        checkpoints = self._run_dir / "checkpoints"
        extra = {"ingredients": self._plan.ingredients, "template": template_hash(), "units": job.units_identity}

        def write_more(directory: Path) -> None:
            (directory / "config.json").write_text(config_json(state.model_config), encoding="utf-8")
            shutil.copy(self._run_dir / "config.yaml", directory / "config.yaml")
            load_tokenizer(job.model_path).save_pretrained(directory)

        def may_commit() -> bool:
            return (self._run_dir / ".attempt").read_text(encoding="utf-8") == self._attempt

        checkpoint.save(checkpoint.step_dir(checkpoints, state.step), state, self._plan.cursor(state.step), extra, may_commit, write_more)
        if self._rank == 0:
            checkpoint.keep_last(checkpoints, job.config.keep_last)

    def finish(self) -> None:
        if self._validation:
            self._validation.collect(wait=True)


def run_summary(path: Path) -> dict[str, Any] | None:
    """summary.json of a finished run."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return loaded if isinstance(loaded, dict) else None
