"""Everything of a run that must survive a restart, in one place."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import get_scheduler

from most_ray.config import OptimizerOptions
from most_ray.model.configuration import MostConfig
from most_ray.model.routing import MostRouter
from most_ray.optim.optimizer import make_optimizer

BALANCE_LOAD = "balance_load"


@dataclass
class LossScale:
    """Dynamic loss scaling for float16 (Micikevicius et al. 2018), decided by the global gradient norm, so alike on every rank."""

    scale: float = 1.0
    growth_interval: int = 2000
    good_steps: int = 0
    enabled: bool = False

    def update(self, finite: bool) -> None:
        if not self.enabled:
            return
        if not finite:
            self.scale, self.good_steps = max(1.0, self.scale / 2), 0
        else:
            self.good_steps += 1
            if self.good_steps % self.growth_interval == 0:
                self.scale *= 2


@dataclass
class TrainState:
    """A model in training. `step` optimizer steps have been made; `buffers` are further tensors to survive, equal on every rank:
    BALANCE_LOAD (L, E) int64, selections of the last step that was made, where the balance loss is batch-wise."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    loss_scale: LossScale
    step: int = 0
    skipped_in_row: int = 0
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    balance_bias_rate: float = 0.0

    @property
    def model_config(self) -> MostConfig:
        return self.model.config  # type: ignore[return-value]


def make_state(model: nn.Module, options: OptimizerOptions, total_steps: int) -> TrainState:
    """Optimizer with state, schedule and loss scale for a model that is already laid out over its ranks."""
    optimizer = make_optimizer(model, options)
    warmup = options.warmup_steps or round(options.warmup_ratio * total_steps)
    name = "constant_with_warmup" if options.lr_scheduler == "constant" else options.lr_scheduler
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)
    scale = LossScale(scale=2.0**16, enabled=True) if options.fp16 else LossScale()
    state = TrainState(model, optimizer, scheduler, scale, balance_bias_rate=options.balance_bias_rate)
    config = state.model_config
    assert config.use_balance_bias or not options.balance_bias_rate, "load_model is told by RoutingOverrides.use_balance_bias"
    if not config.seq_aux and config.aux_loss_alpha > 0:
        layers = sum(isinstance(module, MostRouter) for module in model.modules())
        state.buffers[BALANCE_LOAD] = torch.zeros(layers, config.n_routed_experts, dtype=torch.int64)
    return state


def set_schedule(state: TrainState, last_epoch: int) -> None:
    """The schedule is a function of one number; rates per parameter group are made anew, for another layout has other groups."""
    scheduler = state.scheduler
    scheduler.last_epoch = last_epoch
    rates = [base * factor(last_epoch) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    scheduler._last_lr = rates
    for group, rate in zip(state.optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):  # torchao's: compiled code must not have it as a constant
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
