"""The mixture of sources: a pure function from a global index to (source, row), exact in every prefix, with seeded shuffles.

It has no state: the position of a run in its data is one number. All decisions are made in integers, so they are equal everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from most_ray.config import WeightUnit
from most_ray.data.merge_tree import Tree, merge_tree
from most_ray.data.shuffle import CountedSource, ShuffledSource

MIXTURE_VERSION = 2  # increase it with any change of the order of sources or rows: a run must not resume in another order
MAX_PERIOD = 1 << 18  # records in a period of a pattern of sources; weights with a longer period are merged by a tree
_CHUNK = 1 << 16  # records located at once, which bounds memory


def integer_weights(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """The smallest integers in exactly the ratio of `weights`."""
    common = math.lcm(*(weight.denominator for weight in weights))
    numbers = [int(weight * common) for weight in weights]
    divisor = math.gcd(*numbers)
    return tuple(number // divisor for number in numbers)


@lru_cache(maxsize=16)
def interleave_pattern(weights: tuple[int, ...]) -> np.ndarray:
    """One period of the order of sources, int16 (sum(weights),).

    The next record comes from the source with the earliest deadline among those that are due (R. Tijdeman, "The chairman assignment
    problem", 1980). After any n records the count of source s differs from n * share_s by at most 1 - 1/(2k - 2) < 1 for k sources.
    """
    k, total = len(weights), sum(weights)
    if k == 1:
        return np.zeros(1, np.int16)
    # All times are in units of 1 / (total * (2k - 2)), so that integers are compared.
    slack, scale = total, 2 * k - 2
    counts, pattern = [0] * k, np.empty(total, np.int16)
    for n in range(1, total + 1):
        best, best_deadline = -1, 0
        for s, weight in enumerate(weights):
            if scale * (n * weight - counts[s] * total) >= slack:
                deadline = scale * total * (counts[s] + 1) - slack
                if best < 0 or deadline * weights[best] < best_deadline * weight:
                    best, best_deadline = s, deadline
        pattern[n - 1] = best
        counts[best] += 1
    return pattern


class _PatternOrder:
    """The order of sources given by a pattern that repeats. See `_MergedOrder` for the methods."""

    def __init__(self, weights: tuple[int, ...]) -> None:
        self._weights = np.array(weights, np.int64)
        self._pattern = interleave_pattern(weights)
        one_hot = self._pattern[:, None] == np.arange(len(weights))
        self._before = np.concatenate([np.zeros((1, len(weights)), np.int64), np.cumsum(one_hot, axis=0)])

    def span(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        periods, rest = divmod(start, len(self._pattern))
        sources = self._pattern[np.arange(start, stop) % len(self._pattern)].astype(np.int64)
        return periods * self._weights + self._before[rest], sources

    def records_until(self, source: int, j: int) -> int:
        periods, rest = divmod(j - 1, int(self._weights[source]))
        return periods * len(self._pattern) + int(np.flatnonzero(self._pattern == source)[rest]) + 1


@dataclass(frozen=True)
class _Node:
    """A node of the tree by which sources are merged."""

    weight: int  # sum over its sources
    leaf: int  # the source, or -1
    children: tuple[_Node, ...] = ()
    scales: tuple[int, ...] = ()  # integers in the ratio of 1 / weight of the children


@dataclass(frozen=True)
class _Span:
    """Consecutive records of a node."""

    counts: np.ndarray  # records of each source before the span, int64 (sources,)
    tokens: int  # tokens of the records before the span
    sources: np.ndarray  # source of each record of the span, int64 (records,)
    lengths: np.ndarray  # tokens of each record of the span, int64 (records,)


class _MergedOrder:
    """The order of sources merged by a tree, in constant time at any index.

    A node sorts its children's records by virtual time: the doubled middle D = T(i-1) + T(i) of a child's i-th record in the child's
    own tokens, divided by the child's weight; of equal times the first child's record comes first. All records up to a virtual time are a
    prefix of the node's sequence, and the doubled tokens of that prefix differ from time * weight by at most (children * longest). So the
    node's records between two values of D are found among its children's records between two slightly wider ones.
    """

    def __init__(self, weights: tuple[int, ...], tree: Tree, sources: Sequence[ShuffledSource | CountedSource]) -> None:
        self._weights, self._sources = weights, sources
        self._longest = max(source.longest for source in sources)
        self._root = self._node(tree, weights)
        speed = sum((Fraction(w * s.size, s.total) for w, s in zip(weights, sources, strict=True)), Fraction(0)) / sum(weights)
        # Doubled tokens per record on average, in units of 2^-40. Only where searches begin depends on it.
        self._pace = int(2 / speed * (1 << 40))

    def _node(self, tree: Tree, weights: tuple[int, ...]) -> _Node:
        if isinstance(tree, int):
            return _Node(weights[tree], tree)
        children = tuple(self._node(child, weights) for child in tree)
        common = math.lcm(*(child.weight for child in children))
        return _Node(sum(c.weight for c in children), -1, children, tuple(common // c.weight for c in children))

    def span(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Records of each source before index `start`, int64 (sources,), and the sources of start..stop-1, int64 (stop - start,)."""
        if self._root.leaf >= 0:
            return np.array([start]), np.zeros(stop - start, np.int64)
        middle = self._time_of(start)
        margin = 32 + 4 * math.isqrt(stop - start)
        while True:
            span = self._merge(self._root, middle - self._tokens(margin), middle + self._tokens(stop - start + margin))
            skipped = start - int(span.counts.sum())
            if skipped >= 0 and skipped + stop - start <= len(span.sources):
                counts = span.counts + np.bincount(span.sources[:skipped], minlength=len(self._sources))
                return counts, span.sources[skipped : skipped + stop - start]
            margin *= 2

    def records_until(self, source: int, j: int) -> int:
        """The number of records up to and with the j-th of `source`, counted from 1."""
        return self._until(self._root, source, j)[0]

    def _tokens(self, records: int) -> int:
        """Approximate doubled tokens of a number of records."""
        return records * self._pace >> 40

    def _time_of(self, n: int) -> int:
        """A virtual time (doubled tokens of the root) near the n-th record, computed as if all sources were merged in one node."""
        low, high = -1, -1
        time = self._tokens(n)
        for tries in range(100):
            within = (source.count_within(w * time, self._root.weight) for source, w in zip(self._sources, self._weights, strict=True))
            missing = n - sum(within)
            if abs(missing) <= 16 + len(self._weights):
                break
            low, high = (time, high) if missing > 0 else (low, time)
            time += self._tokens(missing)
            if high >= 0 and (tries > 8 or not low < time < high):
                time = (low + high) // 2
        return time

    def _between(self, node: _Node, low: int, high: int) -> _Span:
        """The node's records with low < D <= high, D in its own doubled tokens."""
        if node.leaf >= 0:
            source = self._sources[node.leaf]
            first, last = source.count_within(low), source.count_within(high)
            counts = np.zeros(len(self._sources), np.int64)
            counts[node.leaf] = first
            return _Span(counts, source.tokens_before(first), np.full(last - first, node.leaf), source.lengths_at(first, last))
        reach = len(node.children) * self._longest
        span = self._merge(node, low - reach, high + reach)
        middles = 2 * np.cumsum(span.lengths) - span.lengths + 2 * span.tokens
        begin, end = (int(i) for i in middles.searchsorted([low, high], "right"))
        counts = span.counts + np.bincount(span.sources[:begin], minlength=len(self._sources))
        tokens = span.tokens + int(span.lengths[:begin].sum())
        return _Span(counts, tokens, span.sources[begin:end], span.lengths[begin:end])

    def _merge(self, node: _Node, low: int, high: int) -> _Span:
        """The node's records with low < virtual time * weight <= high."""
        low = max(low, -1)  # before all records: no middle is negative
        spans = [self._between(child, child.weight * low // node.weight, child.weight * high // node.weight) for child in node.children]
        # Relative to `low`, keys mostly fit into 64 bits; where they do not, they are Python integers.
        base = low * node.children[0].weight * node.scales[0] // node.weight
        steps = [2 * np.cumsum(span.lengths) - span.lengths for span in spans]
        offsets = [2 * span.tokens * scale - base for span, scale in zip(spans, node.scales, strict=True)]
        known = [each for each in zip(offsets, steps, node.scales, strict=True) if len(each[1])]
        kind = np.int64 if max((abs(o) + max(1, int(d[-1])) * s for o, d, s in known), default=0) < 1 << 62 else object
        keys = np.concatenate([d.astype(kind) * s + o for o, d, s in known] or [np.zeros(0)])
        order = np.argsort(keys, kind="stable")  # stable: of equal keys the first child's record comes first
        return _Span(
            np.sum([span.counts for span in spans], axis=0),
            sum(span.tokens for span in spans),
            np.concatenate([span.sources for span in spans])[order],
            np.concatenate([span.lengths for span in spans])[order],
        )

    def _until(self, node: _Node, source: int, j: int) -> tuple[int, int, int]:
        """The number of records of the node up to and with the source's j-th, and their tokens without and with that one; zeros where the
        source is not below the node."""
        if node.leaf >= 0:
            own = self._sources[source]
            return (j, own.tokens_before(j - 1), own.tokens_before(j)) if node.leaf == source else (0, 0, 0)
        found = [self._until(child, source, j) for child in node.children]
        index = next((i for i, (records, _, _) in enumerate(found) if records), -1)
        if index < 0:
            return 0, 0, 0
        records, before, after = found[index]
        middle, weight = before + after, node.children[index].weight
        for i, child in enumerate(node.children):
            if i != index:
                # Of later children only the records strictly before it.
                limit = (middle * child.weight - (i > index)) // weight
                span = self._between(child, limit, limit)
                records, before, after = records + int(span.counts.sum()), before + span.tokens, after + span.tokens
        return records, before, after


class Mixture:
    """The source and row of every global index.

    In every prefix each source is within `bound` longest records of its share: of the prefix's records where the unit is records (each
    of length one), of its tokens where it is tokens. The bound is at most 1 except for very skewed weights of many sources.

    Args:
        weights: integer weights of the sources (see `integer_weights`).
        lengths: tokens of each record, integers (records,), for each source; only their number matters where the unit is records.
        seed: of the shuffles.
        unit: the quantity that the weights share out.
    """

    def __init__(self, weights: tuple[int, ...], lengths: Sequence[np.ndarray], seed: int, unit: WeightUnit) -> None:
        if min(weights) <= 0 or len(weights) != len(lengths):
            raise ValueError(f"{len(lengths)} sources need as many positive weights, not {weights}")
        self.weights, self.seed, self.unit = weights, seed, unit
        self.sizes = tuple(len(part) for part in lengths)
        self.sources = [ShuffledSource(part, seed, source) for source, part in enumerate(lengths)]
        reduced = tuple(weight // math.gcd(*weights) for weight in weights)
        k = len(weights)
        self._order: _PatternOrder | _MergedOrder
        if unit == "records" and sum(reduced) <= MAX_PERIOD:
            self._order, bound = _PatternOrder(reduced), 1 - Fraction(1, 2 * k - 2) if k > 1 else Fraction(0)
        else:
            tree, bound = merge_tree(reduced)
            self._order = _MergedOrder(reduced, tree, self.sources if unit == "tokens" else [CountedSource(size) for size in self.sizes])
        self.bound = float(bound)

    def counts(self, n: int) -> np.ndarray:
        """Records of each source among the first n, int64 (sources,)."""
        return self._order.span(n, n)[0]

    def tokens(self, n: int) -> np.ndarray:
        """Tokens of each source among the first n records, int64 (sources,)."""
        return np.array([source.tokens_before(int(j)) for source, j in zip(self.sources, self.counts(n), strict=True)])

    def locate(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources and rows of the global indices start..stop-1: two int64 arrays (stop - start,)."""
        all_sources, all_rows = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for first in range(start, stop, _CHUNK):
            counts, sources = self._order.span(first, min(stop, first + _CHUNK))
            rows = np.empty_like(sources)
            for s in np.unique(sources):
                chosen = np.flatnonzero(sources == s)
                rows[chosen] = self.sources[s].rows(counts[s] + np.arange(len(chosen)))
            all_sources.append(sources)
            all_rows.append(rows)
        return np.concatenate(all_sources), np.concatenate(all_rows)

    def records_for_epochs(self, epochs: float, source: int | None = None) -> int:
        """The smallest n such that the first n records contain every source (or only `source`) at least `epochs` times."""
        needed = {s: math.ceil(epochs * size) for s, size in enumerate(self.sizes) if source in (None, s)}
        return max(self._order.records_until(s, j) if j > 0 else 0 for s, j in needed.items())
