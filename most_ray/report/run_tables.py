"""The page's tables. Everything that comes from a run goes through `text`: hypotheses are a model's output, names are a user's."""

from __future__ import annotations

import dataclasses
import html
import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from most_ray.config import RunConfig
from most_ray.report.collect import Evaluation, Hypothesis, Rate, RunData, entries, mapping, number
from most_ray.report.curves import run_colour
from most_ray.report.differences import align

Runs = Sequence[RunData]
_SAMPLES = 20  # of each set
_WORDS = 80  # of a sample
_CONFUSIONS = 30
_MISSING = '<span class="none">–</span>'


def text(value: Any) -> str:
    """A value as text of the page, harmless wherever it stands."""
    return html.escape(str(value), quote=True)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], classes: str = "") -> str:
    """A table of cells that are markup already."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join("<tr>" + f'<th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>\n" for row in rows)
    header = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    return f'<div class="scroll"><table class="{classes}">{header}<tbody>\n{body}</tbody></table></div>'


def pairs(rows: Iterable[Sequence[str]], classes: str = "") -> str:
    """Names and values, in as many columns as there is room for; of cells that are markup already."""
    body = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>\n" for name, value in rows)
    return f'<dl class="pairs {classes}">\n{body}</dl>'


def _by_run(runs: Runs, rows: Sequence[Sequence[str]], classes: str) -> str:
    """Rows of a name and a value for each run."""
    if len(runs) == 1:
        return pairs(rows, classes)
    return table(["", *run_names(runs)], rows, classes)


def run_names(runs: Runs) -> list[str]:
    """The runs' names, each with its colour where there are several."""
    keys = [f'<span class="key" style="background:{run_colour(index, len(runs))}"></span>' for index in range(len(runs))]
    return [f"{key if len(runs) > 1 else ''}{text(run.name)}" for key, run in zip(keys, runs, strict=True)]


def percent(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.2%}" if value < 0.1 else f"{value:.1%}"


def rate(found: Rate | None, short: bool = False) -> str:
    """A rate with its interval, and with what it was counted from."""
    if found is None:
        return _MISSING
    bounds = (
        "" if found.low is None or found.high is None else f' <span class="interval">[{percent(found.low)}, {percent(found.high)}]</span>'
    )
    parts = (("S", found.substitutions), ("D", found.deletions), ("I", found.insertions), ("of", found.reference))
    counts = ", ".join(f"{key} {value:,}" for key, value in parts if value is not None)
    return f"<b>{percent(found.value)}</b>{bounds}" + (f'<br><span class="counts">{counts}</span>' if counts and not short else "")


def duration(seconds: float | None) -> str:
    if seconds is None:
        return _MISSING
    if seconds < 90:
        return f"{seconds:.1f} s"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"


def state(run: RunData) -> str:
    """Whether a run has ended, and how far it got."""
    if run.complete:
        return "complete"
    return f"running, up to step {run.step:,}" if run.train else "no step yet"


def summary(runs: Runs) -> str:
    """What matters most, a run a column."""
    rows: list[tuple[str, list[str]]] = []

    def add(name: str, make: Callable[[RunData], str]) -> None:
        cells = [make(run) for run in runs]
        if any(cell != _MISSING for cell in cells):
            rows.append((name, cells))

    add("State", lambda run: text(state(run)))
    add("Steps", lambda run: f"{run.step:,}" + (f" of {run.total_steps:,}" if run.total_steps else ""))
    add("Epochs", lambda run: _last(run, "epoch", "{:.2f}"))
    for task, what, title in (
        ("asr", "words", "WER"),
        ("asr", "characters", "CER"),
        ("tts", "units", "unit error rate"),
        ("tts", "cycle", "cycle WER"),
    ):
        for name in sorted({name for run in runs if run.last_evaluation for name in run.last_evaluation.names(task)}):
            add(f"{title}, {text(name.split('/', 1)[1])}", lambda run, name=name, what=what: _last_rate(run, name, what))  # type: ignore[misc]
    add("Loss, last line", lambda run: _last(run, "loss", "{:.4f}"))
    add("Tokens trained on", lambda run: _known(_sum(run, "tokens"), "{:,.0f}"))
    add("Tokens per second", lambda run: _known(_speed(run), "{:,.0f}"))
    add("Training time", lambda run: duration(_seconds(run)))
    add("From first start to last line", _wall_clock)
    add("Restarts", lambda run: f"{len(run.restarts)}" if run.starts else _MISSING)
    add("Skipped steps", lambda run: _known(_sum(run, "skipped_steps"), "{:,.0f}"))
    add("Selections across modalities", lambda run: _known(_sum(run, "leaked"), "{:,.0f}"))
    add("MFU, mean", lambda run: percent(_mean(run, "mfu")))
    add("Memory, most", lambda run: _known(max((v for v in run.column("memory_gb") if v is not None), default=None), "{:.1f} GB"))
    add("Ran on", _machine)
    return _by_run(runs, [(name, *cells) for name, cells in rows], "summary")


def _known(value: float | None, form: str) -> str:
    return _MISSING if value is None else form.format(value)


def _last(run: RunData, key: str, form: str) -> str:
    return _known(next((value for value in reversed(run.column(key)) if value is not None), None), form)


def _last_rate(run: RunData, name: str, what: str) -> str:
    found = [(e.step, value) for e in run.evaluations if (value := e.rate(name, what))]
    if not found:
        return _MISSING
    step, value = found[-1]
    return rate(value, short=True) + ("" if step == run.step else f' <span class="counts">at step {step:,}</span>')


def _sum(run: RunData, key: str) -> float | None:
    known = [value for value in run.column(key) if value is not None]
    return math.fsum(known) if known else None


def _mean(run: RunData, key: str) -> float | None:
    known = [value for value in run.column(key) if value is not None]
    return math.fsum(known) / len(known) if known else None


def _seconds(run: RunData) -> float | None:
    """Of training itself: what was lost between attempts does not count."""
    pairs = zip(run.column("tokens"), run.column("tokens_per_second"), strict=True)
    known = [tokens / speed for tokens, speed in pairs if tokens is not None and speed]
    return math.fsum(known) if known else None


def _speed(run: RunData) -> float | None:
    tokens, seconds = _sum(run, "tokens"), _seconds(run)
    return tokens / seconds if tokens is not None and seconds else None


def _wall_clock(run: RunData) -> str:
    first = number(run.starts[0].get("time")) if run.starts else None
    last = number(run.train[-1].get("time")) if run.train else None
    return _MISSING if first is None or last is None or last < first else duration(last - first)


def _machine(run: RunData) -> str:
    start = run.starts[-1] if run.starts else {}
    workers = number(start.get("workers"))
    parts = [f"{workers:g} worker{'s' if workers != 1 else ''}"] if workers is not None else []
    parts += [str(start["device"])] if start.get("device") else []
    parts += [f"{key} {value}" for key, value in mapping(start.get("topology")).items() if value != 1]
    return text(", ".join(parts)) if parts else _MISSING


_COLUMNS: dict[str, tuple[tuple[str, str], ...]] = {
    "asr": (("WER", "words"), ("CER", "characters"), ("empty", "empty_rate"), ("looping", "loop_rate"), ("length cap", "length_cap_rate")),
    "tts": (
        ("unit error rate", "units"),
        ("cycle WER", "cycle"),
        ("outside WER", "outside"),
        ("duration ratio", "duration_ratio"),
        ("looping", "loop_rate"),
        ("ended by marker", "end_of_audio_rate"),
        ("length cap", "length_cap_rate"),
        ("foreign tokens", "foreign_rate"),
    ),
    "text": (("perplexity", "perplexity"),),
}
_PLAIN = ("duration_ratio", "perplexity")  # no rates


def last_figures(runs: Runs, task: str) -> str:
    """All figures of a task's sets at each run's last evaluation; empty where there are none."""
    lines: list[tuple[str, Evaluation, str]] = []
    for run, shown in zip(runs, run_names(runs), strict=True):
        last = run.last_evaluation
        lines += [(name, last, shown) for name in last.names(task)] if last else []
    lines.sort(key=lambda line: line[0])
    columns = [column for column in _COLUMNS[task] if any(_figure(last, name, column[1]) != _MISSING for name, last, _ in lines)]
    rows = []
    for name, last, shown in lines:
        own = [_figure(last, name, key) for _, key in columns]
        fixed = [shown] if len(runs) > 1 else []
        records = number(last.sets.get(name, {}).get("records"))
        rows.append(
            [
                text(name.split("/", 1)[1]),
                *fixed,
                f"{last.step:,}",
                _known(records, "{:,.0f}"),
                _known(last.losses.get(name), "{:.4f}"),
                *own,
            ]
        )
    head = ["set", *(["run"] if len(runs) > 1 else []), "step", "records", "loss", *(title for title, _ in columns)]
    return table(head, rows, "figures") if rows else ""


def _figure(evaluation: Evaluation, name: str, key: str) -> str:
    if key.endswith("_rate") or key in _PLAIN:
        value = number(evaluation.sets.get(name, {}).get(key))
        return _known(value, "{:.3f}") if key in _PLAIN else percent(value)
    return rate(evaluation.rate(name, key))


def confusion_tables(runs: Runs) -> list[str]:
    """The most frequent confusions of each ASR set of each run at its last evaluation."""
    made = []
    for run in runs:
        for name, figures in sorted(run.last_evaluation.sets.items()) if run.last_evaluation else ():
            found = [
                entry
                for entry in entries(figures.get("confusions"))
                if isinstance(entry, (list, tuple)) and len(entry) == 3 and number(entry[2])
            ]
            if not found:
                continue
            most = max(entry[2] for entry in found)
            nothing = '<i class="none">nothing</i>'
            rows = [
                (
                    text(said) or nothing,
                    text(heard) or nothing,
                    f'{count:,}<span class="bar" style="width:{4 * count / most:.2f}em"></span>',
                )
                for said, heard, count in found[:_CONFUSIONS]
            ]
            title = name.split("/", 1)[1] + (f", {run.name}" if len(runs) > 1 else "")
            made.append(f"<div><h4>{text(title)}</h4>{table(('reference', 'heard as', 'times'), rows, 'confusions')}</div>")
    return made


def samples(runs: Runs) -> list[str]:
    """Transcriptions of each set with their differences, a run a column; records that some run got wrong come first."""
    made = []
    for name in sorted({name for run in runs for name in run.hypotheses}):
        by_run = [{entry.id: entry for entry in run.hypotheses.get(name, ())} for run in runs]
        together: dict[str, bool] = {}
        for said in by_run:
            for key, entry in said.items():
                together[key] = together.get(key, False) or entry.wrong
        wrong, right = ([key for key, is_wrong in together.items() if is_wrong is kind] for kind in (True, False))
        chosen = _spread(wrong, _SAMPLES)
        chosen += _spread(right, _SAMPLES - len(chosen))
        rows = [(text(key), *(difference(said[key]) if key in said else _MISSING for said in by_run)) for key in chosen]
        shown = f"{len(chosen)} of {len(together):,} records, {len(wrong):,} of which are wrong" + (" in some run" if len(runs) > 1 else "")
        head = ("record", *run_names(runs)) if len(runs) > 1 else ()
        made.append(f"<div><h4>{text(name)} <small>{shown}</small></h4>{table(head, rows, 'samples')}</div>")
    return made


def _spread(items: Sequence[str], count: int) -> list[str]:
    """`count` of the items from all over them, in their order."""
    count = max(0, count)
    return list(items) if len(items) <= count else [items[index * len(items) // count] for index in range(count)]


def difference(entry: Hypothesis) -> str:
    """A hypothesis with its reference's words in place where the two differ."""
    reference, hypothesis = entry.reference, entry.hypothesis
    cut = len(reference) > _WORDS or len(hypothesis) > _WORDS
    parts = []
    for piece in align(reference[:_WORDS], hypothesis[:_WORDS]):
        said, heard = text(" ".join(piece.reference)), text(" ".join(piece.hypothesis))
        marked = {
            "equal": said,
            "substitute": f'<span class="sub"><del>{said}</del> <ins>{heard}</ins></span>',
            "delete": f'<del class="gone">{said}</del>',
            "insert": f'<ins class="added">{heard}</ins>',
        }
        parts.append(marked[piece.kind])
    return (" ".join(parts) or '<i class="none">both empty</i>') + (" …" if cut else "")


def configuration(runs: Runs) -> str:
    """Settings; first those that differ between the runs, or, of one run, from the defaults."""
    keys = sorted({key for run in runs for key in run.config})
    if not keys:
        return ""
    several = len(runs) > 1
    defaults = {field.name: field.default for field in dataclasses.fields(RunConfig)}

    def differs(key: str) -> bool:
        values = [_plain(run.config.get(key)) for run in runs]
        return values != values[:1] * len(values) if several else key not in defaults or values[0] != _plain(defaults[key])

    order = {field.name: index for index, field in enumerate(dataclasses.fields(RunConfig))}
    keys.sort(key=lambda key: (order.get(key, len(order)), key))
    first = [key for key in keys if differs(key)]
    rest = [key for key in keys if key not in first]
    parts = []
    for chosen, title, own in (
        (first, "differ between the runs" if several else "differ from the defaults", "marked"),
        (rest, "are the same" if several else "are the defaults", ""),
    ):
        if chosen:
            rows = [(text(key), *(text(_plain(run.config[key])) if key in run.config else _MISSING for run in runs)) for key in chosen]
            opened = "" if chosen is rest and first else " open"
            parts.append(f"<details{opened}><summary>{len(chosen)} that {title}</summary>{_by_run(runs, rows, f'keys {own}')}</details>")
    return "".join(parts)


def surroundings(runs: Runs) -> str:
    """What the runs ran on; lines that differ are marked."""
    flat = [dict(_flatten(run.environment)) for run in runs]
    keys = list(dict.fromkeys(key for each in flat for key in each))
    rows = []
    for key in keys:
        values = [each.get(key) for each in flat]
        name = f'<span class="mark">{text(key)}</span>' if values != values[:1] * len(values) else text(key)
        rows.append((name, *(_MISSING if value is None else text(value) for value in values)))
    return _by_run(runs, rows, "keys") if rows else ""


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False, sort_keys=True)
    return {None: "none", True: "true", False: "false"}.get(value, str(value)) if value is None or isinstance(value, bool) else str(value)


def _flatten(values: dict[str, Any], above: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{key} ")
        elif value is not None and value != []:
            yield (f"{above}{key}".removeprefix("versions "), _plain(value))


def highlights(run: RunData) -> list[tuple[str, str, str]]:
    """(what, value, more) of a single run, as markup: last error rates, speed and time."""
    found = []
    last = run.last_evaluation
    for task, what, title in (("asr", "words", "WER"), ("tts", "cycle", "cycle WER")):
        for name in last.names(task) if last else ():
            if last and (value := last.rate(name, what)):
                known = value.low is not None and value.high is not None
                bounds = f"95%: {percent(value.low)} to {percent(value.high)}" if known else "interval not known"
                found.append((f"{title}, {text(name.split('/', 1)[1])}", percent(value.value), bounds))
    found = found[:4]
    if (speed := _speed(run)) is not None:
        found.append(("tokens per second", f"{speed:,.0f}", f"{_known(_sum(run, 'tokens'), '{:,.0f}')} tokens"))
    if (seconds := _seconds(run)) is not None:
        restarts = f"{len(run.restarts)} restart{'s' if len(run.restarts) != 1 else ''}" if run.starts else ""
        found.append(("training time", duration(seconds), restarts))
    if run.train:
        found.append(("steps", f"{run.step:,}", f"of {run.total_steps:,}" if run.total_steps else ""))
    return found
