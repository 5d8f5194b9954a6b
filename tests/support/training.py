"""Training steps without Ray, on any number of ranks: what the distributed and the unit tests compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from most_ray.checkpoint.writer import CheckpointWriter
from most_ray.config import RunConfig, config_from
from most_ray.data.batch import Batch, forward_shape, open_plan, rank_batch
from most_ray.data.plan import Plan, PlanSpec
from most_ray.model.build import RoutingOverrides, load_model
from most_ray.model.placement import experts_of_ranks, row_order
from most_ray.optim.train_state import LossScale, TrainState, make_optimizer, make_state
from most_ray.train.recompute import apply_recompute
from most_ray.train.step import StepResult, StepSettings, run_step
from tests.support.builders import LAYOUT

CPU = torch.device("cpu")
KINDS = ("dense", "router", "expert")
OPTIONS = {"learning_rate": 3e-3, "warmup_steps": 2, "weight_decay": 0.1}


def layout_of(topology: tuple[int, int, int]) -> DistributedConfig | None:
    replicas, shards, experts = topology
    if replicas * shards == 1:
        return None
    # Here, since a machine with one device may have a transformers that has no such thing as an implementation of the exchange.
    from most_ray.model.exchange import EXCHANGE

    return DistributedConfig(dp_replicate_size=replicas, fsdp_size=shards, ep_size=experts, ep_implementation=EXCHANGE)


def make(model_dir: str, topology: tuple[int, int, int] = (1, 1, 1), total: int = 20, **options: Any) -> TrainState:
    config: RunConfig = config_from({**OPTIONS, **options})
    overrides = RoutingOverrides(
        use_modality_aware_routing=config.use_modality_aware_routing,
        seq_aux=config.seq_aux,
        aux_loss_alpha=config.aux_loss_alpha,
        use_balance_bias=config.balance_bias_rate > 0 or None,
    )
    model = load_model(model_dir, overrides, distributed=layout_of(topology))
    apply_recompute(model, config.recomputed)
    return make_state(model, config, total)


def batch_of(plan: Plan, step: int, max_rows: int = 2) -> Batch:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return rank_batch(plan, step, rank, world, max_rows, LAYOUT)


def step_settings(dtype: torch.dtype | None = None, device: torch.device = CPU, **options: Any) -> StepSettings:
    """How steps are made with these keys of the configuration, in a precision of its own."""
    return replace(StepSettings.of(config_from(options), device), dtype=dtype)


def steps(
    state: TrainState,
    plan: Plan,
    count: int,
    *,
    max_rows: int = 2,
    clip: float = 1.0,
    dtype: torch.dtype | None = None,
    asr_weight: float = 1.0,
    change: Callable[[Batch], Batch] = lambda batch: batch,
) -> list[StepResult]:
    """The next `count` optimizer steps; `change`: what is done to each batch first."""
    settings = step_settings(dtype, max_grad_norm=clip, asr_loss_weight=asr_weight)
    return [run_step(state, change(batch_of(plan, state.step + 1, max_rows)), settings) for _ in range(count)]


def loss_of(result: StepResult) -> float:
    return sum(result.loss_sums) / sum(result.token_counts)


def full_rows(state: TrainState, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A parameter, its gradient or a moment in full, rows in the experts' order. Collective."""
    full = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
    order = row_order(state.model, name)
    if order is None:
        return full.clone()
    logical = torch.full_like(full, torch.nan)
    logical[list(order)] = full
    return logical


def full_weights(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: full_rows(state, name, p) for name, p in state.model.named_parameters()}


def spy_gradients(state: TrainState) -> dict[str, torch.Tensor]:
    """Fills up with every parameter's full gradient as the optimizer sees it."""
    seen: dict[str, torch.Tensor] = {}
    step = state.optimizer.step

    def spying(*args: Any, **keywords: Any) -> Any:
        for name, parameter in state.model.named_parameters():
            grad = parameter.grad
            assert grad is not None, name
            seen[name] = full_rows(state, name, grad)
        return step(*args, **keywords)

    state.optimizer.step = spying  # type: ignore[method-assign]
    return seen


def kind_of(name: str) -> str:
    return "expert" if ".mlp.experts." in name else "router" if ".mlp.gate." in name else "dense"


def differences(expected: dict[str, Any], found: dict[str, Any]) -> dict[str, float]:
    """Between two trajectories: per kind of parameter the largest difference of a gradient, over the largest entry of that kind's; and
    of the norms, relative."""
    worst, scale = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0.0)
    for name, gradient in expected["gradients"].items():
        kind = kind_of(name)
        # What is missing is NaN, which no comparison would show.
        difference = (found["gradients"][name] - gradient).abs().nan_to_num(torch.inf)
        worst[kind] = max(worst[kind], float(difference.max()))
        scale[kind] = max(scale[kind], float(gradient.abs().max()))
    assert min(scale.values()) > 0
    norms = max(abs(a / b - 1) for a, b in zip(found["norms"], expected["norms"], strict=True))
    return {kind: worst[kind] / scale[kind] for kind in KINDS} | {"norm": norms}


def trajectory(model_dir: str, spec: PlanSpec, topology: tuple[int, int, int], count: int, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Losses, norms, loads, first gradients of `count` steps on the calling ranks, and who holds which experts. `keywords`: those of
    `steps`; `options`, of the configuration; `passes`, the forward passes of each step whatever the number of ranks."""
    keywords = dict(keywords)
    passes, options = keywords.pop("passes", None), keywords.pop("options", {})
    plan = open_plan(spec)
    state = make(model_dir, topology, **options)
    make_step = state.optimizer.step
    gradients = spy_gradients(state)
    results: list[StepResult] = []
    for _ in range(count):
        if passes:
            keywords["max_rows"] = rows_for(plan, state.step + 1, passes)
        results += steps(state, plan, 1, **keywords)
        state.optimizer.step = make_step  # type: ignore[method-assign]
    return {
        "losses": [loss_of(r) for r in results],
        "norms": [r.grad_norm for r in results],
        "aux": [r.aux_loss for r in results],
        "loads": [r.load for r in results],
        "experts": experts_of_ranks(state.model),
        "gradients": gradients,
    }


def rows_for(plan: Plan, step: int, passes: int, world: int | None = None) -> int:
    """Rows of a forward pass with which a step takes so many of them, on the calling ranks or on `world`."""
    world = world or (dist.get_world_size() if dist.is_initialized() else 1)
    n_packs = len(plan.step(step).packs)
    fitting = [rows for rows in range(1, n_packs + 1) if forward_shape(n_packs, world, rows)[0] == passes]
    assert fitting, f"{n_packs} packs on {world} ranks do not go into {passes} passes"
    return fitting[0]


def save_to(uri: str | Path, state: TrainState, plan: Plan) -> None:
    writer = CheckpointWriter(background=False)
    writer.save(str(uri), state, content_of(state, plan), lambda _: None, lambda: True)
    writer.close()


def content_of(state: TrainState, plan: Plan) -> dict[str, Any]:
    return {"cursor": asdict(plan.cursor(state.step)), "ingredients": plan.ingredients}


def bare_state(model: nn.Module) -> TrainState:
    """A training state around any module, its moments filled."""
    optimizer = make_optimizer(model, config_from(OPTIONS))
    for moments in optimizer.state.values():
        moments["exp_avg"].add_(0.5)
        moments["exp_avg_sq"].add_(0.25)
    return TrainState(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0), LossScale())
