"""What a fresh process does in `resume`: one job, and one line of JSON with its seconds. Imports no more than a data task does."""

from __future__ import annotations

import itertools
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from most_ray.config import WeightUnit
from most_ray.data.batch import rank_batch
from most_ray.data.plan import Plan
from tests.benchmarks.stores import LAYOUT, TASKS, Described, describe, spec_of

RECORDS = 10_000_000  # of each of two sources
WORLD, MAX_ROWS = 8, 16


def open_plan(root: Path, unit: WeightUnit) -> Plan:
    """The plan with its fingerprint, which a resumed run compares before anything else."""
    plan = Plan(spec_of(root, unit), [Described(root / task) for task in TASKS])
    assert plan.fingerprint
    return plan


def build(root: Path, unit: WeightUnit, step: int) -> dict[str, float]:
    """Write the lengths, make the plan."""
    describe(root, RECORDS)
    open_plan(root, unit).step(step)
    return {}


def first_batch(root: Path, unit: WeightUnit, step: int) -> dict[str, float]:
    start = time.perf_counter()
    plan = open_plan(root, unit)
    opened = time.perf_counter() - start
    batch = rank_batch(plan, step, 0, WORLD, MAX_ROWS, LAYOUT)
    assert batch.step == step and len(batch.record_ids) > 0
    return {"reopen_s": opened}


def fast_forward(root: Path, unit: WeightUnit, step: int) -> dict[str, float]:
    """The least that a trainer does which finds its place by skipping: it draws each record of the steps before, asks for its length and
    drops it. The order comes from the same vectorised mixture; nothing is packed, read or tokenised."""
    plan = open_plan(root, unit)
    skipped = (step - 1) * plan.spec.global_batch_size
    start = time.perf_counter()
    tokens = sum(length for _, _, length in itertools.islice(_records(plan), skipped))
    seconds = time.perf_counter() - start
    rank_batch(plan, step, 0, WORLD, MAX_ROWS, LAYOUT)
    return {"skipped_records": skipped, "skipped_tokens": tokens, "skip_s": seconds}


def _records(plan: Plan) -> Iterator[tuple[int, int, int]]:
    lengths = [store.lengths for store in plan.stores]
    for start in itertools.count(0, 1 << 16):
        sources, rows = plan.mixture.locate(start, start + (1 << 16))
        for source, row in zip(sources.tolist(), rows.tolist(), strict=True):
            yield source, row, int(lengths[source][row])


JOBS = {"build": build, "first_batch": first_batch, "fast_forward": fast_forward}


def main() -> None:
    job, root, unit, step = sys.argv[1:]
    start = time.perf_counter()
    told = JOBS[job](Path(root), cast(WeightUnit, unit), int(step))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(json.dumps({**told, "seconds": seconds, "peak_mb": peak}), flush=True)


if __name__ == "__main__":
    main()
