"""Curves over steps, and the look of all figures.

A figure is plotly.js's JSON: traces (the curves) and a layout. Of one run, curves share a panel; of several runs, each quantity has a
panel with a curve for each run. Curves are written over steps; report.js moves them to tokens or hours, by what `axes` says of each run
(a trace's `meta` is the run's index), and draws the marks of resumes.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from most_ray.errors import count_of
from most_ray.metrics.thinning import evenly, extremes, running_mean
from most_ray.report.collect import RunData, entries, mapping, number

PIXELS = 600  # columns that a curve is drawn in: of each, a long curve keeps the smallest and the largest value
_MEANS = 400  # points of a running mean
_MARKED = 100  # columns of a curve whose points are marked, which are slower to draw
_KNOTS = 1000  # steps whose tokens and hours are written
LOOKS = {"total": ("total", "#7b848f"), "asr": ("ASR", "#3a7fc4"), "tts": ("TTS", "#d9812b"), "text": ("text", "#3f9c6d")}  # of tasks
MODALITY_COLOURS = {"text": "#3f9c6d", "audio": "#9063b8"}
RUN_COLOURS = ("#15929b", "#cf4a60", "#7f62c7", "#b58a1a", "#4f86d6", "#6d8a3a", "#b8578f", "#8a7560")
_SHADES = {  # of the sets and sources of one task
    "asr": ("#3a7fc4", "#6cb0e8", "#5a63c9", "#2fa3b5"),
    "tts": ("#d9812b", "#e3ad5c", "#b8552f", "#c2a028"),
    "text": ("#3f9c6d", "#83c29b", "#7d9a2f", "#3b9a94"),
}
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star")
SYMBOL_NAMES = ("●", "◆", "■", "▲", "✚", "★")  # the same as text
_INK, _GRID = "#3d444d", "#e3e6ea"  # report.css replaces them by those of the light or dark page
_FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"

Points = Sequence[float | None]  # None: no value at this step
Values = Callable[[RunData], np.ndarray]
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
    style: Literal["line", "faint", "points", "marked"] = "line"
    symbol: int = 0  # which of _SYMBOLS marks the points
    run: int = 0  # index of the run whose steps x are
    group: str = ""  # the curve whose entry in the legend stands for this one too; empty: it has its own


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

    def add(self, panel: str, name: str, colour: str, x: np.ndarray, y: np.ndarray, smooth: bool = False, run: int = 0) -> None:
        """Add a curve, unless it has no values; with `smooth`, one of more than 100 points is drawn faint, with its running mean.

        `x`, `y`: `(points,)`, NaN where there is no value; `x` ascends.
        """
        if np.isnan(y).all():
            return
        shown, averaged = extremes(x, y, PIXELS), smooth and len(x) > 100
        self.thinned = self.thinned or len(shown) < len(x)
        self.series.append(Series(panel, name, colour, _known(x[shown]), _known(y[shown]), style="faint" if averaged else "line", run=run))
        if averaged:
            window, at = len(x) // 40 | 1, evenly(len(x), _MEANS)
            self.window = max(self.window, window)
            self.series.append(Series(panel, name, colour, _known(x[at]), _known(running_mean(y, window, at)), run=run))

    def add_points(self, series: Series) -> None:
        """Add the figures of evaluations, whose points are marked; of very many, those that stand out."""
        chosen = extremes(np.array(series.x, float), np.array(series.y, float), _MARKED).tolist()
        self.thinned = self.thinned or len(chosen) < len(series.x)
        x, y, bounds = ([values[index] for index in chosen] if values else [] for values in (series.x, series.y, series.bounds))
        self.series.append(dataclasses.replace(series, x=x, y=y, bounds=bounds))

    def add_runs(self, runs: Sequence[RunData], values: Values, title: str = "", colour: str = "", smooth: bool = False) -> None:
        """Add a curve of one quantity for each run; of a single run it is named `title` (default: the run's name) and has this colour."""
        for index, run in enumerate(runs):
            neutral = run_colour(index, len(runs))
            look = (title, run.name, neutral) if len(runs) > 1 else ("", title or run.name, colour or neutral)
            self.add(*look, run.steps, values(run), smooth, index)

    def notes(self) -> list[str]:
        """What readers must know of smoothing and thinning."""
        smooth = f"Faint: as measured; strong: mean of {count_of(self.window, 'neighbouring point')}." if self.window else ""
        thinned = "Long curves are thinned to what a screen shows: highest, lowest, first and last points are kept." if self.thinned else ""
        return [note for note in (smooth, thinned) if note]


def _known(values: np.ndarray) -> list[float | None]:
    return [None if value != value else value for value in values.tolist()]


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


def draw(
    series: Sequence[Series], y_title: str, tick_format: str = "", from_zero: bool = False, height: int = 300, wide: bool = False
) -> dict[str, Any]:
    """plotly.js's JSON of curves over steps, in one panel or in a grid of two columns (three panels of a wide figure: in a row), each with
    its axes and its name above."""
    panels = list(dict.fromkeys(each.panel for each in series))
    reach = 1.02 * max((value for each in series for value in each.x if value is not None), default=1.0) or 1.0
    columns = len(panels) if len(panels) < (4 if wide else 3) else 2
    rows = math.ceil(len(panels) / max(1, columns))
    traces, named = [], set()
    for each in series:
        shown = each.name not in named and each.style != "faint" and not each.group
        named |= {each.name} if shown else set()
        traces.append(_trace(each, axis_number(panels.index(each.panel)), shown))
    layout = base_layout(min(height, 320) if rows == 1 < columns else height if rows == 1 else rows * 240 + 50)
    layout |= {"hovermode": "x unified", "meta": {"over": "step"}}
    if len(panels) > 1:  # room for their names below the legend
        layout["margin"]["t"] += 18
        layout["legend"]["y"] = 1 + 24 / (layout["height"] - 94)
    for index, panel in enumerate(panels):
        left, bottom, suffix = index % columns, rows - 1 - index // columns, axis_number(index)
        xs, ys = _domain(left, columns, 0.24 / columns), _domain(bottom, rows, 0.42 / rows)
        y_axis = axis(ys, f"x{suffix}", y_title if left == 0 else "") | {"tickformat": tick_format, "automargin": True}
        layout[f"yaxis{suffix}"] = y_axis | ({"rangemode": "tozero"} if from_zero else {})
        x_title = "step" if index + columns >= len(panels) else ""
        layout[f"xaxis{suffix}"] = axis(xs, f"y{suffix}", x_title) | {"showgrid": False, "range": [0, reach]}
        if len(panels) > 1:
            layout["annotations"] = [*layout.get("annotations", ()), panel_title(panel, suffix)]
    return {"data": traces, "layout": layout}


def axis_number(panel: int) -> str:
    """What plotly.js appends to the names of a panel's axes; panels are counted from 0."""
    return str(panel + 1) if panel else ""


def _trace(series: Series, suffix: str, shown: bool) -> dict[str, Any]:
    trace: dict[str, Any] = {
        "type": "scatter",  # SVG: WebGL's contexts run out on a page of many figures
        "name": label(series.name),
        "legendgroup": label(series.group or series.name),
        "showlegend": shown,
        **_steps(series.x),
        "y": [rounded(value) for value in series.y],
        "xaxis": f"x{suffix}",
        "yaxis": f"y{suffix}",
        "meta": series.run,
        "mode": {"points": "markers", "marked": "lines+markers"}.get(series.style, "lines"),
        "line": {"color": series.colour, "width": 1.8},
        "marker": {"color": series.colour, "size": 7, "symbol": _SYMBOLS[series.symbol % len(_SYMBOLS)]},
    }
    if series.style == "faint":
        trace |= {"opacity": 0.36, "hoverinfo": "skip", "line": {"color": series.colour, "width": 1}}
    return trace | error_bars(series.y, series.bounds, series.colour) if series.bounds else trace


def _steps(x: Points) -> dict[str, Any]:
    """The steps of a curve; evenly spaced ones as the first and the distance, which makes a page of long curves a quarter smaller."""
    known = [value for value in x if value is not None]
    distances = {after - before for before, after in itertools.pairwise(known)}
    if len(known) == len(x) > 2 and len(distances) == 1:
        return {"x0": known[0], "dx": distances.pop()}
    return {"x": [int(value) if value is not None and value.is_integer() else value for value in x]}


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


def panel_title(text: str, suffix: str, above: float = 0) -> dict[str, Any]:
    """A panel's name above its upper left corner, by so many pixels; `suffix` as of `axis_number`."""
    where = {"x": 0, "y": 1, "xref": f"x{suffix} domain", "yref": f"y{suffix} domain", "xanchor": "left", "yanchor": "bottom"}
    return {"text": f"<b>{label(text)}</b>", "showarrow": False, "font": {"size": 12}, "yshift": above, **where}


def axes(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """What curves are moved from steps to tokens and hours by, and their marks: for each run, tokens and hours at some of its steps.

    Between these steps both are linear; the steps around each resume are among them. `tokens` and `hours` are None where a run has not
    recorded them.
    """
    found = []
    for index, run in enumerate(runs):
        steps, tokens, hours = _knots(run)
        knots: dict[str, Any] = {"step": [0, *steps], "tokens": [0, *tokens] if tokens else None, "hours": [0, *hours] if hours else None}
        found.append(
            {
                "name": run.name,
                "colour": run_colour(index, len(runs)),
                **knots,
                "marks": marks(run, f"{run.name}: " if len(runs) > 1 else ""),
            }
        )
    return found


def _knots(run: RunData) -> tuple[list[int], list[int], list[float]]:
    """Steps, and the tokens and hours at them; empty where they are not recorded."""
    around = np.flatnonzero(np.diff(run.train.attempts)) if len(run.train) else np.arange(0)
    at = np.unique(np.concatenate((evenly(len(run.train), _KNOTS), around, around + 1))).astype(int)
    tokens, seconds = run.tokens_so_far, run.seconds_so_far
    hours = [] if seconds is None else [float(f"{value:.6g}") for value in (seconds[at] / 3600).tolist()]
    return run.steps[at].astype(int).tolist(), [] if tokens is None else tokens[at].astype(int).tolist(), hours


def marks(run: RunData, before: str = "") -> list[dict[str, Any]]:
    """A mark for each resume: its step, the attempt's number, whether settings changed, and the text shown when hovering."""
    return [
        {
            "step": int(step),
            "attempt": attempt,
            "changed": bool(entries(start.get("changed")) or entries(start.get("also_changed"))),
            "text": "<br>".join(map(label, textwrap.wrap(before + resume_text(attempt, step, start), 90))),
        }
        for attempt, start in enumerate(run.restarts, 2)
        if (step := number(start.get("step"))) is not None
    ]


def resume_text(attempt: int, step: float, start: dict[str, Any]) -> str:
    """An attempt in one line: where it resumed, on what, and what had changed."""
    parts = [f"attempt {attempt}, after step {step:,.0f}", *attempt_place(start)]
    parts += ["not exact"] if start.get("exact") is False else []
    for key, title in (("changed", "changed"), ("also_changed", "changed without effect on steps")):
        parts += [f"{title}: {', '.join(map(str, found))}"] if (found := entries(start.get(key))) else []
    return ", ".join(parts)


def attempt_place(start: dict[str, Any]) -> list[str]:
    """Workers, device and sizes of the parallel dimensions of a start."""
    workers = number(start.get("workers"))
    parts = [f"{workers:g} worker{'s' if workers != 1 else ''}"] if workers is not None else []
    parts += [str(start["device"])] if start.get("device") else []
    return parts + [f"{key} {value}" for key, value in mapping(start.get("topology")).items() if value != 1]
