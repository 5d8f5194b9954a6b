from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from most_ray.checkpoint.retention import steps_to_delete

STEPS = [10, 20, 30, 40, 50]
SCORES = {10: 0.3, 20: 0.1, 30: 0.2, 40: 0.1}


@pytest.mark.parametrize(
    ("keywords", "deleted"),
    [
        ({"keep_last": 2}, [10, 20, 30]),
        ({"keep_last": 9}, []),
        ({"keep_last": 0}, [10, 20, 30, 40]),  # the newest stays whatever is asked for
        ({"keep_last": 1, "keep_best": 1}, [10, 20, 30, 40]),  # nothing was evaluated
        ({"keep_last": 1, "keep_best": 1, "scores": SCORES}, [10, 20, 30]),  # of equal ones the newer
        ({"keep_last": 1, "keep_best": 2, "scores": SCORES}, [10, 30]),
        ({"keep_last": 2, "keep_best": 2, "scores": SCORES}, [10, 30]),  # a step may be among both
        ({"keep_last": 1, "keep_best": 1, "scores": {10: math.nan, 20: 0.5, 99: 0.0}}, [10, 30, 40]),  # no figure, no checkpoint
        ({"keep_last": 1, "pending": {20, 70}}, [10, 30, 40]),
    ],
)
def test_what_is_deleted(keywords: dict, deleted: list[int]) -> None:
    assert steps_to_delete(reversed(STEPS), **keywords) == deleted  # type: ignore[arg-type]


@given(
    st.sets(st.integers(0, 50)),
    st.integers(0, 5),
    st.integers(0, 5),
    st.dictionaries(st.integers(0, 50), st.floats()),
    st.sets(st.integers(0, 50)),
)
def test_the_newest_the_best_and_those_under_evaluation_stay(
    steps: set[int], last: int, best: int, scores: dict[int, float], pending: set[int]
) -> None:
    deleted = steps_to_delete(steps, last, best, scores, pending)
    kept = steps - set(deleted)
    assert set(deleted) <= steps and len(deleted) == len(set(deleted)) and deleted == sorted(deleted)
    assert set(sorted(steps)[-max(1, last) :]) <= kept and not set(deleted) & pending
    known = sorted(scores[step] for step in steps if step in scores and not math.isnan(scores[step]))
    assert sorted(scores[step] for step in kept if step in scores and not math.isnan(scores[step]))[:best] == known[:best]
    assert len(kept - pending) <= max(1, last) + best
