"""What a training run trades time for memory with, and start-up time for speed: activations computed again, parts of layers compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from most_ray.model.compat import CACHE, enable_activation_checkpointing


def apply_recompute(model: Any, kind: Literal["none", "selective", "full"]) -> None:
    """Let the backward pass compute activations again that a transformers model would keep.

    full: of each decoder layer all but its input; collectives of its experts run once more, on all ranks alike. selective: of attention
    alone, which keeps the most for the time it takes. (Keeping the results of some operations instead needs a hook on every one: on a CPU
    that takes more time than it saves.)
    """
    if kind == "full":
        enable_activation_checkpointing(model)
    elif kind == "selective":
        for layer in _layers(model):
            layer.self_attn.forward = _again(layer.self_attn)


def _again(attention: nn.Module) -> Callable[..., Any]:
    forward = attention.forward

    @functools.wraps(forward)
    def wrapped(*args: Any, **keywords: Any) -> Any:
        if attention.training and torch.is_grad_enabled():
            keywords.pop(CACHE, None)  # computed again it would be written to once more; the library drops it from whole layers too
            return checkpoint(forward, *args, use_reentrant=False, **keywords)
        return forward(*args, **keywords)

    return wrapped


def compile_layers(model: nn.Module) -> None:
    """Compile in place the norms and MLPs of the decoder layers, for any number of tokens; in attention and routed experts shapes follow
    from the data. Parameters keep their names.

    The parts lie below FSDP's units, so its hooks run outside of what is compiled.
    """
    for layer in _layers(model):
        mlp = getattr(layer.mlp, "shared_experts", layer.mlp)
        for part in (layer.input_layernorm, layer.post_attention_layernorm, mlp):
            part.compile(dynamic=True)


def _layers(model: nn.Module) -> list[Any]:
    return list(model.get_submodule("model.layers").children())
