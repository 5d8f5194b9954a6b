from __future__ import annotations

import numpy as np

from most_ray.report.curves import PIXELS, Curves, Series, draw

STEPS = np.arange(3.0 * PIXELS)


def test_a_thinned_figure_says_so_and_keeps_what_stands_out() -> None:
    curves, y = Curves(), np.ones(len(STEPS))
    y[[700, 900]] = 99.0, -99.0
    curves.add("", "a", "#000000", STEPS, y)
    assert "thinned" in curves.notes()[0]
    assert {99.0, -99.0} <= set(curves.series[0].y)
    assert curves.series[0].x[-1] == STEPS[-1]
    curves = Curves()
    curves.add("", "a", "#000000", STEPS[:50], y[:50], smooth=True)
    assert not curves.notes()


def test_a_smooth_curve_is_faint_with_its_running_mean() -> None:
    curves, y = Curves(), np.where(STEPS % 2, 1.0, 3.0)
    curves.add("", "a", "#000000", STEPS, y, smooth=True, run=2)
    faint, strong = curves.series
    assert (faint.style, strong.style, faint.run, strong.run) == ("faint", "line", 2, 2)
    assert set(faint.y) == {1.0, 3.0}
    assert all(value is not None and abs(value - 2) < 0.1 for value in strong.y)
    assert f"mean of {len(STEPS) // 40 | 1}" in curves.notes()[0]


def test_of_very_many_evaluations_those_that_stand_out_are_drawn_with_their_intervals() -> None:
    curves, steps = Curves(), [float(step) for step in range(5000)]
    y = [1.0 if step == 1234 else 0.5 for step in steps]
    curves.add_points(Series("", "dev", "#000000", steps, y, [(value - 0.1, value + 0.1) for value in y], "marked"))
    (shown,) = curves.series
    assert len(shown.x) == len(shown.y) == len(shown.bounds) <= 202
    assert dict(zip(shown.x, shown.bounds, strict=True))[1234.0] == (0.9, 1.1)
    assert "thinned" in curves.notes()[0]


def test_a_curve_without_values_is_no_curve() -> None:
    curves = Curves()
    curves.add("", "a", "#000000", np.array([1.0, 2.0]), np.array([np.nan, np.nan]))
    assert not curves.series


def test_steps_of_more_than_six_digits_are_exact() -> None:
    (trace,) = draw([Series("", "run", "#000000", [1234567.0, 1234569.0, 1234570.0], [1.0] * 3)], "")["data"]
    assert trace["x"] == [1234567, 1234569, 1234570]


def test_steps_at_equal_distances_are_written_as_the_first_and_the_distance() -> None:
    (even, uneven) = draw([Series("", "run", "#000000", x, [1.0] * 4) for x in ([10.0, 20.0, 30.0, 40.0], [10.0, 20.0, 30.0, 50.0])], "")[
        "data"
    ]
    assert (even["x0"], even["dx"], "x" in even) == (10, 10, False)
    assert uneven["x"] == [10, 20, 30, 50]


def test_each_panel_has_axes_of_its_own_and_a_name_is_listed_once() -> None:
    spec = draw([Series(panel, "run", "#000000", [1.0], [2.0]) for panel in "abc"], "loss")
    assert [trace["yaxis"] for trace in spec["data"]] == ["y", "y2", "y3"]
    assert [trace["showlegend"] for trace in spec["data"]] == [True, False, False]
    assert [note["text"] for note in spec["layout"]["annotations"]] == ["<b>a</b>", "<b>b</b>", "<b>c</b>"]
