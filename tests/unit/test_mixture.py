from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from most_ray.data.merge_tree import Tree, merge_tree, tree_bound
from most_ray.data.mixture import MAX_PERIOD, Mixture, integer_weights, interleave_pattern

WEIGHTS = st.lists(st.integers(1, 60), min_size=1, max_size=7)
FINE_WEIGHTS = st.lists(st.one_of(st.integers(1, 10**6), st.integers(0, 12).map(lambda e: 10**e)), min_size=1, max_size=7)
SIZES = st.lists(st.integers(1, 200), min_size=7, max_size=7)
SEEDS = st.integers(0, 99)


def random_lengths(sizes: list[int], seed: int) -> list[np.ndarray]:
    """Lengths of 1..60, some sources of extremes alone: arrays int32."""
    rng = np.random.default_rng(seed)
    return [rng.choice([1, 60], size).astype(np.int32) if rng.random() < 0.3 else rng.integers(1, 61, size, np.int32) for size in sizes]


def check_prefixes(amounts: np.ndarray, weights: tuple[int, ...], allowed: Fraction) -> None:
    """amounts: records or tokens of each source in each of many prefixes, int64 (prefixes, sources). Compared in integers."""
    whole = sum(weights)
    amounts = amounts.astype(object)
    distance = np.abs(amounts * whole - amounts.sum(1, keepdims=True) * np.array(weights, object))
    assert (distance * allowed.denominator <= allowed.numerator * whole).all()


def amounts_of(mixture: Mixture, lengths: list[np.ndarray], start: int, n: int) -> np.ndarray:
    """Records or, if that is the unit, tokens of each source in the prefixes start..start + n, int64 (n + 1, sources)."""
    sources, rows = mixture.locate(start, start + n)
    steps = np.zeros((n + 1, len(lengths)), np.int64)
    tokens = mixture.unit == "tokens"
    steps[0] = mixture.tokens(start) if tokens else mixture.counts(start)
    steps[np.arange(1, n + 1), sources] = [lengths[s][r] for s, r in zip(sources, rows, strict=True)] if tokens else 1
    return np.cumsum(steps, axis=0)


def bound_of(mixture: Mixture) -> Fraction:
    k, weights = len(mixture.weights), integer_weights([Fraction(w) for w in mixture.weights])
    if mixture.unit == "records" and sum(weights) <= MAX_PERIOD:
        bound = 1 - Fraction(1, 2 * k - 2) if k > 1 else Fraction(0)
    else:
        bound = merge_tree(weights)[1]
    assert mixture.bound == float(bound)
    return bound


def merged(tree: Tree, weights: tuple[int, ...], lengths: list[np.ndarray]) -> Iterator[tuple[int, int]]:
    """Sources and lengths in the order of a tree, as it is defined: from the beginning and with fractions."""
    if isinstance(tree, int):
        yield from ((tree, int(length)) for length in lengths[tree])
        return
    streams = [merged(child, weights, lengths) for child in tree]
    parts = [sum(weights[s] for s in leaves(child)) for child in tree]
    done = [0] * len(tree)
    heads = [next(stream, None) for stream in streams]
    while all(heads):
        c = min(range(len(tree)), key=lambda i: Fraction(2 * done[i] + heads[i][1], parts[i]))  # type: ignore[index]
        yield heads[c]  # type: ignore[misc]
        done[c] += heads[c][1]  # type: ignore[index]
        heads[c] = next(streams[c], None)


def leaves(tree: Tree) -> list[int]:
    return [tree] if isinstance(tree, int) else [leaf for child in tree for leaf in leaves(child)]


@given(WEIGHTS)
@settings(max_examples=80, deadline=None)
def test_every_prefix_is_within_one_record_of_its_share(weights: list[int]) -> None:
    """Promise 11 of docs/promises.md: exact mixes, after every record."""
    reduced = integer_weights([Fraction(w) for w in weights])
    pattern = interleave_pattern(reduced)
    counts = np.cumsum(pattern[:, None] == np.arange(len(reduced)), axis=0)
    share = np.array(reduced) / sum(reduced)
    n = np.arange(1, len(pattern) + 1)[:, None]
    assert (np.abs(counts - n * share) < 1).all()
    assert (counts[-1] == reduced).all()


@given(FINE_WEIGHTS, SIZES, SEEDS, st.integers(0, 10**10))
@settings(max_examples=60, deadline=None)
def test_every_prefix_of_fine_weights_is_within_one_record_of_its_share(weights: list[int], sizes: list[int], seed: int, far: int) -> None:
    """Promise 11 of docs/promises.md for any weights, from the first record on and anywhere."""
    assume(sum(integer_weights([Fraction(w) for w in weights])) > MAX_PERIOD)
    lengths = random_lengths(sizes[: len(weights)], seed)
    mixture = Mixture(tuple(weights), lengths, seed, "records")
    bound = bound_of(mixture)
    assert bound <= 1 or len(weights) > 4
    check_prefixes(amounts_of(mixture, lengths, 0, 3000), mixture.weights, bound)
    check_prefixes(amounts_of(mixture, lengths, far, 500), mixture.weights, bound)


@given(st.one_of(WEIGHTS, FINE_WEIGHTS).map(lambda w: w[:5]), SIZES, SEEDS, st.integers(0, 10**9))
@settings(max_examples=60, deadline=None)
def test_every_prefix_is_within_one_records_tokens_of_its_share_of_tokens(
    weights: list[int], sizes: list[int], seed: int, far: int
) -> None:
    """Promise 11 of docs/promises.md for shares of tokens: one record's tokens are the longest record's."""
    lengths = random_lengths(sizes[: len(weights)], seed)
    mixture = Mixture(tuple(weights), lengths, seed, "tokens")
    bound = bound_of(mixture)
    assert bound <= 1 or len(weights) > 4
    allowed = bound * max(int(part.max()) for part in lengths)
    check_prefixes(amounts_of(mixture, lengths, 0, 2000), mixture.weights, allowed)
    check_prefixes(amounts_of(mixture, lengths, far, 300), mixture.weights, allowed)


@given(FINE_WEIGHTS, SIZES, SEEDS, st.sampled_from(["records", "tokens"]))
@settings(max_examples=40, deadline=None)
def test_a_tree_merges_by_the_middles_of_records(weights: list[int], sizes: list[int], seed: int, unit: str) -> None:
    """The search for a place finds what merging from the beginning finds."""
    assume(unit == "tokens" or sum(integer_weights([Fraction(w) for w in weights])) > MAX_PERIOD)
    mixture = Mixture(tuple(weights), random_lengths(sizes[: len(weights)], seed), seed, unit)  # type: ignore[arg-type]
    ordered = [source.lengths_at(0, 300) if unit == "tokens" else np.ones(300, np.int64) for source in mixture.sources]
    tree, _ = merge_tree(integer_weights([Fraction(w) for w in weights]))
    expected = [source for source, _ in merged(tree, mixture.weights, ordered)]
    assert len(expected) >= 300 and mixture.locate(0, len(expected))[0].tolist() == expected


@given(st.one_of(WEIGHTS, FINE_WEIGHTS), SIZES, st.integers(0, 10**9), st.integers(1, 200), st.sampled_from(["records", "tokens"]))
@settings(max_examples=80, deadline=None)
def test_counts_agree_with_locate_anywhere(weights: list[int], sizes: list[int], start: int, length: int, unit: str) -> None:
    lengths = random_lengths(sizes[: len(weights)], 3)
    mixture = Mixture(tuple(weights), lengths, 3, unit)  # type: ignore[arg-type]
    sources, rows = mixture.locate(start, start + length)
    assert mixture.counts(start).sum() == start and (mixture.counts(0) == 0).all()
    difference = mixture.counts(start + length) - mixture.counts(start)
    assert (np.bincount(sources, minlength=len(weights)) == difference).all()
    assert all(0 <= row < mixture.sizes[source] for source, row in zip(sources, rows, strict=True))
    tokens = sum(int(lengths[s][r]) for s, r in zip(sources, rows, strict=True))
    assert (mixture.tokens(start + length) - mixture.tokens(start)).sum() == tokens
    cut = start + length // 3
    parts = [mixture.locate(start, cut), mixture.locate(cut, start + length)]
    assert (np.concatenate([part[0] for part in parts]) == sources).all() and (np.concatenate([part[1] for part in parts]) == rows).all()


def test_each_source_goes_through_its_own_order() -> None:
    mixture = Mixture((300_007, 200_003, 1), random_lengths([40, 7, 3], 0), 4, "tokens")
    sources, rows = mixture.locate(0, 500)
    for s, source in enumerate(mixture.sources):
        own = rows[sources == s]
        assert (own == source.rows(np.arange(len(own)))).all()


def test_shapes_of_trees() -> None:
    assert merge_tree((1,)) == (0, 0)
    assert merge_tree((5, 3)) == ((0, 1), Fraction(1, 2))
    assert merge_tree((1, 1, 1)) == ((0, 1, 2), Fraction(2, 3))
    # The heaviest is more than half: it would be off by more than a record in one node of all.
    assert merge_tree((1000, 600, 300, 1))[0] == ((0, (1, 2)), 3) and tree_bound((0, 1, 2, 3), (1000, 600, 300, 1)) > 1


def all_trees(members: tuple[int, ...]) -> list[Tree]:
    """Every tree of pairs with one flat group of its sources in place of any of its parts."""
    if len(members) == 1:
        return [members[0]]
    trees: list[Tree] = [members]
    for part in range(1, 1 << len(members), 2):
        one = tuple(s for i, s in enumerate(members) if part >> i & 1)
        other = tuple(s for i, s in enumerate(members) if not part >> i & 1)
        trees += [pair for pair in itertools.product(all_trees(one), all_trees(other)) if len(members) > 2] if other else []
    return trees


@given(FINE_WEIGHTS.map(lambda w: w[:5]))
@settings(max_examples=30, deadline=None)
def test_the_bound_is_at_most_1_if_any_tree_has_it(weights: list[int]) -> None:
    tree, bound = merge_tree(tuple(weights))
    best = min(tree_bound(other, weights) for other in all_trees(tuple(range(len(weights)))))
    assert bound == tree_bound(tree, weights) and (bound <= 1) == (best <= 1)
    assert best <= 1 or len(weights) > 4


@given(st.lists(st.integers(1, 10**6), min_size=11, max_size=14))
@settings(max_examples=20, deadline=None)
def test_trees_of_many_sources_hold_each_once(weights: list[int]) -> None:
    tree, bound = merge_tree(tuple(weights))
    assert sorted(leaves(tree)) == list(range(len(weights))) and bound < 2


def test_a_share_that_no_tree_holds_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    weights = (8, 2, 100_000, 473_355, 10, 930_083)
    with caplog.at_level(logging.WARNING):
        bounds = {Mixture(weights, random_lengths([3] * 6, 0), seed, "tokens").bound for seed in range(3)}
    assert min(bounds) > 1 and len(caplog.records) == 1 and f"{bounds.pop():.3f}" in caplog.text


def test_paper_stages() -> None:
    assert integer_weights([Fraction("0.4"), Fraction("0.4"), Fraction("0.2")]) == (2, 2, 1)
    assert integer_weights([Fraction("0.4"), Fraction("0.4"), Fraction("0.1"), Fraction("0.1")]) == (4, 4, 1, 1)


def test_awkward_weights_are_kept_exactly() -> None:
    given = [Fraction(28539, 132553) / 2, Fraction(104014, 132553) / 2, Fraction(1, 2), Fraction(1, 10**9)]
    weights = integer_weights(given)
    assert [Fraction(weight, sum(weights)) for weight in weights] == [weight / sum(given) for weight in given]
    assert math.gcd(*weights) == 1 and sum(weights) > MAX_PERIOD
    mixture = Mixture(weights, random_lengths([9, 8, 7, 6], 0), 0, "records")
    n = 10**10
    assert all(abs(int(count) - n * weight / sum(given)) <= 1 for count, weight in zip(mixture.counts(n), given, strict=True))


def test_weights_without_a_share_are_refused() -> None:
    with pytest.raises(ValueError, match="positive weights"):
        Mixture((1, 0), random_lengths([3, 3], 0), 0, "records")


def test_the_orders_are_pinned() -> None:
    """A resume on another machine, or after an upgrade of numpy, must find the same order. Another order needs a new MIXTURE_VERSION."""
    assert interleave_pattern((3, 2, 1)).tolist() == [0, 1, 0, 2, 1, 0]
    rows = Mixture((300_007, 200_003, 100_001, 7), random_lengths([9, 8, 7, 6], 0), 5, "records")
    tokens = Mixture((3, 2, 1, 1), [np.arange(1, n + 1, dtype=np.int32) for n in (9, 8, 7, 6)], 5, "tokens")
    found = [part.tolist() for mixture in (rows, tokens) for part in mixture.locate(10**9, 10**9 + 16)]
    assert found == [
        [1, 0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 0, 1, 0, 1, 0],
        [6, 4, 3, 7, 5, 3, 5, 0, 7, 2, 6, 8, 0, 5, 2, 5],
        [0, 3, 0, 1, 0, 2, 0, 3, 1, 1, 2, 0, 2, 1, 0, 3],
        [5, 4, 2, 7, 1, 3, 7, 3, 3, 0, 2, 6, 1, 5, 3, 5],
    ]


@pytest.mark.parametrize(
    ("weights", "unit"), [((3, 2), "records"), ((300_001, 200_003), "records"), ((3, 2), "tokens"), ((5, 1), "tokens")]
)
def test_records_for_epochs(weights: tuple[int, ...], unit: str) -> None:
    mixture = Mixture(weights, random_lengths([30, 10], 1), 0, unit)  # type: ignore[arg-type]
    n = mixture.records_for_epochs(2.0)
    assert (mixture.counts(n) >= [60, 20]).all() and (mixture.counts(n - 1) < [60, 20]).any()
    for source, size in enumerate(mixture.sizes):
        n = mixture.records_for_epochs(1.5, source)
        assert mixture.counts(n)[source] == 1.5 * size == mixture.counts(n - 1)[source] + 1
    assert mixture.records_for_epochs(0.0) == 0


@pytest.mark.parametrize("unit", ["records", "tokens"])
def test_far_places_take_no_longer_than_near_ones(unit: str) -> None:
    """Constant time: a search that walked there would take minutes."""
    mixture = Mixture((412_345, 398_765, 3), random_lengths([100_000, 70_000, 5000], 2), 0, unit)  # type: ignore[arg-type]
    start = time.monotonic()
    for n in (10**6, 10**9, 10**10):
        assert mixture.counts(n).sum() == n and len(mixture.locate(n, n + 1024)[0]) == 1024
    assert time.monotonic() - start < 10
