"""The configuration of MoST: DeepSeek-V2's with ranges of audio tokens, groups of experts and balance losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config

from most_ray.errors import ConfigError, count_of, shown
from most_ray.records.model_files import IMPLEMENTATIONS

FIRST_AUDIO_TOKEN = 100002  # of the original vocabulary, in which 0..100001 are text
LAST_AUDIO_TOKEN = 100503  # of the original vocabulary: 500 units and two audio markers

# The numbers that a config.json may state, least and most, so that a wrong one is refused before memory is allocated for it: far above the
# largest published model of this kind.
_SIZES: Mapping[str, tuple[int, int]] = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "kv_lora_rank", "q_lora_rank"), (1, 1 << 20)),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "head_dim", "qk_head_dim"), (1, 1 << 16)),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok"), (1, 1 << 14)),
    **dict.fromkeys(("n_group", "topk_group"), (1, 1 << 14)),
    **dict.fromkeys(("first_audio_token", "last_audio_token", "pad_token_id", "bos_token_id"), (0, 1 << 24)),
    "vocab_size": (1, 1 << 24),
    "num_hidden_layers": (1, 1 << 10),
    "n_shared_experts": (0, 1 << 10),
    "first_k_dense_replace": (0, 1 << 14),
    "max_position_embeddings": (1, 1 << 31),
}
_NUMBERS: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("initializer_range", "rms_norm_eps", "routed_scaling_factor", "aux_loss_alpha", "rope_theta"), (0.0, 1e12)),
    "attention_dropout": (0.0, 1.0),
}
# Keys whose values choose what is computed, and the values that this code computes. None: as if the key were missing.
_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "topk_method": ("greedy", "group_limited_greedy", None),
    "scoring_func": ("softmax", None),
    "moe_layer_freq": (1, None),
    **{f"{mark}{key}": (*known, None) for key, known in IMPLEMENTATIONS.items() for mark in ("", "_")},
}
_LARGEST = 1e300  # number of a position embedding: infinity, and integers that are no float, are beyond
_FROM_ELSEWHERE = ("rope_scaling", "output_attentions", "ep_size", "template_hash", "units_identity")  # keys that are kept as they are
_NOT_USED = (  # keys of whoever wrote the file, and `auto_map`, which names code that is not loaded
    *("architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version"),
    *("_attn_implementation_autoset", "_commit_hash", "_name_or_path"),
)


@strict
class MostConfig(DeepseekV2Config):
    """DeepSeek-V2 with a modality-aware router. ConfigError: a group is empty, an expert is in both or in none, or top-k does not fit
    into a group."""

    model_type = "most"

    use_modality_aware_routing: bool = True  # tokens use the experts of their modality only; False is plain DeepSeek-V2
    text_expert_indices: list[int] | None = None  # routed experts for text; default of both groups: the first and the second half
    audio_expert_indices: list[int] | None = None  # routed experts for audio
    first_audio_token: int = FIRST_AUDIO_TOKEN  # ids first_audio_token..last_audio_token are audio, all others text
    last_audio_token: int = LAST_AUDIO_TOKEN
    aux_loss_alpha: float = 0.001  # weight of the balance loss; 0 turns it off
    seq_aux: bool = True  # balance within each record (sequence-wise, DeepSeek-V2 eq. 12-16) instead of over the batch
    # Routers have a bias per expert, `e_score_correction_bias`, that counts in the choice of experts but not in their weights (arXiv
    # 2408.15664, DeepSeek-V3).
    use_balance_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.use_modality_aware_routing and self.text_expert_indices is None and self.audio_expert_indices is None:
            half = self.n_routed_experts // 2
            self.text_expert_indices = list(range(half))
            self.audio_expert_indices = list(range(half, self.n_routed_experts))
        # Not in the library's validation hook, which would wrap the error and hide what the user can fix.
        _check_experts(self)
        super().__post_init__(**kwargs)


@strict
class OriginalMostConfig(MostConfig):
    """MostConfig with the `model_type` of the original MoST, so that its checkpoint folders load as they are."""

    model_type = "MoST"


def parse_config(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """From the content of a config.json to arguments of MostConfig, which checks types and groups of experts.

    Returns:
        The arguments, and the keys that are not known and are left out.

    Raises:
        ValueError: a value is of the wrong kind, out of range, or wants something that this code does not compute.
    """
    known = {field.name for field in fields(MostConfig)} | {*_SIZES, *_NUMBERS, *_CHOICES, *_FROM_ELSEWHERE}
    kept = {key: value for key, value in values.items() if key in known and key not in _NOT_USED}
    for key, value in kept.items():
        _check_value(key, value)
    for key in ("rope_parameters", "rope_scaling"):
        _check_rope(key, kept.get(key))
    if kept.get("topk_method") == "group_limited_greedy":
        n_experts, n_group, chosen = (kept.get(key) or 0 for key in ("n_routed_experts", "n_group", "topk_group"))
        if not 1 <= chosen <= n_group or n_experts % n_group:
            raise ValueError(f"topk_group {chosen} of n_group {n_group} do not divide n_routed_experts {n_experts} into groups to choose")
    return kept, sorted(map(str, values.keys() - known - set(_NOT_USED)))


def _check_value(key: str, value: Any) -> None:
    """Raise ValueError if the value of a key of config.json, where it is a number or a choice, is none that the key may have."""
    if key in _CHOICES and (isinstance(value, bool | list | dict) or value not in _CHOICES[key]):
        raise ValueError(f"{key} {shown(value)} is not one of {', '.join(map(str, _CHOICES[key]))}")
    limits = _SIZES.get(key) or _NUMBERS.get(key)
    if limits is None or value is None:
        return
    kinds: Any = int if key in _SIZES else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not limits[0] <= value <= limits[1]:
        what = "a whole number" if key in _SIZES else "a number"
        raise ValueError(f"{key} {shown(value)} is not {what} in {limits[0]:g}..{limits[1]:g}")


def _check_rope(key: str, values: Any) -> None:
    """Raise ValueError unless `values` are parameters of a position embedding that the library knows; None: the default one."""
    if values is None:
        return
    if not isinstance(values, dict):
        raise ValueError(f"{key} {shown(values)} is no object")
    kind = values.get("rope_type", values.get("type", "default"))
    if kind != "default" and (not isinstance(kind, str) or kind not in ROPE_INIT_FUNCTIONS):
        raise ValueError(f"{key} has the type {shown(kind)}, not one of default, {', '.join(sorted(ROPE_INIT_FUNCTIONS))}")
    for name, value in values.items():
        if not name.isidentifier() or not name.isascii():  # the library would log it
            raise ValueError(f"{key} has the key {shown(name)}")
        numbers = value if isinstance(value, list) else [value]
        if name in ("rope_type", "type") or value is None or isinstance(value, bool):
            continue
        if not all(isinstance(each, int | float) and -_LARGEST <= each <= _LARGEST for each in numbers):
            raise ValueError(f"{key} has {name} {shown(value)}, which is no number")


def _check_experts(config: MostConfig) -> None:
    """Check the groups of experts and top-k against each other."""
    n_experts, top_k = config.n_routed_experts, config.num_experts_per_tok
    if top_k is None or not 1 <= top_k <= n_experts:
        raise ConfigError("num_experts_per_tok", top_k, f"must be in 1..{n_experts} (n_routed_experts).")
    if not config.use_modality_aware_routing:
        return
    groups = {name: list(getattr(config, name) or ()) for name in ("text_expert_indices", "audio_expert_indices")}
    for name, group in groups.items():
        modality = name.split("_", 1)[0]
        if not group:
            raise ConfigError(name, group, f"{modality} tokens would have no expert.", "Name at least top-k experts.")
        outside = [expert for expert in group if expert not in range(n_experts)]
        if outside or len(set(group)) != len(group) or not all(isinstance(expert, int) for expert in group):
            raise ConfigError(name, group, f"must hold different experts out of 0..{n_experts - 1}.")
        if top_k > len(group):
            rule = f"is more than the {count_of(len(group), 'expert')} of {name}."
            raise ConfigError("num_experts_per_tok", top_k, rule, "Lower it or widen the group.")
        if config.topk_method == "group_limited_greedy" and config.n_group and config.topk_group:
            size = n_experts // config.n_group
            usable = sorted(filter(None, (sum(expert // size == g for expert in group) for g in range(config.n_group))))
            if sum(usable[: config.topk_group]) < top_k:
                rule = f"can leave a {modality} token fewer than {count_of(top_k, 'expert')} of {name}."
                raise ConfigError("topk_group", config.topk_group, rule, "Raise it.")
    text, audio = groups.values()
    if both := sorted(set(text) & set(audio)):
        raise ConfigError("text_expert_indices", text, f"experts {both} are in audio_expert_indices too.", "Split them.")
    if unused := sorted(set(range(n_experts)) - set(text) - set(audio)):
        raise ConfigError("audio_expert_indices", audio, f"experts {unused} are in no group.", "Assign them.")
