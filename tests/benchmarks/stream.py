"""The stream: tokens a second into 1, 2 and 4 ranks at once, against the same batches made in one process, and a store ten times as large
as Ray's object store streamed through it once, with the bytes that were spilled (promise 10 of docs/promises.md).

With `--run DIR`, also how long the steps of that run waited for their data.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

from most_ray.data.batch import open_plan, rank_batch
from most_ray.data.feed import StreamSpec
from most_ray.io.journal import read_journal
from most_ray.service.cluster.connection import start_local_ray
from most_ray.service.tasks.batch_stream import stream_batches
from tests.benchmarks import common
from tests.benchmarks.stores import LAYOUT, fill, spec_of

RANKS = (1, 2, 4)
OBJECT_STORE = 80 * 10**6  # near the smallest that Ray takes
STORE = 880 * 10**6  # bytes of tokens
MAX_ROWS = 16


@contextmanager
def local_ray(**changes: Any) -> Iterator[None]:
    """A Ray as a run on this machine has it, in a folder of its own, ended whatever happens."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        start_local_ray(max(RANKS) + 2, _temp_dir=folder, **changes)
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        try:
            yield
        finally:
            ray.shutdown()


@ray.remote(num_cpus=1)
class Rank:
    """One rank's end of the stream. It does nothing with its batches: only the stream is measured."""

    def first(self, spec: StreamSpec, steps: int) -> float:
        """Seconds until the first batch of a new stream."""
        start = time.perf_counter()
        self._batches, self._world = stream_batches(spec, 1, steps), spec.world_size
        next(self._batches)
        return time.perf_counter() - start

    def drain(self) -> float:
        """This rank's share of the tokens of all other batches."""
        return sum(batch.n_tokens for batch in self._batches) / self._world


def deliver(spec: StreamSpec, world: int, steps: int) -> tuple[float, float]:
    """Tokens a second into all ranks together, until the last of them has all, and seconds to the slowest rank's first batch."""
    ranks = [Rank.remote() for _ in range(world)]
    specs = [replace(spec, rank=rank, world_size=world) for rank in range(world)]
    ray.get([rank.first.remote(own, 2) for rank, own in zip(ranks, specs, strict=True)])  # imports, worker processes, open stores
    first = max(ray.get([rank.first.remote(own, steps) for rank, own in zip(ranks, specs, strict=True)]))
    start = time.perf_counter()
    tokens = sum(ray.get([rank.drain.remote() for rank in ranks]))
    seconds = time.perf_counter() - start
    for rank in ranks:
        ray.kill(rank)
    return tokens / seconds, first


def in_process(spec: StreamSpec, steps: int) -> float:
    """Tokens a second of one loop without Ray."""
    plan = open_plan(spec.plan)
    rank_batch(plan, 1, 0, 1, MAX_ROWS, LAYOUT)
    start = time.perf_counter()
    tokens = sum(rank_batch(plan, step, 0, 1, MAX_ROWS, LAYOUT).n_tokens for step in range(2, steps + 1))
    return tokens / (time.perf_counter() - start)


def throughput(spec: StreamSpec, steps: int, rounds: int) -> tuple[dict[str, float], list[list[object]]]:
    """The ranks and the loop in turns; the best of each."""
    rates: dict[int, list[float]] = {world: [] for world in (0, *RANKS)}
    firsts: dict[int, list[float]] = {world: [] for world in RANKS}
    for _ in range(rounds):
        rates[0].append(in_process(spec, steps))
        for world in RANKS:
            rate, first = deliver(spec, world, steps)
            rates[world].append(rate)
            firsts[world].append(first)
    figures = {f"tokens_per_s_{world}": max(rates[world]) for world in RANKS}
    figures |= {f"first_batch_s_{world}": median(firsts[world]) for world in RANKS}
    figures |= {"tokens_per_s_in_process": max(rates[0]), "first_batch_s": median(firsts[1])}
    figures |= {f"ratio_in_process_{world}": max(rates[world]) / max(rates[0]) for world in RANKS}
    figures["ratio_in_process"] = figures["ratio_in_process_1"]
    rows: list[list[object]] = [["one process, no Ray", max(rates[0]), min(rates[0]), ""]]
    rows += [[f"{world} rank{'s' * (world > 1)}", max(rates[world]), min(rates[world]), median(firsts[world])] for world in RANKS]
    return figures, rows


class ObjectStore:
    """Ray's own counters of its object store (`store_stats` of the raylet's memory info, which `ray memory --stats-only` prints), polled:
    `peak`, the most bytes in use, those of objects that nobody needs any more and Ray has not yet freed included; `peak_needed`, of
    objects that somebody needs."""

    def __init__(self) -> None:
        self._state = get_state_from_address(ray.get_runtime_context().gcs_address)
        self.peak = self.peak_needed = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def stats(self) -> Any:
        return get_memory_info_reply(self._state).store_stats

    def _poll(self) -> None:
        while not self._done.wait(0.05):
            stats = self.stats()
            self.peak = max(self.peak, stats.object_store_bytes_used)
            self.peak_needed = max(self.peak_needed, stats.object_store_bytes_primary_copy)

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def spills_when_forced(self) -> int:
        """Bytes spilled once twice the store's size is held on purpose: shows that the counter counts."""
        before = self.stats().spilled_bytes_total
        held = [ray.put(np.ones(OBJECT_STORE // 40, np.int32)) for _ in range(20)]
        deadline = time.monotonic() + 20
        while (spilled := self.stats().spilled_bytes_total - before) == 0 and time.monotonic() < deadline:
            time.sleep(0.2)
        del held
        return int(spilled)


def resident_mb() -> float:
    """Memory of this process with the object store's pages that it maps; mapped files aside, which are the system's page cache."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) * 1024 / 1e6


def pass_through(spec: StreamSpec, store_bytes: int) -> tuple[dict[str, float], list[list[object]]]:
    """The whole store once through a small object store, into this process."""
    steps = open_plan(spec.plan).steps_for_epochs(1.0)
    watched = ObjectStore()
    resident, tokens, start = [], 0, time.perf_counter()
    for batch in stream_batches(spec, 1, steps):
        tokens += batch.n_tokens
        resident.append(resident_mb())
    seconds = time.perf_counter() - start
    watched.stop()
    stats, quarter = watched.stats(), len(resident) // 4
    forced = watched.spills_when_forced()
    assert forced > 0, "the counter of spilled bytes does not count"
    size = ray.cluster_resources()["object_store_memory"]
    figures = {
        "spilled_bytes": stats.spilled_bytes_total,
        "forced_spilled_bytes": forced,
        "fallback_bytes": stats.object_store_bytes_fallback,
        "store_over_object_store": store_bytes / size,
        "peak_object_store_mb": watched.peak / 1e6,
        "peak_object_store_needed_mb": watched.peak_needed / 1e6,
        "object_store_mb": size / 1e6,
        "driver_rss_growth_mb": mean(resident[-quarter:]) - mean(resident[:quarter]),
        "driver_rss_growth_mb_from_second_quarter": mean(resident[-quarter:]) - mean(resident[quarter : 2 * quarter]),
        "driver_rss_mb": mean(resident[-quarter:]),
        "tokens_per_s_small_object_store": tokens / seconds,
    }
    return figures, [[key.replace("_", " "), value] for key, value in figures.items()]


def data_wait(run: Path) -> tuple[dict[str, float], list[list[object]]]:
    """Share of a run's step time that was spent waiting for data, apart from the first line, which waits for the stream to start."""
    lines = read_journal(run / "metrics.jsonl", "train")
    first, rest = lines[0], lines[1:]
    figures = {
        "data_wait_share": sum(line["data_wait"] for line in rest) / sum(line["step_time"] for line in rest),
        "data_wait_s_median": median(line["data_wait"] for line in rest),
        "step_time_s_median": median(line["step_time"] for line in rest),
        "data_wait_s_first": first["data_wait"],
        "run_steps": lines[-1]["step"],
    }
    return figures, [[key.replace("_", " "), value] for key, value in figures.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="folder of a training run with --logging_steps 1")
    parser.add_argument("--steps", type=int, default=240, help="of 512 records, for tokens a second")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="most_ray-bench-") as folder:
        store_bytes = fill(Path(folder), STORE)
        spec = StreamSpec(spec_of(Path(folder), "records"), LAYOUT, 0, 1, MAX_ROWS)
        with local_ray():
            found, rates = throughput(spec, arguments.steps, arguments.rounds)
        figures |= found
        common.show("Tokens a second into all ranks", ["", "best", "worst", "s to first batch"], rates)
        with local_ray(object_store_memory=OBJECT_STORE):
            found, rows = pass_through(spec, store_bytes)
        figures |= found
        common.show("A store ten times the object store, once through", ["", ""], rows)
    if arguments.run:
        found, rows = data_wait(arguments.run)
        figures |= found
        common.show("Waiting for data in a run", ["", ""], rows)
    common.write("stream", figures)


if __name__ == "__main__":
    main()
