"""The cost model against what is measured: seconds a step at 1, 2 and 4 gloo ranks of one thread each, on the digits records.

    python -m tests.benchmarks.cost [--models tiny small] [--rounds 3] [--steps 8] [--processor_time]

A round predicts, as `most-ray train --dry_run` does, and measures at once behind it; errors are those of medians over rounds. Where others
use the same cores, seconds on the clock are theirs as much as ours: --processor_time takes that of all ranks over the cores that they
share instead, which is what a step takes on a machine of its own. `tiny` is the preset, `small` has 27 M parameters. Memory is what
`--dry_run` says of a rank against what its resident set grows by at most, from before the model is loaded.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from most_ray.config import RunConfig, load_config
from most_ray.data.batch import open_plan, rank_batch
from most_ray.model.build import init_model, read_config, save_model
from most_ray.model.modeling import MostForCausalLM
from most_ray.planner import calibration
from most_ray.planner.calibration import CpuLinks
from most_ray.planner.dry_run import DryRun, dry_run
from most_ray.records.tokenizer import load_tokenizer
from most_ray.runs.job import Job
from most_ray.runs.resolve import prepare_run, training_texts
from most_ray.train.step import StepSettings, run_step
from tests.benchmarks.common import ROOT, show, write
from tests.benchmarks.train import SMALL
from tests.support.gloo import run_ranks
from tests.support.training import CPU, make

LAYOUTS = ((1, 1, 1), (1, 2, 1), (1, 2, 2), (2, 1, 1), (1, 4, 1), (1, 4, 4), (1, 4, 2))
_WARM = 2


def rank_steps(job: Job, options: dict[str, Any], warm_model: str, count: int) -> dict[str, Any]:
    """Of each step behind the first ones on the calling rank, seconds on the clock and of processor time; MiB by which its memory grew,
    beyond what a small model's steps have taken for libraries."""
    _train(replace(job, model_path=warm_model), options, _WARM)
    gc.collect()
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    taken = _train(job, options, _WARM + count)
    return {"seconds": taken[_WARM:], "mib": _memory("VmHWM") - before}


def _train(job: Job, options: dict[str, Any], count: int) -> list[tuple[float, float]]:
    topology = job.topology
    state = make(job.model_path, (topology.dp_replicate, topology.fsdp, topology.ep), job.total_steps, **options)
    plan, taken = open_plan(job.plan), []
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for step in range(1, count + 1):
        batch = rank_batch(plan, step, rank, world, job.config.train_batch_size, job.layout)
        if world > 1:
            dist.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        run_step(state, batch, StepSettings.of(job.config, CPU))
        taken.append((time.perf_counter() - wall, time.process_time() - cpu))
    return taken


def _memory(name: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name)) / 1024


def config_of(folder: Path, model: str, layout: tuple[int, int, int]) -> RunConfig:
    replicas, shards, experts = layout
    flags = {"num_workers": str(replicas * shards), "dp_replicate_size": replicas, "ep_size": experts, "threads_per_worker": 1}
    flags |= {"model_name_or_path": str(folder / model), "output_dir": str(folder / "runs"), "max_steps": 100, "use_gpu": False}
    return load_config(ROOT / "jobs/configs/digits.yaml", {**flags, "bf16": True})


def make_models(folder: Path, names: list[str]) -> None:
    config = load_config(ROOT / "jobs/configs/digits.yaml")
    init_model("tiny", training_texts(config), folder / "tiny")
    if "small" in names:
        made = MostForCausalLM(read_config(str(folder / "tiny"), **SMALL))
        save_model(made, load_tokenizer(str(folder / "tiny")), folder / "small")


def predict(config: RunConfig, processor: bool) -> DryRun:
    """By the clock or by processor time, of which gloo's is that of all ranks together, whose cores they share."""
    if not processor:
        return dry_run(config, "cpu")

    def shared(ranks: int) -> CpuLinks:
        links = measured_links(ranks)
        cores = _cores(links.ranks)
        shares = ({kind: each / cores for kind, each in figures.items()} for figures in (links.call, links.byte))
        return CpuLinks(links.ranks, *shares)

    measured_links = calibration.measure_links
    with mock.patch.object(calibration, "clock", time.process_time), mock.patch.object(calibration, "measure_links", shared):
        return dry_run(config, "cpu")


def _cores(ranks: int) -> int:
    return min(ranks, os.cpu_count() or 1)


def one_round(config: RunConfig, steps: int, processor: bool) -> dict[str, Any]:
    predicted = predict(config, processor)
    job = prepare_run(config).job
    options = {name: getattr(config, name) for name in ("learning_rate", "weight_decay", "adam_beta2", "warmup_steps")}
    workers = job.topology.world_size
    ranks = run_ranks(workers, rank_steps, job, options, str(Path(job.model_path).parent / "tiny"), steps)
    taken = [list(zip(*(rank["seconds"][step] for rank in ranks), strict=True)) for step in range(steps)]
    return {
        "predicted_s": float(predicted.layout.cost.seconds),
        "measured_s": statistics.median(sum(cpu) / _cores(workers) if processor else max(wall) for wall, cpu in taken),
        "communication": float(predicted.layout.cost.communication),
        "estimate_mib": predicted.layout.memory.total(config.recomputed) / (1 << 20),
        "measured_mib": max(rank["mib"] for rank in ranks),
    }


def summary(model: str, layout: tuple[int, int, int], rounds: list[dict[str, Any]]) -> dict[str, Any]:
    middle = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
    return {"model": model, "layout": layout, **middle, "error": middle["predicted_s"] / middle["measured_s"] - 1}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.cost", description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--models", nargs="+", choices=("tiny", "small"), default=["tiny", "small"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--processor_time", action="store_true")
    args = parser.parse_args()
    told: dict[tuple[str, tuple[int, int, int]], list[dict[str, Any]]] = {(m, layout): [] for m in args.models for layout in LAYOUTS}
    with tempfile.TemporaryDirectory(prefix="most_ray-bench-") as folder:
        make_models(Path(folder), args.models)
        for _ in range(args.rounds):
            for (model, layout), rounds in told.items():
                rounds.append(one_round(config_of(Path(folder), model, layout), args.steps, args.processor_time))
                print(json.dumps(summary(model, layout, rounds)), flush=True)
    found = [summary(model, layout, rounds) for (model, layout), rounds in told.items()]
    rows = [
        [
            f"{one['model']}, {' x '.join(map(str, one['layout']))}",
            *(f"{one[name]:.3f}" for name in ("predicted_s", "measured_s")),
            f"{one['error']:+.0%}",
            f"{one['communication']:.0%}",
            *(f"{one[name]:.0f}" for name in ("estimate_mib", "measured_mib")),
        ]
        for one in found
    ]
    headings = ["replicas x shards x experts", "predicted", "measured", "error", "communication", "MiB predicted", "measured"]
    show(f"Seconds a step ({'processor time' if args.processor_time else 'clock'}) and memory of a rank", headings, rows)
    write("cost", {"processor_time": args.processor_time, "runs": found, "worst_error": max(abs(one["error"]) for one in found)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
