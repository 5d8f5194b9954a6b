"""What all commands share: the parser, and checks of what they write."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import track

from most_ray import config as configuration
from most_ray.cli.job_files import placed
from most_ray.errors import ConfigError, nearest

_TELL_S = 30.0  # between lines of progress in a log file


class Parser(argparse.ArgumentParser):
    """Errors name the nearest known flag or command; no abbreviations, so that a typo never becomes another flag."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        keywords["allow_abbrev"] = False
        keywords.setdefault("formatter_class", lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=130))
        super().__init__(*args, **keywords)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        parsed, unknown = self.parse_known_args(args, namespace)
        for word in unknown:
            if word.startswith("--"):
                name = word[2:].split("=", 1)[0]
                raise ConfigError(f"--{name}", None, "is no known flag.", nearest(name, getattr(parsed, "known_flags", [])))
        if unknown:
            raise ConfigError("argument", unknown[0], "belongs to no flag.")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise ConfigError("command line", None, f"{message}.", f"See `{self.prog} --help`.")

    def flag_names(self) -> list[str]:
        return [option[2:] for action in self._actions for option in action.option_strings if option.startswith("--")]


def add_command(where: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> Parser:
    """A command under a parser's subparsers."""
    command: Parser = where.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    return command


def config_of(args: argparse.Namespace) -> configuration.RunConfig:
    """The configuration of --config, overruled by flags; in a job, with its places."""
    return placed(configuration.load_config(args.config, configuration.flag_values(args)))


def remember_flags(parser: Parser) -> None:
    parser.set_defaults(known_flags=parser.flag_names())
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                remember_flags(command)


def check_output(path: Path) -> None:
    """Before anything is done for it.

    Raises:
        ConfigError: it is no local file's path.
    """
    if re.match(r"[a-z0-9]+:/", str(path)):
        raise ConfigError("output", str(path), "is no local place.", "Name a file on this machine.")
    if path.is_dir():
        raise ConfigError("output", str(path), "is a folder.", "Name a file.")


def tracked(items: Iterable[Any], what: str, total: int, console: Console) -> Iterable[Any]:
    """The items, with a bar on a terminal; in a log file a line now and then."""
    if console.is_terminal:
        return track(items, what, total=total, console=console)
    return _told(items, what, total, console)


def _told(items: Iterable[Any], what: str, total: int, console: Console) -> Iterator[Any]:
    began = told = time.monotonic()
    for number, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - told >= _TELL_S and number < total:
            told = now
            left = (now - began) / number * (total - number)
            console.print(f"{what}: {number} of {total}, {left / 60:.0f} min left", highlight=False, soft_wrap=True)
