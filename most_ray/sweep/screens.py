"""The screens of a sweep: what will be tried at what cost, what happens, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from most_ray.console.progress import duration
from most_ray.io import storage
from most_ray.metrics.figures import RATES
from most_ray.runs.job import Job
from most_ray.sweep.ledger import Ledger, Objective, Trial, pareto, ranked
from most_ray.sweep.measure import Affinity
from most_ray.sweep.options import Sweep
from most_ray.sweep.trials import Estimate

_MOST_EXPERTS = 16


def start_screen(
    sweep: Sweep, ledger: Ledger, uri: str, job: Job, where: str, affinities: Sequence[Affinity], cost: Estimate, console: Console
) -> None:
    """What the sweep is about to do, and what that will cost."""
    options = sweep.options
    ended = len(ledger.in_state("finished", "stopped", "failed"))
    already = f"; {ended} have ended, {len(ledger.in_state('open'))} go on" if ledger.trials else ""
    _say(console, f"Sweep {storage.redact(uri)}: {sweep.max_trials} trials of {job.total_steps:,} steps{already}")
    scheduler = {
        "none": "no early stopping",
        "asha": f"ASHA from step {sweep.grace_steps} on, one in {options.reduction_factor:g} goes on",
        "pbt": f"population based training every {sweep.perturb_steps} steps",
    }[options.scheduler]
    rows = {
        "objective": ", ".join(f"{'largest' if objective.largest else 'smallest'} {objective.metric}" for objective in sweep.objectives),
        "search": f"{options.search}, {scheduler}",
        "where": where,
        "estimate": _cost(cost),
    }
    if options.max_hours:
        rows["budget"] = f"{options.max_hours:g} hours, of which {ledger.spent_s / 3600:.2f} are spent"
    if affinities:
        first = affinities[0]
        shares = ", ".join(f"{expert} ({first.share[expert]:.1%})" for expert in first.order[:_MOST_EXPERTS])
        several = f" (the first of {len(affinities)})" if len(affinities) > 1 else ""
        rows["affinity"] = f"text on the starting model{several}, by expert: {shares}"
    for name, text in rows.items():
        _say(console, f"  {name:<11} {text}")
    table = Table(title="Space")
    for heading in ("setting", "how", "values"):
        table.add_column(heading)
    for dimension in sweep.space.dimensions:
        values = ", ".join(map(str, dimension.values)) if dimension.values else f"{dimension.low:g} to {dimension.high:g}"
        table.add_row(dimension.name, dimension.kind, values)
    console.print(table)


def _cost(cost: Estimate) -> str:
    steps = f"{cost.most_steps:,} steps"
    if cost.fewest_steps < cost.most_steps:
        steps = f"{cost.fewest_steps:,} to {steps}"
    if cost.fewest_hours is None or cost.most_hours is None:
        return f"{steps}; their time is not known: a step could not be timed here"
    low, high = duration(cost.fewest_hours * 3600), duration(cost.most_hours * 3600)
    return f"{steps}, {low}" + (f" to {high}" if low != high else "")


def trial_line(trial: Trial, objectives: Sequence[Objective]) -> str:
    """What is new of a trial, in a line."""
    values = ", ".join(f"{name} {shown(value)}" for name, value in trial.values.items())
    head = f"trial {trial.number:>3} ({values})"
    figures = ", ".join(f"{o.metric} {figure(trial, o.metric)}" for o in objectives if trial.metric(o.metric) is not None)
    if trial.state == "failed":
        return f"{head}: failed: {trial.reason}"
    if trial.state == "stopped":
        return f"{head}: stopped early at step {trial.step}, {figures}"
    if trial.state == "finished":
        return f"{head}: finished, {figures}"
    return f"{head}: step {trial.step}, {figures}"


def figure(trial: Trial, metric: str) -> str:
    """A trial's last value, with its 95% interval where it has one."""
    for result in reversed(trial.results):
        if metric in result.metrics:
            rate = metric.split("/")[0] in RATES.values()
            text = f"{result.metrics[metric]:.2%}" if rate else f"{result.metrics[metric]:.4g}"
            bounds = result.intervals.get(metric)
            return text + (f" [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]" if bounds and rate else "")
    return "-"


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def last_screen(ledger: Ledger, objectives: Sequence[Objective], summary: Mapping[str, Any], console: Console) -> None:
    """All trials, best first, and how the winner is trained."""
    names = [dimension["name"] for dimension in ledger.sweep.get("dimensions", [])]
    order = ranked(ledger.trials.values(), objectives[0])
    rest = [trial for trial in ledger.trials.values() if trial not in order]
    table = Table(title="Trials, best first")
    for heading in ("trial", *names, "step", *(objective.metric for objective in objectives), "state"):
        table.add_column(heading, justify="left" if heading in ("expert_split", "state") else "right", overflow="fold")
    for trial in order + rest:
        figures = (figure(trial, objective.metric) for objective in objectives)
        table.add_row(str(trial.number), *(shown(trial.values.get(name, "-")) for name in names), str(trial.step), *figures, trial.state)
    console.print(table)
    for trial in ledger.in_state("failed"):
        _say(console, f"trial {trial.number} failed: {trial.reason}")
    if len(objectives) > 1:
        front = pareto(ledger.trials.values(), objectives)
        _say(console, f"Not beaten in every objective (Pareto front): trials {', '.join(str(trial.number) for trial in front) or 'none'}")
    _say(console, f"Time:       {duration(ledger.spent_s)}")
    _say(
        console,
        f"Best:       trial {summary['best']['trial']}" if summary["best"] else "Best:       none yet: no trial has made all its steps",
    )
    for name, command in summary["commands"].items():
        _say(console, f"{name.capitalize() + ':':<11} {command}")
    _say(console, f"Report:     {summary['report']}")


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)
