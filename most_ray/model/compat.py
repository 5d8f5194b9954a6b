"""Differences between the releases of transformers that pyproject.toml allows, detected in the library itself, not by its version.

The key-value cache is called `past_key_values` up to 5.23 and `cache` from 5.24 on; the old name is deprecated and removed in 5.40. Modules
and callers of this package say `cache`; CACHE is for calls of the library and for its results.

From 5.23 on a model can be laid out over replicas and a custom exchange of tokens can be registered (`most_ray.model.exchange`); with 5.22
only one worker can train. In 5.23 gradient checkpointing became activation checkpointing; the old name is deprecated and removed in 6.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal

import transformers
from transformers.distributed import DistributedConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention

from most_ray.errors import ConfigError

_HAS_CACHE = "cache" in inspect.signature(DeepseekV2Attention.forward).parameters
CACHE: Literal["cache", "past_key_values"] = "cache" if _HAS_CACHE else "past_key_values"  # the library's name of the key-value cache
SUPPORTS_MANY_WORKERS = "ep_implementation" in inspect.signature(DistributedConfig).parameters  # whether several can train a model


def resolve_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache by whichever name it was passed: `generate` uses the name of its release, users that of the release they wrote for. Two
    different ones are a ValueError."""
    if cache is None:
        return past_key_values
    if past_key_values is not None and past_key_values is not cache:
        raise ValueError(
            "cache and past_key_values are two names of one argument, and two caches were given: pass one "
            f"(to generate() as {CACHE}, transformers {transformers.__version__}'s name)"
        )
    return cache


def enable_activation_checkpointing(model: Any) -> None:
    """Recompute each layer of a transformers model from its input in the backward pass, instead of saving its activations."""
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()


def check_workers(most: int) -> None:
    """Raise ConfigError if the library is too old to train with `most` workers."""
    if most > 1 and not SUPPORTS_MANY_WORKERS:
        rule = f"needs transformers 5.23 or later, which lays models out over workers; {transformers.__version__} is installed."
        raise ConfigError("num_workers", most, rule, "pip install 'transformers>=5.23', or use num_workers 1.")
