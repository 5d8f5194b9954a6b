"""The train lines of metrics.jsonl as columns of numbers: a run of a million lines takes some 0.3 GB rather than 5 GB of dictionaries."""

from __future__ import annotations

import typing
from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np

from most_ray.metrics.keys import Each
from most_ray.metrics.schema import TRAIN

_MODALITIES = ("text", "audio")


def number(value: Any) -> float | None:
    """The value where it is a finite number whose sums stay finite, else None."""
    if type(value) is float:  # the usual case, of which a report reads millions
        return value if -1e200 < value < 1e200 else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < 1e200 else None  # false for NaN


def _is_number(kind: Any) -> bool:
    return kind in (int, float) or set(typing.get_args(kind)) - {type(None)} in ({int}, {float})


# Columns: the declared numbers of a line, and those by modality, as (key, modality).
_PLAIN = tuple(name for name, key in TRAIN.items() if _is_number(key.type))
_BY_MODALITY = tuple(
    (name, part) for name, key in TRAIN.items() if isinstance(key.type, Each) and key.type.value is float for part in _MODALITIES
)
_COLUMNS: tuple[str | tuple[str, str], ...] = (*_PLAIN, *_BY_MODALITY)
_PLACES = {column: place for place, column in enumerate(_COLUMNS)}
_STEP, _WIDTH = _PLACES["step"], len(_COLUMNS) + 1
_MISSING = float("nan")


class TrainLines(Sequence[dict[str, Any]]):
    """Train lines in the order of their steps, each step once: the last line of a step counts. An item is a line's known numbers."""

    def __init__(self) -> None:
        self._values = array("d")

    def append(self, line: Mapping[str, Any], attempt: int) -> None:
        """Take the numbers of a line that has a step; `attempt` counts the starts before it. Nothing may be read before the last line."""
        row = [_MISSING if (value := number(line.get(name))) is None else value for name in _PLAIN]
        for name, part in _BY_MODALITY:
            inner = line.get(name)
            value = number(inner.get(part)) if isinstance(inner, dict) else None
            row.append(_MISSING if value is None else value)
        row.append(attempt)
        self._values.extend(row)

    @cached_property
    def _table(self) -> np.ndarray:
        """`(lines, columns)`, the attempt last; NaN: a line lacks the value."""
        table = np.frombuffer(self._values, np.float64).reshape(-1, _WIDTH)
        steps = np.trunc(table[:, _STEP])
        if len(steps) and not np.all(np.diff(steps) > 0):
            order = np.argsort(steps, kind="stable")
            last = np.append(np.diff(steps[order]) > 0, True)  # of the lines of one step
            table = table[order[last]]
        return table

    def values(self, key: str, modality: str = "") -> np.ndarray:
        """A number of each line, `(lines,)`; NaN where a line lacks it."""
        place = _PLACES.get((key, modality) if modality else key)
        return np.full(len(self), np.nan) if place is None else self._table[:, place]

    @property
    def attempts(self) -> np.ndarray:
        """How many starts came before each line, `(lines,)`."""
        return self._table[:, -1].astype(int)

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        return [_line(row) for row in self._table[index]] if isinstance(index, slice) else _line(self._table[index])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(_line, self._table)


def _line(row: np.ndarray) -> dict[str, Any]:
    """The known numbers of a row of the table, as in the line."""
    line: dict[str, Any] = {}
    for column, value in zip(_COLUMNS, row.tolist(), strict=False):
        if value == value:  # not NaN
            if isinstance(column, tuple):
                line.setdefault(column[0], {})[column[1]] = value
            else:
                line[column] = value
    return line
