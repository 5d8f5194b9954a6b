"""The first steps of jobs/configs/digits.yaml in one process: one thread, float32, deterministic, without Ray.

Losses and gradient norms are compared with those in digits.json, kept per kind of machine. After a change that is meant to change them:

    python -m tests.golden.digits --write
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from most_ray.config import config_from, read_yaml
from most_ray.data.batch import rank_batch
from most_ray.distributed.determinism import set_deterministic
from most_ray.model.build import load_model
from most_ray.optim.train_state import make_state
from most_ray.runs.job import overrides_of
from most_ray.runs.resolve import prepare_run
from most_ray.train.step import StepSettings, run_step

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("digits.json")
STEPS = 20


def machine() -> str:
    """What the last bits depend on: the processor, the kernels that torch picks for it, and torch."""
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    model = fields.get("model name") or platform.processor() or platform.machine()
    # Virtual machines hide the name; these numbers tell generations apart.
    numbers = "-".join(fields.get(name, "?") for name in ("cpu family", "model", "stepping"))
    return f"{model} ({numbers}), {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def measure(output_dir: Path) -> dict[str, list[Any]]:
    """losses: cross-entropy per supervised token; norms: of the gradient, before clipping; load: selections per step by expert group.
    Changes settings of the whole process."""
    torch.set_num_threads(1)
    values = read_yaml(ROOT / "jobs" / "configs" / "digits.yaml")
    values |= {name: [str(ROOT / uri) for uri in values[name]] for name in ("train_asr_dirs", "train_tts_dirs")}
    config = config_from(
        {**values, "val_asr_dirs": [], "val_tts_dirs": [], "output_dir": str(output_dir), "use_gpu": False, "deterministic": True}
    )
    set_deterministic(config.seed)
    prepared = prepare_run(config)
    job, device = prepared.job, torch.device("cpu")
    state = make_state(load_model(job.model_path, overrides_of(config)), config, job.total_steps)
    found: dict[str, list[Any]] = {"losses": [], "norms": [], "load": []}
    for step in range(1, STEPS + 1):
        batch = rank_batch(prepared.plan, step, 0, 1, config.train_batch_size, job.layout)
        result = run_step(state, batch, StepSettings.of(config, device))
        found["losses"].append(sum(result.loss_sums) / sum(result.token_counts))
        found["norms"].append(result.grad_norm)
        found["load"].append(result.load.sum((0, 2)).tolist())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep this machine's figures in digits.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    if arguments.write:
        known = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}
        known[machine()] = found
        GOLDEN.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"machine": machine(), **found}))


if __name__ == "__main__":
    main()
