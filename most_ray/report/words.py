"""Error rates by the columns of the records' metadata, such as the speaker, and confusions of words."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from most_ray.errors import count_of
from most_ray.evaluation.wer import EditCounts, error_rate, of_records, word_counts, word_pairs
from most_ray.metrics.figures import TITLES
from most_ray.metrics.texts import percent
from most_ray.report.cells import Cell, Content, Row
from most_ray.report.collect import Hypothesis, Rate, RunData, entries, number, rate_of
from most_ray.report.run_tables import Table, rate, run_names

Runs = Sequence[RunData]
_MOST_VALUES = 40  # of a column, those with most words
_MOST_COLUMNS = 16
_QUARTERS = 4  # ranges of a column of many different numbers
_FEW_NUMBERS = 12  # different numbers that are values of their own
_SMALL = 36  # words of a vocabulary of which each pair is shown
_LISTED = 20  # words of each list
_FIRST = ("speaker", "speaker_id", "client_id", "sex", "gender", "accent", "language", "dataset")  # the columns that come first


@dataclass(frozen=True)
class Choice:
    """Tables of which one is shown at a time."""

    title: str
    tables: Sequence[Table]  # their titles are those of the choices


@dataclass(frozen=True)
class Confusions:
    """The confusions of one set of one run: either `grid` or `lists`."""

    title: str
    grid: Table | None = None  # reference words by hypothesis words
    lists: Sequence[Table] = ()  # substitutions, deletions, insertions
    note: str = ""


# Error rates by columns of the metadata.


def by_columns(runs: Runs) -> list[Choice]:
    """The error rates of each set for each value of each column that has several; sets whose records have no such column are left out."""
    names = sorted({name for run in runs for name in run.hypotheses if name.split("/", 1)[0] in ("asr", "tts")})
    return [choice for name in names if (choice := _choice(runs, name)).tables]


def _choice(runs: Runs, name: str) -> Choice:
    task, short = name.split("/", 1)
    said = [run.hypotheses.get(name, []) for run in runs]
    counts = [word_counts(*_texts(each)) for each in said]
    columns = {column: None for each in said for entry in each for column in entry.metadata}
    grouped = {column: _groups([entry.metadata.get(column) for each in said for entry in each]) for column in columns}
    found = {column: groups for column, groups in grouped.items() if groups}
    place = {column: _FIRST.index(column) if column in _FIRST else len(_FIRST) for column in found}
    chosen = sorted(found, key=lambda column: (place[column], len(set(found[column].values))))[:_MOST_COLUMNS]
    tables = [_table(runs, column, found[column], counts) for column in chosen]
    return Choice(f"{TITLES['words' if task == 'asr' else 'cycle']} of {short}", tables)


def _texts(said: Sequence[Hypothesis]) -> tuple[list[str], list[str]]:
    """References and hypotheses as texts."""
    return [" ".join(entry.reference) for entry in said], [" ".join(entry.hypothesis) for entry in said]


@dataclass(frozen=True)
class _Groups:
    values: Sequence[str]  # of each record
    order: Sequence[str] = ()  # of the values, where they have one


def _groups(found: Sequence[Any]) -> _Groups | None:
    """The records' values of a column, as they are shown, "" where a record has none; None where the column does not separate groups."""
    stated = [value for value in found if value is not None]
    numbers = [value for each in stated if (value := number(each)) is not None]
    if len(numbers) == len(stated) and len(set(numbers)) > _FEW_NUMBERS:
        return _ranges(found, np.array(numbers))
    shown = ["" if value is None else str(value).lower() if isinstance(value, bool) else str(value) for value in found]
    return _Groups(shown) if 1 < len({*shown} - {""}) <= max(_FEW_NUMBERS, len(shown) // 2) else None


def _ranges(found: Sequence[Any], numbers: np.ndarray) -> _Groups | None:
    """For each value the range that it is in, of ranges with equally many of the numbers, which are those that are stated."""
    edges = np.unique(np.quantile(numbers, np.arange(1, _QUARTERS) / _QUARTERS))
    group = np.searchsorted(edges, numbers, side="left")
    names = {int(index): f"{numbers[group == index].min():.4g} to {numbers[group == index].max():.4g}" for index in np.unique(group)}
    named = iter(group)
    values = ["" if value is None else names[int(next(named))] for value in found]
    return _Groups(values, [*names.values(), ""]) if len(names) > 1 else None


def _table(runs: Runs, column: str, groups: _Groups, counts: Sequence[EditCounts]) -> Table:
    """The error rates by the values of a column: in the values' order, or highest of the first run first."""
    rows: list[dict[str, list[int]]] = []  # of each run, by value
    start, words = 0, collections.Counter[str]()  # words of the references, of the run that has most
    for each in counts:
        rows.append({})
        for row, value in enumerate(groups.values[start : start + len(each.reference)]):
            rows[-1].setdefault(value, []).append(row)
        start += len(each.reference)
        words |= collections.Counter({value: int(each.reference[chosen].sum()) for value, chosen in rows[-1].items()})
    shown = [value for value, _ in words.most_common(_MOST_VALUES)]
    rates = {value: [_rate(own.get(value, []), each) for own, each in zip(rows, counts, strict=True)] for value in shown}
    if groups.order:
        shown.sort(key=groups.order.index)
    else:
        shown.sort(key=lambda value: (-next((found.value for found in rates[value] if found), -1.0), value))
    lines: list[Row] = [
        (
            value or Cell("not stated", "none"),
            *(rate(found) if found else None for found in rates[value]),
            f"{words[value]:,}",
            f"{max(len(own.get(value, ())) for own in rows):,}",
        )
        for value in shown
    ]
    about = f"the {len(shown)} of {count_of(len(words), 'value')} with most words" if len(words) > len(shown) else ""
    return Table(column, (column, *(run_names(runs) if len(runs) > 1 else ["error rate"]), "words", "records"), lines, about)


def _rate(rows: Sequence[int], counts: EditCounts) -> Rate | None:
    return rate_of({"words": error_rate(of_records(counts, rows))}, "words") if rows else None


# Confusions of words.


def confusions(runs: Runs) -> list[Confusions]:
    """The confusions of each ASR set of each run at its last evaluation: of a small vocabulary each pair of words, else the most frequent
    substitutions, deletions and insertions."""
    found = []
    names = {name for run in runs for name in (*run.hypotheses, *(run.last_evaluation.sets if run.last_evaluation else ()))}
    for name in sorted(name for name in names if name.startswith("asr/")):
        for run in runs:
            title = name.split("/", 1)[1] + (f", {run.name}" if len(runs) > 1 else "")
            pairs, complete = _pairs(run, name)
            if not any(left != right for left, right in pairs):
                continue
            words = list(dict.fromkeys(word for entry in run.hypotheses.get(name, ()) for word in entry.reference))
            found.append(_grid(title, pairs, words) if complete and 1 < len(words) <= _SMALL else _lists(title, pairs, complete))
    return found


def _pairs(run: RunData, name: str) -> tuple[Mapping[tuple[str, str], int], bool]:
    """How often each word of a reference was recognised as each word, and whether all are counted: without the hypotheses only the most
    frequent confusions are known."""
    figures = run.last_evaluation.sets.get(name, {}) if run.last_evaluation else {}
    stated = [each for each in entries(figures.get("confusions")) if isinstance(each, list) and len(each) == 3 and number(each[2])]
    if said := run.hypotheses.get(name):
        counted = word_pairs(*_texts(said))
        total = sum(times for (left, right), times in counted.items() if left != right)
        if total >= sum(entry[2] for entry in stated):  # else these are a few samples of them
            return counted, True
    return {(str(left), str(right)): int(times) for left, right, times in stated}, False


def _grid(title: str, pairs: Mapping[tuple[str, str], int], words: Sequence[str]) -> Confusions:
    """A row for each word of the references, with its share of each word that it was recognised as."""
    others = sorted({right for _, right in pairs} - {*words, ""})
    counted = collections.Counter[tuple[str, str]]()
    for (left, right), times in pairs.items():
        counted[left, right if right in words or not right else "\0"] += times
    columns = [*words, *(["\0"] if others else []), *([""] if any(not right for _, right in counted) else [])]
    rows: list[Row] = []
    for left in [*words, *([""] if any(not left for left, _ in counted) else [])]:
        total = sum(counted[left, right] for right in columns)
        heats = [_heat(counted[left, right], total, left == right) for right in columns]
        rows.append((left or Cell("inserted", "none"), *heats, f"{total:,}"))
    named: list[Content] = [Cell("other words", "none") if word == "\0" else word or Cell("nothing", "none") for word in columns]
    note = f"Other words: {', '.join(others[:12])}{', ...' if len(others) > 12 else ''}." if others else ""
    return Confusions(title, grid=Table(title, ("", *named, "times"), rows), note=note)


def _heat(times: int, total: int, right: bool) -> Content:
    return Cell(f"{times:,}", heat=times / total, right=right) if times else ""


def _lists(title: str, pairs: Mapping[tuple[str, str], int], complete: bool) -> Confusions:
    """The most frequent substitutions, deletions and insertions, each with its share of the times that the word was said."""
    said = collections.Counter[str]()
    for (left, _), times in pairs.items():
        said[left] += times
    kinds: Sequence[tuple[str, Row, list[tuple[str, str]]]] = (
        ("substitutions", ("said", "recognised as", "times"), [pair for pair in pairs if all(pair) and pair[0] != pair[1]]),
        ("deletions", ("left out", "times"), [pair for pair in pairs if pair[0] and not pair[1]]),
        ("insertions", ("added", "times"), [pair for pair in pairs if pair[1] and not pair[0]]),
    )
    tables = []
    for kind, head, chosen in kinds:
        chosen.sort(key=lambda pair: (-pairs[pair], pair))
        rows: list[Row] = []
        for pair in chosen[:_LISTED]:
            of = said[pair[0]] if complete and pair[0] else 0
            share = f"{percent(pairs[pair] / of)} of {of:,}" if of else ""
            rows.append((*(word for word in pair if word), Cell(f"{pairs[pair]:,}", bar=4 * pairs[pair] / pairs[chosen[0]], small=share)))
        about = f"the {len(rows)} most frequent of {len(chosen):,}" if len(rows) < len(chosen) else ""
        tables += [Table(kind, head, rows, about)] if rows else []
    return Confusions(title, lists=tables)
