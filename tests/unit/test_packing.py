from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from most_ray.data.packing import best_fit


@given(st.lists(st.integers(1, 64), max_size=80))
def test_every_record_is_packed_whole_and_once(lengths: list[int]) -> None:
    packs = best_fit(lengths, 64)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in pack) <= 64 for pack in packs)
    assert all(packs)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=80))
def test_no_two_packs_would_fit_into_one(lengths: list[int]) -> None:
    loads = sorted(sum(lengths[index] for index in pack) for pack in best_fit(lengths, 64))
    assert len(loads) == 1 or loads[0] + loads[1] > 64


def test_best_fit_and_ties_are_pinned() -> None:
    assert best_fit([5, 3, 7, 2, 5, 3], 10) == [[2, 1], [0, 4], [5, 3]]


@given(st.lists(st.integers(1, 64), min_size=1, max_size=80))
def test_fill_has_a_lower_bound(lengths: list[int]) -> None:
    """No row more than the tokens and the long records need is opened while one has room; short records leave less than a quarter free."""
    rows = len(best_fit(lengths, 64))
    alone = sum(length > 32 for length in lengths)  # no two of these share a row
    fewest = max(-(-sum(lengths) // 64), alone)
    assert rows >= fewest
    if all(length <= 16 for length in lengths):  # then every row but the last is more than three quarters full
        assert rows == 1 or sum(lengths) > 48 * (rows - 1)


@pytest.mark.parametrize("records", [256, 512])
def test_rows_of_speech_are_nearly_full(records: int) -> None:
    """Lengths drawn like LibriHeavy's (tests/benchmarks/packing.py): at least 96% of the rows holds records, in each of 300 steps. (In
    3,000 the emptiest had 96.7%. There are steps with less, one draw in billions, which a search for counterexamples finds.)"""
    for seed in range(300):
        seconds = np.random.default_rng(seed).normal(16.4, 7, 4 * records)
        lengths = (seconds[(seconds > 2) & (seconds < 30)][:records] * 54.5 + 22).astype(int).tolist()
        rows = len(best_fit(lengths, 2048))
        assert sum(lengths) >= 0.96 * 2048 * rows, seed
