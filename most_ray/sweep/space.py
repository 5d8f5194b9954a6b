"""The space of a sweep: which settings are tried, and what the k-th trial is. Pure.

Random and grid proposals are functions of (space, seed, k) alone: however often a sweep is stopped, its k-th trial stays what it was.
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from most_ray.config import OPTIONS
from most_ray.errors import ConfigError, nearest
from most_ray.io import storage
from most_ray.sweep.splits import SPLITS

Kind = Literal["choice", "grid", "uniform", "loguniform", "randint"]
Values = dict[str, Any]
ROUTING = ("audio_experts", "expert_split")
_SETTLED_BY_ROUTING = ("text_expert_indices", "audio_expert_indices", "use_modality_aware_routing")
_RANGE = re.compile(r"\s*(-?[0-9]+)\s*\.\.\s*(-?[0-9]+)\s*")
_MOST_VALUES = 10_000  # of a range of whole numbers that is listed


@dataclass(frozen=True)
class Dimension:
    """One setting. values: of `choice` and `grid`; low and high: of the others, both of them possible."""

    name: str
    kind: Kind
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0

    @property
    def listed(self) -> tuple[Any, ...] | None:
        """All its values; None where there is no end of them."""
        if self.values:
            return self.values
        return tuple(range(int(self.low), int(self.high) + 1)) if self.kind == "randint" else None

    @property
    def continuous(self) -> bool:
        return self.kind in ("uniform", "loguniform")

    def at(self, share: float) -> Any:
        """The value behind `share`, in 0..1, of the distribution."""
        if self.kind == "uniform":
            return self.low + share * (self.high - self.low)
        if self.kind == "loguniform":
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
            return min(self.high, max(self.low, value))  # rounding can lead out of the range by a last digit
        known = self.listed
        assert known is not None
        return known[min(len(known) - 1, int(share * len(known)))]

    def described(self) -> dict[str, Any]:
        """As the ledger has it."""
        return {
            "name": self.name,
            "kind": self.kind,
            **({"values": list(self.values)} if self.values else {"low": self.low, "high": self.high}),
        }


@dataclass(frozen=True)
class Space:
    """dimensions, in the order of the file; lists: configuration keys that are lists some of whose elements are dimensions (None there)."""

    dimensions: tuple[Dimension, ...]
    lists: Mapping[str, tuple[Any, ...]]

    @property
    def names(self) -> list[str]:
        return [dimension.name for dimension in self.dimensions]

    def _gridded(self, search: str) -> list[Dimension]:
        """The dimensions of the grid: all of them where the search is `grid`, else those that say so."""
        return [d for d in self.dimensions if search == "grid" or d.kind == "grid"]

    def grid_size(self, search: str) -> int:
        """Points of the grid, 1 where it has no dimension."""
        return math.prod(len(d.listed or ()) for d in self._gridded(search))

    def grid_point(self, search: str, k: int) -> Values:
        """The k-th of them, the last dimension changing fastest."""
        point: Values = {}
        for dimension in reversed(self._gridded(search)):
            values = dimension.listed or ()
            k, place = divmod(k, len(values))
            point[dimension.name] = values[place]
        return point

    def proposal(self, search: str, seed: int, k: int) -> Values | None:
        """The values of trial k, from 0; None behind the end of a grid. Not of `tpe`, whose proposals depend on results.

        A random search goes round the grid's points in turn and draws all other dimensions anew for each trial.
        """
        size = self.grid_size(search)
        if search == "grid" and k >= size:
            return None
        shares = np.random.Generator(np.random.PCG64([seed, k])).random(len(self.dimensions))
        drawn = {d.name: d.at(float(share)) for d, share in zip(self.dimensions, shares, strict=True) if search != "grid"}
        made = {**drawn, **self.grid_point(search, k % size)}
        return {name: made[name] for name in self.names}

    def settings(self, values: Values) -> Values:
        """Values by dimension as keys of the run's configuration and of ROUTING."""
        made: Values = {}
        for name, value in values.items():
            if "[" not in name:
                made[name] = value
        for key, elements in self.lists.items():
            made[key] = [values[f"{key}[{index}]"] if element is None else element for index, element in enumerate(elements)]
        return made


def parse_space(raw: Any) -> Space:
    """A space as it stands in a sweep's YAML.

    By key: `{choice: [...]}`, `{grid: [...]}`, `{uniform: [low, high]}`, `{loguniform: [low, high]}` or `{randint: [low, high]}`, both ends
    included; short: `2..6`, `[a, b]`, `a | b`, or one value. For a key that holds a list, also a list with these in it, one for an element.

    Raises:
        ConfigError: names the key and the rule.
    """
    if not isinstance(raw, Mapping) or not raw:
        raise ConfigError("space", raw, "names no setting to try.", "Give some, as `learning_rate: {loguniform: [1.0e-4, 1.0e-2]}`.")
    dimensions: list[Dimension] = []
    lists: dict[str, tuple[Any, ...]] = {}
    for key, spec in raw.items():
        key = str(key)
        _check_key(key)
        if _is_list(key) and isinstance(spec, list):
            if not any(isinstance(element, Mapping) for element in spec):
                raise ConfigError(f"space.{key}", spec, "tries nothing: no element of the list is a choice or a range.")
            elements: list[Any] = []
            for index, element in enumerate(spec):
                inner = _dimension(f"{key}[{index}]", element, key) if isinstance(element, Mapping) else None
                elements.append(None if inner else _element(key, index, element))
                dimensions += [inner] if inner else []
            lists[key] = tuple(elements)
        else:
            dimensions.append(_dimension(key, spec, key))
    named = set(raw)
    if named & set(ROUTING) and (twice := sorted(named & set(_SETTLED_BY_ROUTING))):
        raise ConfigError("space", twice, f"says what {sorted(named & set(ROUTING))} say too.", "Leave one of them out.")
    return Space(tuple(dimensions), lists)


def _element(key: str, index: int, element: Any) -> Any:
    value = _value(key, element)
    if value is None or isinstance(value, list):
        raise ConfigError(f"space.{key}[{index}]", element, "is not one element of the list.")
    return value


def _check_key(key: str) -> None:
    known = [option.name for option in OPTIONS.values() if option.sweep != "shared"]
    if key in OPTIONS and key not in known:
        rule = "belongs to the sweep as a whole, not to a trial."
        raise ConfigError(f"space.{key}", None, rule, "Give it beside `space`, as one value.")
    if key not in known and key not in ROUTING:
        raise ConfigError(f"space.{key}", None, "is no configuration key.", nearest(key, [*known, *ROUTING]))


def _is_list(key: str) -> bool:
    return key not in ROUTING and OPTIONS[key].many


def _dimension(name: str, spec: Any, key: str) -> Dimension:
    if isinstance(spec, Mapping):
        if len(spec) != 1 or next(iter(spec)) not in typing.get_args(Kind):
            rule = f"is not one of {', '.join(typing.get_args(Kind))}."
            raise ConfigError(f"space.{name}", dict(spec), rule, "Write it as `{choice: [a, b]}` or `{uniform: [low, high]}`.")
        kind, given = next(iter(spec.items()))
        if kind in ("choice", "grid"):
            if not isinstance(given, list) or not given:
                raise ConfigError(f"space.{name}", given, "is no list of values.")
            return Dimension(name, kind, _distinct(name, [_value(key, value) for value in given]))
        if isinstance(given, str) and (match := _RANGE.fullmatch(given)):
            given = [int(match[1]), int(match[2])]
        return _range(name, kind, given, key)
    if isinstance(spec, str) and (match := _RANGE.fullmatch(spec)):
        return _range(name, "randint", [int(match[1]), int(match[2])], key)
    if isinstance(spec, str) and "|" in spec:
        spec = [part.strip() for part in spec.split("|")]
    given = spec if isinstance(spec, list) else [spec]
    if not given:
        raise ConfigError(f"space.{name}", spec, "is no list of values.")
    return Dimension(name, "choice", _distinct(name, [_value(key, value) for value in given]))


def _range(name: str, kind: Kind, given: Any, key: str) -> Dimension:
    ends = given if isinstance(given, list) and len(given) == 2 else []
    numbers = []
    for end in ends:
        try:
            numbers.append(float(end) if not isinstance(end, bool) else math.nan)
        except (TypeError, ValueError):
            numbers.append(math.nan)
    if len(numbers) != 2 or not all(map(math.isfinite, numbers)):
        raise ConfigError(f"space.{name}", given, "is not two numbers, the lowest and the highest.")
    low, high = numbers
    if low > high or (kind == "loguniform" and low <= 0):
        raise ConfigError(f"space.{name}", given, "must ascend" + (" from above 0." if kind == "loguniform" else "."))
    if kind == "randint":
        if not (low.is_integer() and high.is_integer()):
            raise ConfigError(f"space.{name}", given, "are no whole numbers.")
        if high - low >= _MOST_VALUES:
            raise ConfigError(f"space.{name}", given, f"holds more than {_MOST_VALUES} values.", "Use uniform or loguniform.")
    elif key in ROUTING or OPTIONS[key].type is not float:
        raise ConfigError(f"space.{name}", given, f"cannot be {kind}: {key} is no fraction.", "Use randint or choice.")
    for end in numbers if kind != "randint" else (int(low), int(high)):
        _value(key, end)
    return Dimension(name, kind, low=low, high=high)


def _value(key: str, value: Any) -> Any:
    """A value as the key's type; of a list's key where an element stands alone, as the element's."""
    if key == "expert_split":
        if value not in SPLITS:
            raise ConfigError(f"space.{key}", value, "is no way to split experts.", nearest(str(value), SPLITS))
        return value
    if key == "audio_experts":
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"space.{key}", value, "is no number of experts, from 1 on.")
        return value
    try:
        found = OPTIONS[key].parse(value)
    except ConfigError as error:
        raise ConfigError(f"space.{key}", value, error.rule, error.remedy) from error
    if isinstance(found, tuple):
        found = found[0] if len(found) == 1 and not isinstance(value, list | tuple) else list(found)
    for text in found if isinstance(found, list) else [found]:
        if isinstance(text, str) and storage.redact(text) != text:
            raise ConfigError(
                f"space.{key}", storage.redact(text), "holds credentials, which the ledger would keep.", "Give them by the environment."
            )
    return found


def _distinct(name: str, values: Sequence[Any]) -> tuple[Any, ...]:
    if any(value in values[:index] for index, value in enumerate(values)):
        raise ConfigError(f"space.{name}", list(values), "names a value twice.")
    return tuple(values)
