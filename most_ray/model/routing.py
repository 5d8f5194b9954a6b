"""The modality-aware router and its load-balancing losses.

Shapes: B packs, S positions, T tokens that are not padding, D hidden, E routed experts, K experts per token, G segments (records).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

from most_ray.data.batch import AUDIO, PADDING, TEXT
from most_ray.model.configuration import MostConfig


class Routing(NamedTuple):
    """What every layer's router must know of the batch; made once per forward pass and handed down as an argument.

    tokens: indices (T,) of the tokens that are not padding in the flattened (B*S,) batch, or None where none is padding.
    modality: (T,) TEXT or AUDIO.
    allowed: (T, E) bool, the experts that each token may use; None where any will do.
    segments: (T,) index of the record that each token belongs to.
    n_segments: G.
    """

    tokens: torch.Tensor | None
    modality: torch.Tensor
    allowed: torch.Tensor | None
    segments: torch.Tensor
    n_segments: int


class RouterStats(NamedTuple):
    """What one layer's routing did. aux_loss: scalar with gradient, summed over records (sequence-wise) or over tokens
    (batch-wise), without its weight; load: (2, E) int64, tokens of each modality that each expert got."""

    aux_loss: torch.Tensor
    load: torch.Tensor


def modality_of(input_ids: torch.Tensor, config: MostConfig) -> torch.Tensor:
    """TEXT or AUDIO for each token id, same shape as input_ids."""
    return ((input_ids >= config.first_audio_token) & (input_ids <= config.last_audio_token)).long()


def make_routing(modality: torch.Tensor, position_ids: torch.Tensor | None, config: MostConfig) -> Routing:
    """Routing of a batch from its marks (B, S) and, for packed rows, its positions (B, S), which restart at each record."""
    batch, length = modality.shape
    flat = modality.reshape(-1)
    if position_ids is None:
        segments = torch.arange(batch, device=flat.device).repeat_interleave(length)
    else:
        starts = (position_ids == 0).expand(batch, -1).clone()
        starts[:, 0] = True
        segments = starts.reshape(-1).long().cumsum(0) - 1
    valid = flat != PADDING
    tokens = None
    if not bool(valid.all()):
        tokens = valid.nonzero().squeeze(-1)
        flat = flat[tokens]
        _, segments = torch.unique_consecutive(segments[tokens], return_inverse=True)
    n_segments = int(segments[-1]) + 1 if segments.numel() else 0
    allowed = None
    if config.use_modality_aware_routing:
        table = torch.zeros(2, config.n_routed_experts, dtype=torch.bool)
        table[TEXT, config.text_expert_indices] = True
        table[AUDIO, config.audio_expert_indices] = True
        allowed = table.to(flat.device)[flat]
    return Routing(tokens, flat, allowed, segments, n_segments)


class MostRouter(DeepseekV2TopkRouter):
    """DeepSeek-V2's router over the experts that each token's modality allows."""

    def __init__(self, config: MostConfig) -> None:
        super().__init__(config)
        self.norm_topk_prob = bool(config.norm_topk_prob)

    def forward(
        self, hidden_states: torch.Tensor, allowed: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(T, D) -> logits (T, E), weights (T, K), expert indices (T, K), probabilities (T, E) with 0 at experts that are not allowed;
        the floats are float32 whatever the autocast."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = F.linear(hidden_states.float(), self.weight.float())
        # Over all experts, then masked, as in the original: the other group's share is lost, not handed round.
        probabilities = logits.softmax(dim=-1, dtype=torch.float32)
        choice = probabilities
        if allowed is not None:
            probabilities = probabilities.masked_fill(~allowed, 0.0)
            # Below every probability, so that not even one that underflowed loses its place to the other group's experts.
            choice = probabilities.masked_fill(~allowed, -1.0)
        if self.topk_method == "group_limited_greedy":
            grouped = choice.view(choice.shape[0], self.num_group, -1)
            best = grouped.amax(dim=-1).topk(self.topk_group, dim=-1, sorted=False).indices
            in_best = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, True)
            choice = grouped.masked_fill(~in_best.unsqueeze(-1), -2.0).view_as(choice)
        indices = choice.topk(self.top_k, dim=-1, sorted=False).indices
        weights = probabilities.gather(1, indices)
        if self.norm_topk_prob and self.top_k > 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return logits, weights * self.routed_scaling_factor, indices, probabilities


def balance_loss(indices: torch.Tensor, probabilities: torch.Tensor, routing: Routing, sequence_wise: bool) -> torch.Tensor:
    """Load-balancing loss without its weight, scalar: sum over records (sequence-wise), or T times the batch's (batch-wise).

    f_e: share of the selections that went to expert e, times E; P_e: mean probability of e; loss: sum_e f_e P_e (DeepSeek-V2,
    arXiv 2405.04434, eq. 12-14). Sequence-wise f and P are taken over each record, so the sum depends neither on how records
    are packed nor on how packs are spread over ranks; batch-wise they are taken over the tokens of this call.
    """
    n_tokens, n_experts = probabilities.shape
    if n_tokens == 0:
        return probabilities.sum()
    per_record = routing.segments if sequence_wise else torch.zeros_like(routing.segments)
    groups = routing.n_segments if sequence_wise else 1
    lengths = torch.zeros(groups, device=indices.device).index_add_(0, per_record, torch.ones_like(per_record, dtype=torch.float))
    selected = torch.zeros(groups, n_experts, device=indices.device)
    selected.view(-1).index_add_(
        0, (per_record.unsqueeze(-1) * n_experts + indices).view(-1), torch.ones(indices.numel(), device=indices.device)
    )
    mean = torch.zeros_like(selected).index_add(0, per_record, probabilities) / lengths.unsqueeze(-1)
    frequency = selected * n_experts / (lengths.unsqueeze(-1) * indices.shape[1])
    loss = (frequency * mean).sum()
    return loss if sequence_wise else loss * n_tokens


def expert_load(indices: torch.Tensor, modality: torch.Tensor, n_experts: int) -> torch.Tensor:
    """Selections per modality and expert, (2, E) int64."""
    slots = (modality.unsqueeze(-1) * n_experts + indices).view(-1)
    return torch.bincount(slots, minlength=2 * n_experts).view(2, n_experts)


def leaked_selections(load: torch.Tensor, config: MostConfig) -> int:
    """Selections in `load` (..., 2, E) that crossed the modality border: 0, or the routing is wrong."""
    if not config.use_modality_aware_routing:
        return 0
    by_modality = load.reshape(-1, 2, config.n_routed_experts).sum(0)
    return int(by_modality[TEXT, config.audio_expert_indices].sum() + by_modality[AUDIO, config.text_expert_indices].sum())


def load_summary(load: torch.Tensor, config: MostConfig) -> dict[str, Any]:
    """Selections (L, 2, E) as figures that can be read: by modality, over layers."""
    total = load.sum(0)
    groups = {"text": config.text_expert_indices, "audio": config.audio_expert_indices}
    summary: dict[str, Any] = {"expert_load": {}, "expert_max_over_mean": {}, "leaked": leaked_selections(load, config)}
    for index, modality in enumerate(("text", "audio")):
        summary["expert_load"][modality] = total[index].tolist()
        group = groups[modality] if config.use_modality_aware_routing else range(config.n_routed_experts)
        used = load[:, index, list(group or ())].double()
        if used.sum() > 0:
            ratio = used.max(dim=1).values / used.mean(dim=1).clamp(min=1e-9)
            summary["expert_max_over_mean"][modality] = round(float(ratio.max()), 4)
    return summary
