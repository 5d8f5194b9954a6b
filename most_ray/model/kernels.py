"""Element-wise parts of the network, each with its backward pass written out: fewer passes over memory, and less kept, than autograd's.

Shapes: T tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


class RmsNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, reckoned in float32 (Zhang and Sennrich, arXiv 1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
        full = x.float()
        square = torch.linalg.vector_norm(full, dim=-1, keepdim=True).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (full * scale).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        x, held, scale = ctx.saved_tensors
        grad, weight = grad.float(), held.float()
        normed = x.float() * scale
        product = grad * normed
        weight_grad = product.reshape(-1, x.shape[-1]).sum(0)
        # (g w - n mean(g w n)) scale, with n the normalised values.
        mean = (product @ weight).div_(x.shape[-1]).unsqueeze(-1)
        x_grad = (grad * weight).sub_(normed.mul_(mean)).mul_(scale)
        return x_grad.to(x.dtype), weight_grad.to(held.dtype), None, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """The RMS norm of (..., D) in `dtype`."""
    if x.is_cuda:
        return F.rms_norm(x.float(), weight.shape, weight, eps).to(dtype)  # torch's has a fused kernel there
    return RmsNorm.apply(x, weight, eps, dtype)


class SwiGlu(torch.autograd.Function):
    """silu(gate) * up (Shazeer, arXiv 2002.05202); keeps nothing but its inputs."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The type of matrix products here: the autocast's, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def round_up(count: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """A number of rows, to one of sixteen in each power of two (of 16 or more) for products in half precision: oneDNN makes its kernels
    for these anew for each shape, which takes ten times as long as a product, and keeps a thousand of them."""
    if dtype is torch.float32:
        return count
    unit = max(16, 1 << max(0, count.bit_length() - 5))
    return -(-count // unit) * unit
