"""The figures of a report about a sweep. Each function gives a Figure, or None where no trial has the data.

`best_first` are the trials that have a value of the objective, the best first.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from most_ray.metrics.figures import RATES
from most_ray.metrics.texts import percent
from most_ray.report.collect import entries, mapping, number
from most_ray.report.curves import MODALITY_COLOURS, RUN_COLOURS, Figure, axis, base_layout, error_bars, label, rounded
from most_ray.sweep.effects import level_name
from most_ray.sweep.ledger import Objective, Result, Trial
from most_ray.sweep.space import Dimension

IN_COLOUR = 5  # how many of the best trials have a colour; the others are grey
_PLAIN, _GREY = "#5a84b5", "#8d959e"
_BY_RANK = ("#15929b", "#6ba3a8", "#9aa2ab", "#c98791", "#cf4a60")  # fifths of the trials, the best first
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross")
_COLOURED_BY = "expert_split"  # the setting whose values have colours in the small figures
_LONGEST = 16  # characters of a tick label: as many as fit between two axes
_MOST_TICKS = 12  # of an axis of categories

Trials = Sequence[Trial]
Results = Sequence[tuple[Trial, Result]]
Point = tuple[float | None, float | None, str]  # x, y, text shown when hovering
_GAP: Point = (None, None, "")  # interrupts a line


@dataclass(frozen=True)
class Scale:
    """An axis from 0 to 1 for the values of a setting or an objective."""

    title: str
    position: Callable[[Trial], float | None]  # of a trial on the axis
    ticks: Sequence[tuple[float, str]]  # positions and labels
    text: Callable[[Trial], str]  # a trial's value


def last(trial: Trial, metric: str) -> Result | None:
    """The trial's newest result that has the metric."""
    return next((result for result in reversed(trial.results) if metric in result.metrics), None)


def is_rate(metric: str) -> bool:
    """Whether a metric is an error rate, which is shown in percent."""
    return metric.split("/", 1)[0] in RATES.values()


def shown(metric: str, value: float) -> str:
    """A metric's value: rates in percent, others with four significant digits."""
    return percent(value) if is_rate(metric) else f"{value:.4g}"


def direction(objective: Objective) -> str:
    """Which values of an objective are better, in words."""
    return "larger is better" if objective.largest else "smaller is better"


def progress(best_first: Trials, objective: Objective) -> Figure | None:
    """The objective over steps, a line for each trial."""
    if not best_first:
        return None
    traces = []
    for rank, trial in reversed(list(enumerate(best_first[:IN_COLOUR]))):  # the best on top
        width, size = (1.7, 5) if rank else (3.2, 7)
        points = _history([trial], objective.metric, best_first)
        traces.append(_trace(points, RUN_COLOURS[rank], width, size, f"trial {trial.number}"))
    if rest := best_first[IN_COLOUR:]:
        traces.insert(0, _trace(_history(rest, objective.metric, best_first), _GREY, 0.9, 3, f"{len(rest)} others") | {"opacity": 0.55})
    layout = base_layout(400) | {"hovermode": "closest", "showlegend": True}
    layout["legend"]["traceorder"] = "reversed"
    reach = max(result.step for trial in best_first for result in trial.results)
    layout["xaxis"] = axis([0, 1], "y", "step") | {"showgrid": False, "range": [0, 1.02 * reach or 1]}
    layout["yaxis"] = _values_axis(objective, "x")
    notes = [f"At the steps that were evaluated; {direction(objective)}. Trials that failed are left out."]
    return Figure("fig-progress", str(objective), {"data": traces, "layout": layout}, notes, wide=True, log=True)


def _history(trials: Trials, metric: str, everywhere: Trials) -> list[Point]:
    """A line for each run of each trial, with gaps between them; a run that continued another trial's starts at that one's result."""
    known = {(result.run, result.step): result.metrics.get(metric) for trial in everywhere for result in trial.results}
    points: list[Point] = []
    for trial in trials:
        for run, parent in zip(trial.runs, map(mapping, trial.parents), strict=True):
            step = number(parent.get("step"))
            before = known.get((str(parent.get("run")), int(step or 0)))
            line = [(step, before, f"trial {trial.number} continued from trial {parent.get('trial')}")] if before is not None else []
            for result in trial.results:
                if result.run == run and metric in result.metrics:
                    value = result.metrics[metric]
                    line.append((result.step, value, f"trial {trial.number}, step {result.step:,}: {shown(metric, value)}"))
            points += [_GAP, *line]
    return points[1:]


def _trace(points: Sequence[Point], colour: str, width: float, size: float, name: str = "") -> dict[str, Any]:
    """Points with texts, joined by lines of this width (0: not joined) except at gaps."""
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
    """Parallel coordinates: all dimensions and the objective side by side, a line for each trial, coloured by its rank.

    They are drawn as curves: plotly's own `parcoords` compiles code at run time, which the page's Content-Security-Policy forbids, and
    needs WebGL, which does not print.
    """
    if not best_first or not dimensions:
        return None
    scales = [*(_scale(dimension, best_first) for dimension in dimensions), _objective_scale(objective, best_first)]
    groups: list[list[Trial]] = [[] for _ in _BY_RANK]
    for rank, trial in enumerate(best_first[1:], 1):
        groups[rank * len(_BY_RANK) // len(best_first)].append(trial)
    traces = [
        _trace(_paths(group, scales), colour, 1.3, 4) | {"opacity": 0.75}
        for group, colour in zip(groups[::-1], _BY_RANK[::-1], strict=True)
        if group
    ]
    traces.append(_trace(_paths(best_first[:1], scales), _BY_RANK[0], 3.4, 8))
    layout = base_layout(400) | {"hovermode": "closest", "showlegend": False, "shapes": [], "annotations": []}
    layout["margin"] = {"l": 30, "r": 40, "t": 54, "b": 18}
    hidden = {"visible": False, "fixedrange": True}
    layout["xaxis"], layout["yaxis"] = {**hidden, "range": [-0.35, len(scales) - 0.85]}, {**hidden, "range": [-0.03, 1.03]}
    for index, scale in enumerate(scales):
        upright = {"type": "line", "layer": "below", "x0": index, "x1": index, "y0": 0, "y1": 1}
        layout["shapes"].append(upright | {"line": {"color": _GREY, "width": 1}})
        above = {"x": index, "y": 1, "yshift": 10, "yanchor": "bottom", "showarrow": False}
        layout["annotations"].append(above | {"text": f"<b>{_wrapped(scale.title)}</b>", "font": {"size": 12}})
        for position, text in scale.ticks:
            beside = {"x": index, "y": position, "xanchor": "right", "xshift": -6, "showarrow": False, "borderpad": 1}
            layout["annotations"].append(beside | {"text": _cut(text), "font": {"size": 11}, "bgcolor": "#ffffff"})
    keys = [(_BY_RANK[0], "best fifth of the trials (thick: the best)"), (_BY_RANK[2], "middle"), (_BY_RANK[-1], "worst fifth")]
    notes = [f"A line is a trial, with its last value of {objective.metric} ({direction(objective)}) on the right."]
    return Figure("fig-parallel", "All settings together", {"data": traces, "layout": layout}, notes, keys, wide=True)


def _paths(trials: Trials, scales: Sequence[Scale]) -> list[Point]:
    """A line across all scales for each trial."""
    points: list[Point] = []
    for trial in trials:
        for index, scale in enumerate(scales):
            points.append((float(index), scale.position(trial), f"trial {trial.number}, {scale.title}: {scale.text(trial)}"))
        points.append(_GAP)
    return points


def _scale(dimension: Dimension, trials: Trials) -> Scale:
    """A dimension's axis: its values at equal distances, or its range, logarithmic where the sweep samples it so."""
    tried = [trial.values[dimension.name] for trial in trials if dimension.name in trial.values]
    if dimension.values:
        names = list(dict.fromkeys(map(level_name, (*dimension.values, *tried))))
        positions = {name: (index + 0.5) / len(names) for index, name in enumerate(names)}
        every = math.ceil(len(names) / _MOST_TICKS)
        ticks = [(position, name) for name, position in list(positions.items())[::every]]

        def position(trial: Trial) -> float | None:
            return positions[level_name(trial.values[dimension.name])] if dimension.name in trial.values else None

    else:
        log = dimension.kind == "loguniform" and dimension.low > 0
        known = [value for value in map(number, tried) if value is not None and (value > 0 or not log)]
        low, high = min([dimension.low, *known]), max([dimension.high, *known])
        ticks = [(_share(value, low, high, log), level_name(value)) for value in _round_values(low, high, log, dimension.kind == "randint")]

        def position(trial: Trial) -> float | None:
            value = number(trial.values.get(dimension.name))
            return None if value is None or (log and value <= 0) else _share(value, low, high, log)

    return Scale(dimension.name, position, ticks, lambda trial: level_name(trial.values.get(dimension.name)))


def _objective_scale(objective: Objective, trials: Trials) -> Scale:
    values = [value for trial in trials if (value := trial.metric(objective.metric)) is not None]
    low, high = min(values), max(values)
    unit, sign = (100, "%") if is_rate(objective.metric) else (1, "")
    ticks = [(_share(value, low, high, False), f"{unit * value:.4g}{sign}") for value in _round_values(low, high, False)]

    def position(trial: Trial) -> float | None:
        value = trial.metric(objective.metric)
        return None if value is None else _share(value, low, high, False)

    return Scale(objective.metric, position, ticks, lambda trial: shown(objective.metric, trial.metric(objective.metric) or 0.0))


def _share(value: float, low: float, high: float, log: bool) -> float:
    """Where a value is between two others, from 0 to 1."""
    if low == high:
        return 0.5
    if log:
        value, low, high = math.log10(value), math.log10(low), math.log10(high)
    return (value - low) / (high - low)


def _round_values(low: float, high: float, log: bool, whole: bool = False) -> list[float]:
    """Three to eight round numbers from low to high; low and high themselves where there are none."""
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
    """A setting's name in lines, broken after its underscores."""
    lines = textwrap.wrap(name.replace("_", "_ ").replace("/", "/ "), 15, break_long_words=False, break_on_hyphens=False)
    return "<br>".join(_cut(line.replace("_ ", "_").replace("/ ", "/")) for line in lines[:3])


def against(best_first: Trials, dimensions: Sequence[Dimension], objective: Objective) -> list[Figure]:
    """The objective's last value against each dimension, all with the same vertical axis."""
    results = [(trial, result) for trial in best_first if (result := last(trial, objective.metric))]
    groups = _groups(results, dimensions)
    bounds = [bound for _, result in results for bound in (result.metrics[objective.metric], *result.intervals.get(objective.metric, ()))]
    figures = []
    for index, dimension in enumerate(dimensions if results else ()):
        scale = _scale(dimension, best_first)
        traces = [_marks(members, scale, objective.metric, colour, symbol) for _, colour, symbol, members in groups]
        layout = base_layout(250) | {"hovermode": "closest", "showlegend": False}
        layout["margin"] |= {"t": 12, "l": 56, "b": 8}
        layout["xaxis"] = axis([0, 1], "y", "") | {"showgrid": False, "range": [-0.06, 1.06], "automargin": True}
        layout["xaxis"] |= {"autotickangles": [0, -30, -60]}
        layout["xaxis"] |= {"tickvals": [position for position, _ in scale.ticks], "ticktext": [_cut(text) for _, text in scale.ticks]}
        layout["yaxis"] = _values_axis(objective, "x")
        if max(bounds) > min(bounds):
            pad = 0.05 * (max(bounds) - min(bounds))
            layout["yaxis"]["range"] = [rounded(min(bounds) - pad), rounded(max(bounds) + pad)]
        figures.append(Figure(f"fig-against-{index + 1}", dimension.name, {"data": traces, "layout": layout}, log=True))
    return figures


def split_keys(best_first: Trials, dimensions: Sequence[Dimension]) -> list[tuple[str, str]]:
    """Colours of `against` and their meaning; empty where there is one colour only."""
    groups = _groups([(trial, trial.results[-1]) for trial in best_first], dimensions)
    return [(colour, name) for name, colour, _, _ in groups if name]


def _groups(results: Results, dimensions: Sequence[Dimension]) -> list[tuple[str, str, str, Results]]:
    """(name, colour, symbol, members): trials by the split of their experts; one group without a name where the sweep does not vary it."""
    dimension = next((each for each in dimensions if each.name == _COLOURED_BY), None)
    if dimension is None:
        return [("", _PLAIN, "circle", results)]
    names = list(dict.fromkeys(map(level_name, (*dimension.values, *(trial.values.get(_COLOURED_BY) for trial, _ in results)))))
    return [
        (name, RUN_COLOURS[index % len(RUN_COLOURS)], _SYMBOLS[index % len(_SYMBOLS)], members)
        for index, name in enumerate(names)
        if (members := [pair for pair in results if level_name(pair[0].values.get(_COLOURED_BY)) == name])
    ]


def _marks(members: Results, scale: Scale, metric: str, colour: str, symbol: str) -> dict[str, Any]:
    """Trials on a dimension's axis with the intervals of their results; those that are not finished have open marks."""
    points: list[Point] = []
    for trial, result in members:
        value, bounds = result.metrics[metric], interval(metric, result.intervals.get(metric))
        points.append((scale.position(trial), value, f"trial {trial.number}, {scale.text(trial)}: {shown(metric, value)} {bounds}"))
    bars = error_bars([y for _, y, _ in points], [result.intervals.get(metric, (None, None)) for _, result in members], colour, 1, 2)
    trace = _trace(points, colour, 0, 8) | bars
    trace["marker"]["symbol"] = [_symbol(trial, symbol) for trial, _ in members]
    return trace


def _symbol(trial: Trial, symbol: str = "circle") -> str:
    return symbol if trial.state == "finished" else f"{symbol}-open"


def interval(metric: str, bounds: tuple[float, float] | None) -> str:
    """A 95% interval as text; empty where it is unknown."""
    return f"[{', '.join(shown(metric, bound) for bound in bounds)}]" if bounds else ""


def front(trials: Trials, best: Trials, objectives: Sequence[Objective]) -> Figure | None:
    """The first two objectives against each other; `best` are the trials of the Pareto front."""
    first, second = objectives[:2]
    groups: tuple[list[Trial], list[Trial]] = ([], [])
    points: tuple[list[Point], list[Point]] = ([], [])
    for trial in (*(trial for trial in trials if trial not in best), *best):
        x, y = trial.metric(first.metric), trial.metric(second.metric)
        if x is not None and y is not None:
            text = f"trial {trial.number}: {first.metric} {shown(first.metric, x)}, {second.metric} {shown(second.metric, y)}"
            groups[trial in best].append(trial)
            points[trial in best].append((x, y, text))
    line = 1.2 if len(objectives) == 2 else 0  # with three objectives, the front is not a line in two of them
    looks = ((_GREY, 0.0, 8, "others"), (RUN_COLOURS[0], line, 11, "Pareto front"))
    traces = [_trace(found, *look) for found, look in zip(points, looks, strict=True) if found]
    for trace, members in zip(traces, filter(None, groups), strict=True):
        trace["marker"]["symbol"] = [_symbol(trial) for trial in members]
        trace["line"]["dash"] = "dot"
    if not traces:
        return None
    layout = base_layout(380) | {"hovermode": "closest", "showlegend": True}
    layout["xaxis"], layout["yaxis"] = _values_axis(first, "y"), _values_axis(second, "x")
    notes = [f"{first.metric}: {direction(first)}; {second.metric}: {direction(second)}. Open marks: stopped early or not finished yet."]
    return Figure("fig-front", "Two objectives", {"data": traces, "layout": layout}, notes, wide=True)


def text_share(affinity: dict[str, Any]) -> Figure | None:
    """Each expert's share of the text tokens' selections in the starting model, in the order of the split in affinity.json."""
    share = [number(entry) or 0.0 for entry in entries(affinity.get("share"))]
    order = [int(found) for entry in entries(affinity.get("order")) if (found := number(entry)) is not None]
    if not share or sorted(order) != list(range(len(share))):
        return None
    bars = {
        "type": "bar",
        "x": [str(expert) for expert in order],
        "y": [rounded(share[expert]) for expert in order],
        "marker": {"color": MODALITY_COLOURS["text"]},
        "hovertext": [f"expert {expert}: {share[expert]:.2%}, rank {rank}" for rank, expert in enumerate(order, 1)],
        "hoverinfo": "text",
    }
    even = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 1 / len(share), "y1": 1 / len(share)}
    layout = base_layout(260) | {"hovermode": "closest", "showlegend": False, "bargap": 0.2}
    layout["shapes"] = [even | {"line": {"color": _GREY, "width": 1.5, "dash": "dot"}}]
    layout["margin"]["t"] = 14
    layout["xaxis"] = axis([0, 1], "y", "expert, the most used by text first") | {"type": "category", "showgrid": False, "automargin": True}
    layout["yaxis"] = axis([0, 1], "x", "share of text's selections") | {"tickformat": ".1~%", "rangemode": "tozero", "automargin": True}
    notes = ["In the starting model, mean over layers; dotted: an even share. The split `affinity` gives audio the experts on the right."]
    return Figure("fig-text-share", "Experts that text uses", {"data": [bars], "layout": layout}, notes, wide=True)
