"""AdamW with moments in 8 bits: torchao's. Imported only where it is asked for."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torchao.optim import AdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit


class Int8AdamW(AdamW8bit):
    """torchao's, its moments made beforehand. It compiles its update of each shape of parameter; on CPUs, where that takes minutes, the
    same update runs uncompiled."""

    def step(self, closure: Any = None) -> Any:
        on_cpu = self.param_groups[0]["params"][0].device.type == "cpu"
        with torch.compiler.set_stance("force_eager") if on_cpu else contextlib.nullcontext():
            return super().step(closure)


def zeros(like: torch.Tensor, signed: bool, block: int) -> torch.Tensor:
    """A moment of a plain tensor's shape and device: `codes`, uint8 in its shape, and a float32 `scale` for each `block` of them."""
    return OptimState8bit.zeros(like.shape, signed, block, like.device, dtype=torch.float32)
