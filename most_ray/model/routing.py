"""The modality-aware router and its load-balancing losses.

Shapes: B packs, S positions, T tokens that are not padding, D hidden, E routed experts, K experts per token, G segments (records),
L layers with experts.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

from most_ray.model.configuration import MostConfig
from most_ray.records.template import AUDIO, PADDING, TEXT

BALANCE_BIAS = "e_score_correction_bias"  # DeepSeek-V3's name


class Routing(NamedTuple):
    """What every layer's router must know of the batch; made once per forward pass and handed down as an argument.

    tokens: indices (T,) of the tokens that are not padding in the flattened (B*S,) batch, or None where they are its first T.
    modality: (T,) TEXT or AUDIO.
    allowed: (T, E) bool, the experts that each token may use; None where any will do.
    segments: (T,) index of the record that each token belongs to.
    n_segments: G.
    previous_load: (E,) selections per expert in the layer that this is handed to, over all of the optimizer step before: what the
        batch-wise balance loss takes frequencies from. None: from this call.
    """

    tokens: torch.Tensor | None
    modality: torch.Tensor
    allowed: torch.Tensor | None
    segments: torch.Tensor
    n_segments: int
    previous_load: torch.Tensor | None = None


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
    return record_routing(flat, segments, n_segments, config)._replace(tokens=tokens)


def record_routing(modality: torch.Tensor, segments: torch.Tensor, n_segments: int, config: MostConfig) -> Routing:
    """Routing of tokens (T,), none of them padding, of records that are known."""
    allowed = None
    if config.use_modality_aware_routing:
        groups = tuple(config.text_expert_indices or ()), tuple(config.audio_expert_indices or ())
        allowed = _allowed(*groups, config.n_routed_experts, modality.device)[modality]
    return Routing(None, modality, allowed, segments, n_segments)


@functools.lru_cache(maxsize=8)
def _allowed(text: tuple[int, ...], audio: tuple[int, ...], n_experts: int, device: torch.device) -> torch.Tensor:
    """The experts that each modality may use, (2, E) bool; kept, for a GPU would be waited for each time it is made."""
    table = torch.zeros(2, n_experts, dtype=torch.bool)
    table[TEXT, list(text)] = True
    table[AUDIO, list(audio)] = True
    return table.to(device)


class MostRouter(DeepseekV2TopkRouter):
    """DeepSeek-V2's router over the experts that each token's modality allows, with DeepSeek-V3's bias where the model has one."""

    e_score_correction_bias: torch.Tensor | None

    def __init__(self, config: MostConfig) -> None:
        super().__init__(config)
        self.norm_topk_prob = bool(config.norm_topk_prob)
        # float32 whatever the default type: its steps are small.
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32) if config.use_balance_bias else None
        self.register_buffer(BALANCE_BIAS, bias)

    def forward(
        self, hidden_states: torch.Tensor, allowed: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(T, D) -> logits (T, E), weights (T, K), expert indices (T, K), probabilities (T, E) with 0 at experts that are not allowed;
        the floats are float32 whatever the autocast."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = F.linear(hidden_states.float(), self.weight.float())
        # Over all experts, then masked, as in the original: the other group's share is lost, not handed round.
        probabilities = logits.softmax(dim=-1, dtype=torch.float32)
        choice = probabilities if self.e_score_correction_bias is None else probabilities + self.e_score_correction_bias
        if allowed is not None:
            probabilities = probabilities.masked_fill(~allowed, 0.0)
            # Below every score, so that not even one that underflowed loses its place to the other group's experts.
            choice = choice.masked_fill(~allowed, -torch.inf)
        if self.topk_method == "group_limited_greedy":
            grouped = choice.view(choice.shape[0], self.num_group, -1)
            best = grouped.amax(dim=-1).topk(self.topk_group, dim=-1, sorted=False).indices
            in_best = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, True)
            choice = grouped.masked_fill(~in_best.unsqueeze(-1), -torch.inf).view_as(choice)
        indices = choice.topk(self.top_k, dim=-1, sorted=False).indices
        weights = probabilities.gather(1, indices)
        if self.norm_topk_prob and self.top_k > 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return logits, weights * self.routed_scaling_factor, indices, probabilities


def balance_loss(indices: torch.Tensor, probabilities: torch.Tensor, routing: Routing, sequence_wise: bool) -> torch.Tensor:
    """Load-balancing loss without its weight, scalar: sum over records (sequence-wise), or T times the batch's (batch-wise).

    f_e: share of the selections that went to expert e, times E; P_e: mean probability of e; loss: sum_e f_e P_e (DeepSeek-V2,
    arXiv 2405.04434, eq. 12-14). Sequence-wise f and P are taken over each record, so the sum depends neither on how records
    are packed nor on how packs are spread over ranks. Batch-wise they are taken over the tokens of this call; with
    `routing.previous_load`, f is that of the step before (none yet: 0), so that the loss is a sum over tokens and depends on neither.
    """
    n_tokens, n_experts = probabilities.shape
    if n_tokens == 0:
        return probabilities.sum()
    if not sequence_wise and routing.previous_load is not None:
        share = routing.previous_load.double() / routing.previous_load.sum().clamp(min=1)
        return ((share * n_experts).to(probabilities.dtype) * probabilities).sum()
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
    # Not bincount, which waits for a GPU.
    return (
        torch.zeros(2 * n_experts, dtype=torch.long, device=slots.device).scatter_add_(0, slots, torch.ones_like(slots)).view(2, n_experts)
    )


def leaked_selections(load: torch.Tensor, config: MostConfig) -> int:
    """Selections in `load` (..., 2, E) that crossed the modality border: 0, or the routing is wrong."""
    if not config.use_modality_aware_routing:
        return 0
    by_modality = load.reshape(-1, 2, config.n_routed_experts).sum(0)
    return int(by_modality[TEXT, config.audio_expert_indices].sum() + by_modality[AUDIO, config.text_expert_indices].sum())


def expert_groups(load: torch.Tensor, config: MostConfig) -> dict[str, tuple[torch.Tensor, list[int]]]:
    """Per modality: its selections (L, E) out of `load` (L, 2, E), and the experts that may get them."""
    every = list(range(config.n_routed_experts))
    aware = config.use_modality_aware_routing
    named = {"text": config.text_expert_indices, "audio": config.audio_expert_indices}
    return {name: (load[:, index], list(named[name] or ()) if aware else every) for name, index in (("text", TEXT), ("audio", AUDIO))}


@torch.no_grad()
def update_balance_bias(model: nn.Module, load: torch.Tensor, rate: float) -> None:
    """Add rate * sign(mean load of e's group - load of e) to every expert's bias in the choice of experts (arXiv 2408.15664, algorithm 1).

    Args:
        model: its routers have biases.
        load: (L, 2, E) selections of a whole optimizer step, over all ranks, so that biases stay alike on every rank. Each modality's
            experts are a group by themselves, all experts one where routing does not look at modality; a group without tokens is left.
    """
    routers = [module for module in model.modules() if isinstance(module, MostRouter)]
    config: MostConfig = model.config  # type: ignore[assignment]
    if config.use_modality_aware_routing:
        groups = list(expert_groups(load, config).values())
    else:
        groups = [(load.sum(1), list(range(config.n_routed_experts)))]
    change = torch.zeros(load.shape[0], load.shape[2], dtype=torch.float32)
    for selections, experts in groups:
        used = selections[:, experts].cpu()
        # In whole numbers: mean > load where sum > n * load. Without tokens every load is the mean.
        change[:, experts] = rate * (used.sum(1, keepdim=True) - len(experts) * used).sign().float()
    for router, row in zip(routers, change, strict=True):
        assert router.e_score_correction_bias is not None
        router.e_score_correction_bias.add_(row.to(router.e_score_correction_bias.device))


def load_summary(load: torch.Tensor, config: MostConfig) -> dict[str, Any]:
    """Selections (L, 2, E) as figures that can be read, by modality; a modality without tokens is left out of all but the first.

    expert_load: selections by expert, summed over layers; leaked: selections across the modality border;
    expert_max_over_mean: the busiest expert's over its group's mean, in the worst layer; expert_entropy: of the selections over the
    group, 1 where all its experts have the same and 0 where one has all, mean over layers. Under `layers` both, and the busiest
    expert, layer by layer (those with experts, from the first).
    """
    by_layer: dict[str, dict[str, list[Any]]] = {"expert_max_over_mean": {}, "expert_entropy": {}, "busiest_expert": {}}
    summary: dict[str, Any] = {
        "expert_load": {},
        "expert_max_over_mean": {},
        "expert_entropy": {},
        "leaked": leaked_selections(load, config),
        "layers": by_layer,
    }
    for modality, (selections, experts) in expert_groups(load, config).items():
        summary["expert_load"][modality] = selections.sum(0).tolist()
        used = selections[:, experts].double()
        if not experts or used.sum() == 0:
            continue
        ratio = used.amax(1) / used.mean(1).clamp(min=1e-9)
        share = used / used.sum(1, keepdim=True).clamp(min=1e-9)
        entropy = torch.special.entr(share).sum(1) / math.log(len(experts)) if len(experts) > 1 else torch.ones(len(used))
        summary["expert_max_over_mean"][modality] = round(float(ratio.max()), 4)
        summary["expert_entropy"][modality] = round(float(entropy.mean()), 4)
        by_layer["expert_max_over_mean"][modality] = [round(value, 4) for value in ratio.tolist()]
        by_layer["expert_entropy"][modality] = [round(value, 4) for value in entropy.tolist()]
        by_layer["busiest_expert"][modality] = [experts[index] for index in used.argmax(1).tolist()]
    return summary
