"""The figures of a report about runs. Each function gives a Figure, or None where no run has the data.

A new figure is a function here, listed in `figures`. One that only draws a value of the train lines is declared with it, in metrics.schema.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from most_ray.metrics.figures import TITLES
from most_ray.metrics.keys import Curve
from most_ray.metrics.schema import TRAIN
from most_ray.records.record import TASKS
from most_ray.report.collect import RunData, mapping, number, numbers
from most_ray.report.curves import (
    LOOKS,
    SYMBOL_NAMES,
    Curves,
    Figure,
    Series,
    axis,
    base_layout,
    draw,
    label,
    rounded,
    run_colour,
    shade,
    side_by_side,
)
from most_ray.report.expert_figures import expert_balance, expert_load

Runs = Sequence[RunData]
Maker = Callable[[Runs], Figure | None]


def figures(runs: Runs) -> dict[str, list[Figure]]:
    """The figures of each part of the page, in the page's order."""
    parts: dict[str, Sequence[Maker]] = {
        "Training": (losses, *_declared("Training")),
        "Evaluation": (word_errors, character_errors, speech_errors),
        "Speed": (throughput, step_time, *_declared("Speed")),
        "Data": (mix,),
        "Experts": (expert_load, expert_balance),
    }
    return {part: side_by_side([figure for make in makers if (figure := make(runs))]) for part, makers in parts.items()}


def _declared(part: str) -> list[Maker]:
    """The figures that metrics.schema declares for a part."""
    return [partial(curve, key=name, about=key.curve) for name, key in TRAIN.items() if key.curve and key.curve.part == part]


def curve(runs: Runs, key: str, about: Curve) -> Figure | None:
    """A value of the train lines over steps, a curve for each run.

    The declaration's options are those of `draw`, and `smooth`: with a running mean, `log`: with a button for a logarithmic axis.
    """
    curves, options = Curves(), dict(about.options)
    smooth, log = options.pop("smooth", False), options.pop("log", False)
    curves.add_runs(runs, lambda run: run.train.values(key), smooth=smooth)
    if not curves.series:
        return None
    spec = draw(curves.series, about.axis, **options)
    spec["layout"]["showlegend"] = len(runs) > 1
    return Figure(about.id, about.title, spec, curves.notes(), log=log)


def losses(runs: Runs) -> Figure | None:
    """Cross-entropy per supervised token, by task; validation sets as points."""
    curves, several, validated = Curves(), len(runs) > 1, dict[str, None]()
    for task, (shown, task_colour) in LOOKS.items():
        panel, key = shown if several else "", "loss" if task == "total" else f"{task}_loss"
        for index, run in enumerate(runs):
            run_or_task, colour = (run.name, run_colour(index, len(runs))) if several else (shown, task_colour)
            curves.add(panel, run_or_task, colour, run.steps, run.train.values(key), True, index)
            for order, name in enumerate(_sets(run, task)):
                points = [(float(each.step), each.losses[name]) for each in run.evaluations if name in each.losses]
                if points:
                    x, y = zip(*points, strict=True)
                    point_colour, set_name = colour if several else shade(task, order), f"{run_or_task}, {name.split('/', 1)[-1]}"
                    group = run.name if several else ""
                    curves.add_points(Series(panel, set_name, point_colour, x, y, style="points", symbol=order, run=index, group=group))
                    validated |= {f"{SYMBOL_NAMES[order % len(SYMBOL_NAMES)]} {name.split('/', 1)[-1]}": None}
    if not curves.series:
        return None
    notes = ["Cross-entropy per supervised token, in nats, before weighting.", *curves.notes()]
    notes += [f"Points: validation sets{' (' + ', '.join(validated) + ')' if several else ''}."] if validated else []
    return Figure("fig-loss", "Loss", draw(curves.series, "nats per token", height=420, wide=True), notes, wide=True, log=True)


def _sets(run: RunData, task: str) -> list[str]:
    """The evaluated sets of a task, as "task/set"."""
    return sorted({name for evaluation in run.evaluations for name in evaluation.names(task)})


def recognition_errors(runs: Runs, name: str, title: str, what: str) -> Figure | None:
    """An error rate of each ASR set, with intervals."""
    curves = _rate_curves(runs, "asr", {what: ""})
    return Figure(name, title, draw(curves.series, TITLES[what], ".1~%", True), _rate_notes(curves)) if curves.series else None


word_errors = partial(recognition_errors, name="fig-wer", title="Word error rate", what="words")
character_errors = partial(recognition_errors, name="fig-cer", title="Character error rate", what="characters")


def speech_errors(runs: Runs) -> Figure | None:
    """Error rates of synthesised speech: of its units, and of what is recognised in it."""
    curves = _rate_curves(runs, "tts", {what: TITLES[what] for what in ("units", "cycle", "outside")})
    notes = [
        "Unit error rate: against the reference's units. Cycle WER: the model's own transcription of its speech. "
        "Outside WER: the transcription of another recogniser.",
        *_rate_notes(curves),
    ]
    spec = draw(curves.series, "error rate", ".1~%", True)
    return Figure("fig-tts", "Synthesised speech", spec, notes) if curves.series else None


def _rate_notes(curves: Curves) -> list[str]:
    known = any(bound[0] is not None for each in curves.series for bound in each.bounds)
    return ["Bars: 95% intervals from resampling records." if known else "No intervals are known.", *curves.notes()]


def _rate_curves(runs: Runs, task: str, titles: Mapping[str, str]) -> Curves:
    """A curve for each rate of each set of each run. Panels are named by `titles`, and by the set where several runs are compared."""
    curves, several = Curves(), len(runs) > 1
    names = sorted({name for run in runs for name in _sets(run, task)})
    for (what, title), (order, name), (index, run) in itertools.product(titles.items(), enumerate(names), enumerate(runs)):
        found = [(float(each.step), rate) for each in run.evaluations if (rate := each.rate(name, what))]
        if not found:
            continue
        set_name = name.split("/", 1)[-1]
        panel = ", ".join(part for part in (title, set_name if several and (len(names) > 1 or not title) else "") if part)
        curve, colour, symbol = (run.name, run_colour(index, len(runs)), index) if several else (set_name, shade(task, order), order)
        steps, rates = zip(*found, strict=True)
        bounds = [(rate.low, rate.high) for rate in rates]
        curves.add_points(Series(panel, curve, colour, steps, [rate.value for rate in rates], bounds, "marked", symbol, index))
    return curves


def throughput(runs: Runs) -> Figure | None:
    """Tokens per second over all workers."""
    curves = Curves()
    curves.add_runs(runs, lambda run: run.train.values("tokens_per_second"), "tokens per second", smooth=True)
    if not curves.series:
        return None
    spec = draw(curves.series, "tokens/s", "~s", True)
    spec["layout"]["showlegend"] = len(runs) > 1
    return Figure("fig-throughput", "Throughput", spec, ["Over all workers.", *curves.notes()])


def step_time(runs: Runs) -> Figure | None:
    """The time of a step, and the part of it spent waiting for data."""
    curves = Curves()
    curves.add_runs(runs, lambda run: run.train.values("step_time"), "whole step", "#5a84b5", smooth=True)
    curves.add_runs(runs, lambda run: run.train.values("data_wait"), "waiting for data", "#c98a2b", smooth=True)
    if not curves.series:
        return None
    return Figure("fig-step-time", "Time of a step", draw(curves.series, "seconds", from_zero=True), curves.notes(), log=True)


def mix(runs: Runs) -> Figure | None:
    """Each source's share of the training data, next to its target."""
    shares, several = [mix_of(run) for run in runs], len(runs) > 1
    by_task: dict[str, list[str]] = {}
    for name in sorted({name for share in shares for name in share}):
        by_task.setdefault(name.split("/", 1)[0], []).append(name)
    tasks = sorted(by_task, key=lambda task: TASKS.index(task) if task in TASKS else len(TASKS))
    colours = {name: shade(task, index) for task in tasks for index, name in enumerate(by_task[task])}
    if not (names := list(colours)):
        return None
    traces: list[dict[str, Any]] = []
    labels, hover = [label(name) for name in names], "%{y}: %{x:.2%}<extra>%{fullData.name}</extra>"
    targets: list[list[float | None]] = []
    for index, (run, share) in enumerate(zip(runs, shares, strict=True)):
        x, target = ([rounded(share.get(name, (None, None))[side]) for name in names] for side in (0, 1))
        colour = [run_colour(index, len(runs)) if several else colours[name] for name in names]
        name = label(run.name if several else "trained on")
        bars = {"type": "bar", "orientation": "h", "name": name, "showlegend": several, "x": x, "y": labels, "offsetgroup": str(index)}
        text = {"text": ["" if value is None else f"{value:.1%}" for value in x], "insidetextfont": {"color": "#ffffff"}}
        text |= {"textposition": "inside", "insidetextanchor": "start"}
        traces.append({**bars, **text, "hovertemplate": hover, "marker": {"color": colour}})
        if any(value is not None for value in target) and target not in targets[-1:]:
            name = label(f"target, {run.name}" if several and index else "target")
            marker = {"symbol": "line-ns-open", "size": 22, "color": "#7b848f", "line": {"width": 2.5}}
            marks = {"type": "scatter", "mode": "markers", "name": name, "showlegend": True, "x": target, "y": labels}
            traces.append({**marks, "hovertemplate": hover, "marker": marker})
        targets.append(target)
    layout = base_layout(100 + len(names) * (26 + 14 * len(runs))) | {"bargap": 0.3, "barmode": "group", "hovermode": "closest"}
    layout["xaxis"] = axis([0, 1], "y", "share of the training data") | {"tickformat": ".0%", "rangemode": "tozero"}
    layout["yaxis"] = axis([0, 1], "x", "") | {"automargin": True, "autorange": "reversed", "showgrid": False, "ticks": ""}
    notes = ["Up to the last line, counted like the mixing weights: in records or tokens."]
    return Figure("fig-mix", "Mix of sources", {"data": traces, "layout": layout}, notes)


def mix_of(run: RunData) -> dict[str, tuple[float | None, float | None]]:
    """Each source's share of the training data, and its target. Lines that hold plain counts of records give the shares of these."""
    wanted: dict[str, Any] = next((start["wanted_mix"] for start in reversed(run.starts) if isinstance(start.get("wanted_mix"), dict)), {})
    last, counts, found = run.mix, numbers(run.mix), {}
    total = sum(counts.values())
    for name in {**last, **wanted}:
        own = mapping(last.get(name))
        share = number(own.get("share")) if own else counts[name] / total if name in counts and total else None
        target = number(wanted.get(name))
        found[str(name)] = (share, number(own.get("target")) if target is None else target)
    return found
