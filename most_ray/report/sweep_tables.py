"""A sweep's folder, and the tables of the report about it as plain data; templates/sweep.html places them on the page.

Nothing here fails on missing or damaged files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from most_ray.errors import DataError, count_of
from most_ray.io import storage
from most_ray.io.run_folder import LEDGER
from most_ray.report import sweep_figures
from most_ray.report.cells import Cell, Content, Row, duration
from most_ray.report.collect import RunData, collect, entries, mapping, number, numbers, read_file, read_mapping
from most_ray.report.curves import RUN_COLOURS
from most_ray.report.expert_figures import expert_load
from most_ray.report.sweep_figures import IN_COLOUR, interval, is_rate, last, shown
from most_ray.sweep.effects import Effect, dimensions_of, effects, level_name
from most_ray.sweep.ledger import BEST, Ledger, Objective, Result, Trial, commands_of, pareto, ranked, read_ledger, trial_uri
from most_ray.sweep.space import Dimension

_STATES = {"finished": "finished", "stopped": "stopped early", "failed": "failed", "open": "open"}
_LOOKS = {"failed": "failed", "open": "going"}  # classes of states below the heading
_REASON = 90  # characters of a failure in the table of trials; failures are shown in full further down


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder, read."""

    uri: str  # as it was given
    name: str
    ledger: Ledger
    objectives: list[Objective]
    dimensions: list[Dimension]
    best: list[Trial]  # trials with a value of the first objective, the best first
    best_yaml: str | None  # the winner's configuration; None: none yet
    affinity: dict[str, Any]  # content of affinity.json
    ended: bool  # whether the folder has a summary.json

    @property
    def trials(self) -> list[Trial]:
        """All trials, in the order of the ledger."""
        return list(self.ledger.trials.values())


def is_sweep(uri: str) -> bool:
    """Whether a folder (path or URI) is a sweep's rather than a run's."""
    return storage.exists(storage.join(uri, LEDGER))


def read_sweep(uri: str) -> Sweep:
    """The sweep in a folder for which `is_sweep` is true."""
    ledger = read_ledger(uri) or Ledger({}, {})
    for trial in ledger.trials.values():
        trial.results = [_finite(result) for result in trial.results]
    objectives = [Objective.parse(entry) for entry in entries(ledger.sweep.get("objectives")) if isinstance(entry, str)]
    best = ranked(ledger.trials.values(), objectives[0]) if objectives else []
    name = storage.base_name(storage.absolute(uri))
    config, ended = read_file(uri, BEST), read_file(uri, "summary.json") is not None
    best_yaml = None if config is None else config.decode(errors="replace")
    return Sweep(uri, name, ledger, objectives, dimensions_of(ledger), best, best_yaml, read_mapping(uri, "affinity.json"), ended)


def _finite(result: Result) -> Result:
    """Without values that are not finite numbers."""
    bounds = {name: pair for name, pair in result.intervals.items() if all(number(value) is not None for value in pair)}
    return dataclasses.replace(result, metrics=numbers(result.metrics), intervals=bounds)


def content(sweep: Sweep) -> dict[str, Any]:
    """Everything of templates/sweep.html, by the names that the template uses."""
    objective = sweep.objectives[0] if sweep.objectives else None
    several = len(sweep.objectives) > 1
    on_front = pareto(sweep.trials, sweep.objectives) if several else []
    alive = [trial for trial in sweep.trials if trial.state != "failed"]
    ends = _ends(sweep)
    load = expert_load(list(ends.values()))
    names = [dimension.name for dimension in sweep.dimensions]
    return {
        "names": [Cell(sweep.name)],
        "states": states(sweep),
        "tiles": tiles(sweep),
        "winner": _winner(sweep),
        "trials": _trials(sweep),
        "trials_head": ("trial", "run", *names, "state", "step", *map(str, sweep.objectives), "time"),
        "objective": objective,
        "direction": sweep_figures.direction(objective) if objective else "",
        "progress": sweep_figures.progress(sweep.best, objective) if objective else None,
        "parallel": sweep_figures.parallel(sweep.best, sweep.dimensions, objective) if objective else None,
        "axes": len(names) + 1,
        "against": sweep_figures.against(sweep.best, sweep.dimensions, objective) if objective else [],
        "split_keys": sweep_figures.split_keys(sweep.best, sweep.dimensions),
        "continued": any(len(trial.runs) > 1 for trial in sweep.trials),
        "effects": [_effect(effect, objective) for effect in effects(sweep.ledger, objective)] if objective else [],
        "pareto": [(f"{trial.number}", *_cells(sweep, trial), *_settings(sweep, trial)) for trial in on_front],
        "pareto_head": ("trial", *map(str, sweep.objectives), *names),
        "front": sweep_figures.front(alive, on_front, sweep.objectives) if several else None,
        "ends": [f"{run.name}, place {rank + 1} of {len(sweep.best)}" for rank, run in ends.items()] if load else [],
        "experts": [load, sweep_figures.text_share(sweep.affinity)],
        "failures": sweep.ledger.in_state("failed"),
    }


def states(sweep: Sweep) -> list[tuple[str, str]]:
    """(class, text) of the line below the heading: how many trials have ended, and how."""
    counts = {state: len(sweep.ledger.in_state(state)) for state in ("finished", "stopped", "failed", "open")}
    ended, most = sum(counts.values()) - counts["open"], number(sweep.ledger.sweep.get("max_trials"))
    of = "" if most is None else f" of {int(most):,}"
    done = not counts["open"] and (sweep.ended or ended >= (int(most or 0) or ended + 1))
    return [
        ("complete" if done else "going", f"{ended:,}{of} trials ended"),
        *((_LOOKS.get(state, ""), f"{count:,} {_STATES[state]}") for state, count in counts.items() if count),
    ]


def tiles(sweep: Sweep) -> list[tuple[str, str, str]]:
    """The most important numbers: (name, value, more)."""
    found = []
    if sweep.best and (result := last(sweep.best[0], sweep.objectives[0].metric)):
        metric, low_high = sweep.objectives[0].metric, result.intervals.get(sweep.objectives[0].metric)
        known = f"95%: {' to '.join(shown(metric, bound) for bound in low_high)}" if low_high else "interval not known"
        found.append((f"trial {sweep.best[0].number}, best {metric}", shown(metric, result.metrics[metric]), known))
    how = ", ".join(str(sweep.ledger.sweep[key]) for key in ("search", "scheduler") if sweep.ledger.sweep.get(key))
    found.append(("trials", f"{len(sweep.trials):,}", how))
    steps = f"to the last results of {count_of(sum(len(trial.runs) for trial in sweep.trials), 'run')}"
    found.append(("steps trained in all", f"{steps_trained(sweep.trials):,}", steps))
    return [*found, ("time spent", duration(number(sweep.ledger.spent_s)) or "–", "from each start to its last line")]


def steps_trained(trials: Iterable[Trial]) -> int:
    """Steps of all runs of the trials, each up to its last result; steps that a run took over from its parent count once."""
    total = 0
    for trial in trials:
        for run, parent in zip(trial.runs, trial.parents, strict=True):
            reached = max((result.step for result in trial.results if result.run == run), default=0)
            total += max(0, reached - int(number(mapping(parent).get("step")) or 0))
    return total


def _winner(sweep: Sweep) -> dict[str, Any] | None:
    """The winner's results and settings, commands that train with them, and best.yaml; None where there is none yet."""
    if sweep.best_yaml is None or not sweep.best:
        return None
    # best.yaml is of the trial that had won when the sweep last ended; a sweep that was resumed may have a better one by now.
    trial = next((trial for trial in sweep.best if f"-best-{trial.runs[-1]}\n" in sweep.best_yaml), sweep.best[0])
    rows: list[Row] = [
        *zip(map(str, sweep.objectives), _cells(sweep, trial), strict=True),
        *zip((dimension.name for dimension in sweep.dimensions), _settings(sweep, trial), strict=True),
        ("run", Cell(storage.redact(_folder(sweep, trial) or trial.runs[-1]), "code")),
    ]
    commands = commands_of(sweep.ledger, sweep.uri, sweep.name, trial.runs[-1])
    return {"rows": rows, "commands": commands, "yaml": sweep.best_yaml, "open": bool(sweep.ledger.in_state("open"))}


def _folder(sweep: Sweep, trial: Trial) -> str | None:
    """The folder of a trial's last run; None where no folder in trials/ could have its name."""
    try:
        return trial_uri(sweep.uri, trial.runs[-1])
    except DataError:
        return None


def _trials(sweep: Sweep) -> list[Row]:
    """All trials, the best first; after them, by number, those without a value."""
    chosen = {trial.number for trial in sweep.best}
    rows: list[Row] = []
    for rank, trial in enumerate([*sweep.best, *(trial for trial in sweep.trials if trial.number not in chosen)]):
        number_cell = Cell(f"{trial.number}", colour=RUN_COLOURS[rank] if rank < min(IN_COLOUR, len(sweep.best)) else "")
        spent = duration(None if trial.ended is None else number(trial.ended - trial.began))
        settings, results = _settings(sweep, trial), _cells(sweep, trial)
        rows.append((number_cell, _runs(trial), *settings, _state(trial), f"{trial.step:,}", *results, spent))
    return rows


def _runs(trial: Trial) -> Content:
    """A trial's runs, and which trial and step each started from."""
    lines = []
    for run, parent in zip(trial.runs, map(mapping, trial.parents), strict=True):
        known = ", ".join(f"{name} {parent[name]}" for name in ("trial", "step") if parent.get(name) is not None)
        lines.append(Cell(run, small=f"from {known}" if known else ""))
    return lines


def _settings(sweep: Sweep, trial: Trial) -> list[Content]:
    """The trial's value of each dimension."""
    return [level_name(trial.values[each.name]) if each.name in trial.values else None for each in sweep.dimensions]


def _state(trial: Trial) -> Content:
    """A trial's state with the beginning of its reason."""
    line = next(iter(str(trial.reason or "").strip().splitlines()), "")
    short = line if len(line) <= _REASON else line[: _REASON - 1] + "…"
    return [_STATES[trial.state], Cell(small=short)] if trial.reason else _STATES[trial.state]


def _cells(sweep: Sweep, trial: Trial) -> list[Content]:
    """The trial's last value of each objective."""

    def cell(metric: str) -> Cell | None:
        if (result := last(trial, metric)) is None:
            return None
        return Cell(shown(metric, result.metrics[metric]), "strong", interval(metric, result.intervals.get(metric)))

    return [cell(objective.metric) for objective in sweep.objectives]


def _effect(effect: Effect, objective: Objective) -> dict[str, Any]:
    """The levels of a dimension, and by how much the best of them is better than the worst."""
    metric = objective.metric
    means = [Cell(shown(metric, level.mean), "strong", interval(metric, level.interval)) for level in effect.levels]
    rows = [(level.label, f"{level.trials:,}", mean) for level, mean in zip(effect.levels, means, strict=True)]
    found = {"dimension": effect.dimension, "step": effect.step, "rows": rows, "difference": effect.difference}
    if difference := effect.difference:
        best, worst = (difference.largest, difference.smallest)[:: 1 if objective.largest else -1]
        unit, points = (100, " points") if is_rate(metric) else (1, "")
        amount, *bounds = (f"{unit * value:.3g}" for value in (difference.value, *(difference.interval or ())))
        found |= {"best": best.label, "worst": worst.label, "amount": amount + points, "interval": " to ".join(bounds)}
    return found


def _ends(sweep: Sweep) -> dict[int, RunData]:
    """The runs of the best and the worst trial whose runs have metrics, by the trials' ranks."""
    ranks = range(len(sweep.best))
    ends = [next(((rank, run) for rank in order if (run := _read_run(sweep, sweep.best[rank]))), None) for order in (ranks, ranks[::-1])]
    return dict(end for end in ends if end)


def _read_run(sweep: Sweep, trial: Trial) -> RunData | None:
    """A trial's last run; None where it has no folder or no metrics."""
    try:
        (run,) = collect([trial_uri(sweep.uri, trial.runs[-1])])
    except DataError:  # other trials' runs are shown
        return None
    return dataclasses.replace(run, name=f"trial {trial.number}")
