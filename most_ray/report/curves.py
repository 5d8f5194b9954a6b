"""Curves over steps, and how all figures look: one panel for one run, one panel per quantity for several."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import plotly.graph_objects as go

MOST_POINTS = 2000
TASK_COLOURS = {"total": "#7b848f", "asr": "#3a7fc4", "tts": "#d9812b", "text": "#3f9c6d"}
TASK_NAMES = {"total": "total", "asr": "ASR", "tts": "TTS", "text": "text"}
MODALITY_COLOURS = {"text": "#3f9c6d", "audio": "#9063b8"}
RUN_COLOURS = ("#15929b", "#cf4a60", "#7f62c7", "#b58a1a", "#4f86d6", "#6d8a3a", "#b8578f", "#8a7560")
_SHADES = {  # sets and sources of one task, side by side
    "asr": ("#3a7fc4", "#6cb0e8", "#5a63c9", "#2fa3b5"),
    "tts": ("#d9812b", "#e3ad5c", "#b8552f", "#c2a028"),
    "text": ("#3f9c6d", "#83c29b", "#7d9a2f", "#3b9a94"),
}
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star")
_INK, _GRID = "#3d444d", "#e3e6ea"  # the page's style puts its own, light or dark, in their place
_FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"

Points = Sequence[float | None]


@dataclass(frozen=True)
class Series:
    """One curve. With several runs `panel` tells which of the figure's panels it is in."""

    panel: str
    name: str
    colour: str
    x: Points
    y: Points
    bounds: Sequence[tuple[float | None, float | None]] = ()  # of an interval, for each point
    style: Literal["line", "faint", "points", "marked", "restarts"] = "line"
    symbol: int = 0
    texts: Sequence[str] = ()  # what hovering says of each point


@dataclass(frozen=True)
class Figure:
    """A figure of the page: `spec` is plotly's JSON, `keys` are colours and what they stand for, `log` offers a logarithmic axis."""

    id: str
    title: str
    spec: dict[str, Any]
    notes: Sequence[str] = ()
    keys: Sequence[tuple[str, str]] = ()
    wide: bool = False
    log: bool = False


@dataclass
class Curves:
    """Series that are being gathered for a figure, and whether any had to be thinned."""

    series: list[Series] = field(default_factory=list)
    thinned: bool = False
    window: int = 0

    def add(self, panel: str, name: str, colour: str, x: Points, y: Points, smooth: bool = False) -> None:
        """A curve of many points; with `smooth`, faint behind its own running mean where it has more than 100."""
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

    def notes(self) -> list[str]:
        smooth = f"Faint: as measured; strong: mean of {self.window} neighbouring points." if self.window else ""
        thinned = f"Curves of more than {MOST_POINTS} points are thinned: each point is the mean of its neighbours." if self.thinned else ""
        return [note for note in (smooth, thinned) if note]


def thin(values: Points, most: int = MOST_POINTS) -> list[float | None]:
    """At most `most` values, each the mean of those of a bucket that are not None."""
    if len(values) <= most:
        return list(values)
    size = math.ceil(len(values) / most)
    return [_mean(values[start : start + size]) for start in range(0, len(values), size)]


def running_mean(values: Points, window: int) -> list[float | None]:
    """The mean around each value, over fewer at the ends; None where the value itself is."""
    half = window // 2
    return [None if value is None else _mean(values[max(0, i - half) : i + half + 1]) for i, value in enumerate(values)]


def _mean(values: Points) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def shade(task: str, index: int) -> str:
    """A colour for the index-th set or source of a task."""
    shades = _SHADES.get(task, _SHADES["text"])
    return shades[index % len(shades)]


def run_colour(index: int, runs: int) -> str:
    """The colour of a run among several; of a single one, a neutral one."""
    return RUN_COLOURS[index % len(RUN_COLOURS)] if runs > 1 else "#5a84b5"


def label(text: str) -> str:
    """Text for plotly, which reads some HTML in names and labels."""
    return html.escape(text, quote=False)


def rounded(value: float | None) -> float | None:
    """Six significant digits: what a figure can show, and a file half as large."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def draw(series: Sequence[Series], y_title: str, tick_format: str = "", from_zero: bool = False, height: int = 300) -> dict[str, Any]:
    """Plotly's JSON of curves over steps, each panel with its own axes and its name above."""
    panels = list(dict.fromkeys(each.panel for each in series))
    reach = 1.02 * max((value for each in series for value in each.x if value is not None), default=1.0) or 1.0
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / max(1, columns))
    traces, named = [], set()
    for each in series:
        number = panels.index(each.panel) + 1
        shown = each.name not in named and each.style != "faint"
        named |= {each.name} if shown else set()
        traces.append(_trace(each, number, shown))
    shape = base_layout(height if rows == 1 else rows * 240 + 50)
    shape["hovermode"] = "x unified"
    if len(panels) > 1:  # their names stand between the legend and themselves
        shape["margin"]["t"] += 18
        shape["legend"]["y"] = 1 + 24 / (shape["height"] - 94)
    for number, panel in enumerate(panels, 1):
        left, bottom = (number - 1) % columns, rows - 1 - (number - 1) // columns
        xs, ys = _domain(left, columns, 0.12), _domain(bottom, rows, 0.42 / rows)
        suffix = "" if number == 1 else str(number)
        y_axis = axis(ys, f"x{suffix}", y_title if left == 0 else "") | {"tickformat": tick_format, "automargin": True}
        shape[f"yaxis{suffix}"] = y_axis | ({"rangemode": "tozero"} if from_zero else {})
        x_title = "step" if number + columns > len(panels) else ""
        shape[f"xaxis{suffix}"] = axis(xs, f"y{suffix}", x_title) | {"showgrid": False, "range": [0, reach]}
        if len(panels) > 1:
            shape["annotations"] = [*shape.get("annotations", ()), panel_title(panel, xs[0], ys[1])]
    return as_json(traces, shape)


def _trace(series: Series, number: int, shown: bool) -> dict[str, Any]:
    suffix = "" if number == 1 else str(number)
    trace: dict[str, Any] = {
        "type": "scatter",  # SVG: WebGL's contexts run out on a page of many figures
        "name": label(series.name),
        "legendgroup": label(series.name),
        "showlegend": shown,
        "x": [rounded(value) for value in series.x],
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
    pairs = list(zip(series.bounds, series.y, strict=True)) if series.bounds else []
    if any(bound[0] is not None for bound, _ in pairs):
        reach = [(0.0, 0.0) if y is None or low is None or high is None else (high - y, y - low) for (low, high), y in pairs]
        above, below = ([rounded(max(0.0, pair[side])) for pair in reach] for side in (0, 1))
        trace["error_y"] = {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1.2, "width": 3}
        trace["error_y"]["color"] = series.colour
    return trace


def _domain(index: int, count: int, gap: float) -> list[float]:
    size = (1 - gap * (count - 1)) / count
    return [round(index * (size + gap), 4), round(min(1.0, index * (size + gap) + size), 4)]


def base_layout(height: int) -> dict[str, Any]:
    """What all figures share."""
    clear = "rgba(0,0,0,0)"
    return {
        "template": {},
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
    """An axis that takes part of the figure."""
    line = {"gridcolor": _GRID, "linecolor": _INK, "tickcolor": _INK, "showline": True, "ticks": "outside", "ticklen": 4, "zeroline": False}
    return {"domain": list(domain), "anchor": anchor, "title": {"text": label(title), "standoff": 8, "font": {"size": 12}}, **line}


def panel_title(text: str, x: float, y: float) -> dict[str, Any]:
    """A panel's name above its upper left corner."""
    where = {"x": x, "y": y, "xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "bottom"}
    return {"text": f"<b>{label(text)}</b>", "showarrow": False, "font": {"size": 12}, **where}


def as_json(traces: Sequence[dict[str, Any]], shape: dict[str, Any]) -> dict[str, Any]:
    """Traces and layout, checked by plotly: a misspelt property raises."""
    checked: dict[str, Any] = go.Figure(data=list(traces), layout=shape).to_plotly_json()
    return {"data": checked["data"], "layout": checked["layout"]}
