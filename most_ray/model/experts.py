"""Expert kernels: the feed-forward networks of the routed experts as one function, registered with transformers by name.

The kernel of this module sorts the pairs of a token and one of its experts by expert; each expert multiplies its rows in one product, in
the type of the autocast. The backward pass is written out: it saves only the tokens and the inner products, and gathers the rest again.

Shapes: T tokens, D hidden size, I inner size of an expert, E experts on this rank, K experts per token, P rows, one for each pair of a
token and an expert of this rank, in some cases more that only fill up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from most_ray.model.kernels import compute_dtype, round_up


def experts_forward(module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """The weighted sum of the outputs of each token's experts, in the shape (T, D) and type of hidden_states.

    Args:
        module: the experts: gate_up_proj (E, 2 I, D) and down_proj (E, D, I).
        top_k_index: int64 (T, K), the experts of each token. Those numbered E and above are on other ranks: they add nothing.
        top_k_weights: (T, K), the routing weights.
    """
    x = hidden_states.to(compute_dtype(hidden_states))
    return _Experts.apply(x, top_k_index, top_k_weights.float(), module.gate_up_proj, module.down_proj).to(hidden_states.dtype)


class _Pairs(NamedTuple):
    """The rows of pairs of a token and an expert of this rank, sorted by expert."""

    token: torch.Tensor  # (P,), the token of each row; T where a row only fills up
    pair: torch.Tensor  # (P,), the index of each row's pair among all T * K; T * K where a row only fills up
    row: torch.Tensor  # (T, K), the row of each pair; P where its expert is on another rank
    ends: torch.Tensor  # int32 (E,), where the rows of each expert end


def _sort(index: torch.Tensor, n_experts: int, dtype: torch.dtype) -> _Pairs:
    """The pairs of `index` (T, K); each expert's rows are filled up to a number that `round_up` gives for products of `dtype`."""
    n_tokens, k = index.shape
    flat = index.reshape(-1)
    experts, order = flat.sort(stable=True)
    if _on_gpu(index):
        return _sort_on_device(experts, order, index.shape, n_experts)
    counts = torch.bincount(flat, minlength=n_experts)[:n_experts]
    held = int(counts.sum())
    sizes = torch.tensor([round_up(count, dtype) for count in counts.tolist()])
    ends = sizes.cumsum(0)
    n_rows = int(ends[-1])
    shift = (ends - sizes) - (counts.cumsum(0) - counts)
    order = order[:held]
    rows = torch.arange(held) + shift[experts[:held]]
    pair = torch.full((n_rows,), n_tokens * k).index_copy_(0, rows, order)
    row = torch.full((n_tokens * k,), n_rows).index_copy_(0, order, rows)
    return _Pairs(pair // k, pair, row.view(n_tokens, k), ends.int())


def _sort_on_device(experts: torch.Tensor, order: torch.Tensor, shape: torch.Size, n_experts: int) -> _Pairs:
    """The pairs without waiting for the device, from the sorted `experts` (T * K,) of all pairs and the indices `order` (T * K,) of the
    pairs in that order; shape: (T, K). Pairs of experts on other ranks stay after the last end, where nothing is computed."""
    n_tokens, k = shape
    numbers = torch.arange(n_experts, device=experts.device)
    ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
    rows = torch.arange(len(order), device=order.device).where(experts < n_experts, len(order))
    return _Pairs(order // k, order, torch.empty_like(order).index_copy_(0, order, rows).view(n_tokens, k), ends)


class _Experts(torch.autograd.Function):
    """Sum over k of w_k down_k(silu(gate_k x) * up_k x). The routing weights w multiply the input of the last product, so that their
    gradient needs no result of it."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
    ) -> torch.Tensor:
        pairs = _sort(index, len(gate_up), x.dtype)
        inner = _products(_with_zero(x).index_select(0, pairs.token), gate_up.transpose(1, 2), pairs.ends)
        gate, up = inner.chunk(2, dim=-1)
        weight = _with_zero(weights.reshape(-1, 1)).index_select(0, pairs.pair).to(x.dtype)
        rows = _products(F.silu(gate).mul_(up).mul_(weight), down.transpose(1, 2), pairs.ends)
        ctx.save_for_backward(x, weights, gate_up, down, inner, *pairs)
        return _sum_by_token(rows, pairs.row)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weights, gate_up, down, inner, *saved = ctx.saved_tensors
        pairs = _Pairs(*saved)
        weight = _with_zero(weights.reshape(-1, 1)).index_select(0, pairs.pair).to(x.dtype)
        gate, up = inner.chunk(2, dim=-1)
        silu = F.silu(gate)
        active = silu * up
        grad_rows = _with_zero(grad.to(x.dtype)).index_select(0, pairs.token)
        grad_active = _products(grad_rows, down, pairs.ends)
        weights_grad = (grad_active * active).sum(-1, dtype=torch.float32)
        weights_grad = F.pad(weights_grad, (0, 1)).index_select(0, pairs.row.view(-1)).view_as(weights)
        down_grad = _weight_gradient(grad_rows, active.mul_(weight), pairs.ends, down)
        grad_active.mul_(weight)
        grad_inner = torch.empty_like(inner)
        grad_gate, grad_up = grad_inner.chunk(2, dim=-1)
        torch.mul(grad_active, silu, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_active.mul_(up), gate, grad_input=grad_gate)
        gate_up_grad = _weight_gradient(grad_inner, _with_zero(x).index_select(0, pairs.token), pairs.ends, gate_up)
        x_grad = _sum_by_token(_products(grad_inner, gate_up, pairs.ends), pairs.row)
        return x_grad, None, weights_grad, gate_up_grad, down_grad


def _with_zero(rows: torch.Tensor) -> torch.Tensor:
    """(T, D) -> (T + 1, D), the last row zeros."""
    return F.pad(rows, (0, 0, 0, 1))


def _sum_by_token(rows: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Sum `rows` (P, D) over the pairs of each token, whose rows are `row` (T, K): (T, D). In a fixed order, unlike additions by index."""
    return _with_zero(rows).index_select(0, row.view(-1)).view(*row.shape, rows.shape[1]).sum(1)


def _products(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Multiply the rows (P, A) of each expert by its matrix of (E, A, B), in the type of the rows: (P, B)."""
    if _on_gpu(rows):
        return _grouped(rows, matrices.to(rows.dtype), ends) if len(rows) else rows.new_zeros(0, matrices.shape[2])
    output = rows.new_empty(len(rows), matrices.shape[2])
    start = 0
    for matrix, end in zip(matrices, ends.tolist(), strict=True):
        if end > start:
            torch.mm(rows[start:end], matrix.to(rows.dtype), out=output[start:end])
        start = end
    return output


def _on_gpu(tensor: torch.Tensor) -> bool:
    """A function, so that tests can take the paths of GPUs on a CPU."""
    return tensor.is_cuda


def _grouped(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """torch's grouped product; its fast kernels are for bfloat16 on GPUs from Hopper on."""
    return F.grouped_mm(left, right, offs=ends)


def _weight_gradient(grads: torch.Tensor, inputs: torch.Tensor, ends: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The gradient of each expert's matrix, (E, B, A), from the gradients (P, B) of its products and their inputs (P, A)."""
    if _on_gpu(grads):
        if not len(grads):
            return torch.zeros_like(like)
        # For experts without rows some kernels write nothing (pytorch issue 172439).
        empty = ends.diff(prepend=ends.new_zeros(1)) == 0
        return _grouped(grads.t(), inputs, ends).masked_fill_(empty.view(-1, 1, 1), 0).to(like.dtype)
    found = torch.empty_like(like)
    start = 0
    for matrix, end in zip(found, ends.tolist(), strict=True):
        matrix.copy_(grads[start:end].t() @ inputs[start:end])
        start = end
    return found


# Every kernel by the name that `experts_implementation` has for it. The tests of kernels run for each.
EXPERT_KERNELS: dict[str, Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {"most_ray": experts_forward}
DEFAULT_KERNEL = "most_ray"  # of a model that is loaded without `experts_implementation`, so of training
for _name, _kernel in EXPERT_KERNELS.items():
    ALL_EXPERTS_FUNCTIONS.register(_name, _kernel)
