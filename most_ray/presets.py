"""Sizes of new models by name: what a run starts from where it names no model."""

from __future__ import annotations

from typing import Any

from most_ray.errors import ConfigError, nearest

# Fields of MostConfig by preset; `text_vocab_size` is that of the tokenizer without audio tokens.
PRESETS: dict[str, dict[str, Any]] = {
    # About 1 M parameters: learns spoken digits in minutes on two cores.
    "tiny": {
        "text_vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
        "kv_lora_rank": 64, "q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32,
        "max_position_embeddings": 4096, "norm_topk_prob": True, "aux_loss_alpha": 0.001,
    },
}  # fmt: skip


def check_preset(name: str) -> None:
    """Raise ConfigError for a name that no preset has."""
    if name not in PRESETS:
        raise ConfigError("preset", name, "is not known.", nearest(name, PRESETS))
