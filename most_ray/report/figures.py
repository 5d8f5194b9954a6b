"""The figures of one run or several. Each function gives a Figure, or None where no run has what it shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from most_ray.records.record import TASKS
from most_ray.report.collect import RunData, entries, mapping, number
from most_ray.report.curves import (
    TASK_COLOURS,
    TASK_NAMES,
    Curves,
    Figure,
    Series,
    as_json,
    axis,
    base_layout,
    draw,
    label,
    rounded,
    run_colour,
    shade,
)
from most_ray.report.expert_figures import expert_balance, expert_load

Runs = Sequence[RunData]


def figures(runs: Runs) -> dict[str, list[Figure]]:
    """By the page's parts, those that there is something to show in."""
    parts: dict[str, Sequence[Callable[[Runs], Figure | None]]] = {
        "Loss": (losses, learning_rate, gradient_norm),
        "Evaluation": (word_errors, character_errors, speech_errors),
        "Speed": (throughput, step_time, utilisation, memory),
        "Data": (mix,),
        "Experts": (expert_load, expert_balance),
    }
    made = {part: [figure for make in makers if (figure := make(runs))] for part, makers in parts.items()}
    return {part: found for part, found in made.items() if found}


def losses(runs: Runs) -> Figure | None:
    """Cross-entropy per supervised token, by task; validation as points."""
    curves, several, points = Curves(), len(runs) > 1, False
    for task, key in [("total", "loss"), *((task, f"{task}_loss") for task in TASKS)]:
        for index, run in enumerate(runs):
            colour = run_colour(index, len(runs)) if several else TASK_COLOURS[task]
            curves.add(
                TASK_NAMES[task] if several else "", run.name if several else TASK_NAMES[task], colour, run.steps, run.column(key), True
            )
            for place, name in enumerate(_sets(run, task)):
                shown = f"{run.name if several else TASK_NAMES[task]}, {_bare(name)}"
                judged = [evaluation for evaluation in run.evaluations if name in evaluation.losses]
                if not judged:
                    continue
                x, y = [float(each.step) for each in judged], [each.losses[name] for each in judged]
                panel = TASK_NAMES[task] if several else ""
                curves.series.append(Series(panel, shown, colour if several else shade(task, place), x, y, style="points", symbol=place))
                points = True
    if not curves.series:
        return None
    notes = ["Cross-entropy per supervised token, in nats, before weighting.", *curves.notes()]
    notes += ["Points: validation sets."] if points else []
    return Figure("fig-loss", "Loss", draw(curves.series, "nats per token", height=420), notes, wide=True, log=True)


def word_errors(runs: Runs) -> Figure | None:
    return _rates(runs, "fig-wer", "Word error rate", "words", "WER")


def character_errors(runs: Runs) -> Figure | None:
    return _rates(runs, "fig-cer", "Character error rate", "characters", "CER")


def speech_errors(runs: Runs) -> Figure | None:
    """Of synthesised speech: its units, and what is recognised in it."""
    series = []
    for what, title in (("units", "unit error rate"), ("cycle", "cycle WER"), ("outside", "outside WER")):
        series += _rate_series(runs, "tts", what, title)
    if not series:
        return None
    notes = [
        "Unit error rate: against the reference's units. Cycle WER: what the model itself hears in its speech. "
        "Outside WER: what another recogniser hears.",
        *_interval_note(series),
    ]
    return Figure("fig-tts", "Synthesised speech", draw(series, "error rate", ".1~%", True), notes)


def _rates(runs: Runs, name: str, title: str, what: str, y_title: str) -> Figure | None:
    series = _rate_series(runs, "asr", what)
    if not series:
        return None
    return Figure(name, title, draw(series, y_title, ".1~%", True), _interval_note(series))


def _interval_note(series: Sequence[Series]) -> list[str]:
    known = any(bound[0] is not None for each in series for bound in each.bounds)
    return ["Bars: 95% intervals from resampling records."] if known else ["No intervals are known."]


def _rate_series(runs: Runs, task: str, what: str, title: str = "") -> list[Series]:
    """One curve per set; the panel is the quantity's (`title`), and the set's where several runs are compared."""
    series, several = [], len(runs) > 1
    many_sets = len({name for run in runs for name in _sets(run, task)}) > 1
    names = sorted({name for run in runs for name in _sets(run, task)})
    for place, name in enumerate(names):
        for index, run in enumerate(runs):
            found = [(float(e.step), rate) for e in run.evaluations if (rate := e.rate(name, what))]
            if not found:
                continue
            colour = run_colour(index, len(runs)) if several else shade(task, place)
            panel = ", ".join(part for part in (title, _bare(name) if several and (many_sets or not title) else "") if part)
            x, y = [step for step, _ in found], [rate.value for _, rate in found]
            bounds = [(rate.low, rate.high) for _, rate in found]
            symbol = index if several else place
            series.append(Series(panel, run.name if several else _bare(name), colour, x, y, bounds, "marked", symbol))
    return series


def _sets(run: RunData, task: str) -> list[str]:
    return sorted({name for evaluation in run.evaluations for name in evaluation.names(task)})


def _bare(name: str) -> str:
    return name.split("/", 1)[-1]


def _simple(runs: Runs, key: str, name: str, title: str, y_title: str, **options: Any) -> Figure | None:
    """One quantity of the train lines, a curve for each run."""
    curves, smooth, log = Curves(), options.pop("smooth", False), options.pop("log", False)
    for index, run in enumerate(runs):
        curves.add("", run.name, run_colour(index, len(runs)), run.steps, run.column(key), smooth)
    if not curves.series:
        return None
    spec = draw(curves.series, y_title, **options)
    spec["layout"]["showlegend"] = len(runs) > 1
    return Figure(name, title, spec, curves.notes(), log=log)


def learning_rate(runs: Runs) -> Figure | None:
    return _simple(runs, "learning_rate", "fig-learning-rate", "Learning rate", "learning rate", tick_format=".1~e", from_zero=True)


def gradient_norm(runs: Runs) -> Figure | None:
    return _simple(runs, "grad_norm", "fig-gradient-norm", "Gradient norm", "before clipping", smooth=True, log=True)


def utilisation(runs: Runs) -> Figure | None:
    return _simple(runs, "mfu", "fig-mfu", "Model FLOPs utilisation", "MFU", smooth=True, tick_format=".1~%", from_zero=True)


def memory(runs: Runs) -> Figure | None:
    return _simple(runs, "memory_gb", "fig-memory", "Memory", "GB", from_zero=True)


def throughput(runs: Runs) -> Figure | None:
    """Tokens per second over all workers, restarts as dotted lines."""
    curves = Curves()
    top = max((value for run in runs for value in run.column("tokens_per_second") if value is not None), default=0.0)
    for index, run in enumerate(runs):
        colour = run_colour(index, len(runs))
        name = run.name if len(runs) > 1 else "tokens per second"
        curves.add("", name, colour, run.steps, run.column("tokens_per_second"), True)
    if not curves.series:
        return None
    restarts = 0
    for index, run in enumerate(runs):
        found = [(step, start) for start in run.restarts if (step := number(start.get("step"))) is not None]
        if not found:
            continue
        restarts += len(found)
        x = [value for step, _ in found for value in (step, step, None)]
        texts = [text for step, start in found for text in (*[restart_text(step, start)] * 2, "")]
        name = f"restart of {run.name}" if len(runs) > 1 else "restart"
        colour = run_colour(index, len(runs)) if len(runs) > 1 else "#c0453a"
        curves.series.append(Series("", name, colour, x, [0.0, top, None] * len(found), style="restarts", texts=texts))
    spec = draw(curves.series, "tokens/s", "~s", True)
    spec["layout"]["showlegend"] = len(runs) > 1 or restarts > 0
    return Figure("fig-throughput", "Throughput", spec, ["Over all workers.", *curves.notes()])


def restart_text(step: float, start: dict[str, Any]) -> str:
    """What hovering over a restart says."""
    parts = [f"restart after step {step:g}"]
    parts += [f"{start['workers']} workers"] if start.get("workers") is not None else []
    parts += [f"{key} {value}" for key, value in mapping(start.get("topology")).items() if value != 1]
    parts += [str(start["device"])] if start.get("device") else []
    parts += ["not exact"] if start.get("exact") is False else []
    changed = entries(start.get("changed"))
    parts += ["changed: " + ", ".join(map(str, changed))] if changed else []
    return ", ".join(parts)


def step_time(runs: Runs) -> Figure | None:
    """Where a step's time goes: all of it, and the part in which data was waited for."""
    curves, several = Curves(), len(runs) > 1
    for key, title, own in (("step_time", "whole step", "#5a84b5"), ("data_wait", "waiting for data", "#c98a2b")):
        for index, run in enumerate(runs):
            colour = run_colour(index, len(runs)) if several else own
            curves.add(title if several else "", run.name if several else title, colour, run.steps, run.column(key), True)
    if not curves.series:
        return None
    return Figure("fig-step-time", "Time of a step", draw(curves.series, "seconds", from_zero=True), curves.notes(), log=True)


def mix(runs: Runs) -> Figure | None:
    """Share of each source in what was trained on, beside the share that was wanted."""
    shares = [mix_of(run) for run in runs]
    names = sorted(
        {name for share in shares for name in share}, key=lambda name: ((*TASKS, name.split("/", 1)[0]).index(name.split("/", 1)[0]), name)
    )
    if not names:
        return None
    traces: list[dict[str, Any]] = []
    for index, (run, share) in enumerate(zip(runs, shares, strict=True)):
        several = len(runs) > 1
        places = {name: [other for other in names if other.split("/")[0] == name.split("/")[0]].index(name) for name in names}
        colours = [run_colour(index, len(runs)) if several else shade(name.split("/", 1)[0], places[name]) for name in names]
        group = {"orientation": "h", "name": label(run.name if several else "trained on"), "showlegend": several}
        x = [rounded(share.get(name, (None, None))[0]) for name in names]
        own = {
            "y": [label(name) for name in names],
            "offsetgroup": str(index),
            "hovertemplate": "%{y}: %{x:.2%}<extra>%{fullData.name}</extra>",
        }
        text = ["" if value is None else f"{value:.1%}" for value in x]
        drawn = {"text": text, "textposition": "inside", "insidetextanchor": "start", "insidetextfont": {"color": "#ffffff"}}
        traces.append({"type": "bar", **group, **own, **drawn, "x": x, "marker": {"color": colours}})
        wanted = [rounded(share.get(name, (None, None))[1]) for name in names]
        if any(value is not None for value in wanted) and (index == 0 or wanted != traces[-2].get("x")):
            mark = {"symbol": "line-ns-open", "size": 22, "color": "#7b848f", "line": {"width": 2.5}}
            name = f"wanted, {run.name}" if several and index else "wanted"
            wish = {"type": "scatter", "mode": "markers", "name": label(name), "showlegend": True, "x": wanted, "marker": mark}
            traces.append({**wish, "y": own["y"], "hovertemplate": own["hovertemplate"]})
    shape = base_layout(100 + len(names) * (26 + 14 * len(runs))) | {"bargap": 0.3, "barmode": "group", "hovermode": "closest"}
    shape["xaxis"] = axis([0, 1], "y", "share of what was trained on") | {"tickformat": ".0%", "rangemode": "tozero"}
    shape["yaxis"] = axis([0, 1], "x", "") | {"automargin": True, "autorange": "reversed", "showgrid": False, "ticks": ""}
    return Figure("fig-mix", "Mix of sources", as_json(traces, shape), ["Up to the last line, counted in what the weights count."])


def mix_of(run: RunData) -> dict[str, tuple[float | None, float | None]]:
    """Per source the share of what was trained on and the wanted one; of lines that hold bare counts of records, their shares."""
    last: dict[str, Any] = next((line["mix"] for line in reversed(run.train) if isinstance(line.get("mix"), dict)), {})
    wanted: dict[str, Any] = next((start["wanted_mix"] for start in reversed(run.starts) if isinstance(start.get("wanted_mix"), dict)), {})
    counts = {name: value for name, entry in last.items() if (value := number(entry)) is not None}
    total = sum(counts.values())
    found: dict[str, tuple[float | None, float | None]] = {}
    for name in {**last, **wanted}:
        entry = last.get(name)
        own = entry if isinstance(entry, dict) else {}
        share = number(own.get("share")) if own else counts[name] / total if name in counts and total else None
        target = number(wanted.get(name))
        found[str(name)] = (share, number(own.get("target")) if target is None else target)
    return found
