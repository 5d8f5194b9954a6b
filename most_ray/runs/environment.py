"""The environment of a run: hardware and versions, without anything that names a machine, a user or a path."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import most_ray
from most_ray.errors import redact
from most_ray.runs.room import machine_cores

_LONGEST_COMMAND = 4000  # characters
_PACKAGES = ("torch", "transformers", "ray", "numpy", "pyarrow", "wandb", "most_ray")
# Of a report of a fault: others that a run may depend on, beginnings of variables that matter, and names of those whose values stay here.
_MORE = ("accelerate", "safetensors", "tokenizers", "huggingface_hub", "optuna", "scikit-learn", "soundfile", "soxr", "fsspec", "torchao")
_VARIABLES = (
    "MOST_",
    "RAY_",
    "CUDA_",
    "NVIDIA_",
    "OMP_",
    "HF_",
    "TRANSFORMERS_",
    "TOKENIZERS_",
    "TORCH_",
    "NCCL_",
    "GLOO_",
    "WANDB_",
    "PYTHON",
)
_SECRET = re.compile("KEY|TOKEN(?!IZERS)|SECRET|PASSWORD|CREDENTIAL|AUTH(?!_MODE)", re.IGNORECASE)
_DRIVER, _DRIVER_FILE = r"Kernel Module\D*([\d.]+)", "/proc/driver/nvidia/version"


def environment() -> dict[str, Any]:
    """Python, system, processor, memory, GPUs, versions, and the commit of the code, as JSON values: `commit` and `modified` where
    most_ray's source is in a git checkout, `cuda` and `driver` where there is a GPU."""
    import torch  # not above: probes of a cluster's nodes use `version_of` without it

    found = {**_machine(), "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]}
    if torch.cuda.is_available():
        found |= {"cuda": torch.version.cuda, "driver": _find(_DRIVER, _DRIVER_FILE)}
    found["versions"] = {name: version_of(name) for name in _PACKAGES}
    return found | source_commit()


def installation() -> dict[str, Any]:
    """What a report of a fault needs of this machine, as JSON values, found without loading a library: as `environment`, with more versions
    and the variables that matter, without the values of secrets."""
    driver = _find(_DRIVER, _DRIVER_FILE)
    return {
        "most_ray": most_ray.__version__,
        **source_commit(),
        **_machine(),
        "gpus": _nvidia_smi(),
        **({"driver": driver} if driver else {}),
        "versions": {name: version_of(name) for name in (*_PACKAGES, *_MORE) if name != "most_ray"},
        "variables": {name: _shown_value(name, value) for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)},
    }


def _machine() -> dict[str, Any]:
    """Python, system, processor, cores and memory."""
    memory = _find(r"^MemTotal:\s*(\d+) kB$", "/proc/meminfo")
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}".strip(),
        "cpu": _find(r"^model name\s*:\s*(.+)$", "/proc/cpuinfo") or platform.processor() or None,
        "cores": machine_cores(),
        "memory_gb": round(int(memory) * 1024 / 1e9, 1) if memory else None,
    }


def _nvidia_smi() -> list[str]:
    """Name and memory of each NVIDIA GPU, as its driver's own tool reports them; empty where there is none."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in found.splitlines() if line.strip()]


def _shown_value(name: str, value: str) -> str:
    """A variable's value, without credentials and without the name of the user's home folder."""
    return "***" if _SECRET.search(name) else redact(value.replace(str(Path.home()), "~"))


def command_line() -> str:
    """The command that started this process, as it could be typed again: without folders of programs and without credentials."""
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    program = sys.argv[0] if sys.argv else ""
    name = Path(program).name if Path(program).is_absolute() else program
    if main is not None and name.endswith(".py"):
        words = ["python", "-m", main.name.removesuffix(".__main__")]
    else:
        words = ["python", name] if name.endswith(".py") else [name]
    line = redact(shlex.join([*words, *sys.argv[1:]]))
    return line if len(line) <= _LONGEST_COMMAND else f"{line[:_LONGEST_COMMAND]} ..."


def version_of(package: str) -> str | None:
    """The installed version of a package, read without loading it; None where it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _find(pattern: str, path: str) -> str | None:
    """The first group of a pattern in a file; None where it is not found, or the file cannot be read, as on another operating system."""
    try:
        match = re.search(pattern, Path(path).read_text(), re.MULTILINE)
    except OSError:
        return None
    return match[1].strip() if match else None


def source_commit() -> dict[str, Any]:
    """The commit of the git checkout that this code is in, and whether its tracked files differ from it; empty where it is in none."""
    root = Path(most_ray.__file__).resolve().parents[1]
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
