from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from most_ray.config import config_from
from most_ray.data.batch import rank_batch
from most_ray.data.noise import UnitNoise, noisy_units
from most_ray.data.plan import Plan, make_spec
from most_ray.errors import ConfigError
from most_ray.records.template import IGNORE
from tests.support.builders import asr, make_plan, make_store
from tests.unit.test_plan import LAYOUT

NEAR = (np.arange(50)[:, None] + np.arange(1, 4)) % 50


@given(st.lists(st.integers(0, 49), min_size=1, max_size=60), st.integers(0, 10**12))
def test_noise_is_a_function_of_seed_and_place(units: list[int], uri: int) -> None:
    noise = UnitNoise(0.3, 0.1, 0.2)
    array = np.array(units, dtype=np.int32)
    once = noisy_units(array, noise, NEAR, 1, uri)
    assert np.array_equal(once, noisy_units(array, noise, NEAR, 1, uri))
    assert 1 <= len(once) <= len(units)
    assert ((once >= 0) & (once < 50)).all()
    assert array.tolist() == units, "the stored record is left as it is"


def test_shares_are_what_was_asked_for() -> None:
    units = np.full(20_000, 10, dtype=np.int32)
    swapped = noisy_units(units, UnitNoise(swap=0.3), NEAR, 0, 0)
    assert np.mean(swapped != 10) == pytest.approx(0.3, abs=0.02)
    assert set(swapped.tolist()) == {10, 11, 12, 13}
    assert np.mean(noisy_units(units, UnitNoise(replace=0.1), NEAR, 0, 0) != 10) == pytest.approx(0.1, abs=0.02)
    assert len(noisy_units(units, UnitNoise(drop=0.2), NEAR, 0, 0)) == pytest.approx(16_000, abs=300)


@pytest.mark.parametrize("world", [1, 3])
def test_only_the_input_units_of_asr_records_change(tmp_path: Path, world: int) -> None:
    clean = make_plan(tmp_path)
    noisy = Plan(replace(clean.spec, noise=UnitNoise(replace=0.5, drop=0.3)))
    assert noisy.fingerprint != clean.fingerprint
    heard = (0, 0)
    for step in range(1, 6):
        for rank in range(world):
            one, two = (rank_batch(plan, step, rank, world, 3, LAYOUT) for plan in (clean, noisy))
            assert one.record_ids == two.record_ids
            assert one.n_supervised == two.n_supervised
            assert np.array_equal(one.labels[one.labels != IGNORE], two.labels[two.labels != IGNORE])
            assert np.array_equal(one.input_ids[one.task == 1], two.input_ids[two.task == 1])
            texts = [batch.input_ids[(batch.task == 0) & (batch.modality == 0)] for batch in (one, two)]
            assert np.array_equal(*texts)
            heard = (heard[0] + int((one.task == 0).sum()), heard[1] + int((two.task == 0).sum()))
    assert heard[1] < heard[0]


def test_the_same_record_is_heard_differently_each_time(tmp_path: Path) -> None:
    store = make_store(tmp_path, "a", [asr(0, 30)])
    clean = make_plan(tmp_path / "x")
    plan = Plan(replace(clean.spec, stores=(store.uri,), weights=(1,), global_batch_size=1, noise=UnitNoise(replace=0.5)))
    heard = {rank_batch(plan, step, 0, 1, 1, LAYOUT).input_ids.tobytes() for step in range(1, 6)}
    assert len(heard) == 5


def test_swapping_needs_to_know_what_is_near(tmp_path: Path) -> None:
    store = make_store(tmp_path, "a", [asr(0)])
    with pytest.raises(ConfigError, match=r"unit_swap_prob.*units\.json"):
        make_spec(config_from({"unit_swap_prob": 0.1}), [store], 1)
