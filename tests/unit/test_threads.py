"""How threads wait is set by importing most_ray, on every way to torch, and never over what the environment says."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from most_ray import THREADS
from tests.conftest import ROOT


def told(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program of a process whose environment says nothing of threads but what is given."""
    rest = {name: value for name, value in os.environ.items() if name not in THREADS}
    env = {**rest, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True)


@pytest.mark.parametrize(
    ("code", "spins"),
    [
        ("import most_ray.train.run", "0"),  # as `python -m` and torchrun's ranks
        ("import most_ray, torch", "0"),
        ("import torch, most_ray", "300000"),  # too late: libgomp's default
    ],
)
def test_openmp_has_read_it(code: str, spins: str) -> None:
    assert f"GOMP_SPINCOUNT = '{spins}'" in told(code, OMP_DISPLAY_ENV="VERBOSE").stderr


@pytest.mark.parametrize(
    ("code", "environment", "printed"),
    [
        ("", {}, "PASSIVE false False"),
        ("", {"OMP_WAIT_POLICY": "ACTIVE", "TOKENIZERS_PARALLELISM": "true"}, "ACTIVE true False"),
        ("import sys; sys.modules['torch'] = sys; ", {}, "PASSIVE false True"),
        ("import sys; sys.modules['torch'] = sys; ", {"OMP_WAIT_POLICY": "PASSIVE"}, "PASSIVE false False"),
    ],
)
def test_what_the_environment_says_is_kept(code: str, environment: dict[str, str], printed: str) -> None:
    shown = "print(*(os.environ[name] for name in most_ray.THREADS), most_ray.TORCH_CAME_FIRST)"
    assert told(f"{code}import os, most_ray; {shown}", **environment).stdout == f"{printed}\n"
