from __future__ import annotations

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
