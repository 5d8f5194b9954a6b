"""What every rank of a run is given, and what follows from its configuration."""

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
    """All that a rank needs to know; made once by who starts the ranks, the same for every rank and attempt."""

    config: RunConfig
    run_uri: str
    model_path: str
    driver: str
    plan: PlanSpec
    layout: TokenLayout
    topology: Topology
    total_steps: int
    threads: int
    units_identity: str | None
    has_validation: bool


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
