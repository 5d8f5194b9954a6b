"""What a sweep's dimensions make of an objective: its means by level, and how sure they are. Pure.

A level's mean is over its trials, whose other dimensions differ, so that its interval holds what those and chance do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from scipy.special import stdtrit

from most_ray.sweep.ledger import Ledger, Objective, Trial, at_step
from most_ray.sweep.space import Dimension, Kind

Interval = tuple[float, float]


@dataclass(frozen=True)
class Level:
    """Trials of one value of a dimension; of a continuous one, of a half of the values that were tried.

    Attributes:
        mean: of the objective over the trials.
        interval: of the mean, 95%, by Student's t; None with fewer than two trials.
    """

    label: str
    trials: int
    mean: float
    interval: Interval | None


@dataclass(frozen=True)
class Difference:
    """The largest mean of a dimension's levels minus the smallest; its 95% interval is Welch's, None where either has fewer than two
    trials."""

    largest: Level
    smallest: Level
    value: float
    interval: Interval | None


@dataclass(frozen=True)
class Effect:
    """A dimension's levels, all at `step`, in the order of its values; `difference` is None with fewer than two levels."""

    dimension: str
    step: int
    levels: list[Level]
    difference: Difference | None


def effects(ledger: Ledger, objective: Objective) -> list[Effect]:
    """One for each dimension, in the ledger's order, at the last step that all trials with a value of the objective have one of: trials
    that were stopped early are compared with what the others had then.

    None at all where there is no such step, or where a trial went on from another one (population based training): its results are not
    those of its values.
    """
    trials = ledger.trials.values()
    steps = [found for trial in trials if (found := _steps(trial, objective.metric))]
    common = set.intersection(*steps) if steps else set()
    if not common or any(len(trial.runs) > 1 for trial in trials):
        return []
    step = max(common)
    valued = [(trial.values, value) for trial in trials if (value := _value(trial, objective.metric, step)) is not None]
    return [effect for dimension in dimensions_of(ledger) if (effect := _effect(dimension, step, valued))]


def dimensions_of(ledger: Ledger) -> list[Dimension]:
    """The sweep's dimensions, in the order of its file, without what is described incompletely."""
    found = []
    given = ledger.sweep.get("dimensions")
    for entry in given if isinstance(given, list) else ():
        try:
            values, kind = tuple(entry.get("values", ())), entry["kind"]
            dimension = Dimension(str(entry["name"]), kind, values, float(entry.get("low", 0)), float(entry.get("high", 0)))
        except (AttributeError, KeyError, TypeError, ValueError):
            continue
        listed = kind in ("choice", "grid")
        if kind in get_args(Kind) and (values if listed else math.isfinite(dimension.low) and math.isfinite(dimension.high)):
            found.append(dimension)
    return found


def level_name(value: Any) -> str:
    """A dimension's value as text, fractions with four significant digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(level_name, value)) or "none"
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _steps(trial: Trial, metric: str) -> set[int]:
    return {result.step for result in trial.results if _value(trial, metric, result.step) is not None}


def _value(trial: Trial, metric: str, step: int) -> float | None:
    value = at_step(trial, metric, step)
    return value if value is not None and math.isfinite(value) else None


def _effect(dimension: Dimension, step: int, trials: Sequence[tuple[Mapping[str, Any], float]]) -> Effect | None:
    known = [(values[dimension.name], value) for values, value in trials if dimension.name in values]
    groups = _halves(known) if dimension.continuous else _groups(dimension, known)
    if not groups:
        return None
    levels = [Level(name, len(values), float(np.mean(values)), _interval(values)) for name, values in groups]
    ends = [pick(range(len(levels)), key=lambda index: levels[index].mean) for pick in (max, min)]
    difference = None
    if len(levels) > 1:
        largest, smallest = ends if ends[0] != ends[1] else (0, 1)  # all means are the same
        bounds = _welch(groups[largest][1], groups[smallest][1])
        difference = Difference(levels[largest], levels[smallest], levels[largest].mean - levels[smallest].mean, bounds)
    return Effect(dimension.name, step, levels, difference)


def _groups(dimension: Dimension, known: Sequence[tuple[Any, float]]) -> list[tuple[str, list[float]]]:
    """By value: the listed ones first, in their order."""
    found: dict[str, tuple[str, list[float]]] = {}
    for value, results in (*((value, []) for value in dimension.listed or ()), *((value, [result]) for value, result in known)):
        found.setdefault(json.dumps(value, sort_keys=True), (level_name(value), []))[1].extend(results)
    return [(name, results) for name, results in found.values() if results]


def _halves(known: Sequence[tuple[Any, float]]) -> list[tuple[str, list[float]]]:
    """At the median, which counts to the lower half."""
    tried = [(float(value), result) for value, result in known if isinstance(value, int | float) and math.isfinite(value)]
    median = float(np.median([value for value, _ in tried])) if tried else 0.0
    halves = [[pair for pair in tried if (pair[0] > median) is upper] for upper in (False, True)]
    return [(_range([value for value, _ in half]), [result for _, result in half]) for half in halves if half]


def _range(values: Sequence[float]) -> str:
    low, high = level_name(float(min(values))), level_name(float(max(values)))
    return low if low == high else f"{low} to {high}"


def _interval(values: Sequence[float]) -> Interval | None:
    if len(values) < 2:
        return None
    error = math.sqrt(np.var(values, ddof=1) / len(values))
    return _around(float(np.mean(values)), error, len(values) - 1)


def _welch(a: Sequence[float], b: Sequence[float]) -> Interval | None:
    """Of mean(a) - mean(b), without the assumption that both spread alike."""
    if min(len(a), len(b)) < 2:
        return None
    squares = [float(np.var(values, ddof=1)) / len(values) for values in (a, b)]
    below = sum(square**2 / (len(values) - 1) for square, values in zip(squares, (a, b), strict=True))
    freedom = sum(squares) ** 2 / below if below else 1.0  # without any spread the interval is a point
    return _around(float(np.mean(a) - np.mean(b)), math.sqrt(sum(squares)), freedom)


def _around(mean: float, error: float, freedom: float) -> Interval:
    reach = float(stdtrit(freedom, 0.975)) * error
    return mean - reach, mean + reach
