"""The configuration of MoST: DeepSeek-V2's with ranges of audio tokens, groups of experts and balance losses."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config

from most_ray.errors import ConfigError

FIRST_AUDIO_TOKEN = 100002  # of the original vocabulary, in which 0..100001 are text
LAST_AUDIO_TOKEN = 100503  # of the original vocabulary: 500 units and two audio markers


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
            rule = f"is more than the {len(group)} experts of {name}."
            raise ConfigError("num_experts_per_tok", top_k, rule, "Lower it or widen the group.")
        if config.topk_method == "group_limited_greedy" and config.n_group and config.topk_group:
            size = n_experts // config.n_group
            usable = sorted(filter(None, (sum(expert // size == g for expert in group) for g in range(config.n_group))))
            if sum(usable[: config.topk_group]) < top_k:
                rule = f"can leave a {modality} token fewer than {top_k} experts of {name}."
                raise ConfigError("topk_group", config.topk_group, rule, "Raise it.")
    text, audio = groups.values()
    if both := sorted(set(text) & set(audio)):
        raise ConfigError("text_expert_indices", text, f"experts {both} are in audio_expert_indices too.", "Split them.")
    if unused := sorted(set(range(n_experts)) - set(text) - set(audio)):
        raise ConfigError("audio_expert_indices", audio, f"experts {unused} are in no group.", "Assign them.")
