"""Decodes batches of prompts with the KV cache, greedily or by beam search, on one rank or on several that share a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence

from most_ray.evaluation.beam import BeamSearch
from most_ray.model.compat import CACHE
from most_ray.model.modeling import MostForCausalLM, MostMoe
from most_ray.model.routing import RouterStats, modality_of
from most_ray.records.template import PADDING


@dataclass(frozen=True)
class SearchOptions:
    """How outputs are searched for."""

    batch_size: int  # records at once
    num_beams: int  # 1: greedy
    length_penalty: float  # see `beam.BeamSearch`


@dataclass(frozen=True)
class Decoded:
    """The continuation of a prompt."""

    tokens: list[int]  # without the stop token
    stop: int | None  # stop token; None: the length cap was reached


class Forward:
    """A model's forward passes; `collective`: the ranks of the process group share the model (FSDP, expert parallelism), so every pass is a
    collective. A rank that has nothing left to do must join the passes of the others (`drain`), so that uneven work cannot hang."""

    def __init__(self, model: MostForCausalLM, collective: bool = False) -> None:
        self.model, self._collective = model, collective
        on_gpu = next(model.parameters()).device.type == "cuda"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        self.pad = int(model.config.pad_token_id or 0)

    def __call__(self, **inputs: Any) -> Any:
        if self._collective:
            self._any_rank_works(True)
        return self.model(**inputs)

    @torch.no_grad()
    def drain(self) -> None:
        """Join the passes of other ranks, with nothing but padding, until every rank has called this."""
        while self._collective and self._any_rank_works(False):
            nothing = torch.full((1, 2), self.pad, device=self.device)
            self.model(input_ids=nothing, modality=torch.full_like(nothing, PADDING), use_cache=False, logits_to_keep=1)

    def _any_rank_works(self, this_one: bool) -> bool:
        flag = torch.tensor([int(this_one)], device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)


@contextlib.contextmanager
def count_routing(model: MostForCausalLM) -> Iterator[torch.Tensor]:
    """Count the selections that this rank's routers make inside the block, by layer, modality and expert, int64 (layers, 2, experts). The
    tensor is filled as the model runs."""
    layers = [module for module in model.modules() if isinstance(module, MostMoe)]
    load = torch.zeros(len(layers), 2, model.config.n_routed_experts, dtype=torch.long)
    with contextlib.ExitStack() as hooks:
        for index, layer in enumerate(layers):

            def hook(_module: torch.nn.Module, _inputs: object, output: tuple[torch.Tensor, RouterStats], index: int = index) -> None:
                load[index] += output[1].load.cpu()

            hooks.enter_context(layer.register_forward_hook(hook))
        yield load


@torch.no_grad()
def decode(
    forward: Forward, prompts: Sequence[np.ndarray], stop: Sequence[int], caps: Sequence[int], search: SearchOptions
) -> list[Decoded]:
    """Decode the continuation of each prompt, int (tokens,), up to a stop token or to its cap in tokens. The result does not depend on the
    batch size. Prompts of similar length share a batch. A row that has ended is padding from then on, so it is neither routed nor
    counted."""
    results, stops = [Decoded([], None)] * len(prompts), sorted(set(stop))
    order = sorted((index for index in range(len(prompts)) if caps[index] > 0), key=lambda index: (len(prompts[index]), index))
    for start in range(0, len(order), search.batch_size):
        chosen = order[start : start + search.batch_size]
        batch, limits = [prompts[index] for index in chosen], [caps[index] for index in chosen]
        found = _greedy(forward, batch, stops, limits) if search.num_beams == 1 else _beams(forward, batch, stops, limits, search)
        for index, result in zip(chosen, found, strict=True):
            results[index] = result
    return results


class _Context:
    """The state of a batch of R rows between passes: the cache, the attention mask (R, S), each row's next token and position."""

    def __init__(self, forward: Forward, prompts: Sequence[np.ndarray]) -> None:
        self._forward = forward
        tokens = [torch.from_numpy(prompt.astype(np.int64)).to(forward.device) for prompt in prompts]
        self._next = pad_sequence(tokens, batch_first=True, padding_value=forward.pad, padding_side="left")
        self._mask = pad_sequence([torch.ones_like(prompt) for prompt in tokens], batch_first=True, padding_side="left")
        self._positions = (self._mask.cumsum(1) - 1).clamp(min=0)
        self._cache: Any = None

    def logits(self, alive: torch.Tensor) -> torch.Tensor:
        """Logits of the next token, float32 (R, V). Rows that are not `alive`, bool (R,), are padding."""
        padding = (self._mask[:, -self._next.shape[1] :] == 0) | ~alive.unsqueeze(1)
        modality = modality_of(self._next, self._forward.model.config).masked_fill(padding, PADDING)
        inputs = {"input_ids": self._next, "modality": modality, "attention_mask": self._mask, "position_ids": self._positions}
        output = self._forward(**inputs, cache=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = getattr(output, CACHE)
        return output.logits[:, -1].float()

    def append(self, tokens: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """Append a token to each row, (R,). `rows`, (R,): the rows that the new ones extend; None: themselves."""
        if rows is not None:
            self._cache.reorder_cache(rows)
            self._mask, self._positions = self._mask[rows], self._positions[rows]
        self._next, self._positions = tokens.unsqueeze(1), self._positions[:, -1:] + 1
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)


def _greedy(forward: Forward, prompts: Sequence[np.ndarray], stops: Sequence[int], caps: Sequence[int]) -> list[Decoded]:
    """Take the most probable token each time; see `decode`."""
    device, tokens = forward.device, [list[int]() for _ in prompts]
    ends: list[int | None] = [None] * len(prompts)
    alive = torch.ones(len(prompts), dtype=torch.bool, device=device)
    limits, stop_tokens = torch.tensor(caps, device=device), torch.tensor(stops, device=device)
    context = _Context(forward, prompts)
    for produced in range(1, max(caps) + 1):
        best = context.logits(alive).argmax(-1)
        stopped = alive & torch.isin(best, stop_tokens)
        for row in stopped.nonzero().flatten().tolist():
            ends[row] = int(best[row])
        alive = alive & ~stopped
        for row, token in zip(alive.nonzero().flatten().tolist(), best[alive].tolist(), strict=True):
            tokens[row].append(token)
        alive = alive & (limits > produced)
        if not bool(alive.any()):
            break
        context.append(best)
    return [Decoded(row, end) for row, end in zip(tokens, ends, strict=True)]


def _beams(
    forward: Forward, prompts: Sequence[np.ndarray], stops: Sequence[int], caps: Sequence[int], search: SearchOptions
) -> list[Decoded]:
    """Take the best hypothesis of a search with `num_beams` beams; see `decode`."""
    beams = [BeamSearch(search.num_beams, stops, cap, search.length_penalty) for cap in caps]
    device, width = forward.device, search.num_beams
    context = _Context(forward, prompts)
    logits = context.logits(torch.ones(len(prompts), dtype=torch.bool, device=device))
    rows = torch.arange(len(prompts), device=device).repeat_interleave(width)  # the row of each beam: at first one for each record
    while True:
        n_candidates = min(beams[0].n_candidates, logits.shape[-1])
        values, tokens = (best[rows].view(len(beams), width, -1).tolist() for best in logits.log_softmax(-1).topk(n_candidates))
        grown = [beam.advance(*candidates) for beam, *candidates in zip(beams, values, tokens, strict=True)]
        alive = torch.tensor([not beam.done for beam in beams], device=device)
        if not bool(alive.any()):
            return [Decoded(*beam.best()) for beam in beams]
        parents = torch.tensor([index * width + parent for index, (row, _) in enumerate(grown) for parent in row], device=device)
        context.append(torch.tensor([token for _, row in grown for token in row], device=device), rows[parents])
        rows = torch.arange(len(beams) * width, device=device)
        logits = context.logits(alive.repeat_interleave(width))
