"""In which pairs and groups the sources of a mixture are merged, so that each stays as close to its share as possible."""

from __future__ import annotations

import heapq
import itertools
import logging
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache, lru_cache
from typing import TypeAlias

logger = logging.getLogger(__name__)

_SEARCHED = 10  # sources up to which the best of all trees is searched, in 3^sources steps
_SEARCHED_IN_ORDER = 128  # sources up to which the best tree of neighbours in weight is searched, in sources^3 steps

Tree: TypeAlias = "int | tuple[Tree, ...]"  # a source, or several subtrees that are merged


def tree_bound(tree: Tree, weights: Sequence[int], incoming: Fraction = Fraction(0)) -> Fraction:
    """The largest distance of any source from its share of a prefix, in longest records, where sources are merged by `tree`.

    The children of a node are merged by the middles of their records (see `mixture`). So each child is within half a record of its share
    of virtual time, and the node within the sum of these. A child with the fraction f of a node of m children is therefore within
    1/2 (1 + (m - 2) f) of its share of the node, to which f times the node's own distance, `incoming`, is added.
    """
    if isinstance(tree, int):
        return incoming
    parts = [_tree_weight(child, weights) for child in tree]
    shares = [Fraction(part, sum(parts)) for part in parts]
    own = [(1 + (len(tree) - 2) * f) / 2 for f in shares]
    return max(tree_bound(child, weights, e + f * incoming) for child, e, f in zip(tree, own, shares, strict=True))


def _tree_weight(tree: Tree, weights: Sequence[int]) -> int:
    """The sum of the weights of the sources in a tree."""
    return weights[tree] if isinstance(tree, int) else sum(_tree_weight(child, weights) for child in tree)


@lru_cache(maxsize=16)
def merge_tree(weights: tuple[int, ...]) -> tuple[Tree, Fraction]:
    """The tree by which sources of these weights are merged, and its bound (see `tree_bound`).

    Up to 10 sources the bound is at most 1 if that of any tree of pairs and flat groups is. A larger one is logged as a warning.
    """
    k = len(weights)
    if k <= _SEARCHED:
        tree = _best_tree(weights, tuple(range(k)))
    else:
        by_weight = tuple(sorted(range(k), key=lambda s: (-weights[s], s)))
        tree = _best_tree(weights, by_weight) if k <= _SEARCHED_IN_ORDER else by_weight
    bound = tree_bound(tree, weights)
    if bound > 1:
        tree = min(tree, _huffman_tree(weights), key=lambda t: tree_bound(t, weights))
        bound = tree_bound(tree, weights)
    if bound > 1:
        logger.warning("the shares of %d sources are kept to within %.3f longest records instead of 1 (weights %s)", k, bound, weights)
    return tree, bound


def _best_tree(weights: tuple[int, ...], sources: tuple[int, ...]) -> Tree:
    """The tree that tolerates the largest incoming distance while all its leaves stay within 1.

    A leaf tolerates 1, a pair the minimum of (tolerated - 1/2) / f over its halves, a flat group the minimum of
    (1 - 1/2 (1 + (m - 2) f)) / f over its members. All ways to halve a set of sources are compared, or for many sources all cuts of the
    order in which they are given.
    """

    @cache
    def best(members: tuple[int, ...]) -> tuple[Fraction, Tree]:
        """(tolerated distance - 1/2) / weight of the best tree of these sources, and the tree."""
        total, m = sum(weights[s] for s in members), len(members)
        if m == 1:
            return Fraction(1, 2 * total), members[0]
        # `most` is the tolerated distance / weight. In a flat group the heaviest member decides; of equal trees the first found is taken.
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
    """Yield each way to split `members` in two once: the first member is always in the first half."""
    rest = members[1:]
    for part in range((1 << len(rest)) - 1):
        chosen = [part >> i & 1 for i in range(len(rest))]
        yield (members[0], *itertools.compress(rest, chosen)), tuple(itertools.compress(rest, [not c for c in chosen]))


def _huffman_tree(weights: tuple[int, ...]) -> Tree:
    """The tree of D. Huffman (1952): the two lightest are merged until one is left."""
    heap: list[tuple[int, int, Tree]] = [(weight, s, s) for s, weight in enumerate(weights)]
    heapq.heapify(heap)
    while len(heap) > 1:
        one, other = sorted([heapq.heappop(heap), heapq.heappop(heap)], key=lambda entry: entry[1])
        heapq.heappush(heap, (one[0] + other[0], one[1], (one[2], other[2])))
    return heap[0][2]
