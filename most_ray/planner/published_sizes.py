"""Configurations of published models, so that a run can be estimated without downloading the weights."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from most_ray.io.hub import base_model

# From config.json in each repository on huggingface.co. The position embedding (YaRN) has no weights and is left out.
_LITE: dict[str, Any] = {
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek-ai/DeepSeek-V2-Lite": _LITE,
    "deepseek-ai/DeepSeek-V2": {
        **_LITE,
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "n_routed_experts": 160,
        "q_lora_rank": 1536,
        "n_group": 8,
        "topk_group": 3,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0,
    },
}
# What an earlier shipped configuration makes, by the last two parts of its path: until then it has the sizes of what that began with.
_RESULTS: dict[tuple[str, ...], str] = {("stage1", "export"): "deepseek-ai/DeepSeek-V2-Lite"}


def published_name(name: str) -> str | None:
    """Return the published model whose sizes a name on the hub, a folder that is made of it or what a shipped configuration makes has; None
    if there is none. A MoST model has the same sizes as the one it was made from: units and markers of speech use spare rows of the
    vocabulary."""
    return base_model(name) or _RESULTS.get(PurePosixPath(name).parts[-2:])
