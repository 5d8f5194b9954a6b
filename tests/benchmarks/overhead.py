"""The same loop under Ray and under torchrun: seconds a step in steady state, by turns, on the digits records.

    python -m tests.benchmarks.overhead [--workers 1 2] [--steps 120] [--rounds 3]

The first steps of a run (warm-up, the stream's first block) are left out; medians of the rest, then of the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

import ray

from most_ray.io.journal import read_journal
from most_ray.service.cluster.connection import start_local_ray
from tests.benchmarks.common import show, write
from tests.end_to_end.faults.harness import by_itself, finish, under_ray

SKIPPED = 20


def step_times(folder: Path, name: str) -> list[float]:
    lines = read_journal(folder / name / "metrics.jsonl", "train")
    return [line["step_time"] for line in lines[SKIPPED:]]


def compare(folder: Path, address: str, workers: int, steps: int, rounds: int) -> dict[str, object]:
    """Median step times of each round, Ray and torchrun by turns."""
    flags = {"max_steps": steps, "save_steps": 10 * steps, "num_workers": workers, "ep_size": workers}
    flags |= {"threads_per_worker": 1, "trace_records": "none"}
    times: dict[str, list[float]] = {"ray": [], "torchrun": []}
    for number in range(rounds):
        for how in ("torchrun", "ray") if number % 2 else ("ray", "torchrun"):
            name = f"{how}-{workers}-{number}"
            process = under_ray(folder, name, address, **flags) if how == "ray" else by_itself(folder, name, workers, **flags)
            finish(process, folder, name)
            times[how].append(statistics.median(step_times(folder, name)))
    ratio = statistics.median(times["ray"]) / statistics.median(times["torchrun"])
    return {"workers": workers, "steps": steps, "seconds": times, "ratio": ratio}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.overhead", description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        address = start_local_ray(max(args.workers) + 2).address_info["gcs_address"]
        found = [compare(Path(folder), address, workers, args.steps, args.rounds) for workers in args.workers]
        ray.shutdown()
    rows = [
        [r["workers"], *(f"{statistics.median(r['seconds'][how]):.4f}" for how in ("torchrun", "ray")), f"{r['ratio']:.3f}"] for r in found
    ]  # type: ignore[index]
    show("Seconds a step", ["workers", "torchrun", "Ray", "Ray / torchrun"], rows)
    write("overhead", {"runs": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
