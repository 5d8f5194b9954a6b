"""What transformers calls differently in the releases that pyproject.toml allows, found in the library itself rather than by its version.

The key-value cache is `past_key_values` up to 5.23; from 5.24 on it is `cache`, and the old name, deprecated, goes with 5.40. Modules and
callers of this package say `cache`; CACHE is for calls into the library and for what it hands back.

From 5.23 on a model is laid out over replicas, and experts get their tokens in a way of one's own (`most_ray.model.exchange`); with 5.22 it
is trained by one worker. In 5.23 gradient checkpointing became activation checkpointing; the old name, deprecated, goes with 6.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal

import transformers
from transformers.distributed import DistributedConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention

from most_ray.errors import ConfigError

CACHE: Literal["cache", "past_key_values"] = (
    "cache" if "cache" in inspect.signature(DeepseekV2Attention.forward).parameters else "past_key_values"
)

SUPPORTS_MANY_WORKERS = "ep_implementation" in inspect.signature(DistributedConfig).parameters  # whether a model can have several workers


def resolve_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache, by whichever name a caller gave it: `generate` of a release uses that release's, users what their code was written for.

    Raises ValueError where two different ones are given.
    """
    if cache is None:
        return past_key_values
    if past_key_values is not None and past_key_values is not cache:
        raise ValueError(
            "cache and past_key_values are two names of one argument, and two caches were given: pass one "
            f"(to generate() as {CACHE}, transformers {transformers.__version__}'s name)"
        )
    return cache


def enable_activation_checkpointing(model: Any) -> None:
    """Let the backward pass compute each layer of a transformers model again from its input."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def check_workers(most: int) -> None:
    """The library can lay a model out over so many workers.

    Raises:
        ConfigError: it is too old for more than one.
    """
    if most > 1 and not SUPPORTS_MANY_WORKERS:
        rule = f"needs transformers 5.23 or later, which lays models out over workers; {transformers.__version__} is installed."
        raise ConfigError("num_workers", most, rule, "pip install 'transformers>=5.23', or use num_workers 1.")
