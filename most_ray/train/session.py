"""A run on one rank, from its job to its last step: find the checkpoint to resume from, lay out the model, train, save."""

from __future__ import annotations

import itertools
import logging
from typing import Any, NamedTuple

import torch
from transformers.distributed import DistributedConfig

from most_ray.checkpoint import catalog, reader
from most_ray.checkpoint.resume import all_changes
from most_ray.data.batch import open_plan
from most_ray.data.feed import StreamSpec
from most_ray.data.plan import Plan
from most_ray.distributed.collectives import all_gather_or_raise
from most_ray.distributed.determinism import set_deterministic, set_seeds
from most_ray.distributed.ranks import this_rank, world_size
from most_ray.errors import CheckpointError
from most_ray.io import storage
from most_ray.io.json_values import parse_json
from most_ray.io.run_folder import local_copy
from most_ray.model.build import load_model, not_finite
from most_ray.model.exchange import EXCHANGE
from most_ray.optim.train_state import TrainState, make_state
from most_ray.records.template import template_hash
from most_ray.runs.job import Job, overrides_of
from most_ray.train.attempt import Attempt
from most_ray.train.checkpoint_manager import CheckpointManager
from most_ray.train.evaluation_scheduler import EvaluationScheduler
from most_ray.train.hooks import TrainHooks
from most_ray.train.loop import make_meter, train
from most_ray.train.meter import Meter
from most_ray.train.recompute import apply_layer_options
from most_ray.train.reporter import RunReporter

logger = logging.getLogger(__name__)


def run_rank(job: Job, device: torch.device, hooks: TrainHooks) -> bool:
    """Train on this rank. With several ranks the process group must be initialised. Returns whether the goal was reached; if not, the run
    was stopped after a checkpoint of its current step. Raises UserError for what the user can fix."""
    torch.set_num_threads(job.threads)
    (set_deterministic if job.config.deterministic else set_seeds)(job.config.seed, this_rank())
    attempt = Attempt.claim(job)
    start = _find_start(attempt)
    stream = StreamSpec(job.plan, job.layout, attempt.rank, world_size(), job.config.train_batch_size, job.config.data_timeout_s)
    batches = hooks.batches(stream, start.step + 1, job.total_steps)  # prefetched while the model is built
    plan = open_plan(job.plan)
    model = _build_model(job, device, start)
    state = make_state(model, job.config, job.total_steps)
    meter = make_meter(state, job.config, device)
    changed, also_changed = _resume(start, state, plan, job, meter)
    _check_weights(state, start, job.model_path)
    about = {**_describe_attempt(job, state, device), "exact": not changed, "changed": changed, "also_changed": also_changed}
    reporter = RunReporter(job.config.trace_records, plan, attempt.folder, state.step, attempt.rank, hooks.trackers, about, job.config)
    evaluations = EvaluationScheduler(attempt, reporter, hooks, meter)
    checkpoints = CheckpointManager(attempt, plan, reporter, evaluations, meter)
    ended = False
    try:
        checkpoints.prepare(state)
        evaluations.restart(state)
        reached = train(state, batches, job.config, job.total_steps, device, reporter, checkpoints.at_step, hooks.should_stop, meter)
        checkpoints.finish(reached, hooks.should_stop)
        ended = True
    finally:
        checkpoints.close()
        reporter.close(push=ended)
    return reached


def _describe_attempt(job: Job, state: TrainState, device: torch.device) -> dict[str, Any]:
    """Return an attempt's line of kind `start`, but for what has changed since the checkpoint."""
    config, topology = state.model_config, job.topology
    every, aware = list(range(config.n_routed_experts)), config.use_modality_aware_routing
    return {
        "workers": topology.world_size,
        "topology": {"dp_replicate": topology.dp_replicate, "fsdp": topology.fsdp, "ep": topology.ep},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": job.threads,
        "precision": "float16" if job.config.fp16 else "bfloat16" if job.config.bf16 else "float32",
        "global_batch_size": job.plan.global_batch_size,
        "total_steps": job.total_steps,
        "command": job.command,
        "first_expert_layer": config.first_k_dense_replace,
        "n_experts": config.n_routed_experts,
        "experts_per_token": config.num_experts_per_tok,
        "experts": {
            "text": list(config.text_expert_indices or ()) if aware else every,
            "audio": list(config.audio_expert_indices or ()) if aware else every,
        },
    }


def _build_model(job: Job, device: torch.device, start: _Start) -> torch.nn.Module:
    """Load the starting model, lay it out over the ranks and apply the run's options."""
    topology, biased, distributed = job.topology, False, None
    if topology.world_size > 1:
        sizes = {"dp_replicate_size": topology.dp_replicate, "fsdp_size": topology.fsdp, "ep_size": topology.ep}
        distributed = DistributedConfig(**sizes, ep_implementation=EXCHANGE)
    if start.uri is not None:
        biased = bool(parse_json(storage.read_bytes(storage.join(start.uri, "config.json"))).get("use_balance_bias"))
    model = load_model(local_copy(job.model_path), overrides_of(job.config, biased), distributed)
    model.config.template_hash = template_hash()
    model.config.units_identity = job.units_identity
    apply_layer_options(model, job.config)
    if topology.world_size == 1:
        model.to(device)
    return model


class _Start(NamedTuple):
    """What a run resumes from."""

    uri: str | None  # of a checkpoint
    weights_only: bool  # only its weights are read
    step: int  # that was completed, 0 if the run starts from scratch


def _find_start(attempt: Attempt) -> _Start:
    """Find the run's newest valid checkpoint, or the one that the configuration names. Collective: the ranks agree on it once per attempt,
    so that weights and data resume from the same step. Each hashes a share of the files; a checkpoint that was damaged after its commit is
    skipped and an older one used."""
    own, corrupt = catalog.latest_valid(attempt.folder.checkpoints, on_all_ranks=True)
    catalog.require_valid(own, corrupt)
    if attempt.rank == 0:
        for damaged, reason in corrupt:
            logger.warning("checkpoint %s is damaged and is skipped: %s", storage.redact(damaged), reason)
            catalog.invalidate(damaged)  # its step will be saved again
    config = attempt.job.config
    uri = own or config.resume_from_checkpoint
    weights_only = own is None and config.ignore_optimizer_state
    step = all_gather_or_raise(lambda: int(reader.read_state(uri)["step"]) if uri and not weights_only else 0)[0]
    return _Start(uri, weights_only, step)


def _resume(start: _Start, state: TrainState, plan: Plan, job: Job, meter: Meter) -> tuple[list[str], list[str]]:
    """Load the checkpoint to resume from. Returns what has changed since then, see `all_changes`."""
    if start.uri is None:
        return [], []
    changed, content = (list[str](), list[str]()), reader.load(start.uri, state, with_optimizer=not start.weights_only)
    if not start.weights_only:
        changed = all_changes(start.uri, content, plan, job.config, state.model_config, job.total_steps)
        if "meter" in content:
            meter.restore(content["meter"])
    assert state.step == start.step, "weights and data resume from the same step"
    return changed


def _check_weights(state: TrainState, start: _Start, model_path: str) -> None:
    """Raise CheckpointError, on every rank, where weights that training starts from are not finite: every step would be skipped.
    Collective."""
    if names := sorted(set(itertools.chain.from_iterable(all_gather_or_raise(lambda: not_finite(state.model))))):
        rule = f"holds values that are not finite, in {len(names)} of its tensors, the first being {names[0]}: no step could be made."
        field, uri = ("checkpoint", start.uri) if start.uri else ("model_name_or_path", model_path)
        raise CheckpointError(field, storage.redact(uri), rule, "Start from sound weights.")
