"""Terminal output of a sweep: its plan and cost, its progress, and its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from most_ray.console.run_screens import print_rows
from most_ray.console.terminal import print_line
from most_ray.errors import count_of
from most_ray.io import storage
from most_ray.metrics.figures import RATES
from most_ray.metrics.texts import rough_duration as duration
from most_ray.runs.job import Job
from most_ray.sweep.ledger import Ledger, Objective, Trial, pareto, ranked
from most_ray.sweep.measure import Affinity
from most_ray.sweep.options import Sweep
from most_ray.sweep.trials import Estimate

_MOST_EXPERTS = 16


def start_screen(
    sweep: Sweep, ledger: Ledger, uri: str, job: Job, where: str, affinities: Sequence[Affinity], cost: Estimate, console: Console
) -> None:
    """Print what the sweep is about to do, and its estimated cost."""
    options, left = sweep.options, len(ledger.in_state("open"))
    already = f"; {len(ledger.trials) - left} have ended, {left} continue" if ledger.trials else ""
    trials = f"{count_of(sweep.max_trials, 'trial')} of {count_of(job.total_steps, 'step')}"
    print_line(console, f"Sweep {storage.redact(uri)}: {trials}{already}")
    scheduler = {
        "none": "no early stopping",
        "asha": f"ASHA from step {sweep.grace_steps} on, one in {options.reduction_factor:g} continues",
        "pbt": f"population based training every {count_of(sweep.perturb_steps, 'step')}",
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
        order, share = affinities[0].order[:_MOST_EXPERTS], affinities[0].share
        shares = ", ".join(f"{expert} ({share[expert]:.1%})" for expert in order)
        several = f" (the first of {len(affinities)})" if len(affinities) > 1 else ""
        rows["affinity"] = f"text on the starting model{several}, by expert: {shares}"
    print_rows(console, rows)
    table = Table("setting", "how", "values", title="Space")
    for dimension in sweep.space.dimensions:
        values = ", ".join(map(str, dimension.values)) if dimension.values else f"{dimension.low:g} to {dimension.high:g}"
        table.add_row(dimension.name, dimension.kind, values)
    console.print(table)


def _cost(cost: Estimate) -> str:
    steps = f"{f'{cost.fewest_steps:,} to ' if cost.fewest_steps < cost.most_steps else ''}{count_of(cost.most_steps, 'step')}"
    if cost.fewest_hours is None or cost.most_hours is None:
        return f"{steps}; their time is unknown: a step could not be timed here"
    low, high = duration(cost.fewest_hours * 3600), duration(cost.most_hours * 3600)
    return f"{steps}, {low}" + (f" to {high}" if low != high else "")


def trial_line(trial: Trial, objectives: Sequence[Objective]) -> str:
    """Format a trial's state and last metrics as a line."""
    values = ", ".join(f"{name} {format_value(value)}" for name, value in trial.values.items())
    figures = ", ".join(f"{o.metric} {format_metric(trial, o.metric)}" for o in objectives if trial.metric(o.metric) is not None)
    state = {
        "failed": f"failed: {trial.reason}",
        "stopped": f"stopped early at step {trial.step}, {figures}",
        "finished": f"finished, {figures}",
        "open": f"step {trial.step}, {figures}",
    }[trial.state]
    return f"trial {trial.number:>3} ({values}): {state}"


def format_metric(trial: Trial, metric: str) -> str:
    """Format a trial's last value of a metric, with its 95% interval if it has one."""
    for result in reversed(trial.results):
        if metric in result.metrics:
            rate = metric.split("/")[0] in RATES.values()
            text = f"{result.metrics[metric]:.2%}" if rate else f"{result.metrics[metric]:.4g}"
            bounds = result.intervals.get(metric)
            return text + (f" [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]" if bounds and rate else "")
    return "-"


def format_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def last_screen(ledger: Ledger, objectives: Sequence[Objective], summary: Mapping[str, Any], console: Console) -> None:
    """Print all trials, best first, and the commands that train the best one."""
    names = [dimension["name"] for dimension in ledger.sweep.get("dimensions", [])]
    order = ranked(ledger.trials.values(), objectives[0])
    order += [trial for trial in ledger.trials.values() if trial not in order]
    table = Table(title="Trials, best first")
    for heading in ("trial", *names, "step", *(objective.metric for objective in objectives), "state"):
        table.add_column(heading, justify="left" if heading in ("expert_split", "state") else "right", overflow="fold")
    for trial in order:
        values = (format_value(trial.values.get(name, "-")) for name in names)
        figures = (format_metric(trial, objective.metric) for objective in objectives)
        table.add_row(str(trial.number), *values, str(trial.step), *figures, trial.state)
    console.print(table)
    for trial in ledger.in_state("failed"):
        print_line(console, f"trial {trial.number} failed: {trial.reason}")
    if len(objectives) > 1:
        front = ", ".join(str(trial.number) for trial in pareto(ledger.trials.values(), objectives))
        print_line(console, f"Not beaten in every objective (Pareto front): trials {front or 'none'}")
    best = f"trial {summary['best']['trial']}" if summary["best"] else "none yet: no trial has made all its steps"
    for name, text in {"time": duration(ledger.spent_s), "best": best, **summary["commands"], "report": summary["report"]}.items():
        print_line(console, f"{name.capitalize() + ':':<11} {text}")
