"""The plan carried out by Ray Data: the same batches as the plan's own, in order, from any step, at any number of ranks."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from most_ray.data.batch import Batch, rank_batch
from most_ray.data.feed import StreamSpec, StreamStalledError, prefetch
from most_ray.data.plan import Plan
from most_ray.errors import DataError
from most_ray.service.tasks import batch_stream
from most_ray.service.tasks.batch_stream import decode_batch, encode_batch, stream_batches
from tests.conftest import ROOT
from tests.support.builders import make_plan
from tests.unit.test_plan import LAYOUT


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return make_plan(tmp_path_factory.mktemp("data"))


def same(one: Batch, two: Batch) -> bool:
    return all(
        np.array_equal(getattr(one, f.name), getattr(two, f.name)) and type(getattr(one, f.name)) is type(getattr(two, f.name))
        for f in fields(Batch)
    )


def test_a_batch_survives_the_wire(plan: Plan) -> None:
    batch = rank_batch(plan, 4, 1, 3, 2, LAYOUT)
    again = decode_batch(encode_batch(batch))
    assert same(batch, again) and asdict(again)["step"] == 4


@pytest.mark.parametrize(("rank", "world", "first", "last"), [(0, 1, 1, 30), (1, 2, 13, 29)])
def test_the_stream_is_the_plan(
    ray_cluster: str, plan: Plan, monkeypatch: pytest.MonkeyPatch, rank: int, world: int, first: int, last: int
) -> None:
    """Over blocks and over datasets, neither of which the steps are a multiple of."""
    monkeypatch.setattr(batch_stream, "steps_per_block", lambda _: 4)
    monkeypatch.setattr(batch_stream, "_BLOCKS_PER_DATASET", 3)
    spec = StreamSpec(plan.spec, LAYOUT, rank, world, 2)
    count = 0
    for step, batch in zip(range(first, last + 1), stream_batches(spec, first, last), strict=True):
        assert same(batch, rank_batch(plan, step, rank, world, 2, LAYOUT)), step
        count += 1
    assert count == last - first + 1


def test_blocks_stay_small_and_start_up_does_not_grow(plan: Plan, tmp_path: Path) -> None:
    from dataclasses import replace

    spec = StreamSpec(plan.spec, LAYOUT, 0, 1, 2)
    assert 1 <= batch_stream.steps_per_block(spec) <= 64
    large = StreamSpec(replace(plan.spec, global_batch_size=1 << 17, max_seq_length=4096), LAYOUT, 0, 8, 8)
    assert batch_stream.steps_per_block(large) <= 2


def test_a_stream_that_stalls_ends_naming_the_stage() -> None:
    """Promise 9 of docs/promises.md: no batch for N seconds ends in a named error; batches before it come through."""
    hold = threading.Event()

    def stalling() -> Iterator[Any]:
        yield "first"
        hold.wait(60)

    batches = prefetch(stalling(), 0.3, lambda: "stage read: steps 3 to 4")
    assert next(batches) == "first"
    with pytest.raises(StreamStalledError, match=r"data_timeout_s = 0\.3: passed without a batch: stage read: steps 3 to 4"):
        next(batches)
    hold.set()


def test_a_batch_is_made_ahead_and_no_more(plan: Plan) -> None:
    """Promise 10 of docs/promises.md: prefetch is bounded; the producer stops while nothing consumes."""
    made: list[int] = []
    ahead = threading.Semaphore(0)

    def counting() -> Iterator[Any]:
        for number in range(100):
            made.append(number)
            ahead.release()
            yield number

    batches = prefetch(counting(), 0.0, lambda: "")
    assert next(batches) == 0
    for _ in range(3):
        assert ahead.acquire(timeout=10)
    assert not ahead.acquire(timeout=0.2) and made == [0, 1, 2]
    batches.close()


def test_the_stages_of_a_stalled_stream_are_told(ray_cluster: str, tmp_path: Path) -> None:
    """A task that cannot be scheduled, one that reads for ever, and a first block whose reading never ends."""
    command = [sys.executable, "-m", "tests.support.stalled_streams", ray_cluster, str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    unscheduled, endless, own = ended.stdout.splitlines() or [ended.stderr]
    assert re.search(r"stage schedule: .*steps 3 to 4 has not begun \(free of the cluster's [\d.]+ CPUs: [\d.]+\)", unscheduled)
    assert re.search(r"stage read \(records from the token store\): steps 3 to 4, on .* for \d+ s", endless)
    assert re.search(r"stage read \(records from the token store\): steps 1 to 2, on .*, in the training process", own)


def test_a_damaged_shard_ends_the_stream_with_its_name(ray_cluster: str, tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    shard = Path(plan.stores[0].shard_uri(0))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    spec = StreamSpec(plan.spec, LAYOUT, 0, 1, 2, timeout_s=60.0)
    with pytest.raises(DataError, match=rf"{shard.name}.*damaged"):
        list(stream_batches(spec, 1, 20))
