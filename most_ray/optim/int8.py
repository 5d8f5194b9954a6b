"""AdamW with moments in 8 bits, from torchao. Imported only where the configuration selects it: torchao is optional."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torchao.optim import AdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit


class Int8AdamW(AdamW8bit):
    """torchao's optimizer, for parameters whose moments exist already. torchao compiles the update for each shape of a parameter; on CPUs,
    where that takes minutes, this class runs it uncompiled."""

    def step(self, closure: Any = None) -> Any:
        on_cpu = self.param_groups[0]["params"][0].device.type == "cpu"
        with torch.compiler.set_stance("force_eager") if on_cpu else contextlib.nullcontext():
            return super().step(closure)


def zeros(like: torch.Tensor, signed: bool, block: int) -> torch.Tensor:
    """A moment of zeros for `like`, which is no DTensor, with negative values if `signed`: a tensor subclass with `codes`, uint8 in the
    shape and on the device of `like`, and `scale`, float32 (values / block,), one for `block` consecutive values."""
    return OptimState8bit.zeros(like.shape, signed, block, like.device, dtype=torch.float32)
