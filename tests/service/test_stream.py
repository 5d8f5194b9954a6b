"""The plan carried out by Ray Data: the same batches as the plan's own, in order, from any step, at any number of ranks."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest

from most_ray.data.batch import Batch, rank_batch
from most_ray.data.plan import Plan
from most_ray.service import stream
from most_ray.service.stream import StreamSpec, decode_batch, encode_batch, stream_batches
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
    monkeypatch.setattr(stream, "steps_per_block", lambda _: 4)
    monkeypatch.setattr(stream, "_BLOCKS_PER_DATASET", 3)
    spec = StreamSpec(plan.spec, LAYOUT, rank, world, 2)
    count = 0
    for step, batch in zip(range(first, last + 1), stream_batches(spec, first, last), strict=True):
        assert same(batch, rank_batch(plan, step, rank, world, 2, LAYOUT)), step
        count += 1
    assert count == last - first + 1


def test_blocks_stay_small_and_start_up_does_not_grow(plan: Plan, tmp_path: Path) -> None:
    from dataclasses import replace

    spec = StreamSpec(plan.spec, LAYOUT, 0, 1, 2)
    assert 1 <= stream.steps_per_block(spec) <= 64
    large = StreamSpec(replace(plan.spec, global_batch_size=4096, max_seq_length=4096), LAYOUT, 0, 8, 8)
    assert stream.steps_per_block(large) <= 2
