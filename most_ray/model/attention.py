"""Multi-head latent attention, and a fast path for packed records that needs no mask.

Shapes: T tokens, those of all records one after another, H heads, D hidden size, Q width of a head's queries and keys, W width of a head's
values, P tokens in groups of records (see `RecordLayout`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import varlen
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention

from most_ray.model.kernels import compute_dtype
from most_ray.model.packed import RecordLayout


class MostAttention(DeepseekV2Attention):
    """The library's multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), also for packed records."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: torch.Tensor | None = None,
        records: RecordLayout | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The library's forward, or with the layout of packed `records` causal attention within each record.

        Then hidden_states are (1, T or more, D), of which tokens after the T-th attend to nothing, position_embeddings are complex numbers
        (1, as many tokens, width of rotary embeddings / 2), and there are no mask and no cache; attention weights are None.
        """
        if records is None:
            return super().forward(hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings, **kwargs)
        assert position_embeddings is not None
        x = hidden_states[0].to(compute_dtype(hidden_states))
        n_tokens, nope = len(x), self.qk_nope_head_dim
        angles = position_embeddings[0].unsqueeze(1)
        query = self.q_proj(x) if self.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        query = query.view(n_tokens, self.num_heads, self.qk_head_dim)
        latent, key_pe = self.kv_a_proj_with_mqa(x).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        expanded = self.kv_b_proj(self.kv_a_layernorm(latent)).view(n_tokens, self.num_heads, nope + self.v_head_dim)
        key_nope, value = expanded.split([nope, self.v_head_dim], dim=-1)
        query_nope, query_pe = query.split([nope, self.qk_rope_head_dim], dim=-1)
        query = torch.cat([query_nope, _rotate(query_pe, angles)], dim=-1)
        key = torch.cat([key_nope, _rotate(key_pe.unsqueeze(1), angles).expand(-1, self.num_heads, -1)], dim=-1)
        n_real, dropout = len(records.restore), self.attention_dropout if self.training else 0.0
        attended = packed_attention(query[:n_real], key[:n_real], value[:n_real], records, self.scaling, dropout).flatten(1)
        return self.o_proj(F.pad(attended, (0, 0, 0, n_tokens - n_real))).unsqueeze(0), None


def _rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of neighbouring pairs of values: x (T, H, width) by complex numbers (T, 1, width / 2), in float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * angles).flatten(-2).to(x.dtype)


def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, records: RecordLayout, scale: float, dropout: float = 0.0
) -> torch.Tensor:
    """Causal attention within each record: query and key (T, H, Q), value (T, H, W) -> (T, H, W). `scale` is the factor of the scores,
    `dropout` the probability that a weight is dropped."""
    if not records.groups:
        return value + 0 * (query.sum() + key.sum())  # without tokens, but every parameter gets a gradient of zeros
    # Flash kernels need values as wide as keys; the other kernels store all scores, or mask them.
    width, wide = value.shape[-1], max(query.shape[-1], value.shape[-1])
    query, key, value = (F.pad(each, (0, wide - each.shape[-1])) for each in (query, key, value))
    if not dropout and _has_kernel(query):
        return varlen_attention(query, key, value, records, scale)[..., :width]
    sizes = [count * length for count, length in records.groups]
    parts = [_Gather.apply(each, records.gather, records.restore).split(sizes) for each in (query, key, value)]
    outputs = []
    for (count, length), *each in zip(records.groups, *parts, strict=True):
        q, k, v = (rows.float().unflatten(0, (count, length)).transpose(1, 2) for rows in each)
        with torch.autocast(query.device.type, enabled=False):  # the CPU kernel's backward takes ten times as long in bfloat16
            output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, dropout_p=dropout)
        outputs.append(output.transpose(1, 2).flatten(0, 1).to(value.dtype))
    return _Restore.apply(torch.cat(outputs), records.restore)[..., :width]


def _has_kernel(query: torch.Tensor) -> bool:
    """Whether torch's kernel for sequences of different lengths supports query (T, H, Q): half precision on GPUs from Ampere on, heads of
    up to 256 values."""
    if not (query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)) or query.shape[-1] % 8 or query.shape[-1] > 256:
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(query.device) >= (8, 0)


def varlen_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, records: RecordLayout, scale: float) -> torch.Tensor:
    """`packed_attention` by torch's kernel for GPUs, in half precision: query, key and value (T, H, Q) -> (T, H, Q)."""
    factor = scale * math.sqrt(query.shape[-1])  # the kernel's scale is 1 / sqrt(Q)
    query = query if math.isclose(factor, 1.0) else query * factor
    starts, longest = records.starts, records.longest
    attended = varlen.varlen_attn(query, key, value, starts, starts, longest, longest, window_size=(-1, 0))
    assert isinstance(attended, torch.Tensor), "normalizers were not requested"
    return attended


class _Gather(torch.autograd.Function):
    """(T, H, Q) -> (P, H, Q): tokens in groups of records. Copies that only fill a record up have no gradient: a token's is the one at its
    `restore` index."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, gather: torch.Tensor, restore: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(restore)
        return rows.index_select(0, gather)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Restore(torch.autograd.Function):
    """(P, H, Q) -> (T, H, Q): tokens out of groups of records."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, restore: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(restore)
        ctx.shape = rows.shape
        return rows.index_select(0, restore)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.new_zeros(ctx.shape).index_copy_(0, ctx.saved_tensors[0], grad), None
