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

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from most_ray.config import OptimizerOptions
from most_ray.data.batch import Batch
from most_ray.distributed.collectives import all_gather_or_raise
from most_ray.distributed.ranks import this_rank, world_size
from most_ray.errors import UserError, printable
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


def autocast_dtype(options: OptimizerOptions) -> torch.dtype | None:
    """Return the type that forward passes compute in under autocast; None for float32, without autocast."""
    return torch.float16 if options.fp16 else torch.bfloat16 if options.bf16 else None


@dataclass(frozen=True)
class StepSettings:
    """How a rank makes its steps. Fields with the name of a configuration key are described in config.OptimizerOptions."""

    dtype: torch.dtype | None  # see `autocast_dtype`
    device: torch.device
    max_grad_norm: float
    asr_loss_weight: float
    max_skipped_steps: int

    @classmethod
    def of(cls, options: OptimizerOptions, device: torch.device) -> StepSettings:
        return cls(autocast_dtype(options), device, options.max_grad_norm, options.asr_loss_weight, options.max_skipped_steps)


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
    *parts, loads = totals.split([len(TASKS), len(TASKS), 4, load.numel()])
    loss_sums, token_counts, (aux_loss, square, any_stop, attended) = (part.tolist() for part in parts)
    learning_rate = float(state.scheduler.get_last_lr()[0])
    grad_norm = math.sqrt(square) / state.loss_scale.scale
    # The losses too: an infinite one can have finite gradients.
    skipped = not all(map(math.isfinite, (*loss_sums, aux_loss, grad_norm)))
    load = loads.view(load.shape).long()
    if not skipped:
        _update(state, grad_norm, settings.max_grad_norm)
        if state.balance_bias_rate:
            update_balance_bias(state.model, load, state.balance_bias_rate)
        if BALANCE_LOAD in state.buffers:
            state.buffers[BALANCE_LOAD].copy_(load.sum(1))
    _advance(state, batch.step, skipped)
    if skipped:
        _report_skipped(state, batch, sum(loss_sums) + aux_loss, grad_norm, settings.max_skipped_steps)
    counts = list(map(int, token_counts))
    return StepResult(batch.step, loss_sums, counts, aux_loss, grad_norm, learning_rate, load, skipped, bool(any_stop), int(attended))


def attended_pairs(batch: Batch) -> int:
    """Return the number of pairs (token, token of its record up to it) in this rank's rows, which causal attention in records computes."""
    return int((batch.positions[batch.modality != PADDING] + 1).sum(dtype=np.int64))


def _accumulate(state: TrainState, batch: Batch, settings: StepSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Accumulate the gradients of all forward passes, multiplied by the loss scale, in the parameters. Returns this rank's sums, float64
    `(2 * tasks + 1,)`: losses and supervised tokens by task, and the weighted balance loss; and its load, `(L, 2, E)`."""
    model, config, ranks, device = state.model, state.model_config, world_size(), settings.device
    by_task = [settings.asr_loss_weight if task == "asr" else 1.0 for task in TASKS]
    weights = to_device(torch.tensor(by_task), device)
    denominator = sum(count * weight for count, weight in zip(batch.n_supervised, by_task, strict=True))
    n_aux = batch.n_records if config.seq_aux else batch.n_tokens
    loss_sums = torch.zeros(len(TASKS), device=device, dtype=torch.float64)
    token_counts = torch.zeros_like(loss_sums)
    aux_total = torch.zeros((), device=device, dtype=torch.float64)
    load: torch.Tensor | None = None
    previous_load = state.buffers[BALANCE_LOAD].to(device) if BALANCE_LOAD in state.buffers else None
    for *arrays, task in zip(batch.input_ids, batch.labels, batch.positions, batch.modality, batch.task, strict=True):
        packed = pack_rows(*arrays).to(device)
        tasks = to_device(torch.from_numpy(task[:, 1:][arrays[1][:, 1:] != IGNORE].astype(np.int64)), device)
        with torch.autocast(device.type, dtype=settings.dtype) if settings.dtype else contextlib.nullcontext():
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


def _advance(state: TrainState, step: int, skipped: bool) -> None:
    """Count a step, whether made or skipped: the schedule depends on the step's number alone."""
    state.skipped_in_row = state.skipped_in_row + 1 if skipped else 0
    state.loss_scale.update(not skipped)
    state.optimizer.zero_grad(set_to_none=True)
    state.scheduler.step()
    state.step = step


def _report_skipped(state: TrainState, batch: Batch, loss: float, grad_norm: float, limit: int) -> None:
    """Warn of a skipped step on rank 0, and end the run at the `limit`-th in a row. Collective. Records are named at once, except in
    float16, which normally skips steps while it searches for a scale."""
    at_end, records = state.skipped_in_row >= limit, ""
    what, value = ("loss", loss) if not math.isfinite(loss) else ("gradient norm", grad_norm)
    if at_end or not state.loss_scale.enabled:
        ids = all_record_ids(batch)
        more = len(ids) - _SHOWN_RECORDS
        records = f" Its records: {', '.join(ids[:_SHOWN_RECORDS])}{f' and {more} more' if more > 0 else ''}."
    if this_rank() == 0:
        logger.warning("step %d skipped: %s = %s.%s", batch.step, what, value, printable(records))
    if at_end:
        rule = f"is not finite; step {batch.step} is the last of {limit} skipped in a row.{records}"
        advice = "Use bf16" if state.loss_scale.enabled else "Look at these records"
        raise TrainingDivergedError(what, value, rule, f"{advice}, or lower learning_rate.")


def all_record_ids(batch: Batch) -> list[str]:
    """Return the step's records on all ranks, sorted. Collective."""
    return sorted(itertools.chain.from_iterable(all_gather_or_raise(lambda: batch.record_ids)))


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
    """Return this rank's part of the squared Euclidean norm of all gradients, as a float64 scalar. The sum over ranks is the squared norm,
    whatever meshes (dense, expert) the parameters are on: a shard that several ranks hold counts in equal parts on each."""
    parts = [torch.nn.utils.get_total_norm(grads).double() ** 2 / copies for copies, grads in _local_gradients(model).items()]
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)
