"""Curves over steps, and the look of all figures.

A figure is plotly.js's JSON: traces (the curves) and a layout. Of one run, curves share a panel; of several runs, each quantity has a
panel with a curve for each run.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from most_ray.report.collect import RunData

MOST_POINTS = 2000  # of a curve; longer ones are thinned
LOOKS = {"total": ("total", "#7b848f"), "asr": ("ASR", "#3a7fc4"), "tts": ("TTS", "#d9812b"), "text": ("text", "#3f9c6d")}  # of tasks
MODALITY_COLOURS = {"text": "#3f9c6d", "audio": "#9063b8"}
RUN_COLOURS = ("#15929b", "#cf4a60", "#7f62c7", "#b58a1a", "#4f86d6", "#6d8a3a", "#b8578f", "#8a7560")
_SHADES = {  # of the sets and sources of one task
    "asr": ("#3a7fc4", "#6cb0e8", "#5a63c9", "#2fa3b5"),
    "tts": ("#d9812b", "#e3ad5c", "#b8552f", "#c2a028"),
    "text": ("#3f9c6d", "#83c29b", "#7d9a2f", "#3b9a94"),
}
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star")
_INK, _GRID = "#3d444d", "#e3e6ea"  # report.css replaces them by those of the light or dark page
_FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"

Points = Sequence[float | None]  # None: no value at this step
Values = Callable[[RunData], Points]
Bounds = tuple[float | None, float | None]  # of an interval


@dataclass(frozen=True)
class Series:
    """One curve."""

    panel: str  # name of the panel that it is in
    name: str  # in the legend
    colour: str
    x: Points  # steps
    y: Points
    bounds: Sequence[Bounds] = ()  # of the interval of each point
    style: Literal["line", "faint", "points", "marked", "restarts"] = "line"
    symbol: int = 0  # which of _SYMBOLS marks the points
    texts: Sequence[str] = ()  # shown when hovering over each point


@dataclass(frozen=True)
class Figure:
    """A figure of the page."""

    id: str  # of its HTML element
    title: str
    spec: dict[str, Any]  # plotly.js's JSON: {"data": traces, "layout": ...}
    notes: Sequence[str] = ()  # sentences below the figure
    keys: Sequence[tuple[str, str]] = ()  # colours and their meaning, after the notes
    wide: bool = False  # as wide as the page rather than half as wide
    log: bool = False  # has a button for a logarithmic axis


def side_by_side(figures: Sequence[Figure]) -> list[Figure]:
    """Figures for a grid of two columns: a figure that would be alone in its row takes both."""
    found: list[Figure] = []
    alone = True  # nothing to the left
    for index, figure in enumerate(figures):
        wide = figure.wide or (alone and all(following.wide for following in figures[index + 1 : index + 2]))
        found.append(dataclasses.replace(figure, wide=wide))
        alone = wide or not alone
    return found


@dataclass
class Curves:
    """Collects the series of a figure."""

    series: list[Series] = field(default_factory=list)
    thinned: bool = False  # whether any series was thinned
    window: int = 0  # points of the longest running mean

    def add(self, panel: str, name: str, colour: str, x: Points, y: Points, smooth: bool = False) -> None:
        """Add a curve, unless it has no values; with `smooth`, one of more than 100 points is drawn faint, with its running mean."""
        if all(value is None for value in y):
            return
        self.thinned = self.thinned or len(x) > MOST_POINTS
        x, y = thin(x), thin(y)
        window = len(x) // 40 | 1
        if smooth and len(x) > 100:
            self.window = max(self.window, window)
            self.series.append(Series(panel, name, colour, x, y, style="faint"))
            y = running_mean(y, window)
        self.series.append(Series(panel, name, colour, x, y))

    def add_runs(self, runs: Sequence[RunData], values: Values, title: str = "", colour: str = "", smooth: bool = False) -> None:
        """Add a curve of one quantity for each run; of a single run it is named `title` (default: the run's name) and has this colour."""
        for index, run in enumerate(runs):
            neutral = run_colour(index, len(runs))
            look = (title, run.name, neutral) if len(runs) > 1 else ("", title or run.name, colour or neutral)
            self.add(*look, run.steps, values(run), smooth)

    def notes(self) -> list[str]:
        """What readers must know of smoothing and thinning."""
        smooth = f"Faint: as measured; strong: mean of {self.window} neighbouring points." if self.window else ""
        thinned = f"Curves of more than {MOST_POINTS} points are thinned: each point is the mean of its neighbours." if self.thinned else ""
        return [note for note in (smooth, thinned) if note]


def thin(values: Points, most: int = MOST_POINTS) -> list[float | None]:
    """At most `most` values: means of neighbouring values, None where all of them are."""
    if len(values) <= most:
        return list(values)
    size = math.ceil(len(values) / most)
    return [_mean(values[start : start + size]) for start in range(0, len(values), size)]


def running_mean(values: Points, window: int) -> list[float | None]:
    """The mean of `window` values around each one, of fewer at the ends; None stays None."""
    half = window // 2
    return [None if value is None else _mean(values[max(0, i - half) : i + half + 1]) for i, value in enumerate(values)]


def _mean(values: Points) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def shade(task: str, index: int) -> str:
    """The colour of the index-th set or source of a task."""
    return (shades := _SHADES.get(task, _SHADES["text"]))[index % len(shades)]


def run_colour(index: int, runs: int) -> str:
    """The colour of the index-th of several runs; a single run has a neutral colour."""
    return RUN_COLOURS[index % len(RUN_COLOURS)] if runs > 1 else "#5a84b5"


def label(text: str) -> str:
    """Text escaped for plotly.js, which interprets some HTML in names and labels."""
    return html.escape(text, quote=False)


def rounded(value: float | None) -> float | None:
    """Six significant digits, which halve the size of the page; None for values that are not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def draw(series: Sequence[Series], y_title: str, tick_format: str = "", from_zero: bool = False, height: int = 300) -> dict[str, Any]:
    """plotly.js's JSON of curves over steps, in one panel or in a grid of two columns, each with its axes and its name above."""
    panels = list(dict.fromkeys(each.panel for each in series))
    reach = 1.02 * max((value for each in series for value in each.x if value is not None), default=1.0) or 1.0
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / max(1, columns))
    traces, named = [], set()
    for each in series:
        shown = each.name not in named and each.style != "faint"
        named |= {each.name} if shown else set()
        traces.append(_trace(each, axis_number(panels.index(each.panel)), shown))
    layout = base_layout(height if rows == 1 else rows * 240 + 50)
    layout["hovermode"] = "x unified"
    if len(panels) > 1:  # room for their names below the legend
        layout["margin"]["t"] += 18
        layout["legend"]["y"] = 1 + 24 / (layout["height"] - 94)
    for index, panel in enumerate(panels):
        left, bottom, suffix = index % columns, rows - 1 - index // columns, axis_number(index)
        xs, ys = _domain(left, columns, 0.12), _domain(bottom, rows, 0.42 / rows)
        y_axis = axis(ys, f"x{suffix}", y_title if left == 0 else "") | {"tickformat": tick_format, "automargin": True}
        layout[f"yaxis{suffix}"] = y_axis | ({"rangemode": "tozero"} if from_zero else {})
        x_title = "step" if index + columns >= len(panels) else ""
        layout[f"xaxis{suffix}"] = axis(xs, f"y{suffix}", x_title) | {"showgrid": False, "range": [0, reach]}
        if len(panels) > 1:
            layout["annotations"] = [*layout.get("annotations", ()), panel_title(panel, xs[0], ys[1])]
    return {"data": traces, "layout": layout}


def axis_number(panel: int) -> str:
    """What plotly.js appends to the names of a panel's axes; panels are counted from 0."""
    return str(panel + 1) if panel else ""


def _trace(series: Series, suffix: str, shown: bool) -> dict[str, Any]:
    trace: dict[str, Any] = {
        "type": "scatter",  # SVG: WebGL's contexts run out on a page of many figures
        "name": label(series.name),
        "legendgroup": label(series.name),
        "showlegend": shown,
        **_steps(series.x),
        "y": [rounded(value) for value in series.y],
        "xaxis": f"x{suffix}",
        "yaxis": f"y{suffix}",
        "mode": {"points": "markers", "marked": "lines+markers"}.get(series.style, "lines"),
        "line": {"color": series.colour, "width": 1.8},
        "marker": {"color": series.colour, "size": 7, "symbol": _SYMBOLS[series.symbol % len(_SYMBOLS)]},
    }
    if series.style == "faint":
        trace |= {"opacity": 0.36, "hoverinfo": "skip", "line": {"color": series.colour, "width": 1}}
    if series.style == "restarts":
        trace |= {"line": {"color": series.colour, "width": 1.2, "dash": "dot"}, "hoverinfo": "text"}
        trace |= {"hovertext": [label(text) for text in series.texts], "connectgaps": False}
    return trace | error_bars(series.y, series.bounds, series.colour) if series.bounds else trace


def _steps(x: Points) -> dict[str, Any]:
    """The steps of a curve; evenly spaced ones as the first and the distance, which makes a page of long curves a quarter smaller."""
    known = [value for value in x if value is not None]
    distances = {after - before for before, after in itertools.pairwise(known)}
    if len(known) == len(x) > 2 and len(distances) == 1:
        return {"x0": known[0], "dx": distances.pop()}
    return {"x": [rounded(value) for value in x]}


def error_bars(y: Points, bounds: Sequence[Bounds], colour: str, thickness: float = 1.2, width: float = 3) -> dict[str, Any]:
    """The part of a trace that draws intervals; empty where none is known. `width` is that of the bars' ends in pixels."""
    if all(low is None for low, _ in bounds):
        return {}
    sizes = [
        (0.0, 0.0) if value is None or low is None or high is None else (high - value, value - low)
        for value, (low, high) in zip(y, bounds, strict=True)
    ]
    above, below = ([rounded(max(0.0, size[side])) for size in sizes] for side in (0, 1))
    bars = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
    return {"error_y": {**bars, "thickness": thickness, "width": width, "color": colour}}


def _domain(index: int, count: int, gap: float) -> list[float]:
    size = (1 - gap * (count - 1)) / count
    return [round(index * (size + gap), 4), round(min(1.0, index * (size + gap) + size), 4)]


def base_layout(height: int) -> dict[str, Any]:
    """The layout that all figures share."""
    clear = "rgba(0,0,0,0)"
    return {
        "height": height,
        "margin": {"l": 62, "r": 14, "t": 34, "b": 42},
        "paper_bgcolor": clear,
        "plot_bgcolor": clear,
        "font": {"family": _FONT, "size": 12, "color": _INK},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "bgcolor": clear, "itemwidth": 30},
        "hoverlabel": {"bgcolor": "#23282e", "bordercolor": "#23282e", "font": {"color": "#f3f5f7", "size": 12}, "namelength": -1},
        "modebar": {"bgcolor": clear, "color": "#9aa2ab", "activecolor": "#5a84b5"},
    }


def axis(domain: Sequence[float], anchor: str, title: str) -> dict[str, Any]:
    """An axis over a part of the figure (0 to 1); `anchor` names the axis that it crosses."""
    line = {"gridcolor": _GRID, "linecolor": _INK, "tickcolor": _INK, "showline": True, "ticks": "outside", "ticklen": 4, "zeroline": False}
    return {"domain": list(domain), "anchor": anchor, "title": {"text": label(title), "standoff": 8, "font": {"size": 12}}, **line}


def panel_title(text: str, x: float, y: float) -> dict[str, Any]:
    """A panel's name above its upper left corner."""
    where = {"x": x, "y": y, "xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "bottom"}
    return {"text": f"<b>{label(text)}</b>", "showarrow": False, "font": {"size": 12}, **where}
