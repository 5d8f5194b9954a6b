"""Measurements of the starting model before a sweep: which experts text is routed to, and how long a step takes."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from most_ray.data.batch import open_plan, rank_batch
from most_ray.data.plan import Plan
from most_ray.distributed.determinism import torch_threads
from most_ray.io.run_folder import local_copy
from most_ray.model.build import RoutingOverrides, load_model
from most_ray.model.modeling import MostForCausalLM
from most_ray.optim.train_state import make_state
from most_ray.records.template import TEXT
from most_ray.runs.job import Job, overrides_of
from most_ray.sweep.splits import rank_experts
from most_ray.train.recompute import apply_layer_options
from most_ray.train.step import StepSettings, run_step

logger = logging.getLogger(__name__)
TEXT_TOKENS = 50_000  # that affinity is measured on; more do not change the shares by a percent
_ROWS = 16  # in a forward pass
_STEPS = 3  # that are timed, after a warm-up


@dataclass(frozen=True)
class Affinity:
    """What text a starting model routes to each expert."""

    order: list[int]  # experts, the one with the most text first
    share: list[float]  # of a layer's selections by expert, mean over layers
    tokens: int  # of text that were measured


def measure_affinity(job: Job, device: torch.device) -> Affinity:
    """Run text through the starting model, routed without regard to modality, and count the tokens of each expert. The text is that of the
    run's first records in the run's mix: instructions, transcripts and prompts, without the speech."""
    overrides = RoutingOverrides(use_modality_aware_routing=False, num_experts_per_tok=job.config.num_experts_per_tok)
    model = load_model(local_copy(job.model_path), overrides).to(device)
    load, tokens = text_load(model, texts_of(open_plan(job.plan), job), device)
    return Affinity(*rank_experts(load), tokens)


def texts_of(plan: Plan, job: Job) -> Iterator[np.ndarray]:
    """Yield the text tokens `(tokens,)` of each of the plan's records, until they are TEXT_TOKENS or a few more."""
    count = 0
    for step in range(1, job.total_steps + 1):
        made = plan.step(step)
        for source, row in zip(made.sources, made.rows, strict=True):
            ids = plan.stores[source].input_ids(int(row))
            text = ids[(ids < job.layout.first_audio) | (ids > job.layout.last_audio)]
            yield text
            count += len(text)
            if count >= TEXT_TOKENS:
                return


@torch.no_grad()
def text_load(model: MostForCausalLM, texts: Iterator[np.ndarray], device: torch.device) -> tuple[np.ndarray, int]:
    """Return the experts' selections by the tokens of all texts, `(layers, experts)`, and the number of tokens."""
    total, rows = np.zeros(()), [torch.from_numpy(text.astype(np.int64)) for text in texts]
    for some in (rows[start : start + _ROWS] for start in range(0, len(rows), _ROWS)):
        ids = pad_sequence(some, batch_first=True)
        mask = pad_sequence(list(map(torch.ones_like, some)), batch_first=True)
        load = model.model(ids.to(device), attention_mask=mask.to(device), use_cache=False).expert_load
        total = total + load[:, TEXT].cpu().numpy()
    return total, sum(map(len, rows))


def step_seconds(job: Job, device: torch.device) -> float | None:
    """Return the seconds of an optimizer step on one worker's share of the records, without communication; None if the model does not fit
    on this device."""
    try:
        with torch_threads(job.threads):
            return min(_time_steps(job, device))
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:  # RuntimeError: torch's allocator on CPUs
        logger.warning("a step could not be timed, so the sweep's duration is unknown: %s", error)
        return None


def _time_steps(job: Job, device: torch.device) -> list[float]:
    model = load_model(local_copy(job.model_path), overrides_of(job.config)).to(device)
    apply_layer_options(model, job.config)
    state = make_state(model, job.config, job.total_steps)
    settings = replace(StepSettings.of(job.config, device), max_skipped_steps=_STEPS + 2)  # no number ends the measurement
    plan, seconds = open_plan(job.plan), []
    for step in range(1, min(job.total_steps, _STEPS + 1) + 1):
        batch = rank_batch(plan, step, 0, job.topology.world_size, job.config.train_batch_size, job.layout)
        began = time.perf_counter()
        run_step(state, batch, settings)
        seconds.append(time.perf_counter() - began)
    return seconds
