"""One optimizer step: forward passes, a loss divided by global counts, clipping over all meshes, the update.

Shapes: M forward passes, B rows, S positions, N supervised tokens, L layers with experts, E experts.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from most_ray.data.batch import Batch
from most_ray.errors import UserError
from most_ray.records import TASKS
from most_ray.template import IGNORE
from most_ray.train.state import TrainState

_SKIP_LIMIT = 20


class TrainingDivergedError(UserError):
    """The gradients stay non-finite."""

    kind = "training error"


@dataclass(frozen=True)
class StepResult:
    """Totals over all ranks. loss_sums, token_counts: per task, in the order of records.TASKS; aux_loss: weighted, as added to the
    loss; load: (L, 2, E) selections; grad_norm: before clipping."""

    step: int
    loss_sums: list[float]
    token_counts: list[int]
    aux_loss: float
    grad_norm: float
    learning_rate: float
    load: torch.Tensor
    skipped: bool


@dataclass(frozen=True)
class Precision:
    """Autocast type, or None for float32."""

    dtype: torch.dtype | None

    def context(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(device.type, dtype=self.dtype) if self.dtype else contextlib.nullcontext()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def run_step(
    state: TrainState,
    batch: Batch,
    precision: Precision,
    max_grad_norm: float,
    device: torch.device,
    asr_loss_weight: float = 1.0,
) -> StepResult:
    """Train on one batch.

    The loss is the sum over supervised tokens divided by their number in the whole step (all ranks, all forward passes), ASR tokens
    counting `asr_loss_weight` times in both, plus the balance loss divided by the step's records (or tokens). FSDP averages gradients
    over ranks, so each rank's part is multiplied by their number: the update is the one a single worker would make.
    """
    model, config, ranks = state.model, state.model_config, world_size()
    model.train()
    weights = torch.ones(len(TASKS), device=device)
    weights[TASKS.index("asr")] = asr_loss_weight
    denominator = sum(count * float(weight) for count, weight in zip(batch.n_supervised, weights, strict=True))
    n_aux = batch.n_records if config.seq_aux else batch.n_tokens
    loss_sums = torch.zeros(len(TASKS), device=device, dtype=torch.float64)
    token_counts = torch.zeros(len(TASKS), device=device, dtype=torch.float64)
    aux_total = torch.zeros((), device=device, dtype=torch.float64)
    load: torch.Tensor | None = None
    for index in range(len(batch.input_ids)):
        input_ids, labels, positions, modality, task = (
            torch.from_numpy(array[index]).to(device, torch.long)
            for array in (batch.input_ids, batch.labels, batch.positions, batch.modality, batch.task)
        )
        with precision.context(device):
            output = model(
                input_ids=input_ids,
                position_ids=positions,
                modality=modality,
                labels=labels,
                use_cache=False,
                token_losses_only=True,
            )
        aux = config.aux_loss_alpha * output.aux_sum / n_aux
        tasks = task[:, 1:][labels[:, 1:] != IGNORE]
        loss = (output.token_losses * weights[tasks]).sum() / denominator + aux
        (loss * (ranks * state.loss_scale.scale)).backward()
        loss_sums.index_add_(0, tasks, output.token_losses.detach().double())
        token_counts.index_add_(0, tasks, torch.ones_like(tasks, dtype=torch.float64))
        aux_total += aux.detach()
        load = output.expert_load if load is None else load + output.expert_load
    assert load is not None, "a step has at least one forward pass"
    totals = torch.cat([loss_sums, token_counts, aux_total.view(1), load.double().view(-1)])
    if ranks > 1:
        dist.all_reduce(totals)
    k = len(TASKS)
    learning_rate = float(state.scheduler.get_last_lr()[0])
    grad_norm, skipped = _update(state, max_grad_norm)
    state.step = batch.step
    return StepResult(
        step=batch.step,
        loss_sums=totals[:k].tolist(),
        token_counts=[int(count) for count in totals[k : 2 * k].tolist()],
        aux_loss=float(totals[2 * k]),
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        load=totals[2 * k + 1 :].view(load.shape).long().cpu(),
        skipped=skipped,
    )


def _update(state: TrainState, max_grad_norm: float) -> tuple[float, bool]:
    """Unscale, clip, step; a non-finite gradient leaves weights and moments as they were, on every rank alike."""
    unscale = 1.0 / state.loss_scale.scale
    norm = global_grad_norm(state.model) * unscale
    finite = bool(torch.isfinite(norm))
    if finite:
        factor = unscale
        if max_grad_norm > 0:
            factor *= min(1.0, max_grad_norm / (float(norm) + 1e-6))
        if factor != 1.0:
            grads = [p.grad for p in state.model.parameters() if p.grad is not None]
            for grad in grads:
                grad.mul_(factor)
        state.optimizer.step()
        state.skipped_in_row = 0
    else:
        state.skipped_in_row += 1
        if state.skipped_in_row >= _SKIP_LIMIT:
            raise TrainingDivergedError(
                "gradient norm", float(norm), f"has not been finite for {_SKIP_LIMIT} steps.", "Lower learning_rate or use bf16."
            )
    state.loss_scale.update(finite)
    state.optimizer.zero_grad(set_to_none=True)
    state.scheduler.step()
    return float(norm), not finite


def global_grad_norm(model: nn.Module) -> torch.Tensor:
    """Euclidean norm over all parameters, float32 scalar. Parameters of different meshes cannot meet in one DTensor operation, so
    each mesh's norm is taken by itself and the results are combined."""
    by_mesh: dict[Any, list[torch.Tensor]] = defaultdict(list)
    for parameter in model.parameters():
        if parameter.grad is not None:
            by_mesh[parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None].append(parameter.grad)
    squares = []
    for grads in by_mesh.values():
        norm = torch.nn.utils.get_total_norm(grads)
        squares.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).float() ** 2)
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
