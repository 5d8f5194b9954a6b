"""The job of a run: everything that each of its ranks needs, and what follows from a run's configuration alone."""

from __future__ import annotations

import os
from dataclasses import dataclass

from most_ray.config import RunConfig
from most_ray.data.batch import TokenLayout
from most_ray.data.plan import PlanSpec
from most_ray.distributed.topology import Topology
from most_ray.model.build import RoutingOverrides


@dataclass(frozen=True)
class Job:
    """Everything that a rank needs. Built once by the process that starts the ranks, and equal for every rank and attempt, but for what
    `Prepared.job_for` sets."""

    config: RunConfig
    run_uri: str  # the run's folder
    model_path: str  # folder or name on the hub of the model to start from
    driver: str  # mark of the process that started this attempt, see `train.attempt.claim_run`
    plan: PlanSpec  # which records each step holds
    layout: TokenLayout  # token ids of padding and speech
    topology: Topology  # of this attempt
    total_steps: int  # optimizer steps of the whole run
    threads: int  # CPU threads of each worker
    units_identity: str | None  # digest of what the units of the training records mean; None: no source states it
    has_validation: bool  # there is a validation set
    command: str = ""  # that was typed to start the run, see `environment.command_line`


def overrides_of(config: RunConfig, biased: bool = False) -> RoutingOverrides:
    """What a run changes in the model that it starts from. `biased`: the checkpoint that it resumes from holds balance biases."""
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
    """CPU threads of each of `n_workers` workers on this machine."""
    return config.threads_per_worker or (1 if use_gpu else max(1, (os.cpu_count() or 1) // n_workers))
