"""Options: dataclass fields whose declaration states everything that the program must know about them.

A section is a frozen dataclass whose fields are made by `option`; `options_of` reads its declarations. Value checks, redaction, flags,
jobs, sweeps, preflight checks and the reference pages in docs/ all use these, so that a new option is one statement in its section.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from most_ray.errors import ConfigError, nearest
from most_ray.io.uris import expand

_UNIONS = (types.UnionType, typing.Union)  # what `X | None` is an instance of; the latter where X is a Literal
_TRUTH = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
_ROOM = 37  # characters of a flag's text and default in a line of --help, beside what is between them
MOST_SEED = (1 << 63) - 1  # the largest number of all: what torch, numpy and integers of 64 bits take
_MOST: dict[type, float] = {int: 10**12, float: 1e9}  # the largest number of an option that states none


@dataclass(frozen=True)
class Range:
    """The numbers that an option may have; for a list, the numbers that its elements may have."""

    rule: str  # for errors: "must be at least 1."
    words: str  # for the reference: "at least 1"
    holds: Callable[[float], bool]  # whether a number is in the range


AT_LEAST_1 = Range("must be at least 1.", "at least 1", lambda number: number >= 1)
NOT_NEGATIVE = Range("must not be negative.", "0 or more", lambda number: number >= 0)
ABOVE_0 = Range("must be above 0.", "above 0", lambda number: number > 0)
ABOVE_1 = Range("must be above 1.", "above 1", lambda number: number > 1)
SHARE = Range("must be in 0..1.", "0 to 1", lambda number: 0 <= number <= 1)
BELOW_1 = Range("must be in 0..1, without the 1.", "0 to 1, without the 1", lambda number: 0 <= number < 1)


@dataclass(frozen=True)
class Location:
    """What the path or URI in an option is used for. Any of them can hold credentials, so that it is redacted wherever it is stored."""

    access: Literal["read", "write"]
    words: str  # for the reference
    may_be_name: bool = False  # a value that is not the path of anything is a name on a hub, or of a preset
    must_exist: bool = False  # before a run starts
    by_workers: bool = False  # opened by training workers, whose working directory is another one


RECORDS = Location("read", "directories or URIs that exist", must_exist=True)
MODEL = Location("read", "path, URI or name on a hub", may_be_name=True)
CHECKPOINT = Location("read", "path or URI", by_workers=True)
CONFIGURATION = Location("read", "path or URI")
FOLDER = Location("write", "path or URI")
LOCAL_FILE = Location("write", "path", by_workers=True)

# Where a flag is shown. everyday: in --help. all: in `--help all`. elsewhere: in that of another command, `train`.
Level = Literal["everyday", "all", "elsewhere"]
EVERYDAY: Level = "everyday"

# Whether trials of a sweep may differ in an option.
#   varies: they may.
#   adapts: they may, and population based training may change it during training. Such an option is read at every start of a run, and is
#       part neither of the model nor of the optimizer's state.
#   shared: all trials have the same value. It says where the sweep is, is a trial's part of the cluster, or makes trials comparable.
Sweep = Literal["varies", "adapts", "shared"]


def option(
    default: Any,
    help_text: str,
    *,
    range: Range | None = None,
    most: float | None = None,
    location: Location | None = None,
    sweep: Sweep = "varies",
    inert: bool = False,
    length: bool = False,
    learns: bool = False,
    old_words: Mapping[str, str] | None = None,
    everyday: bool = False,
) -> Any:
    """A field of a section.

    Args:
        default: the default; None where it depends on something else.
        help_text: one line. Where the default is None, it ends with what is used then, as "(default: the model's)".
        range: the numbers that the option may have. Every number has a range.
        most: the largest number that it may have, beyond what any real run needs (default: by its type).
        location: what the path or URI is used for. Every path and URI has a location.
        sweep: whether trials of a sweep may differ in the option.
        inert: whether no trial's result depends on the option, so that it may differ between two starts of the same sweep.
        length: whether the option says how long a run is or how often it saves and evaluates. In these, a sweep's trials often differ from
            the run that they search settings for.
        learns: whether the weights after a step follow from the option, data and model being equal, so that a run that resumes with
            another value does not continue exactly.
        old_words: choices of earlier versions, which are still read, and today's words for them.
        everyday: whether --help shows its flag; those of the others are in `--help all`.
    """
    stated = {"range": range, "most": most, "location": location, "sweep": sweep, "inert": inert, "length": length, "learns": learns}
    return field(default=default, metadata={"help": help_text, **stated, "old_words": old_words or {}, "everyday": everyday})


everyday = functools.partial(option, everyday=True)


@dataclass(frozen=True)
class Option:
    """An option, from its declaration. See `option` for the fields without a comment."""

    name: str
    type: type  # bool, int, float or str; of a list, the type of its elements
    optional: bool  # may be None
    many: bool  # is a list
    choices: tuple[str, ...]  # the values that it may have; empty where it has no choices
    default: Any
    help: str
    range: Range | None
    most: float | None
    location: Location | None
    sweep: Sweep
    inert: bool
    length: bool
    learns: bool
    old_words: Mapping[str, str]
    everyday: bool

    def parse(self, value: Any) -> Any:
        """Convert a YAML value or a flag's text to the option's type.

        Raises:
            ConfigError: the value is of another type, is none of the choices, or is larger than any number of its type may be.
        """
        if value is None or (self.optional and isinstance(value, str) and value.lower() in ("none", "null", "")):
            if self.optional:
                return None
            raise ConfigError(self.name, value, "needs a value.")
        if self.many:
            if isinstance(value, dict):
                raise ConfigError(self.name, value, "is not a list.")
            parts = value if isinstance(value, list | tuple) else str(value).split(",")
            return tuple(self._element(part) for part in parts if part != "")
        if self.choices:
            value = self.old_words.get(value, value) if isinstance(value, str) else value
            if value not in self.choices:
                raise ConfigError(self.name, value, "is not one of its choices.", nearest(str(value), self.choices))
            return value
        return self._element(value)

    def _element(self, value: Any) -> Any:
        """`parse` for one value, or for an element of a list."""
        found = _scalar(self.name, self.type, value)
        return expand(self.name, found) if self.location else found

    def check(self, value: Any) -> None:
        """Raises ConfigError where a parsed value is outside of the option's range."""
        if self.range is None:
            return
        for number in self.elements(value):
            check_number(self.name, number, self.range, self.most, value)

    def elements(self, value: Any) -> tuple[Any, ...]:
        """The elements of a list; of another value, the value itself; of None, nothing."""
        return () if value is None else tuple(value) if self.many else (value,)

    def map(self, change: Callable[[str], str], value: Any) -> Any:
        """Apply `change` to a value, or to each element of a list; None stays None."""
        return value if value is None else tuple(map(change, value)) if self.many else change(value)


def options_of(*sections: type) -> dict[str, Option]:
    """The options of sections by name, in the order of their declaration."""
    found: dict[str, Option] = {}
    for section in sections:
        hints = typing.get_type_hints(section)
        for each in dataclasses.fields(section):
            hint, optional = hints[each.name], False
            if typing.get_origin(hint) in _UNIONS:
                hint, optional = next(arg for arg in typing.get_args(hint) if arg is not type(None)), True
            many = typing.get_origin(hint) is tuple
            choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
            type_ = typing.get_args(hint)[0] if many else str if choices else hint
            found[each.name] = Option(each.name, type_, optional, many, choices, each.default, **each.metadata)
    return found


def _scalar(name: str, type_: type, value: Any) -> Any:
    """Convert a value to a type. Raises ConfigError with the option's name."""
    if type_ is bool:
        truth = _TRUTH.get(str(value).lower()) if isinstance(value, str | bool | int) else None
        if truth is None:
            raise ConfigError(name, value, "is neither true nor false.")
        return truth
    if type_ is not str:
        return parse_number(name, type_, value)
    if value is None or isinstance(value, list | tuple | dict | bool | bytes):
        raise ConfigError(name, value, "is not a string.")
    text = str(value)
    if "\0" in text:
        raise ConfigError(name, value, "holds a NUL character.")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # it could be written to no file, not even to config.yaml
        raise ConfigError(name, value, "holds bytes or half characters that are no text.", "Use names in UTF-8.") from error
    return text


def parse_number(name: str, type_: type, value: Any) -> Any:
    """Convert a value of YAML or JSON, or a flag's text, to `type_`, int or float. `name`: of the option or flag. A whole number may be
    written as 1e3.

    Raises:
        ConfigError: it is no number of that type, is not finite, or is larger than any number may be.
    """
    rule = f"is not {'a whole number' if type_ is int else 'a number'}."
    if isinstance(value, bool | bytes | list | dict):
        raise ConfigError(name, value, rule)
    try:
        number = _whole(value) if type_ is int else float(value)
    except (TypeError, ValueError, OverflowError) as error:  # Python reads no number of thousands of digits
        raise ConfigError(name, value, rule) from error
    if isinstance(number, int) and abs(number) > MOST_SEED:
        raise ConfigError(name, value, "is too large.")
    if not math.isfinite(number):
        raise ConfigError(name, value, "is not finite.")
    return number


def _whole(value: Any) -> int:
    """A whole number of any type, or its text. Raises ValueError, OverflowError or TypeError where it is none."""
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            value = float(value)
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(value)
    return int(value)


def check_number(name: str, number: float, range: Range, most: float | None = None, value: Any = None) -> None:
    """Raise ConfigError where a number is outside of a range, or larger than `most` (None: than any of its type may be).

    Args:
        name, value: what the error says; `value` where it is not the number itself, as the list that the number is in.
    """
    shown = number if value is None else value
    if not range.holds(number):
        raise ConfigError(name, shown, range.rule)
    if number > (limit := _MOST[type(number)] if most is None else most):
        raise ConfigError(name, shown, f"must be at most {limit:,}." if isinstance(limit, int) else f"must be at most {limit:g}.")


def parse_values(options: Mapping[str, Option], values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert values by name to their options' types, and check that each is in its range.

    Raises:
        ConfigError: an unknown key (names the nearest known one), a value of the wrong type or outside of its range.
    """
    check_names(values, options)
    parsed = {name: options[name].parse(value) for name, value in values.items()}
    for name, value in parsed.items():
        options[name].check(value)
    return parsed


def check_names(names: Iterable[str], known: Collection[str]) -> None:
    """Raises ConfigError for the first name that is not known; suggests the nearest one."""
    for name in names:
        if name not in known:
            raise ConfigError(str(name), None, "is no known flag or configuration key.", nearest(str(name), known))


def current_words(options: Mapping[str, Option], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by name from a file of an earlier version, with today's words for choices."""
    return {
        name: options[name].old_words.get(value, value) if name in options and isinstance(value, str) else value
        for name, value in values.items()
    }


def stored_values(options: Mapping[str, Option], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by name from the configuration of a run of any version, converted to their options' types. Those that no option has or takes
    any more stay as they are."""
    found = current_words(options, values)
    for name, value in found.items():
        if name in options:
            with contextlib.suppress(ConfigError):
                found[name] = options[name].parse(value)
    return found


def to_plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by name as YAML and JSON have them: lists instead of tuples."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _metavar(option: Option) -> str:
    """The kind of value that a flag takes, as --help shows it."""
    if option.type is bool:
        return "true|false"
    if option.choices:
        return "|".join(option.choices)
    if option.location:
        return "DIR" if option.location is RECORDS else "PATH"
    name = {int: "N", float: "X", str: "NAME"}[option.type]
    return f"{name}[,{name}]" if option.many and option.type is not str else name


def _first_part(text: str) -> str:
    """What a line of --help has room for: the text up to its first comma or the like, with the default where that is short."""
    meaning, _, default = text.partition(" (default: ")
    short = re.split(r"[,;:] (?![^(]*\))", meaning)[0]
    return f"{short} (default: {default}" if default and len(short) + len(default) <= _ROOM else short


def add_flag(parser: Any, option: Option, flag: str = "", help_text: str = "", level: Level = EVERYDAY) -> None:
    """Add the flag of an option to a parser or a group. A flag that is not given leaves the namespace untouched.

    Args:
        flag: the flag's name where it is not the option's.
        help_text: its line in --help where it is not the option's.
        level: where it is shown.
    """
    name, text = flag or option.name, help_text or option.help
    shown = "none" if option.default is None or option.default == () else option.default
    keywords: dict[str, Any] = {"metavar": _metavar(option)}
    if option.type is bool:
        keywords |= {"nargs": "?", "const": "true"}
    elif option.many and option.type is str:
        keywords["nargs"] = "+"
    text = text if "(default" in text else f"{text} (default: {shown})"
    action = parser.add_argument(f"--{name}", help=text, default=argparse.SUPPRESS, **keywords)
    action.level = level
    action.short = _first_part(text) if option.everyday else ""


def add_flags(parser: argparse.ArgumentParser, sections: Sequence[type], level: Level | None = None) -> None:
    """Add one flag per option, grouped by section, with its default in --help. `level`: where they are shown; None: the everyday ones in
    --help, the others in `--help all`."""
    for section in sections:
        group = parser.add_argument_group(str(section.__doc__).rstrip(".").lower())
        for each in options_of(section).values():
            add_flag(group, each, level=level or ("everyday" if each.everyday else "all"))


def flag_values(namespace: argparse.Namespace, options: Collection[str]) -> dict[str, Any]:
    """The options that were given as flags."""
    return {name: value for name, value in vars(namespace).items() if name in options}
