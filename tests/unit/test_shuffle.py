from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from most_ray.data import shuffle
from most_ray.data.shuffle import CountedSource, ShuffledSource, shuffled_rows

LENGTHS = st.lists(st.integers(0, 60), min_size=1, max_size=150).filter(any)
BLOCKS = st.sampled_from([(4, 16), (3, 12), (1, 5), (256, 65_536)])


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
    many = shuffled_rows(np.array([0, 1, 65_536, 200_000, 200_002, 200_003]), 200_003, seed=5, source=2)
    assert many.tolist() == [25168, 67114, 137261, 38752, 38754, 149702]


@given(LENGTHS, BLOCKS, st.integers(0, 9), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_tokens_before_and_counts_are_those_of_the_order(lengths: list[int], blocks: tuple[int, int], seed: int, first_epoch: int) -> None:
    """Over three epochs and the borders of windows, blocks over the end, and rows behind the last whole block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "_BLOCK", blocks[0])
        patch.setattr(shuffle, "_WINDOW", blocks[1])
        size, total = len(lengths), sum(lengths)
        source = ShuffledSource(np.array(lengths, np.int32), seed, 1)
        places = np.arange(first_epoch * size, (first_epoch + 3) * size)
        rows = source.rows(places)
        assert (np.sort(rows[:size]) == np.arange(size)).all() and (rows == shuffled_rows(places, size, seed, 1)).all()
        ordered = np.array(lengths)[rows]
        sums = first_epoch * total + np.concatenate([[0], np.cumsum(ordered)])
        assert [source.tokens_before(int(j)) for j in [*places, places[-1] + 1]] == sums.tolist()
        assert (source.lengths_at(int(places[0]), int(places[-1]) + 1) == ordered).all()
        assert len(source.lengths_at(5, 5)) == 0
        middles = sums[:-1] + sums[1:]
        limits = range(2 * first_epoch * total, 2 * (first_epoch + 3) * total, 1 + total // 40)
        expected = [int((middles <= limit).sum()) + first_epoch * size for limit in limits]
        assert [source.count_within(limit) for limit in limits] == expected
        assert [source.count_within(7 * limit + 6, 7) for limit in limits] == expected
        assert source.count_within(-1) == 0


def test_counted_records_are_records_of_one_token() -> None:
    ones, counted = ShuffledSource(np.ones(7, np.int32), 0, 0), CountedSource(7)
    for limit in range(-2, 60):
        assert counted.count_within(limit) == ones.count_within(limit)
    assert counted.tokens_before(20) == ones.tokens_before(20) and (counted.lengths_at(3, 11) == ones.lengths_at(3, 11)).all()
    assert (counted.total, counted.longest) == (ones.total, ones.longest)


def test_tokens_of_a_source_of_many_windows_far_away() -> None:
    """At the sizes that runs have: each window's sum and the whole epoch's against the rows themselves."""
    size = 300_007
    lengths = np.random.default_rng(0).integers(1, 500, size).astype(np.int32)
    source = ShuffledSource(lengths, seed=3, source=0)
    start = 1_000_000 * size
    sums = np.concatenate([[0], np.cumsum(lengths[source.rows(np.arange(start, start + size))], dtype=np.int64)])
    for offset in [0, 1, 65_535, 65_536, 262_144, 299_775, 299_776, 300_000, size]:
        assert source.tokens_before(start + offset) == 1_000_000 * int(lengths.sum()) + sums[offset]


def test_a_source_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        ShuffledSource(np.zeros(3, np.int32), 0, 0).tokens_before(5)
