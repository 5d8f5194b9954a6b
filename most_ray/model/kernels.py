"""Element-wise operations with their backward passes written out, which read memory less often and save less than autograd's, and the
library's modules with them. D is the size of the last dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2MLP, DeepseekV2RMSNorm


class RmsNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32 (Zhang and Sennrich, arXiv 1910.07467)."""

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
    """The RMS norm of x (..., D) with weight (D,), in `dtype`: (..., D)."""
    if x.is_cuda:
        return F.rms_norm(x.float(), weight.shape, weight, eps).to(dtype)  # torch has a fused kernel for GPUs
    return RmsNorm.apply(x, weight, eps, dtype)


class SwiGlu(torch.autograd.Function):
    """silu(gate) * up, both (..., D) (Shazeer, arXiv 2002.05202); only the inputs are saved."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The type of matrix products on the device of x: the autocast's where it is enabled, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def round_up(count: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Round a number of rows up for products in half precision, to one of sixteen numbers between powers of two, and to multiples of 16.

    oneDNN compiles a kernel for each shape, which takes ten times as long as a product, and caches a thousand of them. For float32 the
    number stays.
    """
    if dtype is torch.float32:
        return count
    unit = max(16, 1 << max(0, count.bit_length() - 5))
    return -(-count // unit) * unit


class MostNorm(DeepseekV2RMSNorm):
    """RMS norm of (..., D), with the result in the type of matrix products."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon, compute_dtype(hidden_states))


class MostUncastNorm(DeepseekV2RMSNorm):
    """RMS norm of (..., D), with the result in the type of the input: a router's input is not cast to the autocast's type."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon, hidden_states.dtype)


class MostMlp(DeepseekV2MLP):
    """The library's gated MLP of (..., D), with a faster activation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(SwiGlu.apply(self.gate_proj(x), self.up_proj(x)))
