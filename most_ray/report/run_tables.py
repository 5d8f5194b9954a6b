"""The tables of a report about runs, as plain data; templates/run.html places them on the page."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from most_ray.config import RunConfig
from most_ray.errors import count_of
from most_ray.metrics.figures import FIGURES, RATES, TITLES
from most_ray.metrics.notes import run_notes
from most_ray.metrics.texts import bounds, figure_text, percent
from most_ray.report.cells import Cell, Content, Difference, Row, align, duration
from most_ray.report.collect import Evaluation, Hypothesis, Rate, RunData, entries, number
from most_ray.report.curves import attempt_place, run_colour

Runs = Sequence[RunData]
_SAMPLES = 20  # records shown of each set
_WORDS = 80  # words shown of a record
_TASKS = {"asr": "Recognition", "tts": "Synthesis", "text": "Text"}  # in the page's order
# Figures of an evaluation, by task: the columns of the tables of the last evaluation.
_COLUMNS = {
    "asr": ("words", "characters", "empty_rate", "loop_rate", "length_cap_rate"),
    "tts": (
        "outside",
        "cycle",
        "generated_seconds",
        "generated_seconds_median",
        "recorded_seconds",
        "recorded_seconds_median",
        "short_records",
        "duration_ratio",
        "units",
        "loop_rate",
        "end_of_audio_rate",
        "length_cap_rate",
        "foreign_rate",
    ),
    "text": ("perplexity",),
}
# Of figures that count failures, the value that says there were none.
_BEST = {"empty_rate": 0, "loop_rate": 0, "length_cap_rate": 0, "foreign_rate": 0, "end_of_audio_rate": 1}
_PARTS = {  # attributes of RunData, and what is missing on the page where they are empty
    "train": "steps",
    "evaluations": "evaluations",
    "hypotheses": "transcriptions",
    "starts": "starts and restarts",
    "experts": "experts by layer",
    "config": "the configuration",
    "environment": "the environment",
}


@dataclass(frozen=True)
class Table:
    """A table with a title."""

    title: str
    head: Row
    rows: Sequence[Row]
    about: str = ""  # small print beside the title
    marked: bool = False  # its rows stand out
    open: bool = True  # of a foldable table: unfolded at first
    right: Table | None = None  # what is as it should be, folded away below; its title counts it


@dataclass(frozen=True)
class Tile:
    """A card at the top of the page of a single run."""

    what: str  # the name of the row of `summary` that it stands for
    value: str
    more: str = ""
    also: Sequence[str] = ()  # further rows that `more` shows


def content(runs: Runs) -> dict[str, Any]:
    """Everything of templates/run.html but figures and speech, by the names that the template uses."""
    several = len(runs) > 1
    tiles = [] if several else highlights(runs[0])
    return {
        "names": run_names(runs),
        "states": [("complete" if run.complete else "going", (f"{run.name}: " if several else "") + state(run)) for run in runs],
        "tiles": [(tile.what, tile.value, tile.more) for tile in tiles],
        "summary": summary(runs, tiles),
        "checks": checks(runs, tiles),
        "attempts": attempts(runs),
        "notes": notes(runs),
        "absent": absent(runs),
        "evaluations": [table for task in _TASKS if (table := last_evaluations(runs, task))],
        "samples": samples(runs),
        "configuration": configuration(runs),
        "environment": environment_table(runs),
    }


def run_names(runs: Runs) -> list[Cell]:
    """The runs' names, each with its colour where there are several."""
    return [Cell(run.name, colour=run_colour(index, len(runs)) if len(runs) > 1 else "") for index, run in enumerate(runs)]


def rate(found: Rate, small: str = "") -> Cell:
    """A rate with its interval."""
    ends = ", ".join(bounds((found.low, found.high)))
    return Cell(percent(found.value), "strong", f"[{ends}]" if ends else "", small)


def _counted(found: Rate) -> Content:
    """A rate with its interval; below it substitutions, deletions, insertions and the length of the reference, where they are known."""
    parts = (("S", found.substitutions), ("D", found.deletions), ("I", found.insertions), ("of", found.reference))
    counts = ", ".join(f"{key} {value:,}" for key, value in parts if value is not None)
    return [rate(found), Cell(small=counts)] if counts else rate(found)


def state(run: RunData) -> str:
    """Whether a run has ended, and how far it got."""
    if run.complete:
        return "complete"
    return f"running, up to step {run.step:,}" if run.train else "no step yet"


def summary(runs: Runs, tiles: Sequence[Tile] = ()) -> list[Row]:
    """The most important values, a column for each run, without those that `tiles` or the page's heading show."""
    makers: list[tuple[str, Callable[[RunData], Content]]] = [
        ("Steps", lambda run: f"{run.step:,}" + (f" of {run.total_steps:,}" if run.total_steps else "")),
        ("Epochs", lambda run: _last(run, "epoch", "{:.2f}")),
        *(
            (f"{TITLES[what]}, {_set_name(name)}", partial(_last_rate, name=name, what=what))
            for task, what in (("asr", "words"), ("asr", "characters"), ("tts", "outside"), ("tts", "cycle"), ("tts", "units"))
            for name in sorted({name for run in runs if run.last_evaluation for name in run.last_evaluation.names(task)})
        ),
        ("Loss, last line", lambda run: _last(run, "loss", "{:.4f}")),
        ("Records trained on", lambda run: _known(run.totals.records or None, "{:,.0f}")),
        ("Tokens trained on", lambda run: _known(run.totals.tokens or None, "{:,.0f}")),
        ("Tokens per second", lambda run: _known(run.totals.tokens_per_second, "{:,.0f}")),
        ("Training time", lambda run: duration(run.totals.seconds or None)),
        ("From first start to last line", _wall_clock),
        ("MFU, mean", lambda run: percent(math.fsum(known) / len(known)) if (known := _column(run, "mfu")) else None),
        ("Memory, maximum", lambda run: _known(max(_column(run, "memory_gb"), default=None), "{:.1f} GB")),
        ("Ran on", lambda run: ", ".join(attempt_place(run.starts[-1])) or None if run.starts else None),
    ]
    elsewhere = _shown_by(tiles)
    rows = [(name, *(make(run) for run in runs)) for name, make in makers if name not in elsewhere]
    return [row for row in rows if any(cell is not None for cell in row[1:])]


def _shown_by(tiles: Sequence[Tile]) -> set[str]:
    """The names of the rows that cards stand for."""
    return {name for tile in tiles for name in (tile.what, *tile.also)}


def checks(runs: Runs, tiles: Sequence[Tile] = ()) -> Table:
    """What should be 0: the rows of what is not, and below them those that are right; without those that `tiles` show."""
    counts: list[tuple[str, Callable[[RunData], float | None]]] = [
        ("Skipped steps", lambda run: _sum(run, "skipped_steps")),
        ("Selections across modalities", lambda run: _sum(run, "leaked")),
        ("Restarts", lambda run: float(len(run.restarts)) if run.starts else None),
    ]
    wrong: list[Row] = []
    right: list[Row] = []
    elsewhere = _shown_by(tiles)
    for name, count in counts:
        found = [] if name in elsewhere else [count(run) for run in runs]
        if any(found):
            wrong.append((Cell(name, "mark"), *(_known(value, "{:,.0f}") for value in found)))
        elif any(value is not None for value in found):
            right.append((name, *(_known(value, "{:,.0f}") for value in found)))
    return Table("Checks", (), wrong, right=Table(f"{count_of(len(right), 'check')} passed", (), right))


def attempts(runs: Runs) -> Table | None:
    """The starts of each run that resumed; those that resumed exactly, with nothing changed, are folded away. None: no run resumed."""
    wrong: list[Row] = []
    right: list[Row] = []
    for run, shown in zip(runs, run_names(runs), strict=True):
        for attempt, start in enumerate(run.starts if run.restarts else (), 1):
            step, time, changed = number(start.get("step")), number(start.get("time")), entries(start.get("changed"))
            began = None if time is None or not 0 <= time < 1e11 else f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M} UTC"
            exact = {True: "yes", False: "no"}.get(start.get("exact", ""))
            also = entries(start.get("also_changed"))
            settings = [", ".join(map(_plain, changed)), f"without effect on steps: {', '.join(map(_plain, also))}" if also else ""]
            cells: Row = (_known(step, "{:,.0f}"), began, ", ".join(attempt_place(start)) or None, exact, "; ".join(filter(None, settings)))
            names = (f"{attempt}", shown) if len(runs) > 1 else (f"{attempt}",)
            (wrong if changed or also or exact == "no" else right).append((*names, *cells))
    head = ("attempt", *(["run"] if len(runs) > 1 else []), "after step", "started", "on", "exact", "changed")
    if not (wrong or right):
        return None
    folded = Table(f"{count_of(len(right), 'attempt')} with nothing changed", head, right)
    return Table("Attempts", head if wrong else (), wrong, right=folded)


def notes(runs: Runs) -> list[str]:
    """Sentences about what the user should look at in each run, the same as on its last screen."""
    found = []
    for run in runs:
        start, line = (run.starts[-1] if run.starts else {}), (run.train[-1] if run.train else {})
        sets = run.last_evaluation.sets if run.last_evaluation else {}
        found += [
            (f"{run.name}: " if len(runs) > 1 else "") + text for text in run_notes(start, line, sets, number(run.config.get("load_alert")))
        ]
    return found


def absent(runs: Runs) -> list[str]:
    """Sentences that name what each run did not record."""
    missing = {run.name: ", ".join(name for part, name in _PARTS.items() if not getattr(run, part)) for run in runs}
    return [f"Not recorded{f' by {run}' if len(runs) > 1 else ''}: {parts}." for run, parts in missing.items() if parts]


def _set_name(name: str) -> str:
    """A set's name without its task."""
    return name.split("/", 1)[1]


def _known(value: float | None, form: str) -> str | None:
    return None if value is None else form.format(value)


def _column(run: RunData, key: str) -> list[float]:
    return [value for value in run.column(key) if value is not None]


def _last(run: RunData, key: str, form: str) -> str | None:
    return _known(next(reversed(_column(run, key)), None), form)


def _last_rate(run: RunData, name: str, what: str) -> Content:
    """The newest rate of a set, with its step where that is not the run's last."""
    for evaluation in reversed(run.evaluations):
        if found := evaluation.rate(name, what):
            return rate(found, "" if evaluation.step == run.step else f"at step {evaluation.step:,}")
    return None


def _sum(run: RunData, key: str) -> float | None:
    return math.fsum(known) if (known := _column(run, key)) else None


def _wall_clock(run: RunData) -> str | None:
    """From the first start to the last line, interruptions included."""
    first, last = (number(lines[0].get("time")) if lines else None for lines in (run.starts, run.train[-1:]))
    return None if first is None or last is None or last < first else duration(last - first)


def last_evaluations(runs: Runs, task: str) -> Table | None:
    """All values of a task's sets at each run's last evaluation; None where there are no sets."""
    last_ones = [(run.last_evaluation, shown) for run, shown in zip(runs, run_names(runs), strict=True)]
    lines = sorted(((name, last, shown) for last, shown in last_ones if last for name in last.names(task)), key=lambda line: line[0])
    known = [key for key in _COLUMNS[task] if any(_value(last, name, key) is not None for name, last, _ in lines)]
    right = [
        key for key in known if key in _BEST and {number(last.sets.get(name, {}).get(key)) for name, last, _ in lines} <= {_BEST[key], None}
    ]
    columns = [key for key in known if key not in right]
    named = ("set", *(["run"] if len(runs) > 1 else []))
    rows: list[Row] = []
    folded: list[Row] = []
    for name, last, shown in lines:
        records, loss = number(last.sets.get(name, {}).get("records")), last.losses.get(name)
        fixed = (f"{last.step:,}", _known(records, "{:,.0f}"), _known(loss, "{:.4f}"))
        names = (_set_name(name), shown)[: len(named)]
        rows.append((*names, *fixed, *(_value(last, name, key) for key in columns)))
        folded.append((*names, *(_value(last, name, key) for key in right)))
    below = Table(f"{count_of(len(right), 'check')} passed", (*named, *(TITLES[key] for key in right)), folded if right else ())
    head = (*named, "step", "records", "loss", *(TITLES[key] for key in columns))
    return Table(f"{_TASKS[task]}, last evaluation", head, rows, right=below) if rows else None


def _value(evaluation: Evaluation, name: str, key: str) -> Content:
    """A value of a set: an error rate with its interval and counts, or a number."""
    if key in RATES:
        found = evaluation.rate(name, key)
        return _counted(found) if found else None
    value = number(evaluation.sets.get(name, {}).get(key))
    return figure_text(value, FIGURES.keys[key].unit)


def samples(runs: Runs) -> list[Table]:
    """Transcriptions of each set with their differences, a column for each run; records that some run got wrong come first."""
    tables, several = [], len(runs) > 1
    for name in sorted({name for run in runs for name in run.hypotheses}):
        by_run = [{entry.id: entry for entry in run.hypotheses.get(name, ())} for run in runs]
        is_wrong: dict[str, bool] = {}
        for entry in (entry for transcriptions in by_run for entry in transcriptions.values()):
            is_wrong[entry.id] = is_wrong.get(entry.id, False) or entry.wrong
        wrong, right = ([key for key, value in is_wrong.items() if value is kind] for kind in (True, False))
        shown_wrong = _spread(wrong, _SAMPLES)
        shown_right = _spread(right, _SAMPLES - len(shown_wrong))
        rows, folded = (
            [(key, *(difference(found[key]) if key in found else None for found in by_run)) for key in chosen]
            for chosen in (shown_wrong, shown_right)
        )
        count = len(rows) + len(folded)
        about = f"{count} of {count_of(len(is_wrong), 'record')}, {len(wrong):,} of which are wrong" + (" in some run" if several else "")
        head: Row = ("record", *run_names(runs)) if several else ()
        below = Table(f"{count_of(len(folded), 'record')} recognised without an error", head, folded)
        tables.append(Table(name, head if rows else (), rows, about, right=below))
    return tables


def _spread(items: Sequence[str], count: int) -> list[str]:
    """At most `count` of the items, evenly spaced, in their order."""
    count = max(0, count)
    return list(items) if len(items) <= count else [items[index * len(items) // count] for index in range(count)]


def difference(entry: Hypothesis) -> Difference:
    """A transcription aligned with its reference, cut where one of them is long."""
    cut = max(len(entry.reference), len(entry.hypothesis)) > _WORDS
    return Difference(align(entry.reference[:_WORDS], entry.hypothesis[:_WORDS]), cut)


def configuration(runs: Runs) -> list[Table]:
    """Settings that differ between the runs (of a single run: from the defaults), and the rest."""
    several = len(runs) > 1
    defaults = {field.name: field.default for field in dataclasses.fields(RunConfig)}
    given = {key for run in runs for key in run.config}
    keys = [*(key for key in defaults if key in given), *sorted(given - defaults.keys())]

    def differs(key: str) -> bool:
        values = [_plain(run.config.get(key)) for run in runs]
        return values != values[:1] * len(values) if several else key not in defaults or values[0] != _plain(defaults[key])

    first = [key for key in keys if differs(key)]
    titles = ("differ between the runs", "are the same") if several else ("differ from the defaults", "are the defaults")
    tables = []
    for chosen, title in zip((first, [key for key in keys if key not in first]), titles, strict=True):
        if rows := [(key, *(_plain(run.config[key]) if key in run.config else None for run in runs)) for key in chosen]:
            tables.append(Table(f"{len(rows)} that {title}", (), rows, marked=chosen is first, open=chosen is first or not first))
    return tables


def environment_table(runs: Runs) -> Table | None:
    """The machine and software of the runs; of several runs, what is the same in all is folded away. None where it is not known."""
    flat = [dict(_flatten(run.environment)) for run in runs]
    values = {key: [each.get(key) for each in flat] for key in dict.fromkeys(key for each in flat for key in each)}
    if len(runs) == 1:
        return Table("", (), [(key, *found) for key, found in values.items()]) if values else None
    differ: list[Row] = [(Cell(key, "mark"), *found) for key, found in values.items() if len(set(found)) > 1]
    same: list[Row] = [(key, *found) for key, found in values.items() if len(set(found)) == 1]
    return Table("", (), differ, right=Table(f"{len(same)} that are the same", (), same)) if values else None


def _plain(value: Any) -> str:
    """A value of a YAML or JSON file as text."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False, sort_keys=True)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _flatten(values: dict[str, Any], above: str = "") -> Iterable[tuple[str, str]]:
    """Nested mappings as one, whose names join those of all levels by spaces."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{key} ")
        elif value is not None and value != []:
            yield (f"{above}{key}".removeprefix("versions "), _plain(value))


def highlights(run: RunData) -> list[Tile]:
    """The cards of a single run: last error rates, speed and time."""
    found: list[Tile] = []
    last = run.last_evaluation
    for task, what in (("asr", "words"), ("tts", "outside"), ("tts", "cycle")):
        for name in last.names(task) if last else ():
            if last and (value := last.rate(name, what)):
                about = f"95%: {ends}" if (ends := " to ".join(bounds((value.low, value.high)))) else "interval not known"
                about += "" if last.step == run.step else f", at step {last.step:,}"
                found.append(Tile(f"{TITLES[what]}, {_set_name(name)}", percent(value.value), about))
    found = found[:4]
    if (speed := run.totals.tokens_per_second) is not None:
        found.append(Tile("Tokens per second", f"{speed:,.0f}", f"{run.totals.tokens:,} tokens", ["Tokens trained on"]))
    if seconds := duration(run.totals.seconds or None):
        found.append(Tile("Training time", seconds, count_of(len(run.restarts), "restart") if run.starts else "", ["Restarts"]))
    if run.train:
        found.append(Tile("Steps", f"{run.step:,}", f"of {run.total_steps:,}" if run.total_steps else ""))
    return found
