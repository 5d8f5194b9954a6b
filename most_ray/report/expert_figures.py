"""Figures of the experts: how often each is selected, and how unevenly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from most_ray.errors import count_of
from most_ray.report.collect import RunData, entries, mapping, number
from most_ray.report.curves import MODALITY_COLOURS, Curves, Figure, axis, axis_number, base_layout, draw, panel_title, rounded

_MODALITIES = ("text", "audio")
_CELLS_WITH_NUMBERS = 130  # maps of at most as many cells show their values
_CIVIDIS = ("#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838")


def expert_load(runs: Sequence[RunData]) -> Figure | None:
    """A heat map per run and modality: each expert's share of a layer's selections, from the last line that has them."""
    found = [(run, shares) for run in runs if (shares := load_shares(run))]
    if not found:
        return None
    layers = max(len(rows) for _, shares in found for rows in shares.values())
    each = max(130, min(420, 22 * layers))
    layout = base_layout(60 + len(found) * (each + 80)) | {"shapes": [], "annotations": [], "hovermode": "closest"}
    top = max(value for _, shares in found for rows in shares.values() for row in rows for value in row)
    traces: list[dict[str, Any]] = []
    for position, (run, shares) in enumerate(found):
        for side, modality in enumerate(_MODALITIES):
            if not shares.get(modality):
                continue
            suffix = axis_number(position * 2 + side)
            xs, ys = [0.53 * side, 0.53 * side + 0.47], _extent(position, len(found))
            traces.append(_heat_map(run, shares[modality], suffix, top, showscale=not traces))
            layout[f"xaxis{suffix}"] = axis(xs, f"y{suffix}", "expert" if position == len(found) - 1 else "") | {"showgrid": False}
            layout[f"xaxis{suffix}"] |= {"tickmode": "linear", "dtick": max(1, len(shares[modality][0]) // 16), "showline": False}
            layout[f"yaxis{suffix}"] = axis(ys, f"x{suffix}", "layer" if side == 0 else "") | {"showgrid": False, "autorange": "reversed"}
            layout[f"yaxis{suffix}"] |= {"tickmode": "linear", "dtick": max(1, layers // 12), "showline": False}
            pixels = (ys[1] - ys[0]) * (layout["height"] - layout["margin"]["t"] - layout["margin"]["b"])
            layout["shapes"] += _marks(run, suffix, pixels)
            title = f"{modality} tokens" + (f", {run.name}" if len(runs) > 1 else "")
            layout["annotations"].append(panel_title(title, suffix, 10))
    shown = [modality for modality in _MODALITIES if any(_experts(run, modality) for run, _ in found)]
    keys = [(MODALITY_COLOURS[modality], f"{modality} experts") for modality in shown]
    steps = ", ".join(f"{run.name + ': ' if len(runs) > 1 else ''}{_span(run.experts[-1])}" for run, _ in found)
    notes = [f"Share of a layer's selections of each modality ({steps}); blank: never selected."]
    return Figure("fig-experts", "Expert load", {"data": traces, "layout": layout}, notes, keys, wide=True)


def load_shares(run: RunData) -> dict[str, list[list[float]]]:
    """Shares of each layer's selections, `(layers, experts)` for each modality, from the last line of experts; empty without one."""
    load = mapping(run.experts[-1].get("load")) if run.experts else {}
    shares = {}
    for modality in _MODALITIES:
        rows = entries(load.get(modality))
        if rows and all(isinstance(row, list) and len(row) == len(rows[0]) > 0 for row in rows):
            counts = [[number(value) or 0.0 for value in row] for row in rows]
            shares[modality] = [[value / (sum(row) or 1.0) for value in row] for row in counts]
    return shares


def _span(line: dict[str, Any]) -> str:
    """The steps that a line of experts counts."""
    steps = number(line.get("steps"))
    return f"the {count_of(steps, 'step')} up to {line['step']}" if steps else f"up to step {line['step']}"


def _extent(position: int, count: int) -> list[float]:
    """Bottom and top (0 to 1) of the maps of one of `count` runs; the first run is at the top."""
    size = 1 / (count + 0.32 * (count - 1))
    bottom = (count - 1 - position) * size * 1.32
    return [round(bottom, 4), round(min(1.0, bottom + size), 4)]


def _heat_map(run: RunData, rows: list[list[float]], suffix: str, top: float, showscale: bool) -> dict[str, Any]:
    """The trace of `rows`, `(layers, experts)`; `top` is the value of the brightest colour."""
    first = number(run.starts[-1].get("first_expert_layer")) if run.starts else None
    trace = {
        "type": "heatmap",
        "z": [[rounded(value) or None for value in row] for row in rows],  # blank: never selected
        "x": list(range(len(rows[0]))),
        "y": [index + int(first or 0) for index in range(len(rows))],
        "xaxis": f"x{suffix}",
        "yaxis": f"y{suffix}",
        "zmin": 0,
        "zmax": rounded(top),
        "colorscale": [[index / 9, colour] for index, colour in enumerate(_CIVIDIS)],
        "showscale": showscale,
        "colorbar": {"tickformat": ".0%", "thickness": 12, "outlinewidth": 0, "len": 1, "x": 1.01},
        "hovertemplate": "layer %{y}, expert %{x}: %{z:.2%}<extra></extra>",
    }
    if len(rows) * len(rows[0]) <= _CELLS_WITH_NUMBERS:
        trace |= {"xgap": 1, "ygap": 1}
        trace |= {"text": [[f"{value:.0%}" if value else "" for value in row] for row in rows], "texttemplate": "%{text}"}
    return trace


def _experts(run: RunData, modality: str) -> list[int]:
    """The experts of a modality at the run's last start."""
    experts = mapping(run.starts[-1].get("experts")) if run.starts else {}
    return [int(found) for value in entries(experts.get(modality)) if (found := number(value)) is not None]


def _marks(run: RunData, suffix: str, pixels: float) -> list[dict[str, Any]]:
    """A coloured strip above a map that shows each expert's modality."""
    common = {"type": "rect", "xref": f"x{suffix}", "yref": f"y{suffix} domain"}
    height = {"y0": 1 + 4 / pixels, "y1": 1 + 9 / pixels}
    return [
        {**common, "x0": expert - 0.46, "x1": expert + 0.46, **height, "fillcolor": MODALITY_COLOURS[modality], "line": {"width": 0}}
        for modality in _MODALITIES
        for expert in _experts(run, modality)
    ]


def expert_balance(runs: Sequence[RunData]) -> Figure | None:
    """The selections of the busiest expert over the mean of its modality, in the worst layer."""
    curves = Curves()
    for modality in _MODALITIES:

        def balance(run: RunData, modality: str = modality) -> np.ndarray:
            return run.train.values("expert_max_over_mean", modality)

        curves.add_runs(runs, balance, f"{modality} experts", MODALITY_COLOURS[modality], smooth=True)
    if not curves.series:
        return None
    notes = ["The busiest expert's selections over the mean of its modality's, in the worst layer; 1 is even.", *curves.notes()]
    return Figure("fig-balance", "Expert balance", draw(curves.series, "max / mean"), notes)
