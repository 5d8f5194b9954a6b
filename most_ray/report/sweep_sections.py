"""What the page says of a sweep: its ledger, read, as markup and figures. Nothing here fails on what is missing or torn."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from most_ray.errors import DataError
from most_ray.io import storage
from most_ray.io.run_folder import LEDGER
from most_ray.report.collect import RunData, collect, entries, mapping, number, numbers
from most_ray.report.curves import RUN_COLOURS, Figure
from most_ray.report.expert_figures import expert_load
from most_ray.report.run_tables import duration, pairs, table, text
from most_ray.report.sweep_figures import (
    IN_COLOUR,
    against,
    direction,
    front,
    interval,
    is_rate,
    last,
    parallel,
    progress,
    shown,
    split_keys,
    text_share,
)
from most_ray.sweep.effects import Difference, Effect, Level, dimensions_of, effects, level_name
from most_ray.sweep.ledger import BEST, Ledger, Objective, Result, Trial, commands_of, folder_of, pareto, ranked, read_ledger
from most_ray.sweep.space import Dimension

_STATES = {"finished": "finished", "stopped": "stopped early", "failed": "failed", "open": "open"}
_REASON = 90  # characters of one in the table; failures are told in full further down
_AXIS = 125  # pixels between two axes of settings
_MISSING = '<span class="none">–</span>'


@dataclass(frozen=True)
class Drawn:
    """Figures that stand beside each other. `small`: as many as there is room for; `least`: pixels that each is wide at least, scrolling
    where there is no room."""

    figures: Sequence[Figure]
    small: bool = False
    least: int = 0


Piece = str | Drawn  # of a part of the page; text is markup


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder, read. `place` is shown as it was given; `best` are the trials that have a value of the first objective, the best
    first; best_yaml: the winner's configuration, None where there is none yet."""

    uri: str
    name: str
    ledger: Ledger
    objectives: list[Objective]
    dimensions: list[Dimension]
    best: list[Trial]
    best_yaml: str | None
    affinity: dict[str, Any]
    ended: bool

    @property
    def trials(self) -> list[Trial]:
        return list(self.ledger.trials.values())

    @property
    def most(self) -> int | None:
        """How many trials it shall have."""
        wanted = number(self.ledger.sweep.get("max_trials"))
        return None if wanted is None else int(wanted)


def is_sweep(uri: str) -> bool:
    """Whether a folder (path or URI) is a sweep's rather than a run's."""
    return storage.exists(storage.join(uri, LEDGER))


def read_sweep(uri: str) -> Sweep:
    """The sweep at a place for which `is_sweep` holds."""
    ledger = read_ledger(uri) or Ledger({}, {})
    for trial in ledger.trials.values():
        trial.results = [_plain(result) for result in trial.results]
    objectives = [Objective.parse(entry) for entry in entries(ledger.sweep.get("objectives")) if isinstance(entry, str)]
    best = ranked(ledger.trials.values(), objectives[0]) if objectives else []
    name = str(ledger.sweep.get("name") or storage.base_name(storage.absolute(uri)))
    config, affinity = _content(uri, BEST), _content(uri, "affinity.json")
    ended = _content(uri, "summary.json") is not None
    best_yaml = None if config is None else config.decode(errors="replace")
    return Sweep(uri, name, ledger, objectives, dimensions_of(ledger), best, best_yaml, _object(affinity), ended)


def _plain(result: Result) -> Result:
    """Without what is no number."""
    bounds = {name: pair for name, pair in result.intervals.items() if all(number(value) is not None for value in pair)}
    return dataclasses.replace(result, metrics=numbers(result.metrics), intervals=bounds)


def _content(uri: str, name: str) -> bytes | None:
    try:
        return storage.read_bytes(storage.join(uri, name))
    except FileNotFoundError:
        return None


def _object(content: bytes | None) -> dict[str, Any]:
    try:
        return mapping(json.loads(content or b""))
    except ValueError:
        return {}


def states(sweep: Sweep) -> list[tuple[str, str]]:
    """(class, text) of what stands below the heading: how many trials have ended, and how."""
    counts = {state: len(sweep.ledger.in_state(state)) for state in ("finished", "stopped", "failed", "open")}
    ended = sum(counts.values()) - counts["open"]
    of = f" of {sweep.most:,}" if sweep.most is not None else ""
    done = not counts["open"] and (sweep.ended or ended >= (sweep.most or ended + 1))
    looks = {"failed": "failed", "open": "going"}
    return [
        ("complete" if done else "going", f"{ended:,}{of} trials ended"),
        *((looks.get(state, ""), f"{count:,} {_STATES[state]}") for state, count in counts.items() if count),
    ]


def tiles(sweep: Sweep) -> list[tuple[str, str, str]]:
    """(what, value, more), as markup."""
    found = []
    if sweep.best and (result := last(sweep.best[0], sweep.objectives[0].metric)):
        metric, low_high = sweep.objectives[0].metric, result.intervals.get(sweep.objectives[0].metric)
        known = f"95%: {' to '.join(shown(metric, bound) for bound in low_high)}" if low_high else "interval not known"
        found.append((f"trial {sweep.best[0].number}, best {text(metric)}", shown(metric, result.metrics[metric]), known))
    how = ", ".join(str(sweep.ledger.sweep[key]) for key in ("search", "scheduler") if sweep.ledger.sweep.get(key))
    found.append(("trials", f"{len(sweep.trials):,}", text(how)))
    steps = f"to the last results of {sum(len(trial.runs) for trial in sweep.trials):,} runs"
    found.append(("steps trained in all", f"{steps_trained(sweep.trials):,}", steps))
    found.append(("time spent", duration(number(sweep.ledger.spent_s)), "from each start to its last line"))
    return found


def steps_trained(trials: Iterable[Trial]) -> int:
    """Of all their runs, up to each one's last result; what a run took over from its parent does not count again."""
    total = 0
    for trial in trials:
        for run, parent in zip(trial.runs, trial.parents, strict=True):
            reached = max((result.step for result in trial.results if result.run == run), default=0)
            total += max(0, reached - int(number(mapping(parent).get("step")) or 0))
    return total


def parts(sweep: Sweep) -> list[tuple[str, list[Piece]]]:
    """Titles and contents, in the page's order, without those that there is nothing to show in."""
    objective = sweep.objectives[0] if sweep.objectives else None
    made: list[tuple[str, list[Piece]]] = [("The winner", _winner(sweep)), ("Trials", [_trials(sweep)])]
    if objective:
        made += [("Progress", _drawn(progress(sweep.best, objective)))]
        made += [("Settings", _settings(sweep, objective)), ("Does it matter?", _effects(sweep, objective))]
    made += [("Objectives", _objectives(sweep)), ("Experts", _experts(sweep)), ("Failed trials", _failures(sweep))]
    return [(title, pieces) for title, pieces in made if pieces]


def _drawn(*figures: Figure | None) -> list[Piece]:
    return [Drawn(found)] if (found := [figure for figure in figures if figure]) else []


def _winner(sweep: Sweep) -> list[Piece]:
    if sweep.best_yaml is None or not sweep.best:
        return []
    # best.yaml is of the trial that had won when the sweep last ended; one that goes on may have a better one by now.
    trial = next((trial for trial in sweep.best if f"-best-{trial.runs[-1]}\n" in sweep.best_yaml), sweep.best[0])
    rows = [(text(str(objective)), _cell(trial, objective.metric)) for objective in sweep.objectives]
    rows += [(text(dimension.name), _setting(trial, dimension)) for dimension in sweep.dimensions]
    rows.append(("run", f"<code>{text(storage.redact(_folder(sweep, trial) or trial.runs[-1]))}</code>"))
    goes_on = '<p class="note">The sweep goes on: another trial may come to win.</p>' if sweep.ledger.in_state("open") else ""
    commands = "".join(
        f'<h4>{text(name.capitalize())}</h4><pre class="command">{text(command)}</pre>'
        for name, command in commands_of(sweep.ledger, sweep.uri, trial.runs[-1]).items()
    )
    return [
        pairs(rows) + goes_on,
        f'<div class="card"><h3>To train with it</h3>{commands}</div>',
        f'<div class="card"><h3>best.yaml</h3><pre>{text(sweep.best_yaml)}</pre></div>',
    ]


def _folder(sweep: Sweep, trial: Trial) -> str | None:
    """Of the run that counts; None where its name is none that a folder in trials/ could have."""
    try:
        return folder_of(sweep.uri, trial.runs[-1])
    except DataError:
        return None


def _trials(sweep: Sweep) -> str:
    """All of them, the best first; the others behind, by number."""
    chosen = {trial.number for trial in sweep.best}
    order = [*sweep.best, *(trial for trial in sweep.trials if trial.number not in chosen)]
    if not order:
        return '<p class="note">No trial has begun.</p>'
    rows = []
    for rank, trial in enumerate(order):
        coloured = rank < min(IN_COLOUR, len(sweep.best))
        key = f'<span class="key" style="background:{RUN_COLOURS[rank]}"></span>' if coloured else ""
        rows.append(
            (
                f"{key}{trial.number}",
                _runs(trial),
                *(_setting(trial, dimension) for dimension in sweep.dimensions),
                _state(trial),
                f"{trial.step:,}",
                *(_cell(trial, objective.metric) for objective in sweep.objectives),
                duration(None if trial.ended is None else number(trial.ended - trial.began)),
            )
        )
    dimensions, objectives = ([text(name) for name in names] for names in (_names(sweep), map(str, sweep.objectives)))
    head = ("trial", "run", *dimensions, "state", "step", *objectives, "time")
    return f'<div class="tall">{table(head, rows, "trials")}</div>'


def _names(sweep: Sweep) -> list[str]:
    return [dimension.name for dimension in sweep.dimensions]


def _runs(trial: Trial) -> str:
    """A trial's runs, and what each went on from."""
    lines = []
    for run, parent in zip(trial.runs, map(mapping, trial.parents), strict=True):
        known = [f"{name} {parent[name]}" for name in ("trial", "step") if parent.get(name) is not None]
        lines.append(text(run) + (f' <span class="counts">from {text(", ".join(known))}</span>' if known else ""))
    return "<br>".join(lines)


def _setting(trial: Trial, dimension: Dimension) -> str:
    return text(level_name(trial.values[dimension.name])) if dimension.name in trial.values else _MISSING


def _state(trial: Trial) -> str:
    if not trial.reason:
        return _STATES[trial.state]
    line = next(iter(str(trial.reason).strip().splitlines()), "")
    short = line if len(line) <= _REASON else line[: _REASON - 1] + "…"
    return f'{_STATES[trial.state]}<br><span class="counts">{text(short)}</span>'


def _cell(trial: Trial, metric: str) -> str:
    result = last(trial, metric)
    if result is None:
        return _MISSING
    return f'<b>{shown(metric, result.metrics[metric])}</b> <span class="interval">{interval(result, metric)}</span>'


def _settings(sweep: Sweep, objective: Objective) -> list[Piece]:
    small, together = against(sweep.best, sweep.dimensions, objective), parallel(sweep.best, sweep.dimensions, objective)
    pieces: list[Piece] = [Drawn([together], least=_AXIS * (len(sweep.dimensions) + 1))] if together else []
    if small:
        keys = "".join(
            f'<span class="entry"><span class="swatch" style="background:{colour}"></span>{text(name)}</span>'
            for colour, name in split_keys(sweep.best, sweep.dimensions)
        )
        about = f"{text(objective.metric)} against each setting, {direction(objective)}; bars: 95% intervals where they are known; "
        pieces.append(f'<p class="note between">{about}open marks: trials that are not at their end.{keys}</p>')
        pieces.append(Drawn(small, small=True))
    return pieces


def _effects(sweep: Sweep, objective: Objective) -> list[Piece]:
    if any(len(trial.runs) > 1 for trial in sweep.trials):
        return ['<p class="note">Trials went on from one another, so no result belongs to one setting alone.</p>']
    found = effects(sweep.ledger, objective)
    if not found:
        return []
    about = (
        f"{text(objective.metric)} at step {found[0].step:,}, the last that all trials reached: those that were stopped early are compared "
        "with what the others had then. Intervals are 95% over trials, whose other settings differ; where they are wide, more trials help. "
        "Largest and smallest are picked afterwards: of many levels some will differ by chance."
    )
    blocks = [_effect(effect, objective) for effect in found]
    return [f'<p class="note">{about}</p><div class="columns effects">{"".join(blocks)}</div>']


def _effect(effect: Effect, objective: Objective) -> str:
    rows = [(text(level.label), f"{level.trials:,}", _mean(level, objective.metric)) for level in effect.levels]
    levels = table(("level", "trials", f"mean {text(objective.metric)}"), rows, "figures")
    return f'<div><h4>{text(effect.dimension)}</h4>{levels}<p class="note">{_verdict(effect.difference, objective)}</p></div>'


def _mean(level: Level, metric: str) -> str:
    bounds = "" if level.interval is None else f"[{', '.join(shown(metric, bound) for bound in level.interval)}]"
    return f'<b>{shown(metric, level.mean)}</b> <span class="interval">{bounds}</span>'


def _verdict(difference: Difference | None, objective: Objective) -> str:
    """The difference of best and worst level in words, and whether chance may have made it."""
    if difference is None:
        return "Only one level was tried."
    best, worst = (difference.largest, difference.smallest)[:: 1 if objective.largest else -1]
    unit = 100 if is_rate(objective.metric) else 1
    amount, *bounds = (f"{unit * value:.3g}" for value in (difference.value, *(difference.interval or ())))
    points = " points" if unit == 100 else ""
    found = f"<b>{text(best.label)}</b> is better than <b>{text(worst.label)}</b> by {amount}{points}"
    if difference.interval is None:
        return f"{found}; with fewer than two trials of one of them, no interval is known."
    clear = difference.interval[0] > 0
    chance = "zero lies outside" if clear else "zero lies within: it may be chance"
    return f"{found} (95%: {' to '.join(bounds)}), {chance}."


def _objectives(sweep: Sweep) -> list[Piece]:
    """Trials that no other beats, where there are several objectives."""
    if len(sweep.objectives) < 2:
        return []
    best = pareto(sweep.trials, sweep.objectives)
    rows = [
        (
            f"{trial.number}",
            *(_cell(trial, objective.metric) for objective in sweep.objectives),
            *(_setting(trial, dimension) for dimension in sweep.dimensions),
        )
        for trial in best
    ]
    head = ("trial", *(text(str(objective)) for objective in sweep.objectives), *map(text, _names(sweep)))
    note = '<p class="note">Finished trials to which no other is better in one objective and at least as good in the others.</p>'
    pieces: list[Piece] = [f'<div class="card between"><h3>Pareto front</h3>{note}{table(head, rows, "figures")}</div>'] if best else []
    alive = [trial for trial in sweep.trials if trial.state != "failed"]
    return pieces + _drawn(front(alive, best, sweep.objectives))


def _experts(sweep: Sweep) -> list[Piece]:
    ends = _ends(sweep)
    load = expert_load([_read_run(sweep, trial) for trial in ends])
    which = " and ".join(f"trial {trial.number}, place {sweep.best.index(trial) + 1} of {len(sweep.best)}" for trial in ends)
    note: list[Piece] = [f'<p class="note between">The best and the worst whose runs can be read: {which}.</p>'] if load else []
    return note + _drawn(load, text_share(sweep.affinity))


def _ends(sweep: Sweep) -> list[Trial]:
    """The best and the worst of those whose run has metrics."""
    found: list[Trial] = []
    for order in (sweep.best, sweep.best[::-1]):
        end = next((trial for trial in order if _has_metrics(sweep, trial)), None)
        found += [end] if end and end not in found else []
    return found


def _has_metrics(sweep: Sweep, trial: Trial) -> bool:
    folder = _folder(sweep, trial)
    return folder is not None and storage.exists(storage.join(folder, "metrics.jsonl"))


def _read_run(sweep: Sweep, trial: Trial) -> RunData:
    (run,) = collect([folder_of(sweep.uri, trial.runs[-1])])
    return dataclasses.replace(run, name=f"trial {trial.number}")


def _failures(sweep: Sweep) -> list[Piece]:
    blocks = []
    for trial in sweep.ledger.in_state("failed"):
        where = f"trial {trial.number} <small>run {text(trial.runs[-1] if trial.runs else '')}, after step {trial.step:,}</small>"
        blocks.append(f"<h4>{where}</h4><pre>{text(trial.reason or 'no reason was written down')}</pre>")
    return ["".join(blocks)] if blocks else []
