"""AdamW with moments in float32 or in 8 bits, and the form in which a checkpoint stores them.

In 8 bits a moment has one byte per value and a float32 scale per block of values (Dettmers et al. 2021, arXiv 2110.02861). A block is part
of one row of a parameter, and rows are never split over ranks: codes and scales are stored in a checkpoint as they are, and are restored
bitwise identical on any layout.
"""

from __future__ import annotations

import importlib.util
import math
from collections import defaultdict
from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from most_ray.config import OptimizerOptions
from most_ray.errors import ConfigError

_BLOCK = 256  # values that share a scale at most, as in torchao and bitsandbytes
_SMALLEST_BLOCK = 32  # values; with fewer the scales would take more than an eighth of the codes' memory
_FEWEST_VALUES = 4096  # of a parameter with 8-bit moments: smaller ones are few, and the paper keeps them in float32 as well
_MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # name in the optimizer's state: whether it has negative values


def check_available(options: OptimizerOptions) -> None:
    """Raise ConfigError if the library that the options need is not installed."""
    if options.optimizer_state == "int8" and importlib.util.find_spec("torchao") is None:
        raise ConfigError("optimizer_state", "int8", "needs torchao, which is not installed.", "pip install 'most_ray[int8]'")


def make_optimizer(model: nn.Module, options: OptimizerOptions) -> torch.optim.Optimizer:
    """Create AdamW for the trainable parameters of a model; with moments in float32 it is the fused one.

    The moments are created at once, as zeros, so that a checkpoint can be read into them. Matrices have weight decay, vectors none.
    Parameters on different meshes (dense and expert) are in different groups, since a fused update takes one mesh. See `check_available`.
    """
    groups: dict[tuple[Any, bool], list[nn.Parameter]] = defaultdict(list)
    for parameter in model.parameters():
        if parameter.requires_grad:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups[mesh, parameter.dim() > 1].append(parameter)
    settings: dict[str, Any] = {
        "params": [{"params": params, "weight_decay": options.weight_decay if decays else 0.0} for (_, decays), params in groups.items()],
        "lr": options.learning_rate,
        "betas": (options.adam_beta1, options.adam_beta2),
        "eps": options.adam_epsilon,
    }
    if int8 := options.optimizer_state == "int8":
        check_available(options)
        from most_ray.optim.int8 import Int8AdamW  # imported here, since torchao is optional and takes seconds to import

        optimizer: torch.optim.Optimizer = Int8AdamW(**settings)
    else:
        optimizer = torch.optim.AdamW(**settings, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                # torchao's is on the CPU: reading it does not wait for a GPU.
                "step": torch.zeros((), dtype=torch.float32, device="cpu" if int8 else parameter.device),
                **{name: _zeros(parameter, signed, int8) for name, signed in _MOMENTS.items()},
            }
    return optimizer


def block_size(parameter: torch.Tensor) -> int | None:
    """Number of consecutive values of a parameter that share a scale in 8 bits, which divides the size of a row (everything at one index of
    the first dimension); None where its moments stay in float32."""
    if parameter.dim() < 2 or parameter.numel() < _FEWEST_VALUES:
        return None
    block = math.gcd(math.prod(parameter.shape[1:]), _BLOCK)
    return block if block >= _SMALLEST_BLOCK else None


def saved_state(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, prefix: str = "", stored: Container[str] = ()
) -> tuple[dict[str, torch.Tensor], Callable[[], None]]:
    """The tensors of a parameter's optimizer state as a checkpoint stores them, by name.

    A moment NAME in 8 bits is stored as NAME_codes, uint8 in the parameter's shape, and NAME_scale, float32 (rows, blocks of a row).

    Args:
        stored: names in a checkpoint that is to be read; empty to write one. For a moment that the checkpoint has in the other form
            (float32 or 8 bits), new tensors of that form are returned. Converting them from 8 bits to float32 is exact; from float32 to
            8 bits a value changes by at most 0.72% of the largest in its block (exp_avg_sq: 0.36%).

    Returns:
        The tensors, which share memory with the state unless they are of the other form; and a function that converts those of the other
        form into the state, to be called once they have been read.
    """
    int8 = not isinstance(optimizer, torch.optim.AdamW)
    tensors: dict[str, torch.Tensor] = {}
    others: list[tuple[torch.Tensor, torch.Tensor]] = []  # tensor of the state, tensor to read in the checkpoint's form
    for name, value in sorted(optimizer.state.get(parameter, {}).items()):
        form = int8
        if name in _MOMENTS and block_size(parameter) is not None and prefix + (name if int8 else f"{name}_codes") in stored:
            form = not int8
            check_available(OptimizerOptions(optimizer_state="int8"))
            other = _zeros(parameter, _MOMENTS[name], form)
            others.append((_local(value), _local(other)))
            value = other
        tensors.update({prefix + what: tensor for what, tensor in _tensors(parameter, name, value, form).items()})

    @torch.no_grad()
    def convert() -> None:
        for live, read in others:
            live.copy_(read)

    return tensors, convert


def _tensors(parameter: nn.Parameter, name: str, value: torch.Tensor, int8: bool) -> dict[str, torch.Tensor]:
    """The tensors that a checkpoint stores for one entry of a parameter's state, with the parameter's layout over ranks."""
    block = block_size(parameter) if int8 and name in _MOMENTS else None
    if block is None:
        return {name: value}
    n_blocks = math.prod(parameter.shape[1:]) // block
    local: Any = _local(value)
    if local.numel() == 0:  # a rank without rows has a plain tensor
        codes, scale = local.to(torch.uint8), local.new_zeros(0, n_blocks)
    else:
        codes, scale = local.codes, local.scale.view(-1, n_blocks)
    return {
        f"{name}_codes": _laid_out(codes, parameter, parameter.shape),
        f"{name}_scale": _laid_out(scale, parameter, (parameter.shape[0], n_blocks)),
    }


def _zeros(parameter: nn.Parameter, signed: bool, int8: bool) -> torch.Tensor:
    """A moment of zeros for a parameter, with its layout over ranks."""
    block, local = block_size(parameter) if int8 else None, _local(parameter.detach())
    if block is None or local.numel() == 0:
        return torch.zeros_like(parameter.detach())
    from most_ray.optim.int8 import zeros  # see make_optimizer

    return _laid_out(zeros(local, signed, block), parameter, parameter.shape)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _laid_out(local: torch.Tensor, parameter: nn.Parameter, shape: Sequence[int]) -> torch.Tensor:
    """This rank's rows of a tensor of `shape` whose rows are laid out over the ranks as the parameter's: a DTensor where that is one."""
    if not isinstance(parameter, DTensor):
        return local
    assert all(placement.is_replicate() or placement.dim == 0 for placement in parameter.placements), "rows are whole"  # type: ignore[attr-defined]
    size, stride = torch.Size(shape), tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return DTensor.from_local(local, parameter.device_mesh, parameter.placements, run_check=False, shape=size, stride=stride)
