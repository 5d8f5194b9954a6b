"""The figures of a sweep. Each function gives a Figure, or None where there is nothing to show in it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from most_ray.report.collect import entries, mapping, number
from most_ray.report.curves import MODALITY_COLOURS, RUN_COLOURS, Figure, as_json, axis, base_layout, label, rounded
from most_ray.sweep.effects import level_name
from most_ray.sweep.ledger import Objective, Result, Trial
from most_ray.sweep.space import Dimension

IN_COLOUR = 5  # of the best trials; the others are grey
_PLAIN, _GREY = "#5a84b5", "#8d959e"
_BY_RANK = ("#15929b", "#6ba3a8", "#9aa2ab", "#c98791", "#cf4a60")  # fifths of the trials, the best first
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross")
_COLOURED_BY = "expert_split"
_RATES = ("wer", "cer", "unit_error_rate", "cycle_wer", "outside_wer")
_LONGEST = 16  # characters of a tick: what there is room for between two axes
_MOST_TICKS = 12

Trials = Sequence[Trial]
Point = tuple[float | None, float | None, str]  # x, y, what hovering says
_GAP: Point = (None, None, "")


@dataclass(frozen=True)
class Scale:
    """An axis from 0 to 1: where a trial stands, what is written where, and what hovering says of it."""

    title: str
    place: Callable[[Trial], float | None]
    ticks: Sequence[tuple[float, str]]
    says: Callable[[Trial], str]


def last(trial: Trial, metric: str) -> Result | None:
    """The trial's newest result that has the metric."""
    return next((result for result in reversed(trial.results) if metric in result.metrics), None)


def is_rate(metric: str) -> bool:
    return metric.split("/", 1)[0] in _RATES


def shown(metric: str, value: float) -> str:
    """A metric's value: rates in percent, others with four significant digits."""
    if not is_rate(metric):
        return f"{value:.4g}"
    return f"{value:.2%}" if abs(value) < 0.1 else f"{value:.1%}"


def direction(objective: Objective) -> str:
    return "larger is better" if objective.largest else "smaller is better"


def progress(best_first: Trials, objective: Objective) -> Figure | None:
    """The objective over steps, a line for each trial; `best_first` are those that have a value."""
    if not best_first:
        return None
    traces = []
    for place, trial in reversed(list(enumerate(best_first[:IN_COLOUR]))):  # the best on top
        width, size = (1.7, 5) if place else (3.2, 7)
        points = _history([trial], objective.metric, best_first)
        traces.append(_trace(points, RUN_COLOURS[place], width, size, f"trial {trial.number}"))
    if rest := best_first[IN_COLOUR:]:
        traces.insert(0, _trace(_history(rest, objective.metric, best_first), _GREY, 0.9, 3, f"{len(rest)} others") | {"opacity": 0.55})
    shape = base_layout(400) | {"hovermode": "closest", "showlegend": True}
    shape["legend"]["traceorder"] = "reversed"
    reach = max(result.step for trial in best_first for result in trial.results)
    shape["xaxis"] = axis([0, 1], "y", "step") | {"showgrid": False, "range": [0, 1.02 * reach or 1]}
    shape["yaxis"] = _values_axis(objective, "x")
    notes = [f"At the steps that were evaluated; {direction(objective)}. Trials that failed are left out."]
    return Figure("fig-progress", str(objective), as_json(traces, shape), notes, wide=True, log=True)


def _history(trials: Trials, metric: str, everywhere: Trials) -> list[Point]:
    """A line for each run of each trial, with gaps between them; where it went on from another run, from that one's result on."""
    known = {(result.run, result.step): result.metrics.get(metric) for trial in everywhere for result in trial.results}
    points: list[Point] = []
    for trial in trials:
        for run, parent in zip(trial.runs, map(mapping, trial.parents), strict=True):
            step = number(parent.get("step"))
            before = known.get((str(parent.get("run")), int(step or 0)))
            line = [(step, before, f"trial {trial.number} went on from trial {parent.get('trial')}")] if before is not None else []
            for result in trial.results:
                if result.run == run and metric in result.metrics:
                    value = result.metrics[metric]
                    line.append((result.step, value, f"trial {trial.number}, step {result.step:,}: {shown(metric, value)}"))
            points += [_GAP, *line]
    return points[1:]


def _trace(points: Sequence[Point], colour: str, width: float, size: float, name: str = "") -> dict[str, Any]:
    """Points that say their text; joined by lines, but for gaps, where these have a width."""
    return {
        "type": "scatter",
        "mode": "lines+markers" if width else "markers",
        "name": label(name),
        "x": [rounded(x) for x, _, _ in points],
        "y": [rounded(y) for _, y, _ in points],
        "hovertext": [label(text) for _, _, text in points],
        "hoverinfo": "text",
        "line": {"color": colour, "width": width},
        "marker": {"color": colour, "size": size},
    }


def _values_axis(objective: Objective, anchor: str) -> dict[str, Any]:
    form = {"tickformat": ".1~%"} if is_rate(objective.metric) else {}
    return axis([0, 1], anchor, objective.metric) | {"automargin": True} | form


def parallel(best_first: Trials, dimensions: Sequence[Dimension], objective: Objective) -> Figure | None:
    """All dimensions and the objective side by side, a line for each trial, coloured by its rank.

    Drawn as curves: plotly's own `parcoords` compiles code as it runs, which the page's policy forbids, and needs WebGL, which does not
    print.
    """
    if not best_first or not dimensions:
        return None
    scales = [*(_scale(dimension, best_first) for dimension in dimensions), _objective_scale(objective, best_first)]
    fifth = len(_BY_RANK)
    groups: list[list[Trial]] = [[] for _ in _BY_RANK]
    for rank, trial in enumerate(best_first[1:], 1):
        groups[rank * fifth // len(best_first)].append(trial)
    traces = [
        _trace(_paths(group, scales), colour, 1.3, 4) | {"opacity": 0.75}
        for group, colour in zip(groups[::-1], _BY_RANK[::-1], strict=True)
        if group
    ]
    traces.append(_trace(_paths(best_first[:1], scales), _BY_RANK[0], 3.4, 8))
    shape = base_layout(400) | {"hovermode": "closest", "showlegend": False, "shapes": [], "annotations": []}
    shape["margin"] = {"l": 30, "r": 40, "t": 54, "b": 18}
    hidden = {"visible": False, "fixedrange": True}
    shape["xaxis"], shape["yaxis"] = {**hidden, "range": [-0.35, len(scales) - 0.85]}, {**hidden, "range": [-0.03, 1.03]}
    for index, scale in enumerate(scales):
        upright = {"type": "line", "layer": "below", "x0": index, "x1": index, "y0": 0, "y1": 1}
        shape["shapes"].append(upright | {"line": {"color": _GREY, "width": 1}})
        above = {"x": index, "y": 1, "yshift": 10, "yanchor": "bottom", "showarrow": False}
        shape["annotations"].append(above | {"text": f"<b>{_wrapped(scale.title)}</b>", "font": {"size": 12}})
        for place, text in scale.ticks:
            beside = {"x": index, "y": place, "xanchor": "right", "xshift": -6, "showarrow": False, "borderpad": 1}
            shape["annotations"].append(beside | {"text": _cut(text), "font": {"size": 11}, "bgcolor": "#ffffff"})
    keys = [(_BY_RANK[0], "best fifth of the trials (thick: the best)"), (_BY_RANK[2], "middle"), (_BY_RANK[-1], "worst fifth")]
    notes = [f"A line is a trial, with its last value of {objective.metric} ({direction(objective)}) on the right."]
    return Figure("fig-parallel", "All settings together", as_json(traces, shape), notes, keys, wide=True)


def _paths(trials: Trials, scales: Sequence[Scale]) -> list[Point]:
    """A line over all scales for each trial."""
    points: list[Point] = []
    for trial in trials:
        said = [f"trial {trial.number}, {scale.title}: {scale.says(trial)}" for scale in scales]
        points += [*((float(index), scale.place(trial), said[index]) for index, scale in enumerate(scales)), _GAP]
    return points


def _scale(dimension: Dimension, trials: Trials) -> Scale:
    tried = [trial.values[dimension.name] for trial in trials if dimension.name in trial.values]
    if dimension.values:
        names = list(dict.fromkeys(map(level_name, (*dimension.values, *tried))))
        places = {name: (index + 0.5) / len(names) for index, name in enumerate(names)}
        every = math.ceil(len(names) / _MOST_TICKS)
        ticks = [(place, name) for name, place in list(places.items())[::every]]

        def place(trial: Trial) -> float | None:
            return places[level_name(trial.values[dimension.name])] if dimension.name in trial.values else None

    else:
        log = dimension.kind == "loguniform" and dimension.low > 0
        known = [value for value in map(number, tried) if value is not None and (value > 0 or not log)]
        low, high = min([dimension.low, *known]), max([dimension.high, *known])
        ticks = [(_share(value, low, high, log), level_name(value)) for value in _round_values(low, high, log, dimension.kind == "randint")]

        def place(trial: Trial) -> float | None:
            value = number(trial.values.get(dimension.name))
            return None if value is None or (log and value <= 0) else _share(value, low, high, log)

    return Scale(dimension.name, place, ticks, lambda trial: level_name(trial.values.get(dimension.name)))


def _objective_scale(objective: Objective, trials: Trials) -> Scale:
    values = [value for trial in trials if (value := trial.metric(objective.metric)) is not None]
    low, high = min(values), max(values)
    unit, sign = (100, "%") if is_rate(objective.metric) else (1, "")
    ticks = [(_share(value, low, high, False), f"{unit * value:.4g}{sign}") for value in _round_values(low, high, False)]

    def place(trial: Trial) -> float | None:
        value = trial.metric(objective.metric)
        return None if value is None else _share(value, low, high, False)

    return Scale(objective.metric, place, ticks, lambda trial: shown(objective.metric, trial.metric(objective.metric) or 0.0))


def _share(value: float, low: float, high: float, log: bool) -> float:
    if low == high:
        return 0.5
    if log:
        value, low, high = math.log10(value), math.log10(low), math.log10(high)
    return (value - low) / (high - low)


def _round_values(low: float, high: float, log: bool, whole: bool = False) -> list[float]:
    """Three to eight round numbers from low to high; the two themselves where there are no such."""
    if low == high:
        return [low]
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        every = math.ceil(len(decades) / 7)
        for factors in ((1,), (1, 3), (1, 2, 5)):
            found = [factor * 10.0**decade for decade in decades[::every] for factor in factors]
            found = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
            if len(found) > 2:
                return found
        return [low, high]
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = max(next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= 0.999 * rough), float(whole))
    step = math.ceil(step) if whole else step
    first, final = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, final + 1)]


def _cut(text: str) -> str:
    return label(text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…")


def _wrapped(name: str) -> str:
    """A setting's name, broken behind its underscores."""
    lines = textwrap.wrap(name.replace("_", "_ ").replace("/", "/ "), 15, break_long_words=False, break_on_hyphens=False)
    return "<br>".join(_cut(line.replace("_ ", "_").replace("/ ", "/")) for line in lines[:3])


def against(best_first: Trials, dimensions: Sequence[Dimension], objective: Objective) -> list[Figure]:
    """The objective's last value against each dimension, all on one scale."""
    results = [(trial, result) for trial in best_first if (result := last(trial, objective.metric))]
    groups = _groups(results, dimensions)
    bounds = [bound for _, result in results for bound in (result.metrics[objective.metric], *result.intervals.get(objective.metric, ()))]
    figures = []
    for index, dimension in enumerate(dimensions if results else ()):
        scale = _scale(dimension, best_first)
        traces = [_marks(members, scale, objective.metric, colour, symbol) for _, colour, symbol, members in groups]
        shape = base_layout(250) | {"hovermode": "closest", "showlegend": False}
        shape["margin"] |= {"t": 12, "l": 56, "b": 8}
        shape["xaxis"] = axis([0, 1], "y", "") | {
            "showgrid": False,
            "range": [-0.06, 1.06],
            "automargin": True,
            "autotickangles": [0, -30, -60],
        }
        shape["xaxis"] |= {"tickvals": [place for place, _ in scale.ticks], "ticktext": [_cut(text) for _, text in scale.ticks]}
        shape["yaxis"] = _values_axis(objective, "x")
        if max(bounds) > min(bounds):
            pad = 0.05 * (max(bounds) - min(bounds))
            shape["yaxis"]["range"] = [rounded(min(bounds) - pad), rounded(max(bounds) + pad)]
        figures.append(Figure(f"fig-against-{index + 1}", dimension.name, as_json(traces, shape), log=True))
    return figures


def split_keys(best_first: Trials, dimensions: Sequence[Dimension]) -> list[tuple[str, str]]:
    """What the colours of `against` stand for; empty where they are all the same."""
    groups = _groups([(trial, trial.results[-1]) for trial in best_first], dimensions)
    return [(colour, name) for name, colour, _, _ in groups if name]


def _groups(
    results: Sequence[tuple[Trial, Result]], dimensions: Sequence[Dimension]
) -> list[tuple[str, str, str, list[tuple[Trial, Result]]]]:
    """(name, colour, symbol, members): trials by the split of their experts; one group without a name where that is no dimension."""
    dimension = next((each for each in dimensions if each.name == _COLOURED_BY), None)
    if dimension is None:
        return [("", _PLAIN, "circle", list(results))]
    names = list(dict.fromkeys(map(level_name, (*dimension.values, *(trial.values.get(_COLOURED_BY) for trial, _ in results)))))
    return [
        (name, RUN_COLOURS[index % len(RUN_COLOURS)], _SYMBOLS[index % len(_SYMBOLS)], members)
        for index, name in enumerate(names)
        if (members := [pair for pair in results if level_name(pair[0].values.get(_COLOURED_BY)) == name])
    ]


def _marks(members: Sequence[tuple[Trial, Result]], scale: Scale, metric: str, colour: str, symbol: str) -> dict[str, Any]:
    points: list[Point] = []
    above, below = [], []
    for trial, result in members:
        value, (low, high) = result.metrics[metric], _bounds(result, metric)
        text = f"trial {trial.number}, {scale.says(trial)}: {shown(metric, value)} {interval(result, metric)}"
        points.append((scale.place(trial), value, text))
        above.append(rounded(max(0.0, high - value)))
        below.append(rounded(max(0.0, value - low)))
    trace = _trace(points, colour, 0, 8)
    trace["marker"]["symbol"] = [_symbol(trial, symbol) for trial, _ in members]
    if any((*above, *below)):
        trace["error_y"] = {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1, "width": 2}
        trace["error_y"]["color"] = colour
    return trace


def _symbol(trial: Trial, symbol: str = "circle") -> str:
    return symbol if trial.state == "finished" else f"{symbol}-open"


def _bounds(result: Result, metric: str) -> tuple[float, float]:
    value = result.metrics[metric]
    return result.intervals.get(metric, (value, value))


def interval(result: Result, metric: str) -> str:
    """The 95% interval of a result's metric as text; empty where it is not known."""
    return f"[{', '.join(shown(metric, bound) for bound in result.intervals[metric])}]" if metric in result.intervals else ""


def front(trials: Trials, best: Trials, objectives: Sequence[Objective]) -> Figure | None:
    """The first two objectives against each other; `best` are those that no other trial beats."""
    first, second = objectives[:2]
    groups: tuple[list[Trial], list[Trial]] = ([], [])
    points: tuple[list[Point], list[Point]] = ([], [])
    for trial in (*(trial for trial in trials if trial not in best), *best):
        x, y = trial.metric(first.metric), trial.metric(second.metric)
        if x is not None and y is not None:
            text = f"trial {trial.number}: {first.metric} {shown(first.metric, x)}, {second.metric} {shown(second.metric, y)}"
            groups[trial in best].append(trial)
            points[trial in best].append((x, y, text))
    line = 1.2 if len(objectives) == 2 else 0  # of three objectives the front is no line in two of them
    looks = ((_GREY, 0.0, 8, "others"), (RUN_COLOURS[0], line, 11, "Pareto front"))
    traces = []
    for members, places, (colour, width, size, name) in zip(groups, points, looks, strict=True):
        if members:
            traces.append(_trace(places, colour, width, size, name))
            traces[-1]["marker"]["symbol"] = [_symbol(trial) for trial in members]
            traces[-1]["line"]["dash"] = "dot"
    if not traces:
        return None
    shape = base_layout(380) | {"hovermode": "closest", "showlegend": True}
    shape["xaxis"], shape["yaxis"] = _values_axis(first, "y"), _values_axis(second, "x")
    notes = [
        f"{first.metric}: {direction(first)}; {second.metric}: {direction(second)}. Open marks: stopped early, or not at their end yet."
    ]
    return Figure("fig-front", "Two objectives", as_json(traces, shape), notes, wide=True)


def text_share(affinity: dict[str, Any]) -> Figure | None:
    """How much of the text each expert carries in the starting model, in the order that affinity gives them to text."""
    share = [value if (value := number(entry)) is not None else 0.0 for entry in entries(affinity.get("share"))]
    order = [int(found) for entry in entries(affinity.get("order")) if (found := number(entry)) is not None]
    if not share or sorted(order) != list(range(len(share))):
        return None
    bars = {
        "type": "bar",
        "x": [str(expert) for expert in order],
        "y": [rounded(share[expert]) for expert in order],
        "marker": {"color": MODALITY_COLOURS["text"]},
        "hovertext": [f"expert {expert}: {share[expert]:.2%}, place {place}" for place, expert in enumerate(order, 1)],
        "hoverinfo": "text",
    }
    even = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 1 / len(share), "y1": 1 / len(share)}
    shape = base_layout(260) | {"hovermode": "closest", "showlegend": False, "bargap": 0.2}
    shape["shapes"] = [even | {"line": {"color": _GREY, "width": 1.5, "dash": "dot"}}]
    shape["margin"]["t"] = 14
    shape["xaxis"] = axis([0, 1], "y", "expert, the most used by text first") | {"type": "category", "showgrid": False, "automargin": True}
    shape["yaxis"] = axis([0, 1], "x", "share of text's selections") | {"tickformat": ".1~%", "rangemode": "tozero", "automargin": True}
    notes = ["In the starting model, mean over layers; dotted: an even share. The split `affinity` gives audio the experts on the right."]
    return Figure("fig-text-share", "What text uses", as_json([bars], shape), notes, wide=True)
