"""One optimizer step: forward passes, a loss divided by global counts, clipping over all meshes, the update.

Everything that a rank's decisions depend on (the gradient norm, whether all values are finite, whether any rank is to stop) comes from one
all-reduce, so it is bitwise identical on all ranks: a clipping factor that differed in its last bit would make replicas differ.

Shapes: M forward passes, B rows, S positions, N supervised tokens, L layers with experts, E experts.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from most_ray.config import OptimizerOptions
from most_ray.data.batch import Batch
from most_ray.distributed.ranks import this_rank, world_size
from most_ray.errors import UserError
from most_ray.model.packed import pack_rows, to_device
from most_ray.model.routing import update_balance_bias
from most_ray.optim.train_state import BALANCE_LOAD, TrainState
from most_ray.records.record import TASKS
from most_ray.records.template import IGNORE, PADDING

logger = logging.getLogger(__name__)
_SHOWN_RECORDS = 20


class TrainingDivergedError(UserError):
    """Losses or gradients stay non-finite."""

    kind = "training error"


@dataclass(frozen=True)
class StepResult:
    """Totals of a step over all ranks."""

    step: int
    loss_sums: list[float]  # of supervised tokens by task, in the order of records.TASKS
    token_counts: list[int]  # supervised tokens by task
    aux_loss: float  # weighted, as added to the loss
    grad_norm: float  # before clipping
    learning_rate: float
    load: torch.Tensor  # selections of each expert by text and by audio tokens, (L, 2, E)
    skipped: bool  # a loss or gradient was not finite: weights and moments did not change; sums and norm may be NaN
    stop: bool = False  # a rank was requested to stop
    attended: int = 0  # see `attended_pairs`


@dataclass(frozen=True)
class Precision:
    """The type that forward passes compute in."""

    dtype: torch.dtype | None  # of the autocast; None for float32

    @classmethod
    def of(cls, options: OptimizerOptions) -> Precision:
        """Return the precision of a configuration."""
        return cls(torch.float16 if options.fp16 else torch.bfloat16 if options.bf16 else None)

    def context(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(device.type, dtype=self.dtype) if self.dtype else contextlib.nullcontext()


@dataclass(frozen=True)
class StepSettings:
    """How a rank makes its steps. Fields with the name of a configuration key are described in config.OptimizerOptions."""

    precision: Precision
    device: torch.device
    max_grad_norm: float
    asr_loss_weight: float
    max_skipped_steps: int

    @classmethod
    def of(cls, options: OptimizerOptions, device: torch.device) -> StepSettings:
        """Return the settings of a configuration."""
        return cls(Precision.of(options), device, options.max_grad_norm, options.asr_loss_weight, options.max_skipped_steps)


def run_step(state: TrainState, batch: Batch, settings: StepSettings, stop: bool = False) -> StepResult:
    """Train on one batch. Collective.

    The loss is the sum over supervised tokens divided by their number in the whole step (all ranks, all forward passes), where ASR tokens
    count `asr_loss_weight` times in both, plus the balance loss divided by the step's records (or tokens). FSDP averages gradients over
    ranks, so each rank's part is multiplied by their number: the update is the one that a single worker would make.

    Args:
        batch: this rank's.
        stop: whether this rank was requested to stop. The result says whether any rank was, the same on every rank.

    Raises:
        TrainingDivergedError: on every rank, if this is the `max_skipped_steps`-th step in a row that is not finite.
    """
    state.model.train()
    device = settings.device
    sums, load = _accumulate(state, batch, settings)
    counted = torch.tensor([float(stop), attended_pairs(batch)], device=device, dtype=torch.float64)
    totals = torch.cat([sums, grad_square(state.model).to(device).view(1), counted, load.double().view(-1)])
    if world_size() > 1:
        dist.all_reduce(totals)
    totals = totals.cpu()  # the only time in the step that the CPU waits for the device
    k = len(TASKS)
    loss_sums, aux_loss, square = totals[:k].tolist(), float(totals[2 * k]), float(totals[2 * k + 1])
    learning_rate = float(state.scheduler.get_last_lr()[0])
    grad_norm = math.sqrt(square) / state.loss_scale.scale
    # The losses too: an infinite one can have finite gradients.
    skipped = not all(map(math.isfinite, (*loss_sums, aux_loss, grad_norm)))
    load = totals[2 * k + 4 :].view(load.shape).long()
    if not skipped:
        _update(state, grad_norm, settings.max_grad_norm)
        _balance(state, load)
    _advance(state, batch.step, skipped)
    if skipped:
        _report_skipped(state, batch, sum(loss_sums) + aux_loss, grad_norm, settings.max_skipped_steps)
    return StepResult(
        step=batch.step,
        loss_sums=loss_sums,
        token_counts=[int(count) for count in totals[k : 2 * k].tolist()],
        aux_loss=aux_loss,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        load=load,
        skipped=skipped,
        stop=bool(totals[2 * k + 2]),
        attended=int(totals[2 * k + 3]),
    )


def attended_pairs(batch: Batch) -> int:
    """Return the number of pairs (token, token of its record up to it) in this rank's rows, which causal attention in records computes."""
    return int((batch.positions[batch.modality != PADDING] + 1).sum(dtype=np.int64))


def _accumulate(state: TrainState, batch: Batch, settings: StepSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Accumulate the gradients of all forward passes, multiplied by the loss scale, in the parameters.

    Returns:
        This rank's sums, float64 `(2 * tasks + 1,)`: losses and supervised tokens by task, and the weighted balance loss; and its load,
        `(L, 2, E)`.
    """
    model, config, ranks, device = state.model, state.model_config, world_size(), settings.device
    by_task = [settings.asr_loss_weight if task == "asr" else 1.0 for task in TASKS]
    weights = to_device(torch.tensor(by_task), device)
    denominator = sum(count * weight for count, weight in zip(batch.n_supervised, by_task, strict=True))
    n_aux = batch.n_records if config.seq_aux else batch.n_tokens
    loss_sums = torch.zeros(len(TASKS), device=device, dtype=torch.float64)
    token_counts = torch.zeros(len(TASKS), device=device, dtype=torch.float64)
    aux_total = torch.zeros((), device=device, dtype=torch.float64)
    load: torch.Tensor | None = None
    previous_load = state.buffers[BALANCE_LOAD].to(device) if BALANCE_LOAD in state.buffers else None
    for index in range(len(batch.input_ids)):
        arrays = (batch.input_ids, batch.labels, batch.positions, batch.modality)
        packed = pack_rows(*(array[index] for array in arrays)).to(device)
        tasks = torch.from_numpy(batch.task[index, :, 1:][batch.labels[index, :, 1:] != IGNORE].astype(np.int64))
        tasks = to_device(tasks, device)
        with settings.precision.context(device):
            output = model(packed=packed, previous_load=previous_load)
        aux = config.aux_loss_alpha * output.aux_sum / n_aux
        loss = (output.token_losses * weights[tasks]).sum() / denominator + aux
        (loss * (ranks * state.loss_scale.scale)).backward()
        loss_sums.index_add_(0, tasks, output.token_losses.detach().double())
        token_counts.index_add_(0, tasks, torch.ones_like(tasks, dtype=torch.float64))
        aux_total += aux.detach()
        load = output.expert_load if load is None else load + output.expert_load
    assert load is not None, "a step has at least one forward pass"
    return torch.cat([loss_sums, token_counts, aux_total.view(1)]), load


def _update(state: TrainState, grad_norm: float, max_grad_norm: float) -> None:
    """Unscale and clip the gradients, which are finite, and update the weights."""
    factor = 1.0 / state.loss_scale.scale
    if max_grad_norm > 0:
        factor *= min(1.0, max_grad_norm / (grad_norm + 1e-6))
    if factor != 1.0:
        for grads in _local_gradients(state.model).values():
            torch._foreach_mul_(grads, factor)
    state.optimizer.step()


def _balance(state: TrainState, load: torch.Tensor) -> None:
    """Set the next step's balance biases and load from this step's load over all ranks, `(L, 2, E)`."""
    if state.balance_bias_rate:
        update_balance_bias(state.model, load, state.balance_bias_rate)
    if BALANCE_LOAD in state.buffers:
        state.buffers[BALANCE_LOAD].copy_(load.sum(1))


def _advance(state: TrainState, step: int, skipped: bool) -> None:
    """Count a step, whether made or skipped: the schedule depends on the step's number alone."""
    state.skipped_in_row = state.skipped_in_row + 1 if skipped else 0
    state.loss_scale.update(not skipped)
    state.optimizer.zero_grad(set_to_none=True)
    state.scheduler.step()
    state.step = step


def _report_skipped(state: TrainState, batch: Batch, loss: float, grad_norm: float, limit: int) -> None:
    """Warn of a skipped step on rank 0, and end the run at the `limit`-th in a row. Collective.

    Records are named at once, except in float16, which normally skips steps while it searches for a scale.
    """
    at_end = state.skipped_in_row >= limit
    what, value = ("loss", loss) if not math.isfinite(loss) else ("gradient norm", grad_norm)
    records = "" if state.loss_scale.enabled and not at_end else f" Its records: {_format_ids(_all_record_ids(batch))}."
    if this_rank() == 0:
        logger.warning("step %d skipped: %s = %s.%s", batch.step, what, value, records)
    if at_end:
        raise TrainingDivergedError(
            what,
            value,
            f"is not finite; step {batch.step} is the last of {limit} skipped in a row.{records}",
            "Use bf16, or lower learning_rate." if state.loss_scale.enabled else "Look at these records, or lower learning_rate.",
        )


def _all_record_ids(batch: Batch) -> list[str]:
    """Return the step's records on all ranks, sorted. Collective."""
    ids: list[list[str]] = [batch.record_ids]
    if world_size() > 1:
        ids = [[] for _ in range(world_size())]
        dist.all_gather_object(ids, batch.record_ids)
    return sorted(itertools.chain.from_iterable(ids))


def _format_ids(ids: list[str]) -> str:
    more = len(ids) - _SHOWN_RECORDS
    return ", ".join(ids[:_SHOWN_RECORDS]) + (f" and {more} more" if more > 0 else "")


@torch.no_grad()
def _local_gradients(model: nn.Module) -> dict[int, list[torch.Tensor]]:
    """Return this rank's shards of all gradients, grouped by the number of ranks that hold the same shard."""
    found: dict[int, list[torch.Tensor]] = defaultdict(list)
    for parameter in model.parameters():
        grad, copies = parameter.grad, world_size()
        if isinstance(grad, DTensor):
            for placement, size in zip(grad.placements, grad.device_mesh.shape, strict=True):
                assert not placement.is_partial(), "FSDP has reduced all gradients"
                copies //= 1 if placement.is_replicate() else size
            grad = grad.to_local()
        if grad is not None:
            found[copies].append(grad)
    return found


def grad_square(model: nn.Module) -> torch.Tensor:
    """Return this rank's part of the squared Euclidean norm of all gradients, as a float64 scalar.

    The sum over ranks is the squared norm, whatever meshes (dense, expert) the parameters are on: a shard that several ranks hold counts in
    equal parts on each.
    """
    parts = [torch.nn.utils.get_total_norm(grads).double() ** 2 / copies for copies, grads in _local_gradients(model).items()]
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)
