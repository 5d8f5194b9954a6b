from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from most_ray.data.mixture import MAX_PERIOD, Mixture, integer_weights, pattern_of, shuffled_rows

WEIGHTS = st.lists(st.integers(1, 60), min_size=1, max_size=7)


@given(WEIGHTS)
@settings(max_examples=80, deadline=None)
def test_every_prefix_is_within_one_record_of_its_share(weights: list[int]) -> None:
    """Promise 11: exact mixes, after every record."""
    reduced = integer_weights([Fraction(w) for w in weights])
    pattern = pattern_of(reduced)
    counts = np.cumsum(pattern[:, None] == np.arange(len(reduced)), axis=0)
    share = np.array(reduced) / sum(reduced)
    n = np.arange(1, len(pattern) + 1)[:, None]
    assert (np.abs(counts - n * share) < 1).all()
    assert (counts[-1] == reduced).all()


@given(WEIGHTS, st.integers(0, 10**9), st.integers(1, 200))
@settings(max_examples=50, deadline=None)
def test_counts_agree_with_locate_anywhere(weights: list[int], start: int, length: int) -> None:
    reduced = integer_weights([Fraction(w) for w in weights])
    mixture = Mixture(reduced, [7 + i for i in range(len(reduced))], seed=3)
    sources, rows = mixture.locate(start, start + length)
    difference = mixture.counts(start + length) - mixture.counts(start)
    assert (np.bincount(sources, minlength=len(reduced)) == difference).all()
    assert all(0 <= row < mixture.sizes[source] for source, row in zip(sources, rows, strict=True))


def test_paper_stages() -> None:
    assert integer_weights([Fraction("0.4"), Fraction("0.4"), Fraction("0.2")]) == (2, 2, 1)
    assert integer_weights([Fraction("0.4"), Fraction("0.4"), Fraction("0.1"), Fraction("0.1")]) == (4, 4, 1, 1)


def test_awkward_weights_are_rounded_to_a_bounded_period() -> None:
    weights = integer_weights([Fraction(28539, 132553) / 2, Fraction(104014, 132553) / 2, Fraction(1, 2), Fraction(1, 10**9)])
    assert sum(weights) <= MAX_PERIOD + len(weights) and min(weights) >= 1


@pytest.mark.parametrize("size", [1, 2, 100, 65_536, 65_537, 200_003])
def test_each_epoch_holds_each_row_once_in_another_order(size: int) -> None:
    first = shuffled_rows(np.arange(size), size, seed=1, source=0)
    second = shuffled_rows(np.arange(size, 2 * size), size, seed=1, source=0)
    assert (np.sort(first) == np.arange(size)).all() and (np.sort(second) == np.arange(size)).all()
    if size > 2:
        assert (first != second).any()
        assert (first != shuffled_rows(np.arange(size), size, seed=2, source=0)).any()
        assert (first != shuffled_rows(np.arange(size), size, seed=1, source=1)).any()


def test_the_order_is_pinned() -> None:
    """A resume on another machine, or after an upgrade of numpy, must find the same order."""
    rows = shuffled_rows(np.arange(8), 10, seed=5, source=2)
    assert rows.tolist() == [6, 0, 5, 3, 8, 9, 4, 1]
    assert pattern_of((3, 2, 1)).tolist() == [0, 1, 0, 2, 1, 0]


def test_records_for_epochs() -> None:
    mixture = Mixture((3, 2), [30, 10], seed=0)
    n = mixture.records_for_epochs(2.0)
    assert (mixture.counts(n) >= [60, 20]).all() and (mixture.counts(n - 1) < [60, 20]).any()
