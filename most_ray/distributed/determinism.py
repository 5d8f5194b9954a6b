"""Runs that repeat to the bit."""

from __future__ import annotations

import os
import random

import numpy as np
import torch

# cuBLAS picks between kernels by the workspaces that happen to be free unless their number and size are fixed
# (docs.pytorch.org/docs/stable/generated/torch.use_deterministic_algorithms.html).
_CUBLAS_WORKSPACE = ":4096:8"


def set_seeds(seed: int, rank: int = 0) -> None:
    """Every random generator of this process, each rank's another."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def set_deterministic(seed: int, rank: int = 0) -> None:
    """From here on this process repeats itself to the bit on the same machine, libraries and layout.

    To be called before anything has run on a GPU: cuBLAS reads its setting once. An operation that has no deterministic implementation
    raises RuntimeError. The number of CPU threads is left alone, but decides on the last bits as well.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = _CUBLAS_WORKSPACE
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    set_seeds(seed, rank)


def reset_deterministic() -> None:
    """Back to the libraries' defaults; seeds stay."""
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
