"""The modality-aware router and its load-balancing losses.

Shapes: B rows, S positions of a row, T tokens that are not padding, D hidden size, E routed experts, K experts per token, G records,
L layers with experts, 2 modalities, TEXT and AUDIO.
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

BALANCE_BIAS = "e_score_correction_bias"  # name of the routers' buffer, as in DeepSeek-V3


class Routing(NamedTuple):
    """What the routers of all layers need to know about the batch; computed once per forward pass."""

    tokens: torch.Tensor | None  # (T,), indices in the flattened (B * S,) batch of the tokens that are not padding; None: the first T
    modality: torch.Tensor  # (T,), TEXT or AUDIO
    allowed: torch.Tensor | None  # bool (T, E), the experts that each token may use; None: all of them
    segments: torch.Tensor  # (T,), the record of each token
    n_segments: int  # G
    # (E,), selections of each expert of the layer in the whole optimizer step before, which the batch-wise balance loss takes frequencies
    # from. None: it takes them from this call.
    previous_load: torch.Tensor | None = None


class RouterStats(NamedTuple):
    """Statistics of the routing of one layer."""

    aux_loss: torch.Tensor  # scalar with gradient: the balance loss without its weight, see `balance_loss`
    load: torch.Tensor  # int64 (2, E), selections of each expert by tokens of each modality


def modality_of(input_ids: torch.Tensor, config: MostConfig) -> torch.Tensor:
    """TEXT or AUDIO for each token id, int64 in the shape of input_ids."""
    return ((input_ids >= config.first_audio_token) & (input_ids <= config.last_audio_token)).long()


def make_routing(modality: torch.Tensor, position_ids: torch.Tensor | None, config: MostConfig) -> Routing:
    """The routing of a batch with modality (B, S), TEXT, AUDIO or PADDING. position_ids: for packed rows (B, S), from 0 in each record;
    None: each row is a record."""
    batch, length = modality.shape
    flat = modality.reshape(-1)
    if position_ids is None:
        segments = torch.arange(batch, device=flat.device).repeat_interleave(length)
    else:
        starts = (position_ids == 0).expand(batch, -1).clone()
        starts[:, 0] = True
        segments = starts.reshape(-1).long().cumsum(0) - 1
    valid, tokens = flat != PADDING, None
    if not bool(valid.all()):
        tokens = valid.nonzero().squeeze(-1)
        flat = flat[tokens]
        _, segments = torch.unique_consecutive(segments[tokens], return_inverse=True)
    n_segments = int(segments[-1]) + 1 if segments.numel() else 0
    return record_routing(flat, segments, n_segments, config)._replace(tokens=tokens)


def record_routing(modality: torch.Tensor, segments: torch.Tensor, n_segments: int, config: MostConfig) -> Routing:
    """The routing of tokens without padding: modality (T,), segments (T,), the record of each token."""
    allowed = None
    if config.use_modality_aware_routing:
        groups = tuple(config.text_expert_indices or ()), tuple(config.audio_expert_indices or ())
        allowed = _allowed(*groups, config.n_routed_experts, modality.device)[modality]
    return Routing(None, modality, allowed, segments, n_segments)


@functools.lru_cache(maxsize=8)
def _allowed(text: tuple[int, ...], audio: tuple[int, ...], n_experts: int, device: torch.device) -> torch.Tensor:
    """The experts that each modality may use, bool (2, E). Cached, since creating it waits for a GPU."""
    table = torch.zeros(2, n_experts, dtype=torch.bool)
    table[TEXT, list(text)] = table[AUDIO, list(audio)] = True
    return table.to(device)


class MostRouter(DeepseekV2TopkRouter):
    """DeepSeek-V2's router over the experts that are allowed for each token, with DeepSeek-V3's balance bias where the model has one."""

    e_score_correction_bias: torch.Tensor | None

    def __init__(self, config: MostConfig) -> None:
        super().__init__(config)
        self.norm_topk_prob = bool(config.norm_topk_prob)
        # Always float32, whatever the default type: its steps are small.
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32) if config.use_balance_bias else None
        self.register_buffer(BALANCE_BIAS, bias)

    def forward(
        self, hidden_states: torch.Tensor, allowed: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Choose the experts of each token out of those that are `allowed`, bool (T, E); None: all. hidden_states: (T, D).

        Returns:
            Logits (T, E), weights (T, K), expert indices (T, K), and probabilities (T, E), 0 where an expert is not allowed. Floats are
            float32 whatever the autocast.
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = F.linear(hidden_states.float(), self.weight.float())
        # Softmax over all experts, then masked, as in the original MoST: the other group's share is lost, not redistributed.
        probabilities = logits.softmax(dim=-1, dtype=torch.float32)
        choice = probabilities if self.e_score_correction_bias is None else probabilities + self.e_score_correction_bias
        if allowed is not None:
            probabilities = probabilities.masked_fill(~allowed, 0.0)
            # Below every score, so that experts of the other group are not chosen even where scores underflow to 0.
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
    """The balance loss without its weight, a scalar: the sum over records (sequence-wise), or T times that of the batch (batch-wise).

    With f_e the share of selections of expert e times E and P_e the mean probability of e, the loss is sum_e f_e P_e (DeepSeek-V2, arXiv
    2405.04434, eq. 12-14). Sequence-wise, f and P are taken over each record, so that the sum depends neither on how records are packed
    nor on how packs are distributed over ranks. Batch-wise, they are taken over the tokens of this call; with `routing.previous_load`, f
    is that of the step before (in the first step 0), so that the loss is a sum over tokens and depends on neither. indices: (T, K), the
    experts of each token; probabilities: (T, E).
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
    slots = (per_record.unsqueeze(-1) * n_experts + indices).view(-1)
    selected.view(-1).index_add_(0, slots, torch.ones(indices.numel(), device=indices.device))
    mean = torch.zeros_like(selected).index_add(0, per_record, probabilities) / lengths.unsqueeze(-1)
    frequency = selected * n_experts / (lengths.unsqueeze(-1) * indices.shape[1])
    loss = (frequency * mean).sum()
    return loss if sequence_wise else loss * n_tokens


def expert_load(indices: torch.Tensor, modality: torch.Tensor, n_experts: int) -> torch.Tensor:
    """Count the selections of each expert by modality: indices (T, K), modality (T,) -> int64 (2, E)."""
    slots = (modality.unsqueeze(-1) * n_experts + indices).view(-1)
    # Not by bincount, which waits for a GPU.
    return slots.new_zeros(2 * n_experts).scatter_add_(0, slots, torch.ones_like(slots)).view(2, n_experts)


def leaked_selections(load: torch.Tensor, config: MostConfig) -> int:
    """The number of selections in `load` (..., 2, E) of an expert of the other modality's group: not 0 where the routing is wrong."""
    if not config.use_modality_aware_routing:
        return 0
    by_modality = load.reshape(-1, 2, config.n_routed_experts).sum(0)
    return int(by_modality[TEXT, config.audio_expert_indices].sum() + by_modality[AUDIO, config.text_expert_indices].sum())


def expert_groups(load: torch.Tensor, config: MostConfig) -> dict[str, tuple[torch.Tensor, list[int]]]:
    """By modality: its selections (L, E) out of `load` (L, 2, E), and the experts that it may select."""
    every = list(range(config.n_routed_experts))
    named = (("text", TEXT, config.text_expert_indices), ("audio", AUDIO, config.audio_expert_indices))
    return {name: (load[:, at], list(own or ()) if config.use_modality_aware_routing else every) for name, at, own in named}


@torch.no_grad()
def update_balance_bias(model: nn.Module, load: torch.Tensor, rate: float) -> None:
    """Add rate * sign(mean load of e's group - load of e) to the balance bias of every expert e (arXiv 2408.15664, algorithm 1).

    The experts of a modality are a group; without modality-aware routing all experts are one. A group without tokens keeps its biases.
    load: (L, 2, E), selections of a whole optimizer step over all ranks, so that biases stay equal on every rank.
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
        # In integers: mean > load where sum > n * load. Without tokens every load is the mean.
        change[:, experts] = rate * (used.sum(1, keepdim=True) - len(experts) * used).sign().float()
    for router, row in zip(routers, change, strict=True):
        assert router.e_score_correction_bias is not None
        router.e_score_correction_bias.add_(row.to(router.e_score_correction_bias.device))


def load_summary(load: torch.Tensor, config: MostConfig) -> dict[str, Any]:
    """Metrics of the selections `load` (L, 2, E), by name; all but `leaked` are by modality.

    - expert_load: selections of each expert, summed over layers.
    - expert_max_over_mean: those of the busiest expert over the mean of its group, in the layer where that ratio is largest.
    - expert_entropy: entropy of the selections over the group, mean over layers; 1 where all have equally many, 0 where one has all.
    - leaked: selections of experts of the other modality.
    - layers: the ratio, the entropy and the busiest expert of each layer with experts.

    A modality without tokens is left out of all but expert_load.
    """
    by_layer: dict[str, dict[str, list[Any]]] = {"expert_max_over_mean": {}, "expert_entropy": {}, "busiest_expert": {}}
    summary: dict[str, Any] = {"expert_load": {}, "expert_max_over_mean": {}, "expert_entropy": {}}
    summary |= {"leaked": leaked_selections(load, config), "layers": by_layer}
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
