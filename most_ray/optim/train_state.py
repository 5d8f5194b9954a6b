"""The state of a training run that a checkpoint stores: model, optimizer, schedule, loss scale and buffers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import get_scheduler

from most_ray.config import OptimizerOptions
from most_ray.model.configuration import MostConfig
from most_ray.model.routing import MostRouter
from most_ray.optim.optimizer import make_optimizer

BALANCE_LOAD = "balance_load"  # name of a buffer: int64 (layers with experts, experts), selections of the last step that was not skipped


@dataclass
class LossScale:
    """Dynamic loss scaling for float16 (Micikevicius et al. 2018). It depends on the global gradient norm, so it is equal on every rank."""

    scale: float = 1.0  # factor of the loss, and of all gradients
    growth_interval: int = 2000  # the scale is doubled after this many steps with finite gradients
    good_steps: int = 0  # steps with finite gradients since the scale was last halved
    enabled: bool = False  # whether `update` has an effect

    def update(self, finite: bool) -> None:
        """Adapt the scale after a step: halved, but at least 1, where it was not `finite`."""
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
    """A model in training, with everything that must survive a restart."""

    model: nn.Module  # laid out over its ranks
    optimizer: torch.optim.Optimizer  # with moments that exist already
    scheduler: torch.optim.lr_scheduler.LambdaLR  # advances with `step`
    loss_scale: LossScale
    step: int = 0  # steps so far, with those whose update was skipped
    skipped_in_row: int = 0  # latest steps in a row that were skipped, since their loss or gradients were not finite
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)  # equal on every rank: BALANCE_LOAD where the balance loss is batch-wise
    balance_bias_rate: float = 0.0  # change of the routers' balance biases per step (see `routing.update_balance_bias`)

    @property
    def model_config(self) -> MostConfig:
        """The configuration of the model."""
        return self.model.config  # type: ignore[return-value]


def warmup_of(options: OptimizerOptions, total_steps: int) -> int:
    """Steps of linear warm-up of a run of `total_steps`."""
    return options.warmup_steps or round(options.warmup_ratio * total_steps)


def make_state(model: nn.Module, options: OptimizerOptions, total_steps: int) -> TrainState:
    """Create the optimizer with its moments, the schedule over `total_steps` of the whole run, and the loss scale, for a model that is
    already laid out over its ranks."""
    optimizer, warmup = make_optimizer(model, options), warmup_of(options, total_steps)
    name = "constant_with_warmup" if options.lr_scheduler == "constant" else options.lr_scheduler
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)
    scale = LossScale(scale=2.0**16, enabled=True) if options.fp16 else LossScale()
    state = TrainState(model, optimizer, scheduler, scale, balance_bias_rate=options.balance_bias_rate)
    config = state.model_config
    assert config.use_balance_bias or not options.balance_bias_rate, "load the model with RoutingOverrides.use_balance_bias"
    if not config.seq_aux and config.aux_loss_alpha > 0:
        layers = sum(isinstance(module, MostRouter) for module in model.modules())
        state.buffers[BALANCE_LOAD] = torch.zeros(layers, config.n_routed_experts, dtype=torch.int64)
    return state


def set_schedule(state: TrainState, last_epoch: int) -> None:
    """Move the schedule to `last_epoch` scheduler steps. The learning rates of the parameter groups are computed from that number, not
    restored, since another layout over ranks has other groups."""
    scheduler = state.scheduler
    scheduler.last_epoch = last_epoch
    rates = [base * factor(last_epoch) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    scheduler._last_lr = rates
    for group, rate in zip(state.optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):  # torchao's: a constant would be compiled into the update
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
