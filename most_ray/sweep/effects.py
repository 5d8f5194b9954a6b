"""The effect of a sweep's dimensions on an objective: its mean at each level, with confidence intervals. Pure functions.

A level's mean is over its trials, whose other dimensions differ; its interval therefore covers their effects and chance.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from scipy.special import stdtrit

from most_ray.sweep.ledger import Ledger, Objective, Trial, metric_at
from most_ray.sweep.space import Dimension, Kind

Interval = tuple[float, float]
_LARGEST = 1e200  # of values that are compared: their sums are finite


@dataclass(frozen=True)
class Level:
    """The trials with one value of a dimension or, of a continuous one, with the lower or upper half of the values that were tried."""

    label: str
    trials: int
    mean: float  # of the objective
    interval: Interval | None  # 95% interval of the mean by Student's t; None with fewer than two trials


@dataclass(frozen=True)
class Difference:
    """The largest mean of a dimension's levels minus the smallest."""

    largest: Level
    smallest: Level
    value: float
    interval: Interval | None  # 95%, by Welch's t-test; None if either level has fewer than two trials


@dataclass(frozen=True)
class Effect:
    """The effect of one dimension."""

    dimension: str
    step: int  # that all trials are compared at
    levels: list[Level]  # in the order of the dimension's values
    difference: Difference | None  # None with fewer than two levels


def effects(ledger: Ledger, objective: Objective) -> list[Effect]:
    """Return the effect of each dimension, in the ledger's order. Trials are compared at the last step at which all that have values of the
    objective have one, so that trials that were stopped early are compared with the others' results at that step. The list is empty if
    there is no such step, or if a trial continued from another one (population based training), since its results then do not depend on its
    values alone."""
    trials = ledger.trials.values()
    measured = [{r.step for r in trial.results if _value(trial, objective.metric, r.step) is not None} for trial in trials]
    steps = [found for found in measured if found]
    common = set.intersection(*steps) if steps else set()
    if not common or any(len(trial.runs) > 1 for trial in trials):
        return []
    step = max(common)
    valued = [(trial.values, value) for trial in trials if (value := _value(trial, objective.metric, step)) is not None]
    return [effect for dimension in dimensions_of(ledger) if (effect := _effect(dimension, step, valued))]


def dimensions_of(ledger: Ledger) -> list[Dimension]:
    """Return the sweep's dimensions in the order of its file, without any that the ledger describes incompletely."""
    found, given = [], ledger.sweep.get("dimensions")
    for entry in given if isinstance(given, list) else ():
        try:
            values, kind = tuple(entry.get("values", ())), entry["kind"]
            dimension = Dimension(str(entry["name"]), kind, values, float(entry.get("low", 0)), float(entry.get("high", 0)))
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):  # incomplete: the ledger's file was edited or cut
            continue
        bounded = math.isfinite(dimension.low) and math.isfinite(dimension.high)
        if kind in get_args(Kind) and (values if kind in ("choice", "grid") else bounded):
            found.append(dimension)
    return found


def level_name(value: Any) -> str:
    """Format a dimension's value, fractions with four significant digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(level_name, value)) or "none"
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _value(trial: Trial, metric: str, step: int) -> float | None:
    value = metric_at(trial, metric, step)
    return value if value is not None and math.isfinite(value) else None


def _effect(dimension: Dimension, step: int, trials: Sequence[tuple[Mapping[str, Any], float]]) -> Effect | None:
    known = [(values[dimension.name], value) for values, value in trials if dimension.name in values]
    groups = _halves(known) if dimension.continuous else _groups(dimension, known)
    if not groups:
        return None
    levels = [Level(name, len(values), float(np.mean(values)), _interval(values)) for name, values in groups]
    means, difference = [level.mean for level in levels], None
    if len(levels) > 1:
        ends = means.index(max(means)), means.index(min(means))
        largest, smallest = ends if ends[0] != ends[1] else (0, 1)  # all means are equal
        bounds = _welch(groups[largest][1], groups[smallest][1])
        difference = Difference(levels[largest], levels[smallest], means[largest] - means[smallest], bounds)
    return Effect(dimension.name, step, levels, difference)


def _groups(dimension: Dimension, known: Sequence[tuple[Any, float]]) -> list[tuple[str, list[float]]]:
    """Group results by value, the dimension's listed values first, in their order."""
    found: dict[str, tuple[str, list[float]]] = {}
    for value, results in (*((value, []) for value in dimension.listed or ()), *((value, [result]) for value, result in known)):
        found.setdefault(json.dumps(value, sort_keys=True), (level_name(value), []))[1].extend(results)
    return [(name, results) for name, results in found.values() if results]


def _halves(known: Sequence[tuple[Any, float]]) -> list[tuple[str, list[float]]]:
    """Split results at the median of the values, which belongs to the lower half."""
    tried = [(float(value), result) for value, result in known if isinstance(value, int | float) and abs(value) < _LARGEST]
    median, found = float(np.median([value for value, _ in tried])) if tried else 0.0, []
    for upper in (False, True):
        if half := [pair for pair in tried if (pair[0] > median) is upper]:
            low, high = (level_name(end(value for value, _ in half)) for end in (min, max))
            found.append((low if low == high else f"{low} to {high}", [result for _, result in half]))
    return found


def _interval(values: Sequence[float]) -> Interval | None:
    if len(values) < 2:
        return None
    return _interval_around(float(np.mean(values)), math.sqrt(np.var(values, ddof=1) / len(values)), len(values) - 1)


def _welch(a: Sequence[float], b: Sequence[float]) -> Interval | None:
    """Return the interval of mean(a) - mean(b) without assuming equal variances."""
    if min(len(a), len(b)) < 2:
        return None
    squares = [float(np.var(values, ddof=1)) / len(values) for values in (a, b)]
    below = sum(square**2 / (len(values) - 1) for square, values in zip(squares, (a, b), strict=True))
    freedom = sum(squares) ** 2 / below if below else 1.0  # without variance the interval is a point
    return _interval_around(float(np.mean(a) - np.mean(b)), math.sqrt(sum(squares)), freedom)


def _interval_around(mean: float, error: float, freedom: float) -> Interval:
    reach = float(stdtrit(freedom, 0.975)) * error
    return mean - reach, mean + reach
