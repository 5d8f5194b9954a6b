"""The search space of a sweep, and the values of the k-th trial. Pure functions.

Random and grid proposals depend on (space, seed, k) alone, so a sweep's k-th trial is the same after any number of restarts.
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from most_ray.config import OPTIONS
from most_ray.errors import ConfigError, nearest
from most_ray.io import storage
from most_ray.options import parse_number
from most_ray.sweep.splits import SPLITS

Kind = Literal["choice", "grid", "uniform", "loguniform", "randint"]
Values = dict[str, Any]
ROUTING = ("audio_experts", "expert_split")  # keys of a space that are not keys of the configuration, but set those of the next line
_SETTLED_BY_ROUTING = ("text_expert_indices", "audio_expert_indices", "use_modality_aware_routing")
_RANGE = re.compile(r"\s*(-?[0-9]+)\s*\.\.\s*(-?[0-9]+)\s*")
_MAX_VALUES = 10_000  # of a range of integers


@dataclass(frozen=True)
class Dimension:
    """One setting that is varied."""

    name: str  # a key, or an element of a list as KEY[INDEX]
    kind: Kind
    values: tuple[Any, ...] = ()  # of `choice` and `grid`
    low: float = 0.0  # of the other kinds; both ends are included
    high: float = 0.0

    @property
    def listed(self) -> tuple[Any, ...] | None:
        """All its values; None if it is continuous."""
        if self.values:
            return self.values
        return tuple(range(int(self.low), int(self.high) + 1)) if self.kind == "randint" else None

    @property
    def continuous(self) -> bool:
        return self.kind in ("uniform", "loguniform")

    def quantile(self, share: float) -> Any:
        """Return the value below which `share`, in 0..1, of the distribution is."""
        if self.kind == "uniform":
            return self.low + share * (self.high - self.low)
        if self.kind == "loguniform":
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
            return min(self.high, max(self.low, value))  # rounding can exceed the range
        known = self.listed or ()
        return known[min(len(known) - 1, int(share * len(known)))]

    def described(self) -> dict[str, Any]:
        """Return what the ledger holds of it."""
        values = {"values": list(self.values)} if self.values else {"low": self.low, "high": self.high}
        return {"name": self.name, "kind": self.kind, **values}


@dataclass(frozen=True)
class Space:
    """All settings that are varied."""

    dimensions: tuple[Dimension, ...]  # in the order of the file
    lists: Mapping[str, tuple[Any, ...]]  # keys that hold lists, some of whose elements are dimensions: None in their place

    @property
    def names(self) -> list[str]:
        return [dimension.name for dimension in self.dimensions]

    def _gridded(self, search: str) -> list[Dimension]:
        """Return the dimensions of the grid: all of them if the search is `grid`, else those of that kind."""
        return [d for d in self.dimensions if search == "grid" or d.kind == "grid"]

    def grid_size(self, search: str) -> int:
        """Return the number of points of the grid, 1 if it has no dimension."""
        return math.prod(len(d.listed or ()) for d in self._gridded(search))

    def grid_point(self, search: str, k: int) -> Values:
        """Return the k-th point of the grid; the last dimension changes fastest."""
        point: Values = {}
        for dimension in reversed(self._gridded(search)):
            values = dimension.listed or ()
            k, index = divmod(k, len(values))
            point[dimension.name] = values[index]
        return point

    def proposal(self, search: str, seed: int, k: int) -> Values | None:
        """Return the values of trial k, from 0; None after the end of a grid. Not for `tpe`, whose proposals depend on results. A random
        search cycles through the grid's points, and draws all other dimensions for each trial."""
        size = self.grid_size(search)
        if search == "grid" and k >= size:
            return None
        shares = np.random.Generator(np.random.PCG64([seed, k])).random(len(self.dimensions))
        drawn = {d.name: d.quantile(float(share)) for d, share in zip(self.dimensions, shares, strict=True) if search != "grid"}
        made = {**drawn, **self.grid_point(search, k % size)}
        return {name: made[name] for name in self.names}

    def settings(self, values: Values) -> Values:
        """Return values by key of the configuration or of ROUTING instead of by dimension."""
        made = {name: value for name, value in values.items() if "[" not in name}
        for key, elements in self.lists.items():
            made[key] = [values[f"{key}[{index}]"] if element is None else element for index, element in enumerate(elements)]
        return made


def parse_space(raw: Any) -> Space:
    """Parse the space of a sweep's YAML file. Raises ConfigError, which names the key and the rule.

    It has, by key, `{choice: [...]}`, `{grid: [...]}`, `{uniform: [low, high]}`, `{loguniform: [low, high]}` or `{randint: [low, high]}`,
    both ends included; or the short forms `2..6`, `[a, b]`, `a | b`, or a single value. For a key that holds a list, also a list with any
    of these as elements.
    """
    if not isinstance(raw, Mapping) or not raw:
        raise ConfigError("space", raw, "names no setting to try.", "Give some, as `learning_rate: {loguniform: [1.0e-4, 1.0e-2]}`.")
    dimensions: list[Dimension] = []
    lists: dict[str, tuple[Any, ...]] = {}
    for key, spec in raw.items():
        key = str(key)
        _check_key(key)
        if isinstance(spec, list) and key not in ROUTING and OPTIONS[key].many:
            if not any(isinstance(element, Mapping) for element in spec):
                raise ConfigError(f"space.{key}", spec, "tries nothing: no element of the list is a choice or a range.")
            inner = {index: _dimension(f"{key}[{index}]", each, key) for index, each in enumerate(spec) if isinstance(each, Mapping)}
            lists[key] = tuple(None if index in inner else _element(key, index, each) for index, each in enumerate(spec))
            dimensions += inner.values()
        else:
            dimensions.append(_dimension(key, spec, key))
    if (routing := sorted(set(raw) & set(ROUTING))) and (twice := sorted(set(raw) & set(_SETTLED_BY_ROUTING))):
        raise ConfigError("space", twice, f"is set by {routing} too.", "Leave one of them out.")
    return Space(tuple(dimensions), lists)


def _element(key: str, index: int, element: Any) -> Any:
    value = _value(key, element)
    if value is None or isinstance(value, list):
        raise ConfigError(f"space.{key}[{index}]", element, "is not one element of the list.")
    return value


def _check_key(key: str) -> None:
    known = [option.name for option in OPTIONS.values() if option.sweep != "shared"]
    if key in OPTIONS and key not in known:
        raise ConfigError(f"space.{key}", None, "belongs to the sweep as a whole, not to a trial.", "Give it beside `space`, as one value.")
    if key not in known and key not in ROUTING:
        raise ConfigError(f"space.{key}", None, "is not a configuration key.", nearest(key, [*known, *ROUTING]))


def _dimension(name: str, spec: Any, key: str) -> Dimension:
    if isinstance(spec, str) and _RANGE.fullmatch(spec):
        spec = {"randint": spec}
    if not isinstance(spec, Mapping):
        if isinstance(spec, str) and "|" in spec:
            spec = [part.strip() for part in spec.split("|")]
        spec = {"choice": spec if isinstance(spec, list) else [spec]}
    elif len(spec) != 1 or next(iter(spec)) not in typing.get_args(Kind):
        rule = f"is not one of {', '.join(typing.get_args(Kind))}."
        raise ConfigError(f"space.{name}", dict(spec), rule, "Write it as `{choice: [a, b]}` or `{uniform: [low, high]}`.")
    kind, given = next(iter(spec.items()))
    if kind not in ("choice", "grid"):
        return _range(name, kind, given, key)
    if not isinstance(given, list) or not given:
        raise ConfigError(f"space.{name}", given, "is not a list of values.")
    values = [_listed_value(key, value) for value in given]
    if any(value in values[:index] for index, value in enumerate(values)):
        raise ConfigError(f"space.{name}", values, "names a value twice.")
    return Dimension(name, kind, tuple(values))


def _range(name: str, kind: Kind, given: Any, key: str) -> Dimension:
    field = f"space.{name}"
    if isinstance(given, str) and (match := _RANGE.fullmatch(given)):
        given = [int(match[1]), int(match[2])]
    try:
        numbers = [math.nan if isinstance(end, bool) else float(end) for end in given] if isinstance(given, list) else []
    except (TypeError, ValueError, OverflowError):  # reported in the next lines
        numbers = []
    if len(numbers) != 2 or not all(map(math.isfinite, numbers)):
        raise ConfigError(field, given, "is not two numbers, the lowest and the highest.")
    low, high = numbers
    if low > high or (kind == "loguniform" and low <= 0):
        raise ConfigError(field, given, "must ascend" + (" from above 0." if kind == "loguniform" else "."))
    if kind == "randint":
        if not (low.is_integer() and high.is_integer()):
            raise ConfigError(field, given, "are not integers.")
        if high - low >= _MAX_VALUES:
            raise ConfigError(field, given, f"holds more than {_MAX_VALUES} values.", "Use uniform or loguniform.")
    elif key in ROUTING or OPTIONS[key].type is not float:
        raise ConfigError(field, given, f"cannot be {kind}: {key} is not a fraction.", "Use randint or choice.")
    for end in numbers:
        _value(key, int(end) if kind == "randint" else end)
    return Dimension(name, kind, low=low, high=high)


def _listed_value(key: str, value: Any) -> Any:
    """`_value`, within the key's range. (Of a range of numbers, `sweep.options` checks the ends, with the run's other keys.)"""
    found = _value(key, value)
    if key not in ROUTING:
        try:
            OPTIONS[key].check(OPTIONS[key].parse(value))
        except ConfigError as error:
            raise ConfigError(f"space.{key}", value, error.rule, error.remedy) from error
    return found


def _value(key: str, value: Any) -> Any:
    """Convert a value to its key's type; a single value of a key that holds a list, to the type of an element."""
    if key == "expert_split":
        if value not in SPLITS:
            raise ConfigError(f"space.{key}", value, "is not a way to split experts.", nearest(str(value), SPLITS))
        return value
    if key == "audio_experts":
        try:
            number: int = parse_number(key, int, value)
        except ConfigError:
            number = 0
        if number < 1:
            raise ConfigError(f"space.{key}", value, "must be a number of experts, at least 1.")
        return number
    try:
        found = OPTIONS[key].parse(value)
    except ConfigError as error:
        raise ConfigError(f"space.{key}", value, error.rule, error.remedy) from error
    if isinstance(found, tuple):
        found = found[0] if len(found) == 1 and not isinstance(value, list | tuple) else list(found)
    for text in found if isinstance(found, list) else [found]:
        if isinstance(text, str) and (shown := storage.redact(text)) != text:
            rule = "holds credentials, which the ledger would keep."
            raise ConfigError(f"space.{key}", shown, rule, "Give them by the environment.")
    return found
