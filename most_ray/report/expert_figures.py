"""Figures of the experts: who is chosen how often, and how unevenly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from most_ray.report.collect import RunData, entries, mapping, number
from most_ray.report.curves import (
    MODALITY_COLOURS,
    Curves,
    Figure,
    as_json,
    axis,
    base_layout,
    draw,
    panel_title,
    rounded,
    run_colour,
)

_MODALITIES = ("text", "audio")
_CELLS_WITH_NUMBERS = 130


def expert_load(runs: Sequence[RunData]) -> Figure | None:
    """A heat map per run and modality: each expert's share of a layer's selections, from the last line that has them."""
    found = [(run, shares) for run in runs if (shares := load_shares(run))]
    if not found:
        return None
    layers = max(len(rows) for _, shares in found for rows in shares.values())
    each = max(130, min(420, 22 * layers))
    shape = base_layout(60 + len(found) * (each + 80)) | {"shapes": [], "annotations": [], "hovermode": "closest"}
    top = max(value for _, shares in found for rows in shares.values() for row in rows for value in row)
    traces: list[dict[str, Any]] = []
    for place, (run, shares) in enumerate(found):
        for side, modality in enumerate(_MODALITIES):
            if not shares.get(modality):
                continue
            panel = place * 2 + side + 1
            suffix = "" if panel == 1 else str(panel)
            xs, ys = [0.53 * side, 0.53 * side + 0.47], _rows(place, len(found))
            traces.append(_heat_map(run, shares[modality], suffix, top, showscale=not traces))
            shape[f"xaxis{suffix}"] = axis(xs, f"y{suffix}", "expert" if place == len(found) - 1 else "") | {"showgrid": False}
            shape[f"xaxis{suffix}"] |= {"tickmode": "linear", "dtick": max(1, len(shares[modality][0]) // 16), "showline": False}
            shape[f"yaxis{suffix}"] = axis(ys, f"x{suffix}", "layer" if side == 0 else "") | {"showgrid": False, "autorange": "reversed"}
            shape[f"yaxis{suffix}"] |= {"tickmode": "linear", "dtick": max(1, layers // 12), "showline": False}
            pixels = (ys[1] - ys[0]) * (shape["height"] - shape["margin"]["t"] - shape["margin"]["b"])
            shape["shapes"] += _marks(run, suffix, pixels)
            title = f"{modality} tokens" + (f", {run.name}" if len(runs) > 1 else "")
            shape["annotations"].append(panel_title(title, xs[0], ys[1] + 10 / (shape["height"] - 76)))
    spec = as_json(traces, shape)
    keys = [
        (MODALITY_COLOURS[modality], f"{modality} experts") for modality in _MODALITIES if any(_experts(run, modality) for run, _ in found)
    ]
    steps = ", ".join(f"{run.name + ': ' if len(runs) > 1 else ''}{_span(run.experts[-1])}" for run, _ in found)
    notes = [f"Share of a layer's selections of each modality ({steps}); blank: never chosen."]
    return Figure("fig-experts", "Expert load", spec, notes, keys, wide=True)


def load_shares(run: RunData) -> dict[str, list[list[float]]]:
    """(L, E) for each modality: shares of the layer's selections, from the last line of experts; empty where there is none."""
    load = mapping(run.experts[-1].get("load")) if run.experts else {}
    shares = {}
    for modality in _MODALITIES:
        rows = entries(load.get(modality))
        if rows and all(isinstance(row, list) and len(row) == len(rows[0]) > 0 for row in rows):
            counts = [[number(value) or 0.0 for value in row] for row in rows]
            shares[modality] = [[value / (sum(row) or 1.0) for value in row] for row in counts]
    return shares


def _span(line: dict[str, Any]) -> str:
    steps = number(line.get("steps"))
    return f"the {steps:g} steps up to {line['step']}" if steps else f"up to step {line['step']}"


def _rows(place: int, count: int) -> list[float]:
    """The part of the height that a run's maps take, the first run above."""
    size = 1 / (count + 0.32 * (count - 1))
    bottom = (count - 1 - place) * size * 1.32
    return [round(bottom, 4), round(min(1.0, bottom + size), 4)]


def _heat_map(run: RunData, rows: list[list[float]], suffix: str, top: float, showscale: bool) -> dict[str, Any]:
    first = number(run.starts[-1].get("first_expert_layer")) if run.starts else None
    trace = {
        "type": "heatmap",
        "z": [[rounded(value) or None for value in row] for row in rows],  # blank: never chosen
        "x": list(range(len(rows[0]))),
        "y": [index + int(first or 0) for index in range(len(rows))],
        "xaxis": f"x{suffix}",
        "yaxis": f"y{suffix}",
        "zmin": 0,
        "zmax": rounded(top),
        "colorscale": "Cividis",
        "showscale": showscale,
        "colorbar": {"tickformat": ".0%", "thickness": 12, "outlinewidth": 0, "len": 1, "x": 1.01},
        "hovertemplate": "layer %{y}, expert %{x}: %{z:.2%}<extra></extra>",
    }
    if len(rows) * len(rows[0]) <= _CELLS_WITH_NUMBERS:
        trace |= {"xgap": 1, "ygap": 1}
        trace |= {"text": [[f"{value:.0%}" if value else "" for value in row] for row in rows], "texttemplate": "%{text}"}
    return trace


def _experts(run: RunData, modality: str) -> list[int]:
    experts = mapping(run.starts[-1].get("experts")) if run.starts else {}
    return [int(found) for value in entries(experts.get(modality)) if (found := number(value)) is not None]


def _marks(run: RunData, suffix: str, pixels: float) -> list[dict[str, Any]]:
    """A strip above a map that says which experts are whose."""
    marks = []
    height = {"y0": 1 + 4 / pixels, "y1": 1 + 9 / pixels}
    for modality in _MODALITIES:
        for expert in _experts(run, modality):
            where = {"xref": f"x{suffix}", "yref": f"y{suffix} domain", "x0": expert - 0.46, "x1": expert + 0.46, **height}
            marks.append({"type": "rect", **where, "fillcolor": MODALITY_COLOURS[modality], "line": {"width": 0}})
    return marks


def expert_balance(runs: Sequence[RunData]) -> Figure | None:
    """The busiest expert's selections over the mean of its modality, in the worst layer."""
    curves, several = Curves(), len(runs) > 1
    for modality in _MODALITIES:
        for index, run in enumerate(runs):
            y = [number(mapping(line.get("expert_max_over_mean")).get(modality)) for line in run.train]
            name, colour = (run.name, run_colour(index, len(runs))) if several else (f"{modality} experts", MODALITY_COLOURS[modality])
            curves.add(f"{modality} experts" if several else "", name, colour, run.steps, y, True)
    if not curves.series:
        return None
    notes = ["The busiest expert's selections over the mean of its modality's, in the worst layer; 1 is even.", *curves.notes()]
    return Figure("fig-balance", "Expert balance", draw(curves.series, "max / mean"), notes)
