"""Resume: time to the first batch after a start at a late step, over 20 million records known by their lengths, in fresh processes.

Lengths and manifests are in the store's own format and are opened, checked and mapped as always; tokens are made from row numbers, so
the reading of shards is not in these figures (it does not depend on the step). Files are in the page cache. Promise 2 of docs/promises.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from tests.benchmarks import common

STEPS = (10, 10_000, 1_000_000)
UNITS = ("records", "tokens")
SKIPPED_TO = 10_000


def fresh(job: str, root: Path, unit: str = "records", step: int = 1) -> dict[str, float]:
    """A job in a process of its own; `wall`: seconds from its start to its answer, interpreter and imports included."""
    command = [sys.executable, "-m", "tests.benchmarks.fresh", job, str(root), unit, str(step)]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=common.ROOT) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        wall = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return {**json.loads(line), "wall": wall}


def collect(root: Path, rounds: int) -> dict[tuple[str, str, int], list[dict[str, float]]]:
    """All jobs in turn, round by round."""
    jobs = [("first_batch", unit, step) for unit in UNITS for step in STEPS] + [("fast_forward", "records", SKIPPED_TO)]
    told: dict[tuple[str, str, int], list[dict[str, float]]] = {job: [] for job in jobs}
    for _ in range(rounds):
        for name, unit, step in jobs:
            told[name, unit, step].append(fresh(name, root, unit, step))
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="most_ray-bench-") as folder:
        root = Path(folder) / "stores"
        built = fresh("build", root)
        told = collect(root, rounds)

    def middle(key: str, job: str, unit: str, step: int) -> float:
        return float(median(answer[key] for answer in told[job, unit, step]))

    figures = {"build_s": built["seconds"], "build_s_with_imports": built["wall"], "build_peak_mb": built["peak_mb"]}
    rows = []
    for unit in UNITS:
        tail = "" if unit == "records" else "_tokens"
        for step in STEPS:
            job = ("first_batch", unit, step)
            figures[f"first_batch_s_step_{step}{tail}"] = middle("seconds", *job)
            figures[f"first_batch_s_step_{step}{tail}_with_imports"] = middle("wall", *job)
            noise = common.spread([answer["seconds"] for answer in told[job]])
            rows.append([f"{unit}, step {step:,}", *(middle(key, *job) for key in ("seconds", "wall", "reopen_s", "peak_mb")), noise])
        late, early = (f"first_batch_s_step_{step}{tail}" for step in (STEPS[-1], STEPS[0]))
        figures[f"ratio_step_1000000_over_10{tail}"] = figures[late] / figures[early]
        figures[f"ratio_step_1000000_over_10{tail}_with_imports"] = figures[f"{late}_with_imports"] / figures[f"{early}_with_imports"]
        first = ("first_batch", unit, STEPS[0])
        figures[f"reopen_s{tail}"] = middle("reopen_s", *first)
        imports = middle("wall", *first) - middle("seconds", *first)
        figures[f"reopen_s{tail}_with_imports"] = figures[f"reopen_s{tail}"] + imports
        figures[f"use_peak_mb{tail}"] = max(answer["peak_mb"] for step in STEPS for answer in told["first_batch", unit, step])
    skip = ("fast_forward", "records", SKIPPED_TO)
    figures["fast_forward_s"] = middle("seconds", *skip)
    figures["ratio_fast_forward"] = figures["fast_forward_s"] / figures[f"first_batch_s_step_{SKIPPED_TO}"]
    figures["imports_s"] = imports
    skipped = (SKIPPED_TO - 1) * 512
    rows.append([f"fast forward to step {SKIPPED_TO:,}", middle("seconds", *skip), middle("wall", *skip), "", middle("peak_mb", *skip), ""])
    common.show(
        f"First batch of a fresh process, 20 million records, steps of 512 (median of {rounds})",
        ["", "s", "s with imports", "s to open", "peak MB", "median over best - 1"],
        rows,
        [
            f"Step 1,000,000 over step 10: {figures['ratio_step_1000000_over_10']:.2f} (records), "
            f"{figures['ratio_step_1000000_over_10_tokens']:.2f} (tokens). "
            f"Build: {built['seconds']:.1f} s, peak {built['peak_mb']:,.0f} MB.",
            f"Fast forward draws {skipped:,} records, asks for their lengths and drops them: no packing, no reading, no tokenising.",
        ],
    )
    common.write("resume", figures)


if __name__ == "__main__":
    main()
