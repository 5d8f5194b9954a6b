"""The placement of experts on expert-parallel ranks.

transformers gives each expert-parallel rank a contiguous range of the rows of the fused expert tensors. If the groups of text and audio
experts were contiguous ranges too, some ranks would have text experts only, and would idle while speech is trained on. So rows are kept in
slot order: slot s has expert `placement[s]`, and every rank's slots have their share of both groups. Only this module, `MostMoe` and the
code that writes rows to disk (by `row_order`) use slots; the router, its losses and the metrics use the numbers of experts.

Shapes: E routed experts, R expert-parallel ranks, L layers with experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from most_ray.model.configuration import MostConfig
from most_ray.model.modeling import MostMoe

_FUSED = ("gate_up_proj", "down_proj")  # parameters of an experts module, whose rows are experts


def plan_placement(text: Sequence[int], audio: Sequence[int], n_experts: int, ep_size: int) -> tuple[int, ...]:
    """The expert in each slot, (E,). Rank r has the slots r * E/R to (r + 1) * E/R - 1.

    The experts of `text`, then those of `audio`, are dealt to the ranks one by one: every rank gets E/R of them, and of each group its
    share to within one, whatever their numbers. With one rank, or without groups (both empty), it is the identity.
    """
    dealt = [*text, *audio]
    if ep_size == 1 or not dealt:
        return tuple(range(n_experts))
    assert n_experts % ep_size == 0, "checked by plan_topology"
    assert sorted(dealt) == list(range(n_experts)), "checked by MostConfig"
    return tuple(expert for rank in range(ep_size) for expert in dealt[rank::ep_size])


def place_experts(model: nn.Module, ep_size: int) -> None:
    """Move the expert rows of a model that is laid out over ranks from the experts' order to slot order. Collective; each rank has at most
    one tensor of one layer in full at a time."""
    config: MostConfig = model.config  # type: ignore[assignment]
    aware = config.use_modality_aware_routing
    text, audio = (config.text_expert_indices or [], config.audio_expert_indices or []) if aware else ([], [])
    placement = plan_placement(text, audio, config.n_routed_experts, ep_size)
    for layer in _expert_layers(model):
        layer.ep_size = ep_size
        if placement == tuple(range(config.n_routed_experts)):
            continue
        for name in _FUSED:
            _permute_rows(getattr(layer.experts, name), placement)
        layer.place(placement)


def row_order(model: nn.Module, name: str) -> tuple[int, ...] | None:
    """The expert in each row of a parameter (E,), named as in `model.named_parameters()`, and of its optimizer moments, where the rows are
    in slot order; None for other parameters."""
    layer_name, _, last = name.rpartition(".experts.")
    if last not in _FUSED or not layer_name:
        return None
    layer = model.get_submodule(layer_name)
    return layer.placement if isinstance(layer, MostMoe) else None


def experts_of_ranks(model: nn.Module) -> tuple[tuple[int, ...], ...] | None:
    """The experts of each expert-parallel rank, (R, E/R); None without expert parallelism."""
    layer = next(_expert_layers(model), None)
    if layer is None or layer.ep_size == 1:
        return None
    experts = layer.placement or tuple(range(layer.config.n_routed_experts))
    share = len(experts) // layer.ep_size
    return tuple(experts[start : start + share] for start in range(0, len(experts), share))


def rank_load_ratio(load: torch.Tensor, ranks: Sequence[Sequence[int]]) -> float:
    """Selections `load` (L, 2, E) of the busiest expert-parallel rank over those of the mean rank, in the layer where the ratio is largest.

    The same rank of several expert-parallel groups counts as one, so this is the ratio of the mean batch. `ranks`: see `experts_of_ranks`.
    """
    per_rank = torch.stack([load.sum(1)[:, list(experts)].sum(1) for experts in ranks], dim=1).double()
    return float((per_rank.amax(1) / per_rank.mean(1).clamp(min=1e-9)).max()) if load.sum() > 0 else 1.0


def _expert_layers(model: nn.Module) -> Any:
    """Iterate over the modules of experts of all layers."""
    return (module for module in model.modules() if isinstance(module, MostMoe))


@torch.no_grad()
def _permute_rows(parameter: torch.Tensor, order: Sequence[int]) -> None:
    """Move row order[s] of a parameter to row s, whichever ranks they are on."""
    index = torch.tensor(order, device=parameter.device)
    if not isinstance(parameter, DTensor):
        parameter.copy_(parameter[index])
        return
    # Undo FSDP's split first, then that over expert-parallel ranks, the mesh's last dimension: the reverse of how they were applied.
    owned = parameter.redistribute(placements=[*[Replicate()] * (parameter.device_mesh.ndim - 1), parameter.placements[-1]])
    rows = owned.full_tensor()[index]
    # Every rank has all rows, so each takes its own ones (src_data_rank None).
    laid_out = distribute_tensor(rows, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.to_local().copy_(laid_out.to_local())
