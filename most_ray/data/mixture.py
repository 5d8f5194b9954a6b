"""The mixture: a pure function from a global index to (source, row), exact in every prefix, with seeded shuffles.

No state: where a run stands in its data is one number. Every decision is made in integers.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from typing import Protocol, TypeAlias

import numpy as np

from most_ray.config import WeightUnit
from most_ray.data.shuffle import CountedSource, ShuffledSource

logger = logging.getLogger(__name__)

MIXTURE_VERSION = 2  # a change of any order, of sources or of rows, needs a new one: runs under way must not go on in another order
MAX_PERIOD = 1 << 18  # of a pattern of sources; weights with a longer one are merged by a tree
_SEARCHED = 10  # sources up to which the best tree is searched for among all: that takes 3^sources steps
_SEARCHED_IN_ORDER = 128  # and up to which it is searched for among those of neighbours in weight: sources^3 steps
_CHUNK = 1 << 16  # records located at once, which bounds memory

Tree: TypeAlias = "int | tuple[Tree, ...]"  # a source, or what is merged from several


def integer_weights(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """The smallest integers in the ratio of the weights, exactly."""
    common = math.lcm(*(weight.denominator for weight in weights))
    numbers = [int(weight * common) for weight in weights]
    divisor = math.gcd(*numbers)
    return tuple(number // divisor for number in numbers)


@lru_cache(maxsize=16)
def interleave_pattern(weights: tuple[int, ...]) -> np.ndarray:
    """One period of the order of sources, int16 (sum(weights),).

    R. Tijdeman, "The chairman assignment problem" (1980): among the sources whose turn may have come, the one with the earliest
    deadline. After any n records the count of source s differs from n * share_s by at most 1 - 1/(2k - 2) < 1 for k sources.
    """
    k, total = len(weights), sum(weights)
    if k == 1:
        return np.zeros(1, np.int16)
    # All in units of 1 / (total * (2k - 2)), so that comparisons are between integers.
    slack = total
    scale = 2 * k - 2
    counts = [0] * k
    pattern = np.empty(total, np.int16)
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


class _Pattern:
    """Sources in the order of a pattern that repeats."""

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


def tree_bound(tree: Tree, weights: Sequence[int], incoming: Fraction = Fraction(0)) -> Fraction:
    """How far a source can be from its share of a prefix, in longest records, where sources are merged by a tree.

    Merged by the middles of their records, each child of a node is within half a record of its share of virtual time, and the node
    within the sum of these. So a child with the fraction f of a node of m children is within 1/2 (1 + (m - 2) f) of its share of
    the node, to which f times the node's own distance (`incoming`) adds.
    """
    if isinstance(tree, int):
        return incoming
    parts = [_tree_weight(child, weights) for child in tree]
    shares = [Fraction(part, sum(parts)) for part in parts]
    own = [(1 + (len(tree) - 2) * f) / 2 for f in shares]
    return max(tree_bound(child, weights, e + f * incoming) for child, e, f in zip(tree, own, shares, strict=True))


def _tree_weight(tree: Tree, weights: Sequence[int]) -> int:
    return weights[tree] if isinstance(tree, int) else sum(_tree_weight(child, weights) for child in tree)


@lru_cache(maxsize=16)
def merge_tree(weights: tuple[int, ...]) -> tuple[Tree, Fraction]:
    """In which pairs and groups sources are merged, and the bound of that: at most 1 if any tree of these shapes has it (to 10 sources)."""
    k = len(weights)
    if k <= _SEARCHED:
        tree = _best_tree(weights, tuple(range(k)))
    else:
        by_weight = tuple(sorted(range(k), key=lambda s: (-weights[s], s)))
        tree = _best_tree(weights, by_weight) if k <= _SEARCHED_IN_ORDER else by_weight
    bound = tree_bound(tree, weights)
    if bound > 1:
        tree = min(tree, _light_first(weights), key=lambda t: tree_bound(t, weights))
        bound = tree_bound(tree, weights)
    if bound > 1:
        logger.warning("shares of %d sources hold to within %.3f longest records instead of 1 (weights %s)", k, bound, weights)
    return tree, bound


def _best_tree(weights: tuple[int, ...], sources: tuple[int, ...]) -> Tree:
    """The tree that tolerates the largest incoming distance with all leaves within 1.

    A leaf tolerates 1, a pair the least (tolerated - 1/2) / f of its halves, a flat group the least (1 - 1/2 (1 + (m - 2) f)) / f of
    its members. Over all ways to halve a set of sources, or if they are many, over the cuts of the order they are given in.
    """

    @cache
    def best(members: tuple[int, ...]) -> tuple[Fraction, Tree]:
        """(tolerated - 1/2) / weight and the tree."""
        total, m = sum(weights[s] for s in members), len(members)
        if m == 1:
            return Fraction(1, 2 * total), members[0]
        # What is tolerated / weight. Of a flat group the heaviest member decides; of two equal trees the first found is taken.
        found: Tree = members if m > 2 else ()
        most = (Fraction(total, max(weights[s] for s in members)) - (m - 2)) / (2 * total) if m > 2 else None
        for one, other in _halves(members) if len(sources) <= _SEARCHED else ((members[:i], members[i:]) for i in range(1, m)):
            value = min(best(one)[0], best(other)[0])
            if most is None or value > most:
                most, found = value, (best(one)[1], best(other)[1])
        assert most is not None
        return most - Fraction(1, 2 * total), found

    return best(sources)[1]


def _halves(members: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Each way to split members in two, once: the first one is always in the first half."""
    rest = members[1:]
    for part in range((1 << len(rest)) - 1):
        chosen = [part >> i & 1 for i in range(len(rest))]
        yield (members[0], *itertools.compress(rest, chosen)), tuple(itertools.compress(rest, [not c for c in chosen]))


def _light_first(weights: tuple[int, ...]) -> Tree:
    """D. Huffman's tree (1952): the two lightest are merged, again and again."""
    heap: list[tuple[int, int, Tree]] = [(weight, s, s) for s, weight in enumerate(weights)]
    heapq.heapify(heap)
    while len(heap) > 1:
        one, other = sorted([heapq.heappop(heap), heapq.heappop(heap)], key=lambda entry: entry[1])
        heapq.heappush(heap, (one[0] + other[0], one[1], (one[2], other[2])))
    return heap[0][2]


class _Source(Protocol):
    """T(j): tokens of a source's first j records. See `ShuffledSource`."""

    size: int

    @property
    def total(self) -> int: ...
    @property
    def longest(self) -> int: ...
    def tokens_before(self, j: int) -> int: ...
    def count_within(self, num: int, den: int = 1) -> int: ...
    def lengths_at(self, start: int, stop: int) -> np.ndarray: ...


@dataclass(frozen=True)
class _Node:
    """A tree with what merging needs. leaf: the source, or -1; scales: integers in the ratio of 1 / weight of the children."""

    weight: int
    leaf: int
    children: tuple[_Node, ...] = ()
    scales: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Span:
    """A stretch of a node's records. counts: records of each source before it, int64 (sources,); tokens: theirs; then source and
    tokens of each record in it, int64 (records,)."""

    counts: np.ndarray
    tokens: int
    sources: np.ndarray
    lengths: np.ndarray


class _Merged:
    """Sources merged by a tree, in constant time at any place.

    A node sorts its children's records by virtual time: the doubled middle D = T(i-1) + T(i) of a child's i-th record in the child's
    own tokens, divided by the child's weight; ties go to the child that comes first. All records up to a virtual time are a prefix of
    the node's stream, and its doubled tokens then differ from time * weight by at most (children * longest). So what a node holds
    between two values of D is found inside what its children hold between two slightly wider ones.
    """

    def __init__(self, weights: tuple[int, ...], tree: Tree, sources: Sequence[_Source]) -> None:
        self._weights, self._sources = weights, sources
        self._longest = max(source.longest for source in sources)
        self._root = self._node(tree, weights)
        speed = sum((Fraction(w * s.size, s.total) for w, s in zip(weights, sources, strict=True)), Fraction(0)) / sum(weights)
        self._pace = int(2 / speed * (1 << 40))  # doubled tokens per record on average, in 2^-40; only where a search begins depends on it

    def _node(self, tree: Tree, weights: tuple[int, ...]) -> _Node:
        if isinstance(tree, int):
            return _Node(weights[tree], tree)
        children = tuple(self._node(child, weights) for child in tree)
        common = math.lcm(*(child.weight for child in children))
        return _Node(sum(c.weight for c in children), -1, children, tuple(common // c.weight for c in children))

    def span(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
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
        return self._until(self._root, source, j)[0]

    def _tokens(self, records: int) -> int:
        """Doubled tokens of so many records, roughly."""
        return records * self._pace >> 40

    def _time_of(self, n: int) -> int:
        """A virtual time (doubled tokens of the root) near the n-th record: sources are asked as if they were merged in one node."""
        low, high = -1, -1
        time = self._tokens(n)
        for tries in range(100):
            missing = n - sum(
                source.count_within(w * time, self._root.weight) for source, w in zip(self._sources, self._weights, strict=True)
            )
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
        low = max(low, -1)  # before all records, of which none has a negative middle
        spans = [self._between(child, child.weight * low // node.weight, child.weight * high // node.weight) for child in node.children]
        # Relative to `low`, keys mostly fit into 64 bits; if not, Python's integers hold them.
        base = low * node.children[0].weight * node.scales[0] // node.weight
        steps = [2 * np.cumsum(span.lengths) - span.lengths for span in spans]
        offsets = [2 * span.tokens * scale - base for span, scale in zip(spans, node.scales, strict=True)]
        largest = (abs(o) + max(1, int(d[-1])) * s for o, d, s in zip(offsets, steps, node.scales, strict=True) if len(d))
        kind = np.int64 if max(largest, default=0) < 1 << 62 else object
        keys = np.concatenate(
            [d.astype(kind) * s + o for o, d, s in zip(offsets, steps, node.scales, strict=True) if len(d)] or [np.zeros(0)]
        )
        order = np.argsort(keys, kind="stable")  # which leaves ties in the order of the children
        return _Span(
            np.sum([span.counts for span in spans], axis=0),
            sum(span.tokens for span in spans),
            np.concatenate([span.sources for span in spans])[order],
            np.concatenate([span.lengths for span in spans])[order],
        )

    def _until(self, node: _Node, source: int, j: int) -> tuple[int, int, int]:
        """Records of the node up to the source's j-th, and their tokens without and with that one; no records if it is not below."""
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
                # Of children that come later only what lies strictly before.
                limit = (middle * child.weight - (i > index)) // weight
                span = self._between(child, limit, limit)
                records, before, after = records + int(span.counts.sum()), before + span.tokens, after + span.tokens
        return records, before, after


class Mixture:
    """Where each global index leads.

    After every prefix each source is within `bound` longest records of its share: of the prefix's records in rows (where a record
    counts one, whatever its length), of its tokens in tokens. The bound is at most 1 but for very skewed weights of many sources.

    Args:
        weights: integer weights of the sources (see `integer_weights`).
        lengths: tokens of each source's records, integers (records,) each; only their number matters where shares are of records.
        seed: of the shuffles.
        unit: what shares are of.
    """

    def __init__(self, weights: tuple[int, ...], lengths: Sequence[np.ndarray], seed: int, unit: WeightUnit) -> None:
        if min(weights) <= 0 or len(weights) != len(lengths):
            raise ValueError(f"{len(lengths)} sources need as many positive weights, not {weights}")
        self.weights, self.seed, self.unit = weights, seed, unit
        self.sizes = tuple(len(part) for part in lengths)
        self.sources = [ShuffledSource(part, seed, source) for source, part in enumerate(lengths)]
        reduced = tuple(weight // math.gcd(*weights) for weight in weights)
        k = len(weights)
        self._order: _Pattern | _Merged
        if unit == "records" and sum(reduced) <= MAX_PERIOD:
            self._order, bound = _Pattern(reduced), 1 - Fraction(1, 2 * k - 2) if k > 1 else Fraction(0)
        else:
            tree, bound = merge_tree(reduced)
            self._order = _Merged(reduced, tree, self.sources if unit == "tokens" else [CountedSource(size) for size in self.sizes])
        self.bound = float(bound)

    def counts(self, n: int) -> np.ndarray:
        """Records of each source among the first n, int64 (sources,)."""
        return self._order.span(n, n)[0]

    def tokens(self, n: int) -> np.ndarray:
        """Tokens of each source among the first n records, int64 (sources,)."""
        return np.array([source.tokens_before(int(j)) for source, j in zip(self.sources, self.counts(n), strict=True)])

    def locate(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources and rows of the global indices start..stop-1, two int64 arrays (stop - start,)."""
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
        """The smallest n after which every source, or the one given, has been seen at least `epochs` times."""
        needed = {s: math.ceil(epochs * self.sizes[s]) for s in (range(len(self.sizes)) if source is None else [source])}
        return max(self._order.records_until(s, j) if j > 0 else 0 for s, j in needed.items())
