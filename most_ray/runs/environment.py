"""The environment of a run: hardware and versions, without anything that names a machine, a user or a path."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import most_ray

_PACKAGES = ("torch", "transformers", "ray", "numpy", "pyarrow", "wandb", "most_ray")


def environment() -> dict[str, Any]:
    """Python, system, processor, memory, GPUs, versions, and the commit of the code, as JSON values.

    `commit` and `modified` are there where most_ray's source is in a git checkout, `cuda` and `driver` where there is a GPU.
    """
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}".strip(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": _memory_gb(),
        "gpus": [],
    }
    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        found |= {"cuda": torch.version.cuda, "driver": _driver()}
    found["versions"] = {name: _version(name) for name in _PACKAGES}
    return found | _commit(Path(most_ray.__file__).resolve().parents[1])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    match = re.search(r"^model name\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    return match[1].strip() if match else platform.processor() or None


def _memory_gb() -> float | None:
    match = re.search(r"^MemTotal:\s*(\d+) kB$", _text("/proc/meminfo"), re.MULTILINE)
    return round(int(match[1]) * 1024 / 1e9, 1) if match else None


def _driver() -> str | None:
    match = re.search(r"Kernel Module\D*([\d.]+)", _text("/proc/driver/nvidia/version"))
    return match[1] if match else None


def _text(path: str) -> str:
    """A file's text; empty where it cannot be read, as on another operating system."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _commit(root: Path) -> dict[str, Any]:
    """The commit of the git checkout `root`, and whether its tracked files differ from it; empty where `root` is no checkout."""
    if not (root / ".git").exists():
        return {}
    try:
        commit = _git(root, "rev-parse", "HEAD").strip()
        return {"commit": commit, "modified": bool(_git(root, "status", "--porcelain", "--untracked-files=no").strip())}
    except (OSError, subprocess.SubprocessError):  # no git, or one that does not trust the folder
        return {}


def _git(root: Path, *command: str) -> str:
    # Without optional locks: this must not get in the way of someone's own git command.
    line = ["git", "--no-optional-locks", "-C", str(root), *command]
    return subprocess.run(line, capture_output=True, text=True, timeout=10, check=True).stdout
