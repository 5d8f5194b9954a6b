"""What all commands share: the parser, flags that are keys of the configuration, and progress."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import TimeRemainingColumn

from most_ray import config as configuration
from most_ray.cli.job_files import PathFlag, resolve_paths
from most_ray.config_files import is_shipped, shipped_names
from most_ray.console.help import HelpParser
from most_ray.console.terminal import print_line, progress_bar, say
from most_ray.errors import ConfigError, DataError, UserError, nearest
from most_ray.io import storage
from most_ray.io.hub import PREFIX, model_folder
from most_ray.io.run_folder import model_source
from most_ray.options import Range, check_number, parse_number

# What Ctrl-C leaves of a command.
AGAIN = "the same command begins again"
CONTINUES = "the same command continues where this one was"
_REPORT_S = 30.0  # seconds between lines of progress in a log file


class _Store(argparse._StoreAction):
    """Stores a flag's value. A second list replaces the first one, as with every flag, but not without a word."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        if self.nargs == "+" and option_string and getattr(namespace, self.dest, self.default) is not self.default:
            print(f"most-ray: {option_string} is given twice: only the last list is used. One flag takes several values.")
        super().__call__(parser, namespace, values, option_string)


class Parser(HelpParser):
    """A parser whose errors name the nearest known flag or command. Flags cannot be abbreviated: a typo never becomes another flag. Where a
    flag is given twice, as by a script that sets it for those who do not, the last value is used."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.register("action", None, _Store)
        self.register("action", "store", _Store)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:  # type: ignore[override]
        words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(_divided(self, words), namespace)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        parsed, unknown = self.parse_known_args(args, namespace)
        if word := next((word for word in unknown if word.startswith("--") and word != "--"), None):
            name = word[2:].split("=", 1)[0]
            raise ConfigError(f"--{name}", None, "is no known flag.", nearest(name, getattr(parsed, "known_flags", [])))
        if unknown := [word for word in unknown if word != "--"]:
            raise ConfigError("argument", unknown[0], "belongs to no flag.")
        _take_file(parsed)
        return parsed

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            remedy = nearest(value, action.choices)
            if _is_configuration(value) and "train" in action.choices:
                remedy = f"To train its run: {self.prog} train {value}."
            raise ConfigError("command", value, "is no command.", remedy)
        super()._check_value(action, value)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        # argparse would call a path's ConfigError an "invalid value": the flag's name goes where the error is made.
        if isinstance(action.type, PathFlag):
            return action.type(arg_string, action.dest)
        return super()._get_value(action, arg_string)

    def error(self, message: str) -> NoReturn:
        raise ConfigError("command line", None, f"{message}.", f"See `{self.prog} --help`.")

    def flag_names(self) -> list[str]:
        """Names of the flags, without their dashes."""
        return [option[2:] for action in self._actions for option in action.option_strings if option.startswith("--")]


def _is_configuration(word: str) -> bool:
    """Whether a word is the name of a YAML file, or of a shipped configuration."""
    return word.endswith((".yaml", ".yml")) or is_shipped(word)


def _divided(parser: Parser, words: list[str]) -> list[str]:
    """The words of a command that takes a FILE, where one follows a flag whose value may be left out, as in `train --dry_run FILE`: with
    that value written out, so that the file is not taken for it."""
    if not any(action.dest == "file" for action in parser._actions):
        return words
    left_out = {
        flag: action.const
        for action in parser._actions
        if action.nargs == "?"
        for flag in action.option_strings
        if action.const is not None
    }
    pairs = zip(words, [*words[1:], ""], strict=False)
    return [f"{word}={left_out[word]}" if word in left_out and _is_configuration(after) else word for word, after in pairs]


def _take_file(parsed: argparse.Namespace) -> None:
    """Let FILE be the value of --config, in the namespace of a command that takes both. Raises ConfigError where both are given, or neither
    where one is needed."""
    if not hasattr(parsed, "file"):
        return
    if parsed.file is not None and parsed.config is not None:
        rule = f"belongs to no flag, and --config = {str(parsed.config)!r} is a configuration already."
        raise ConfigError("argument", str(parsed.file), rule, "Leave one of them out.")
    if parsed.file is None and parsed.config is None and parsed.needs_file:
        raise ConfigError("config", None, "is needed: a YAML file.", f"As most-ray {parsed.command} FILE.")
    parsed.config = parsed.file if parsed.config is None else parsed.config


def add_config(parser: Parser, text: str, kind: Any, needed: bool = False, shipped: str = "") -> None:
    """Add the two ways to name a command's configuration, FILE and --config FILE. `text`: what it is, `kind`: the type of its path,
    `needed`: whether the command does nothing without, `shipped`: the kind of those that the package ships, see `shipped_names`."""
    text = f"{text}, or a shipped one by its name: {', '.join(shipped_names(shipped))}" if shipped else text
    parser.add_argument("file", nargs="?", type=kind, metavar="FILE", help="the same as --config FILE")
    parser.add_argument("--config", type=kind, metavar="FILE", help=text)
    parser.set_defaults(needs_file=needed)


@contextlib.contextmanager
def naming_files(args: argparse.Namespace) -> Iterator[None]:
    """Within the block, which reads the configuration, the error of a file that does not exist suggests what may be meant."""
    try:
        yield
    except ConfigError as error:
        name = str(getattr(args, "config", None) or "")
        if error.field != "config" or not name or storage.is_remote(name) or Path(name).exists():
            raise
        raise ConfigError("config", error.value, error.rule, _files_remedy(name, args) or error.remedy or "Name a YAML file.") from error


def _files_remedy(name: str, args: argparse.Namespace) -> str:
    """What may be meant by a configuration that does not exist: a flag without its dashes, or a file of a similar name; empty where there
    is none."""
    if given := difflib.get_close_matches(name.lstrip("-").replace("-", "_"), args.known_flags, n=1, cutoff=0.8):
        return f"Did you mean --{given[0]}?"
    folders = [Path(name).parent, Path("jobs/configs")]
    files = {path.stem: str(path) for folder in reversed(folders) if folder.is_dir() for path in sorted(folder.glob("*.y*ml"))}
    close = difflib.get_close_matches(Path(name).stem, files, n=1, cutoff=0.6)
    return f"Did you mean {files[close[0]]!r}?" if close else ""


class _NumberAction(argparse.Action):
    """Stores a flag's number; see `number`. Not a `type`, of whose errors argparse keeps the text alone."""

    def __init__(self, *args: Any, kind: type, range: Range, most: float | None, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._kind, self._range, self._most = kind, range, most

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        del parser, option_string
        found = parse_number(self.dest, self._kind, values)
        check_number(self.dest, found, self._range, self._most)
        setattr(namespace, self.dest, found)


def number(kind: type, range: Range, most: float | None = None) -> Any:
    """The `action` of a flag whose value is a number, by the rules of the configuration's numbers.

    Args:
        kind: int or float.
        range, most: the numbers that it may be, as in `options.option`.
    """
    return partial(_NumberAction, kind=kind, range=range, most=most)


def add_command(where: Any, name: str, run: Callable[[argparse.Namespace], int], text: str, interrupted: str = "") -> Parser:
    """Add a command under a parser's subparsers.

    Args:
        run: carries the command out and returns its exit code.
        text: what it does, in a line.
        interrupted: what Ctrl-C leaves, where that is always the same, as "nothing was written".
    """
    command: Parser = where.add_parser(name, help=text, description=text)
    command.set_defaults(run=run, interrupted=interrupted)
    return command


def add_commands(parser: Parser, dest: str, metavar: str) -> Any:
    """Add subcommands to a parser, and return what `add_command` adds them to. Without one, the help is shown."""

    def show(args: argparse.Namespace) -> int:
        del args
        parser.print_help()
        return 0

    parser.set_defaults(run=show, interrupted="")
    return parser.add_subparsers(dest=dest, metavar=metavar, parser_class=Parser)


def config_of(args: argparse.Namespace) -> configuration.RunConfig:
    """The configuration of --config, overruled by flags; in a job, with the paths that the job uses."""
    with naming_files(args):
        return resolve_paths(configuration.load_config(args.config, configuration.flag_values(args)))


def config_of_flags(args: argparse.Namespace, keys: Mapping[str, str]) -> configuration.RunConfig:
    """The configuration of a command that has flags for some keys; `keys`: the key of each flag. In a job, with the paths that it uses.
    Raises ConfigError, which names the flag."""
    try:
        return resolve_paths(configuration.config_from({key: getattr(args, flag) for flag, key in keys.items() if hasattr(args, flag)}))
    except ConfigError as error:
        flags = {key: flag for flag, key in keys.items()}
        raise ConfigError(flags.get(error.field, error.field), error.value, error.rule, error.remedy) from error


def remember_flags(parser: Parser) -> None:
    """Keep the names of a parser's flags, and of its commands', for errors that suggest the nearest one; and those of what is read."""
    parser.set_defaults(known_flags=parser.flag_names())
    parser.set_defaults(read_flags=[action.dest for action in parser._actions if isinstance(action.type, PathFlag) and action.type.reads])
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                remember_flags(command)


def check_model(model: str) -> str:
    """The model of --model, see `model_source`; one on the hub is fetched. Raises CheckpointError for what is none."""
    found = model_source(model, "model", checkpoints=True)
    if found.startswith(PREFIX):
        model_folder(found, "model")
    return found


def check_records(flag: str, uris: Iterable[str]) -> None:
    """Raises DataError for a directory of records that does not exist, before anything is loaded."""
    for uri in uris:
        if not storage.exists(uri):
            raise DataError(flag, storage.redact(uri), "does not exist.", "Check the path.")


def flag_of(args: argparse.Namespace | None, filename: object) -> str:
    """The flag whose path is `filename`, or a folder that it is in; "file" where there is none."""
    for name, value in vars(args).items() if args is not None and isinstance(filename, str) else ():
        for each in value if isinstance(value, list) else [value]:
            text = str(each) if isinstance(each, str | Path) and name not in ("command", "what") else ""
            if text and Path(str(filename)).absolute().is_relative_to(Path(text).absolute()):
                return name
    return "file"


def print_error(error: UserError) -> None:
    say(f"most-ray: {error.kind}: {error}", stream=sys.stderr)


def tracked(items: Iterable[Any], what: str, total: int, console: Console) -> Iterator[Any]:
    """The items, with a progress bar on a terminal; in a log file, with a line every 30 s."""
    if console.is_terminal:
        with progress_bar(console, what, "{task.percentage:>3.0f}%", TimeRemainingColumn()) as progress:
            yield from progress.track(items, total=total)
        return
    began = reported = time.monotonic()
    for number, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - reported >= _REPORT_S and number < total:
            reported = now
            left = (now - began) / number * (total - number)
            print_line(console, f"{what}: {number} of {total}, {left / 60:.0f} min left")
