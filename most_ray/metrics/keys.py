"""What a key of metrics.jsonl is, and whether a line is as declared. The declarations themselves are in `schema`."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Over = Literal["", "sum", "mean", "token mean", "ratio", "max", "last", "run"]  # explained on the page


@dataclass(frozen=True)
class Gauge:
    """A metric of Prometheus, exported by Ray as ray_NAME."""

    name: str
    description: str  # the metric's help text, with its unit
    tags: tuple[str, ...] = ()  # labels beside `run`
    total: bool = False  # the sum over all lines of the run, instead of the newest line's value
    scale: float = 1.0  # the exported value is the key's value times this


@dataclass(frozen=True)
class Curve:
    """A figure of the report: the key's values over steps, a curve for each run."""

    part: Literal["Training", "Speed"]  # the part of the page
    id: str  # of the figure in the page
    title: str
    axis: str  # title of the y axis
    options: Mapping[str, Any] = field(default_factory=dict)  # of `report.figures.curve`


@dataclass(frozen=True)
class Key:
    """A key of a line or of an object in it."""

    type: Any  # a Python type (an int is a float too), a list of one, or an Each, Many or Fixed
    unit: str
    meaning: str
    when: str = ""  # under which condition the key is there; empty: always
    over: Over = ""  # how the value follows from the steps of the line; "run": from all steps since the run began
    ranks: Literal["all", "rank 0"] = "all"  # which ranks the value covers
    tracker: str = ""  # name in W&B and TensorBoard, with {NAME} for the name of an item; empty: not logged there
    gauge: Gauge | None = None
    labels: Mapping[str, str] = field(default_factory=dict)  # values of the gauge's tags that do not depend on the line
    tasks: tuple[str, ...] = ()  # figures of an evaluation: the tasks that have it; empty: all
    objective: str = ""  # figures of an evaluation: the name as an objective of a sweep; empty: none
    title: str = ""  # heading in tables of the report and on screens
    curve: Curve | None = None

    @property
    def condition(self) -> str:
        """Under which condition the key is there, in words; empty: always."""
        return self.when or (f"`task` is {' or '.join(self.tasks)}" if self.tasks else "")


def with_views(
    keys: Mapping[str, Key], part: str, untracked: Collection[str], gauges: Mapping[str, Gauge], curves: Mapping[str, Curve] | None = None
) -> dict[str, Key]:
    """Keys with their gauges and curves. Those that are not `untracked` and declare no name in trackers have PART/KEY there, or
    PART/OBJECTIVE where they are an objective."""
    names = {name: key.tracker or ("" if name in untracked else f"{part}/{key.objective or name}") for name, key in keys.items()}
    return {
        name: replace(key, tracker=names[name], gauge=gauges.get(name, key.gauge), curve=(curves or {}).get(name, key.curve))
        for name, key in keys.items()
    }


@dataclass(frozen=True)
class Fixed:
    """An object whose keys are known."""

    name: str  # for the documentation
    keys: Mapping[str, Key]
    number: str = ""  # the key whose value stands for the object where a single number is needed


@dataclass(frozen=True)
class Each:
    """An object that maps the names of some items to values."""

    of: str  # what the items are
    value: Any  # type of the values, as in `Key`


@dataclass(frozen=True)
class Many:
    """A list of objects."""

    value: Fixed


Parts = tuple[str, ...]  # names of items on the way to a value, as ("asr/test_takes",)


def leaves(line: Mapping[str, Any], keys: Mapping[str, Key], parts: Parts = ()) -> Iterator[tuple[Key, Parts, Any]]:
    """The values of a line's declared keys, and of those of nested objects. An object with a `number` is a value itself."""
    for name, key in keys.items():
        if name not in line:
            continue
        kind, items = key.type, {None: line[name]}
        if isinstance(kind, Each):
            kind, items = kind.value, line[name] if isinstance(line[name], dict) else {}
        for item, value in items.items():
            where = parts if item is None else (*parts, item)
            if not isinstance(kind, Fixed):
                yield key, where, value
            elif isinstance(value, dict):  # else it is null
                yield from [(key, where, value)] if kind.number else leaves(value, kind.keys, where)


def nested(keys: Mapping[str, Key]) -> Iterator[Key]:
    """Keys and the keys of objects in them, but for objects with a `number`."""
    for key in keys.values():
        yield key
        kind = key.type.value if isinstance(key.type, Each) else key.type
        if isinstance(kind, Fixed) and not kind.number:
            yield from nested(kind.keys)


def undeclared(line: Mapping[str, Any], keys: Mapping[str, Key]) -> list[str]:
    """The keys of a line, and of objects in it, that are not declared. Cheap: it looks at no value."""
    found = [name for name in line if name not in keys]
    for name, key in keys.items():
        value, kind = line.get(name), key.type
        if isinstance(kind, Each) and isinstance(kind.value, Fixed) and isinstance(value, dict):
            found += [f"{name}.{item}.{inner}" for item, each in value.items() for inner in undeclared(each, kind.value.keys)]
        elif isinstance(kind, Fixed) and isinstance(value, dict):
            found += [f"{name}.{inner}" for inner in undeclared(value, kind.keys)]
    return found


def check_keys(found: Mapping[str, Any], keys: Mapping[str, Key], where: str = "") -> list[str]:
    """What is wrong with an object: keys that are unknown or missing, values of another type."""
    problems = [f"{where}{name}: unknown key" for name in found if name not in keys]
    for name, key in keys.items():
        if name in found:
            problems += _check_value(found[name], key.type, f"{where}{name}")
        elif not key.condition:
            problems.append(f"{where}{name}: missing key")
    return problems


def _check_value(value: Any, kind: Any, where: str) -> list[str]:
    if isinstance(kind, Fixed):
        return check_keys(value, kind.keys, f"{where}.") if isinstance(value, dict) else [f"{where}: is no object"]
    if isinstance(kind, Each):
        if not isinstance(value, dict):
            return [f"{where}: is no object"]
        return [problem for name, item in value.items() for problem in _check_value(item, kind.value, f"{where}.{name}")]
    inner = kind.value if isinstance(kind, Many) else typing.get_args(kind)[0] if typing.get_origin(kind) is list else None
    if inner is not None:
        if not isinstance(value, list):
            return [f"{where}: is no list"]
        return [problem for index, item in enumerate(value) for problem in _check_value(item, inner, f"{where}[{index}]")]
    if isinstance(kind, types.UnionType):
        fits = any(not _check_value(value, option, where) for option in typing.get_args(kind))
    elif typing.get_origin(kind) is Literal:
        fits = value in typing.get_args(kind)
    elif kind in (int, float):
        fits = isinstance(value, (int, kind)) and not isinstance(value, bool) and math.isfinite(value)
    else:
        fits = isinstance(value, kind)
    return [] if fits else [f"{where}: {value!r} is not of type {type_words(kind)}"]


_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", types.NoneType: "null"}


def type_words(kind: Any) -> str:
    """A type, as the documentation calls it."""
    if isinstance(kind, Fixed):
        return f"object, see *{kind.name}*"
    if isinstance(kind, Each):
        return f"for each {kind.of}: {type_words(kind.value)}"
    if isinstance(kind, Many):
        return f"list of objects, see *{kind.value.name}*"
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is list:
        return f"list of {type_words(arguments[0])}"
    if typing.get_origin(kind) is Literal:
        return " or ".join(f'"{value}"' for value in arguments)
    return " or ".join(map(type_words, arguments)) if arguments else _NAMES[kind]
