"""A run on one rank, from its job to its last step, whoever has started the ranks: lay out the model, find the place to go on from,
train, checkpoint."""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

from most_ray.checkpoint import reader, retention
from most_ray.checkpoint.writer import CheckpointWriter
from most_ray.config import RunConfig, to_yaml
from most_ray.data.batch import Batch, TokenLayout, open_plan
from most_ray.data.feed import StreamSpec, local_batches
from most_ray.data.plan import Cursor, Plan, PlanSpec, check_cursor
from most_ray.distributed.determinism import set_deterministic, set_seeds
from most_ray.distributed.ranks import this_rank, world_size
from most_ray.distributed.topology import Topology
from most_ray.errors import CheckpointError, ConfigError
from most_ray.io import storage
from most_ray.io.run_folder import RunFolder, local_copy
from most_ray.model.build import RoutingOverrides, config_json, load_model
from most_ray.model.exchange import EXCHANGE
from most_ray.optim.train_state import TrainState, make_state
from most_ray.records.template import template_hash
from most_ray.records.tokenizer import load_tokenizer
from most_ray.train.loop import LoopSettings, make_meter, train
from most_ray.train.meter import Meter
from most_ray.train.recompute import apply_recompute, compile_layers
from most_ray.train.reporter import RunReporter, Tracker
from most_ray.train.step import Precision

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """All that a rank needs to know; made once by who starts the ranks, the same for every rank and attempt."""

    config: RunConfig
    run_place: str
    model_path: str
    driver: str
    plan: PlanSpec
    layout: TokenLayout
    topology: Topology
    total_steps: int
    threads: int
    units_identity: str | None
    has_validation: bool


class Validator(Protocol):
    """Evaluations under way beside training, on rank 0."""

    def start(self, step: int, place: str) -> None:
        """Score a committed checkpoint, while training goes on."""

    def pending(self) -> set[int]:
        """Steps whose checkpoints are still to be read."""

    def collect(self, wait_s: float) -> None:
        """Report those that have finished, or do so within `wait_s` seconds.

        Raises:
            Exception: the run's last one could not be made.
        """


ReportEvaluation = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Surroundings:
    """What the one who starts the ranks provides.

    batches: the stream of a rank's batches; wants_stop: whether this rank has been asked to stop behind the step that it is at;
    validator: made on rank 0, given where results go. evaluate_here: collective, scores the model at a step as the ranks hold it; a line
    for metrics.jsonl on rank 0, None elsewhere. trackers: on rank 0, get each line of metrics.
    """

    batches: Callable[[StreamSpec, int, int], Iterator[Batch]] = local_batches
    wants_stop: Callable[[], bool] = lambda: False
    validator: Callable[[ReportEvaluation], Validator] | None = None
    evaluate_here: Callable[[torch.nn.Module, int], dict[str, Any] | None] | None = None
    trackers: Sequence[Tracker] = field(default=())


def overrides_of(config: RunConfig, biased: bool = False) -> RoutingOverrides:
    """What a run changes in the model it starts from; `biased`: the checkpoint that it goes on from holds balance biases."""
    return RoutingOverrides(
        config.use_modality_aware_routing,
        config.text_expert_indices,
        config.audio_expert_indices,
        config.aux_loss_alpha,
        config.seq_aux,
        config.num_experts_per_tok,
        use_balance_bias=True if config.balance_bias_rate > 0 or biased else None,
    )


def threads_of(config: RunConfig, use_gpu: bool, n_workers: int) -> int:
    """CPU threads of each worker."""
    return config.threads_per_worker or (1 if use_gpu else max(1, (os.cpu_count() or 1) // n_workers))


def run_rank(job: Job, device: torch.device, around: Surroundings) -> bool:
    """Train on this rank; the process group is up where there are several. Returns whether the goal was reached; False: stopped, behind
    a checkpoint of the step that it had come to.

    Raises:
        UserError: what a user can mend.
    """
    rank, world = this_rank(), world_size()
    torch.set_num_threads(job.threads)
    (set_deterministic if job.config.deterministic else set_seeds)(job.config.seed, rank)
    folder = RunFolder(job.run_place)
    attempt = _take_over(folder, job.driver, rank)
    start = _starting_point(job, folder)
    # The stream fills while the model is built.
    stream = StreamSpec(job.plan, job.layout, rank, world, job.config.train_batch_size, job.config.data_timeout_s)
    batches = around.batches(stream, start.step + 1, job.total_steps)
    plan = open_plan(job.plan)
    model = _build_model(job, device, start)
    state = make_state(model, job.config, job.total_steps)
    settings = _settings(job, device)
    meter = make_meter(state, settings)
    accepted = _resume(start, state, plan, job.config, meter)
    about = _about(job, state, device, accepted)
    reporter = RunReporter(job.config.trace_records, plan, folder, state.step, rank, around.trackers, about)
    saver = Saver(job, plan, folder, rank, attempt, reporter, around, meter)
    ended = False
    try:
        saver.begin(state)
        reached = train(state, batches, settings, reporter, saver.at_step, around.wants_stop, meter)
        saver.finish(reached, around.wants_stop)
        ended = True
    finally:
        saver.close()
        reporter.close(push=ended)
    return reached


def _about(job: Job, state: TrainState, device: torch.device, accepted: list[str]) -> dict[str, Any]:
    """What a line of kind `start` says of an attempt."""
    config = state.model_config
    every = list(range(config.n_routed_experts))
    aware = config.use_modality_aware_routing
    return {
        "workers": job.topology.world_size,
        "topology": {"dp_replicate": job.topology.dp_replicate, "fsdp": job.topology.fsdp, "ep": job.topology.ep},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": job.threads,
        "precision": "float16" if job.config.fp16 else "bfloat16" if job.config.bf16 else "float32",
        "exact": not accepted,
        "changed": accepted,
        "global_batch_size": job.plan.global_batch_size,
        "total_steps": job.total_steps,
        "first_expert_layer": config.first_k_dense_replace,
        "n_experts": config.n_routed_experts,
        "experts": {
            "text": list(config.text_expert_indices or ()) if aware else every,
            "audio": list(config.audio_expert_indices or ()) if aware else every,
        },
    }


def _settings(job: Job, device: torch.device) -> LoopSettings:
    config = job.config
    return LoopSettings(
        total_steps=job.total_steps,
        logging_steps=config.logging_steps,
        max_grad_norm=config.max_grad_norm,
        precision=Precision.of(config),
        device=device,
        asr_loss_weight=config.asr_loss_weight,
        max_skipped_steps=config.max_skipped_steps,
        check_replicas_steps=config.check_replicas_steps,
        load_alert=config.load_alert,
    )


def _build_model(job: Job, device: torch.device, start: _Start) -> torch.nn.Module:
    topology, biased, distributed = job.topology, False, None
    if topology.world_size > 1:
        distributed = DistributedConfig(
            dp_replicate_size=topology.dp_replicate, fsdp_size=topology.fsdp, ep_size=topology.ep, ep_implementation=EXCHANGE
        )
    if start.place is not None:
        biased = bool(json.loads(storage.read_bytes(storage.join(start.place, "config.json"))).get("use_balance_bias"))
    model = load_model(local_copy(job.model_path), overrides_of(job.config, biased), distributed)
    model.config.template_hash = template_hash()
    model.config.units_identity = job.units_identity
    apply_recompute(model, job.config.recomputed)
    if job.config.compile_layers:
        compile_layers(model)
    if topology.world_size == 1:
        model.to(device)
    return model


def claim_run(folder: RunFolder) -> str:
    """Make the run this driver's; workers of an older one can neither commit a checkpoint nor begin again. Returns the driver's mark."""
    mark = uuid.uuid4().hex
    folder.mark(f"{mark}.0")
    return mark


def _take_over(folder: RunFolder, driver: str, rank: int) -> str:
    """Mark the run as this attempt's, where it is still the driver's: an older attempt that lives on can no longer commit.

    Raises:
        CheckpointError: a newer driver runs under the same name.
    """
    attempt = [""]
    if rank == 0 and folder.marked().startswith(f"{driver}."):
        attempt = [f"{driver}.{uuid.uuid4().hex}"]
        folder.mark(attempt[0])
    if dist.is_initialized():
        dist.broadcast_object_list(attempt, src=0)
    if not attempt[0]:
        raise CheckpointError("attempt", None, "has been replaced by a newer start of the same run.", "One driver at a time.")
    seen = reader.together(folder.marked)
    if any(mark != seen[0] for mark in seen):
        blind = [other for other, mark in enumerate(seen) if mark != seen[0]]
        rule = f"is not shared by all nodes: ranks {blind} do not see there what rank 0 has written."
        raise ConfigError("output_dir", storage.redact(folder.place), rule, "Mount the same storage on every node, or name a URI.")
    return attempt[0]


@dataclass(frozen=True)
class _Start:
    """What a run goes on from: a checkpoint (None: nothing), whether only its weights are taken, the step that has been made."""

    place: str | None
    fresh: bool
    step: int


def _starting_point(job: Job, folder: RunFolder) -> _Start:
    """The ranks agree, once per attempt, from commit markers; weights and data follow the same number. Every rank hashes its share of
    the files, so that a checkpoint that was damaged after its commit is passed over for an older one."""
    own, torn = reader.newest_intact_together(folder.checkpoints)
    reader.require_one(own, torn)
    if this_rank() == 0:
        for damaged, reason in torn:
            logger.warning("checkpoint %s is damaged and is passed over: %s", storage.redact(damaged), reason)
            reader.revoke(damaged)  # its step will be saved anew
    place = own or job.config.resume_from_checkpoint
    fresh = own is None and job.config.ignore_optimizer_state
    step = reader.together(lambda: int(reader.read_state(place)["step"]) if place and not fresh else 0)[0]
    return _Start(place, fresh, step)


def _resume(start: _Start, state: TrainState, plan: Plan, config: RunConfig, meter: Meter) -> list[str]:
    """Load what the run goes on from. Returns what has changed since and was accepted."""
    accepted: list[str] = []
    if start.place is None:
        return accepted
    content = reader.load(start.place, state, with_optimizer=not start.fresh)
    if not start.fresh:
        accepted = check_cursor(plan, Cursor(**content["cursor"]), content["ingredients"], config.accept_data_change)
        if "meter" in content:
            meter.restore(content["meter"])
    assert state.step == start.step, "weights and data go on from the same step"
    return accepted


class Saver:
    """Checkpoints at save_steps, at evaluations, where a run stops and at its end; which of them are kept."""

    def __init__(
        self,
        job: Job,
        plan: Plan,
        folder: RunFolder,
        rank: int,
        attempt: str,
        reporter: RunReporter,
        around: Surroundings,
        meter: Meter,
    ) -> None:
        self._job, self._plan, self._folder, self._rank, self._attempt, self._reporter = job, plan, folder, rank, attempt, reporter
        self._meter = meter
        self._writer = CheckpointWriter(background=job.config.async_save, overlap=True)
        self._told = 0.0  # of the writer's stall: part of it comes before the optimizer step behind a save
        self._evaluate_here = around.evaluate_here if job.has_validation else None
        beside = around.validator if rank == 0 and job.has_validation else None
        self._validator = beside(self._report) if beside else None

    def begin(self, state: TrainState) -> None:
        """Room for the first checkpoint; evaluations that an interruption cut off, once more."""
        self._writer.prepare(state)
        missing = [
            (step, place)
            for place in (reader.committed(self._folder.checkpoints) if self._rank == 0 else [])
            if self._due(step := reader.step_of(place)) and step <= state.step and step not in self._reporter.evaluations
        ]
        if self._validator:
            for step, place in missing:
                self._validator.start(step, place)
        elif self._evaluate_here and reader.together(lambda: any(step == state.step for step, _ in missing))[0]:
            self._evaluate(state)  # of the older ones the weights are no longer there

    def _due(self, step: int) -> bool:
        """Whether a step's checkpoint is to be evaluated."""
        every, last = self._job.config.eval_steps, self._job.total_steps
        return self._job.has_validation and (step == last or (every is not None and step % every == 0))

    def _report(self, line: dict[str, Any]) -> None:
        """Write an evaluation down, where the run is still this attempt's."""
        if self._folder.marked() == self._attempt:
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

        place = reader.step_place(folder.checkpoints, state.step)
        self._writer.save(place, state, content, files, lambda: folder.marked() == self._attempt)

    def _follow(self) -> None:
        """What comes after a commit: its evaluation, and the end of those that need not be kept."""
        saved = self._writer.poll()
        if self._rank != 0:
            return
        for commit in saved:
            self._reporter.checkpoint(commit.step, commit.place)
            if self._validator and self._due(commit.step):
                self._validator.start(commit.step, commit.place)
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
        reader.prune(self._folder.checkpoints, config.keep_last, config.keep_best, scores, pending=pending)

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
