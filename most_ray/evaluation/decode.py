"""Greedy decoding in batches with the KV cache, and the routing counted while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from most_ray.data.batch import PADDING
from most_ray.model.modeling import MostForCausalLM, MostMoe
from most_ray.model.routing import RouterStats


class RoutingCount:
    """Selections by layer, modality and expert (L, 2, E) since `count_routing` began."""

    def __init__(self, load: torch.Tensor) -> None:
        self.load = load


@contextlib.contextmanager
def count_routing(model: MostForCausalLM) -> Iterator[RoutingCount]:
    """Count every selection that the model's routers make inside the block."""
    layers = [module for module in model.modules() if isinstance(module, MostMoe)]
    count = RoutingCount(torch.zeros(len(layers), 2, model.config.n_routed_experts, dtype=torch.long))
    handles = []
    for index, layer in enumerate(layers):

        def hook(_module: torch.nn.Module, _inputs: object, output: tuple[torch.Tensor, RouterStats], index: int = index) -> None:
            count.load[index] += output[1].load.cpu()

        handles.append(layer.register_forward_hook(hook))
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def greedy(
    model: MostForCausalLM, prompts: Sequence[np.ndarray], stop: Sequence[int], max_new_tokens: Sequence[int], batch_size: int
) -> list[list[int]]:
    """The most probable continuation of each prompt, without its stop token; prompts of like length share a batch.

    A row that has ended is padding from then on, so it is neither routed nor counted. The result does not depend on batch_size.
    """
    model.eval()
    device = next(model.parameters()).device
    results: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    stops = torch.tensor(sorted(set(stop)), device=device)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        tokens, mask = _left_padded([prompts[index] for index in chosen], int(model.config.pad_token_id or 0), device)
        limits = torch.tensor([max_new_tokens[index] for index in chosen], device=device)
        alive = torch.ones(len(chosen), dtype=torch.bool, device=device)
        cache = None
        step_ids, positions = tokens, (mask.cumsum(1) - 1).clamp(min=0)
        for produced in range(1, int(limits.max()) + 1):
            output = model(
                input_ids=step_ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                modality=_modality(model, step_ids, mask, alive),
            )
            cache = output.past_key_values
            best = output.logits[:, -1].float().argmax(-1)
            alive = alive & ~torch.isin(best, stops)
            for row in alive.nonzero().flatten().tolist():
                results[chosen[row]].append(int(best[row]))
            alive = alive & (limits > produced)
            if not bool(alive.any()):
                break
            step_ids, positions = best.unsqueeze(1), positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(chosen), 1)], dim=1)
    return results


def _modality(model: MostForCausalLM, ids: torch.Tensor, mask: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    from_ids = ((ids >= model.config.first_audio_token) & (ids <= model.config.last_audio_token)).long()
    return from_ids.masked_fill(mask[:, -ids.shape[1] :] == 0, PADDING).masked_fill(~alive.unsqueeze(1), PADDING)


def _left_padded(prompts: Sequence[np.ndarray], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, prompts))
    tokens = torch.full((len(prompts), longest), pad, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, longest - len(prompt) :] = 1
    return tokens.to(device), mask.to(device)
