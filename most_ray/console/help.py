"""Parsers of flags whose --help fits on a screen: the everyday flags, one line each; `--help all` shows the others too."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from most_ray.errors import ConfigError
from most_ray.options import EVERYDAY, Level

_NARROWEST, _WIDEST = 80, 130  # columns of a terminal that a help text is made for
_HELP_COLUMN = 30  # where the texts of flags begin
_CONFIGURATION = "Any key of the configuration is a flag too: most-ray train --help all"


class _Formatter(argparse.HelpFormatter):
    """As wide as the terminal, within bounds."""

    def __init__(self, prog: str) -> None:
        columns = min(max(shutil.get_terminal_size().columns, _NARROWEST), _WIDEST)
        super().__init__(prog, max_help_position=_HELP_COLUMN, width=columns - 2)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return f"{_name(action)} ..." if action.nargs == "+" else super()._format_args(action, default_metavar)


class _Help(argparse._HelpAction):
    """`--help`, and `--help all`."""

    def __call__(self, parser: Any, *arguments: Any) -> None:
        _, word, _ = arguments
        if word not in (None, "all"):
            raise ConfigError("help", word, "is not all, the only word after it.", f"See `{parser.prog} --help`.")
        show = parser.print_all_help if word else parser.print_help
        show()
        parser.exit()

    def __init__(self, option_strings: Any, **keywords: Any) -> None:
        super().__init__(option_strings, **keywords)
        self.nargs, self.metavar = "?", "all"


class HelpParser(argparse.ArgumentParser):
    """A parser whose help shows what `level_of` its flags says."""

    _everything = False
    listing: tuple[str, Mapping[str, str]] | None = None  # shown below the flags: a title, and names with a text each

    def __init__(self, *args: Any, add_help: bool = True, **keywords: Any) -> None:
        super().__init__(*args, **{"formatter_class": _Formatter, **keywords, "allow_abbrev": False, "add_help": False})
        if add_help:
            self.add_argument("-h", "--help", action=_Help, help="show this; with all: every flag")

    def print_all_help(self) -> None:
        """Print the help with all flags."""
        self._everything = True
        try:
            self.print_help()
        finally:
            self._everything = False

    def format_help(self) -> str:
        levels = {level_of(action) for action in self._actions}
        more = f"All flags: {self.prog} --help all" if "all" in levels and not self._everything else ""
        rest = (self.epilog, more, _CONFIGURATION if "elsewhere" in levels else "")
        with self._as_shown():
            usage, epilog = self.usage, self.epilog
            self.usage, self.epilog = usage or self._usage(), None
            try:
                text = super().format_help()
            finally:
                self.usage, self.epilog = usage, epilog
        text += self._listed()
        formatter = self._get_formatter()
        for part in filter(None, rest):
            formatter.add_text(part)
        return text + ("\n" + formatter.format_help() if any(rest) else "")

    def _listed(self) -> str:
        """The listing, as flags are listed."""
        if self.listing is None:
            return ""
        (title, rows), width = self.listing, self._get_formatter()._width
        indent = " " * _HELP_COLUMN
        lines = [
            textwrap.fill(text, width, initial_indent=f"  {name}".ljust(_HELP_COLUMN), subsequent_indent=indent)
            for name, text in rows.items()
        ]
        return "\n".join(["", f"{title}:", *lines, ""])

    @contextlib.contextmanager
    def _as_shown(self) -> Iterator[None]:
        """Within the block, flags that are not shown have no help, and where only the everyday ones are shown, these their short text."""
        before, levels = [(action, action.help, action.nargs) for action in self._actions], set(map(level_of, self._actions))
        for action in self._actions:
            level = level_of(action)
            if level == "elsewhere" or (level == "all" and not self._everything):
                action.help = argparse.SUPPRESS
            elif not self._everything:
                action.help = getattr(action, "short", "") or action.help
            if isinstance(action, _Help):
                action.nargs, action.help = ("?", "show this; with all: every flag") if "all" in levels else (0, "show this")
        try:
            yield
        finally:
            for action, text, nargs in before:
                action.help, action.nargs = text, nargs

    def _usage(self) -> str:
        """The usage: what is needed, and that there are flags."""
        words, grouped = [self.prog], [action for group in self._mutually_exclusive_groups for action in group._group_actions]
        words += [_needed(action) for action in self._actions if action.option_strings and action.required and action not in grouped]
        for group in self._mutually_exclusive_groups:
            if group.required:
                words.append(f"({' | '.join(map(_needed, group._group_actions))})")
        for action in self._actions:
            if not action.option_strings:
                name = _name(action)
                words.append(f"[{name}]" if action.nargs == "?" else f"{name} ..." if action.nargs == "+" else name)
        prefix = len("usage: ")
        lines = textwrap.wrap(" ".join([*words, "[flags]"]), self._get_formatter()._width - prefix, break_on_hyphens=False)
        return ("\n" + " " * prefix).join(lines).replace("%", "%%")


def mark(action: argparse.Action, short: str = "", level: Level = EVERYDAY) -> None:
    """Say how a flag is shown that is no option of a section. `short`: its text where only everyday flags are shown, `level`: where."""
    action.short, action.level = short, level  # type: ignore[attr-defined]


def level_of(action: argparse.Action) -> Level:
    """Where a flag is shown, see `options.add_flag`."""
    level: Level = getattr(action, "level", EVERYDAY)
    return level


def _needed(action: argparse.Action) -> str:
    return " ".join([action.option_strings[0], *([] if action.nargs == 0 else [_name(action)])])


def _name(action: argparse.Action) -> str:
    return action.metavar if isinstance(action.metavar, str) else action.dest.upper()
