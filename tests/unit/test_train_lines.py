"""Train lines as columns."""

from __future__ import annotations

import numpy as np

from most_ray.metrics.columns import TrainLines


def lines(*found: dict[str, object]) -> TrainLines:
    taken = TrainLines()
    for line in found:
        taken.append(line, 1)
    return taken


def test_lines_are_what_was_taken_of_their_numbers() -> None:
    taken = lines(
        {"step": 1, "loss": 2.5, "tokens": 7, "expert_max_over_mean": {"text": 1.5}, "mix": {}, "device": "x"}, {"step": 2, "loss": None}
    )
    assert list(taken) == [{"step": 1, "loss": 2.5, "tokens": 7, "expert_max_over_mean": {"text": 1.5}}, {"step": 2}]
    assert (taken[-1], taken[:1], len(taken)) == ({"step": 2}, [taken[0]], 2)
    assert np.array_equal(taken.values("expert_max_over_mean", "text"), [1.5, np.nan], equal_nan=True)
    assert np.isnan(taken.values("not a metric")).all()


def test_steps_ascend_and_the_last_line_of_a_step_counts() -> None:
    taken = lines({"step": 3, "loss": 1.0}, {"step": 1, "loss": 2.0}, {"step": 3, "loss": 3.0})
    assert taken.values("step").tolist() == [1, 3]
    assert taken.values("loss").tolist() == [2.0, 3.0]


def test_what_is_no_number_is_missing() -> None:
    taken = lines({"step": 1, "loss": "x", "tokens": True, "grad_norm": float("inf"), "memory_gb": 1e300, "expert_entropy": [1]})
    assert list(taken) == [{"step": 1}]


def test_no_line_is_a_table_without_rows() -> None:
    assert not lines()
    assert lines().values("loss").shape == (0,)


def test_a_hundred_thousand_lines_take_tens_of_megabytes() -> None:
    taken = TrainLines()
    for step in range(1000):
        taken.append({"step": step}, 1)
    assert taken.values("step").base is not None and taken.values("step").base.nbytes < 400 * 1000  # bytes
