"""Activation recomputation, which trades time for memory, and compilation of parts of layers, which trades start-up time for speed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from most_ray.config import Recompute, RunConfig
from most_ray.model.compat import CACHE, enable_activation_checkpointing


def apply_recompute(model: Any, kind: Recompute) -> None:
    """Make the backward pass recompute activations that a transformers model would keep.

    `full` recomputes all of each decoder layer but its input; the collectives of its experts run again, on all ranks. `selective`
    recomputes attention alone, which keeps the most for the time it takes. (Keeping the results of selected operations instead needs a hook
    on every operation: on a CPU that costs more time than it saves.)
    """
    if kind == "full":
        enable_activation_checkpointing(model)
    elif kind == "selective":
        for layer in _layers(model):
            layer.self_attn.forward = _checkpointed_forward(layer.self_attn)


def _checkpointed_forward(attention: nn.Module) -> Callable[..., Any]:
    forward = attention.forward

    @functools.wraps(forward)
    def wrapped(*args: Any, **keywords: Any) -> Any:
        if attention.training and torch.is_grad_enabled():
            keywords.pop(CACHE, None)  # recomputation would write to it again; the library drops it from whole layers too
            return checkpoint(forward, *args, use_reentrant=False, **keywords)
        return forward(*args, **keywords)

    return wrapped


def apply_layer_options(model: nn.Module, config: RunConfig) -> None:
    """Apply a configuration's recomputation and compilation to a model."""
    apply_recompute(model, config.recomputed)
    if config.compile_layers:
        compile_layers(model)


def compile_layers(model: nn.Module) -> None:
    """Compile in place the norms and MLPs of the decoder layers, for any number of tokens. Parameters keep their names. Attention and
    routed experts are left out, since their shapes depend on the data. The compiled parts are below FSDP's units, so its hooks run outside
    of what is compiled."""
    for layer in _layers(model):
        mlp = getattr(layer.mlp, "shared_experts", layer.mlp)
        for part in (layer.input_layernorm, layer.post_attention_layernorm, mlp):
            part.compile(dynamic=True)


def _layers(model: nn.Module) -> list[Any]:
    return list(model.get_submodule("model.layers").children())
