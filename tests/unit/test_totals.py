"""One clock and one speed of a run, from the lines of metrics.jsonl."""

from __future__ import annotations

import math
from typing import Any

import pytest

from most_ray.metrics.totals import RunClock, clock_of


def start(step: int) -> dict[str, Any]:
    return {"kind": "start", "step": step, "time": 5.0}


def train(step: int, tokens: int = 100, speed: float = 50.0, **more: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "tokens": tokens, "samples": 4, "tokens_per_second": speed, "step_time": tokens / speed, **more}


def test_time_and_tokens_are_those_of_all_lines_and_the_speed_is_their_quotient() -> None:
    totals = clock_of([start(0), train(1, speed=10.0), train(2), {"kind": "evaluation", "step": 2}, start(2), train(3), train(4)]).totals
    assert (totals.step, totals.seconds, totals.tokens, totals.records) == (4, 16.0, 400, 16)
    assert totals.tokens_per_second == 400 / 16


def test_lines_that_a_resume_cuts_off_are_gone() -> None:
    """As in the file, which a follower may have read before it was cut."""
    cut = [start(0), train(1), train(2, 999), train(3, 999), start(1), train(2), train(3)]
    kept = [start(0), train(1), start(1), train(2), train(3)]
    assert clock_of(cut).totals == clock_of(kept).totals and clock_of(cut).starts == 2
    assert clock_of([start(0), train(1), train(2), start(2), start(1)]).starts == 2, "a start beyond the cut is gone too"


def test_lines_of_several_steps_and_of_earlier_versions_count_by_their_time_per_step() -> None:
    lines = [{"step": 10, "step_time": 2.0}, {"step": 15, "step_time": 4.0}]
    assert (clock_of(lines).totals.seconds, clock_of(lines).totals.tokens_per_second) == (40.0, None)
    begun_elsewhere = [start(100), {"kind": "train", "step": 110, "step_time": 2.0}]
    assert clock_of(begun_elsewhere).totals.seconds == 20.0, "steps of the checkpoint's own run are not this run's"


@pytest.mark.parametrize("value", [None, "x", True, math.nan, math.inf, -1.0, 0, 1e300, [], {}])
def test_values_that_mean_nothing_are_left_out(value: Any) -> None:
    line = {"kind": "train", "step": 1, "tokens": value, "samples": value, "tokens_per_second": value, "step_time": value}
    totals = clock_of([start(0), line, {**line, "step": value}, train(2)]).totals
    assert totals.seconds == 2.0 and totals.tokens_per_second == 50.0


def test_the_time_of_this_start_is_that_of_the_lines_beyond_its_step() -> None:
    clock = clock_of([start(0), train(1), train(2), start(2), train(3, speed=20.0)])
    assert (clock.since(2), clock.since(0), clock.since(-1)) == (5.0, 9.0, 9.0)


def test_the_time_left_is_not_said_before_a_second_line_and_never_by_a_first_step() -> None:
    clock = RunClock()
    clock.add(start(0))
    assert clock.seconds_left(100) is None
    clock.add(train(1, step_time=60.0, speed=100 / 60))
    assert clock.seconds_left(100) is None, "kernels and caches: 21 h left"
    clock.add(train(2))
    assert clock.seconds_left(100) == 98 * 2.0
    clock.add(start(2))
    assert clock.seconds_left(100) == 98 * 2.0, "what earlier starts took"
    clock.add(train(3, speed=0.1))
    assert clock.seconds_left(100) == 97 * 2.0, "nor by the first step of a resume"
    for step in range(4, 24):
        clock.add(train(step, speed=25.0))
    assert clock.seconds_left(123) == pytest.approx(100 * 3.0), "after twenty steps, half way to the new speed"
    assert clock.seconds_left(10) == 0.0


def test_a_line_that_is_seen_twice_counts_once() -> None:
    assert clock_of([train(1), train(2), train(2)]).totals.tokens == 200


def test_lines_that_say_only_when_they_were_written_count_from_the_line_before() -> None:
    bare = [{"kind": "train", "step": step, "time": 10.0 * step} for step in (1, 2)]
    assert clock_of([start(0), *bare, {"kind": "start", "step": 2, "time": 1000.0}, {"step": 3, "time": 1007.0}]).totals.seconds == 22.0
