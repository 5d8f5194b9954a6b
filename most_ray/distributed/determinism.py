"""Seeds, and runs that repeat bitwise identically."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator

import numpy as np
import torch

# Unless the number and size (KiB) of its workspaces are fixed, cuBLAS chooses between kernels by those that happen to be free
# (docs.pytorch.org/docs/stable/generated/torch.use_deterministic_algorithms.html).
_CUBLAS_WORKSPACE = ":4096:8"


def set_seeds(seed: int, rank: int = 0) -> None:
    """Seed the generators of Python, numpy and torch with `seed + rank`: every rank draws other numbers."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def set_deterministic(seed: int, rank: int = 0) -> None:
    """Seed the generators and select deterministic kernels: from now on this process computes bitwise identical results whenever it is
    repeated on the same machine with the same libraries, layout and number of CPU threads (which is left as it is).

    Call it before anything has run on a GPU: cuBLAS reads its setting once. An operation without a deterministic implementation raises
    RuntimeError when it is used.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = _CUBLAS_WORKSPACE
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    set_seeds(seed, rank)


def reset_deterministic() -> None:
    """Restore the libraries' defaults; seeds stay."""
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Limit torch to `count` CPU threads inside the block. The number of threads decides the order of additions, so the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
