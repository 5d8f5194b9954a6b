from __future__ import annotations

from most_ray.report.curves import MOST_POINTS, Curves, Series, draw, running_mean, thin


def test_short_curves_are_left_as_they_are() -> None:
    assert thin([1.0, None, 3.0], 3) == [1.0, None, 3.0]


def test_long_curves_become_means_of_buckets_without_what_is_missing() -> None:
    assert thin([1.0, 3.0, None, 5.0, None, None, 9.0], 4) == [2.0, 5.0, None, 9.0]
    assert len(thin([0.0] * 5001)) <= MOST_POINTS


def test_a_thinned_figure_says_so() -> None:
    curves = Curves()
    steps = [float(step) for step in range(MOST_POINTS + 1)]
    curves.add("", "a", "#000000", steps, steps)
    assert "thinned" in curves.notes()[0]
    assert curves.series[0].x == curves.series[0].y  # both by the same buckets
    curves = Curves()
    curves.add("", "a", "#000000", steps[:50], steps[:50], smooth=True)
    assert not curves.notes()


def test_a_curve_without_values_is_no_curve() -> None:
    curves = Curves()
    curves.add("", "a", "#000000", [1.0, 2.0], [None, None])
    assert not curves.series


def test_the_running_mean_keeps_gaps_and_ends() -> None:
    assert running_mean([1.0, 2.0, None, 4.0], 3) == [1.5, 1.5, None, 4.0]


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
