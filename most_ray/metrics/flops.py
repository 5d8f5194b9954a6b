"""The floating-point operations of a model's training, for model FLOPs utilisation (MFU).

MFU is the rate of the operations that the model's mathematics needs over the device's peak (PaLM, arXiv 2204.02311, appendix B). Only
matrix products count, with two operations for each multiplication and addition; recomputation and padding do not count.
"""

from __future__ import annotations

from dataclasses import dataclass

from most_ray.model.configuration import MostConfig


@dataclass(frozen=True)
class ModelFlops:
    """Operations of a forward pass."""

    per_token: int
    per_pair: int  # of a token and one that it attends to, itself included
    per_target: int  # of a supervised token: the head is computed for no other

    def of_training(self, tokens: float, pairs: float, targets: float) -> float:
        """Operations forward and backward, for so many of each: the two gradients of a product are a product each."""
        return 3 * (self.per_token * tokens + self.per_pair * pairs + self.per_target * targets)


def model_flops(config: MostConfig) -> ModelFlops:
    """Operations of latent attention, dense layers, shared and top-k routed experts, router and head (section 2 of arXiv 2405.04434)."""
    hidden = config.hidden_size
    attention, per_pair = attention_flops(config)
    n_dense = min(config.first_k_dense_replace, config.num_hidden_layers)
    dense = 3 * hidden * config.intermediate_size
    n_experts = config.n_shared_experts + config.num_experts_per_tok
    experts = hidden * config.n_routed_experts + 3 * hidden * config.moe_intermediate_size * n_experts
    per_token = attention + 2 * (n_dense * dense + _expert_layers(config) * experts)
    return ModelFlops(per_token, per_pair, per_target=2 * hidden * config.vocab_size)


def full_precision_flops(config: MostConfig) -> int:
    """Operations of a forward pass for each token that are float32 under autocast too: those of the routers."""
    return 2 * _expert_layers(config) * config.hidden_size * config.n_routed_experts


def attention_flops(config: MostConfig) -> tuple[int, int]:
    """Operations of attention in a forward pass: for each token (the projections) and for each pair."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    query_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    rank = config.q_lora_rank
    query = hidden * heads * query_dim if rank is None else rank * (hidden + heads * query_dim)
    compressed = hidden * (config.kv_lora_rank + config.qk_rope_head_dim)
    expanded = config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    projections = query + compressed + expanded + heads * config.v_head_dim * hidden
    layers = config.num_hidden_layers
    return 2 * layers * projections, 2 * layers * heads * (query_dim + config.v_head_dim)


def _expert_layers(config: MostConfig) -> int:
    return config.num_hidden_layers - min(config.first_k_dense_replace, config.num_hidden_layers)
