"""Training steps without Ray, on any number of ranks: what the distributed and the unit tests compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from most_ray.config import RunConfig, config_from
from most_ray.data.batch import Batch, open_plan, rank_batch
from most_ray.data.plan import Plan, PlanSpec
from most_ray.model.build import load_model
from most_ray.train import checkpoint
from most_ray.train.state import TrainState, make_state
from most_ray.train.step import Precision, StepResult, run_step
from tests.unit.test_plan import LAYOUT

CPU = torch.device("cpu")
OPTIONS = {"learning_rate": 3e-3, "warmup_steps": 2, "weight_decay": 0.1}


def layout_of(topology: tuple[int, int, int]) -> DistributedConfig | None:
    replicas, shards, experts = topology
    if replicas * shards == 1:
        return None
    return DistributedConfig(dp_replicate_size=replicas, fsdp_size=shards, ep_size=experts)


def make(model_dir: str, topology: tuple[int, int, int] = (1, 1, 1), total: int = 20, **options: Any) -> TrainState:
    config: RunConfig = config_from({**OPTIONS, **options})
    model = load_model(model_dir, distributed=layout_of(topology))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return make_state(model, config, total)


def batch_of(plan: Plan, step: int, max_rows: int = 2) -> Batch:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return rank_batch(plan, step, rank, world, max_rows, LAYOUT)


def steps(
    state: TrainState,
    plan: Plan,
    count: int,
    *,
    max_rows: int = 2,
    clip: float = 1.0,
    dtype: torch.dtype | None = None,
    asr_weight: float = 1.0,
) -> list[StepResult]:
    """The next `count` optimizer steps."""
    return [run_step(state, batch_of(plan, state.step + 1, max_rows), Precision(dtype), clip, CPU, asr_weight) for _ in range(count)]


def loss_of(result: StepResult) -> float:
    return sum(result.loss_sums) / sum(result.token_counts)


def full_weights(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in state.model.named_parameters()}


def spy_gradients(state: TrainState) -> dict[str, torch.Tensor]:
    """Fills up with every parameter's full gradient as the optimizer sees it."""
    seen: dict[str, torch.Tensor] = {}
    step = state.optimizer.step

    def spying(*args: Any, **keywords: Any) -> Any:
        for name, parameter in state.model.named_parameters():
            grad = parameter.grad
            assert grad is not None, name
            seen[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
        return step(*args, **keywords)

    state.optimizer.step = spying  # type: ignore[method-assign]
    return seen


def kind_of(name: str) -> str:
    return "expert" if ".mlp.experts." in name else "router" if ".mlp.gate." in name else "dense"


def trajectory(model_dir: str, spec: PlanSpec, topology: tuple[int, int, int], count: int, keywords: dict[str, Any]) -> dict[str, Any]:
    """Losses, norms, loads, first gradients of `count` steps on the calling ranks."""
    plan = open_plan(spec)
    options = keywords.pop("options", {})
    state = make(model_dir, topology, **options)
    gradients = spy_gradients(state)
    results = steps(state, plan, 1, **keywords)
    first = dict(gradients)
    results += steps(state, plan, count - 1, **keywords)
    return {
        "losses": [loss_of(r) for r in results],
        "norms": [r.grad_norm for r in results],
        "aux": [r.aux_loss for r in results],
        "loads": [r.load for r in results],
        "gradients": first,
    }


def save_to(directory: Path, state: TrainState, plan: Plan) -> None:
    checkpoint.save(directory, state, plan.cursor(state.step), {"ingredients": plan.ingredients}, lambda: True, lambda _: None)
