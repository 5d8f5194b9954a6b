"""Long curves thinned to what a screen shows."""

from __future__ import annotations

import numpy as np

from most_ray.metrics.thinning import evenly, extremes, running_mean

NAN = float("nan")


def test_short_curves_are_left_as_they_are() -> None:
    assert extremes(np.arange(6.0), np.array([1, NAN, 3, 1, 1, 1]), 3).tolist() == [0, 1, 2, 3, 4, 5]


def test_long_curves_keep_each_extreme_and_both_ends() -> None:
    draw = np.random.default_rng(0)
    y = draw.normal(size=100_000)
    y[[12_345, 77_777]] = 50.0, -50.0
    chosen = extremes(np.arange(100_000.0), y, 600)
    assert len(chosen) <= 1202
    assert {0, 12_345, 77_777, 99_999} <= set(chosen.tolist())
    assert all(np.diff(chosen) > 0)


def test_columns_are_of_equal_width_however_the_lines_are_spaced() -> None:
    x = np.concatenate((np.arange(1000.0), np.arange(1000, 100_000, 100.0)))  # logged ever step, then every hundredth
    chosen = x[extremes(x, np.sin(x), 100)]
    assert sum(chosen < 1000) < 10
    assert len(chosen) > 150


def test_a_gap_that_is_wider_than_a_column_stays() -> None:
    y = np.ones(10_000)
    y[4000:5000] = NAN
    assert np.isnan(y[extremes(np.arange(10_000.0), y, 100)]).sum() >= 9


def test_the_last_value_is_kept_where_the_last_lines_have_none() -> None:
    y = np.linspace(0, 1, 10_000)
    y[3::2], y[-50:] = 0.5, NAN
    assert 9948 in extremes(np.arange(10_000.0), y, 100)


def test_the_running_mean_keeps_gaps_and_ends() -> None:
    found = running_mean(np.array([1, 2, NAN, 4]), 3, np.arange(4))
    assert np.array_equal(found, [1.5, 1.5, NAN, 4], equal_nan=True)


def test_the_running_mean_of_a_long_curve_has_no_gap_where_single_values_are_missing() -> None:
    y = np.arange(10_000.0)
    y[::2] = NAN
    found = running_mean(y, 251, evenly(len(y), 400))
    assert not np.isnan(found).any()
    assert abs(found[200] - evenly(10_000, 400)[200]) < 1.5


def test_huge_values_do_not_spoil_the_mean_of_later_ones() -> None:
    y = np.ones(1000)
    y[10] = 1e30
    assert running_mean(y, 25, np.array([500, 999])).tolist() == [1.0, 1.0]


def test_indices_at_equal_distances_hold_both_ends() -> None:
    assert evenly(0, 5).tolist() == []
    assert evenly(3, 5).tolist() == [0, 1, 2]
    assert evenly(1001, 5).tolist() == [0, 250, 500, 750, 1000]
