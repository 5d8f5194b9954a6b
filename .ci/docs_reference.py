"""The reference of the configuration and of the command line as Markdown, from the declarations that the program itself reads.

Both texts depend on the code alone: neither on the width of a terminal nor on the environment.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from most_ray import config as configuration
from most_ray.cli import build_parser
from most_ray.options import Option, options_of
from most_ray.sweep.options import SWEEP_OPTIONS, SweepOptions

_DEFAULT = re.compile(r" \(default: (?P<text>.*)\)$")
_CONFIGURATION_PAGE = "configuration.md"
_TYPES = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`"}
_SWEEPS = {"varies": "yes", "adapts": "yes, also during training", "shared": "no"}


def configuration_markdown() -> str:
    """Every key of a run's configuration and of a sweep's, by section: its values, its default and its meaning."""
    lines = ["# Configuration", "", " ".join(_INTRODUCTION.split()), ""]
    for section in configuration.SECTIONS:
        lines += _section(section, options_of(section), in_sweeps=True)
    lines += _section(SweepOptions, SWEEP_OPTIONS, in_sweeps=False)
    return "\n".join(lines).rstrip() + "\n"


_INTRODUCTION = """
Every key can stand in a run's YAML file, and every key is also a flag of the same name: `learning_rate: 1.0e-4` in the file is
`--learning_rate 1e-4` on the command line. Flags overrule the file. An unknown key, or one that stands twice, is an error. A number may be
written as `1e3` or `1_000`; a text stays as it is written, as `name: 1.10`. The column "Sweep" says whether the trials
of a sweep may differ in a key; population based training may change some of them during training, too. Wherever the program writes a path
or a URI down, it leaves out the credentials that these can hold.
"""


def _section(section: type, options: Mapping[str, Option], in_sweeps: bool) -> Iterator[str]:
    yield from (f"## {section.__name__.removesuffix('Options')}", "", str(section.__doc__), "")
    rows = []
    for option in options.values():
        meaning, default = _split_default(option.help, option.default)
        rows.append([f"`{option.name}`", _values(option), default, *([_SWEEPS[option.sweep]] if in_sweeps else []), meaning])
    yield from (*_table(("Key", "Values", "Default", *(["Sweep"] if in_sweeps else []), "Meaning"), rows), "")


def _values(option: Option) -> str:
    """An option's type in words, or its choices; its range, or what its path is for."""
    if option.choices:
        return ", ".join(f"`{choice}`" for choice in option.choices)
    if option.location:
        return f"{option.location.words}; {'written' if option.location.access == 'write' else 'read'}"
    kind = f"list of {_TYPES[option.type]}s" if option.many else _TYPES[option.type]
    return f"{kind}, {option.range.words}" if option.range else kind


def _split_default(text: str, default: Any) -> tuple[str, str]:
    """A help text without the default that it names, and that default; a single word as code."""
    if match := _DEFAULT.search(text):
        return text[: match.start()], match["text"] if " " in match["text"] else f"`{match['text']}`"
    if default is None or isinstance(default, tuple | list) or default == argparse.SUPPRESS:
        return text, "none"
    return text, f"`{str(default).lower() if isinstance(default, bool) else default}`"


def command_line_markdown() -> str:
    """Every command and its flags."""
    parser = build_parser()
    commands = list(_commands(parser))
    summary = _table(("Command", "What it does"), [(f"[`{command.prog}`](#{_anchor(command.prog)})", text) for command, text in commands])
    flags = [action for action in parser._actions if action.option_strings and not isinstance(action, argparse._HelpAction)]
    alone = [_sentence(f"`{parser.prog} {action.option_strings[0]}`: {action.help}") for action in flags]
    lines = ["# Command line", "", f"{parser.description}", "", *summary, "", *alone, ""]
    return "\n".join((*lines, *(line for command, _ in commands for line in _command(command)))).rstrip() + "\n"


def _commands(parser: argparse.ArgumentParser) -> Iterator[tuple[argparse.ArgumentParser, str]]:
    """All commands below a parser that run something, with their one-line help, in the order of `--help`."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, command in action.choices.items():
                below = list(_commands(command))
                yield from below or [(command, helps.get(name, ""))]


def _command(command: argparse.ArgumentParser) -> Iterator[str]:
    yield from (f"## {command.prog}", "", _sentence(" ".join(str(command.description).split())), "")
    if command.epilog:
        yield from (" ".join(command.epilog.split()), "")
    keys = {str(section.__doc__).rstrip(".").lower() for section in configuration.SECTIONS}
    shared = [action for group in command._action_groups if group.title in keys for action in group._group_actions]
    own = [action for action in command._actions if action not in shared and not isinstance(action, argparse._HelpAction)]
    ordered = sorted(own, key=lambda action: bool(action.option_strings))  # arguments before flags
    yield from (*_table(("Flag", "Values", "Default", "Meaning"), [_flag(command, action) for action in ordered]), "")
    if shared:
        yield from (f"Every key of a run's [configuration]({_CONFIGURATION_PAGE}) is a flag of this command too.", "")


def _flag(command: argparse.ArgumentParser, action: argparse.Action) -> tuple[str, str, str, str]:
    named = ", ".join(f"`{option}`" for option in action.option_strings) or f"`{action.metavar or action.dest}`"
    text = (action.help or "") % {**vars(action), "prog": command.prog}
    meaning, default = _split_default(text, action.default)
    default = "required" if action.required else default
    if action.choices:
        values = ", ".join(f"`{choice}`" for choice in action.choices)
    elif action.nargs == 0:
        values = "no value"
    else:
        metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
        values = ", ".join(f"`{value}`" for value in metavar.split("|"))
        values += " ..." if action.nargs in ("+", "*") else ""
    return named, values, default, meaning


def _sentence(text: str) -> str:
    """A text that begins with a capital and ends with a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", ":")) else ".")


def _anchor(heading: str) -> str:
    """The anchor that Markdown gives a heading."""
    return re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
