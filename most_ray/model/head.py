"""The language-model head, and its cross-entropy without logits of the whole vocabulary in memory.

Shapes: N supervised tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from most_ray.model.kernels import compute_dtype, round_up

_MAX_LOGITS = 1 << 23  # in memory at once, unless there are more than 8192 tokens


class MostHead(nn.Linear):
    """A linear layer that computes logits, or with targets their losses; both by calls of the module, when FSDP gathers its weight."""

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> MostHead:
        """A head that takes over the weight of `linear` (V, D), without drawing random numbers for one of its own."""
        head = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        head.weight = linear.weight
        return head

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (..., V) of hidden (..., D); of hidden (N, D) and targets, token ids (N,), the cross-entropy of each, float32 (N,)."""
        if targets is None:
            return super().forward(hidden)
        count, dtype = len(targets), compute_dtype(hidden)
        filling = round_up(count, dtype) - count
        hidden = F.pad(hidden.to(dtype), (0, 0, 0, filling))
        return _TokenLosses.apply(hidden, self.weight, F.pad(targets, (0, filling)))[:count].clone()  # since FSDP warns about views


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy of hidden (N, D) @ weight (V, D)^T for targets (N,), block by block of the vocabulary, so that memory does not grow
    with it. The backward pass computes the blocks again and writes each row of the weight's gradient once. Products are in the type of
    `hidden`, everything else in float32.

    torch.nn.functional.linear_cross_entropy (torch 2.13) has the same purpose; tests/benchmarks/RESULTS.md compares both.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        normaliser = torch.full((len(hidden),), -torch.inf, device=hidden.device)
        chosen = torch.zeros(len(hidden), device=hidden.device)
        blocks = list(_blocks(len(hidden), len(weight)))
        kept = None
        for start, end in blocks:
            logits = hidden @ weight[start:end].to(hidden.dtype).t()
            kept = logits if len(blocks) == 1 else None
            logits = logits.float()
            inside, columns = _in_block(targets, start, end)
            chosen += logits.gather(1, columns).squeeze(-1).where(inside, 0.0)
            normaliser = torch.logaddexp(normaliser, logits.logsumexp(-1)) if len(blocks) > 1 else logits.logsumexp(-1)
        ctx.save_for_backward(hidden, weight, targets, normaliser, kept)
        return normaliser - chosen

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        hidden, weight, targets, normaliser, kept = ctx.saved_tensors
        hidden_grad = torch.zeros(hidden.shape, device=hidden.device)
        weight_grad = torch.empty_like(weight)
        by = grad.unsqueeze(-1)
        for start, end in _blocks(len(hidden), len(weight)):
            rows = weight[start:end].to(hidden.dtype)
            logits = (hidden @ rows.t() if kept is None else kept).float()
            # (softmax - one-hot) times the gradient of each loss.
            share = logits.sub_(normaliser.unsqueeze(-1)).exp_() if kept is None else (logits - normaliser.unsqueeze(-1)).exp_()
            share.mul_(by)
            inside, columns = _in_block(targets, start, end)
            share.scatter_add_(1, columns, -(grad * inside).unsqueeze(-1))
            lowered = share.to(hidden.dtype)
            weight_grad[start:end] = lowered.t() @ hidden
            hidden_grad += lowered @ rows
        return hidden_grad.to(hidden.dtype), weight_grad, None


def logits_block(n_tokens: int, vocabulary: int) -> int:
    """Rows of the vocabulary whose logits are in memory at once."""
    return min(vocabulary, max(1024, _MAX_LOGITS // max(1, n_tokens)))


def _blocks(n_tokens: int, vocabulary: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of the vocabulary that are computed at once."""
    size = logits_block(n_tokens, vocabulary)
    for start in range(0, vocabulary, size):
        yield start, min(start + size, vocabulary)


def _in_block(targets: torch.Tensor, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each target is in the block of the vocabulary from `start` to `end`, bool (N,); and its column there, (N, 1)."""
    return (targets >= start) & (targets < end), (targets - start).clamp(0, end - start - 1).unsqueeze(-1)
