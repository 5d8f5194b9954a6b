"""The command line, `most-ray COMMAND`: turns flags into calls of the other rooms, and their errors into one line and an exit code."""

from __future__ import annotations

import argparse
import atexit
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from most_ray.console.streams import drop_stream, open_streams
from most_ray.errors import EXIT_INTERRUPTED, ConfigError, Interrupted, UserError, explain_os_error, printable

if TYPE_CHECKING:
    from most_ray.cli.parser import Parser

_READER_GONE = 141  # exit code of shells for a process whose output has no reader any more


def build_parser() -> Parser:
    """The parser of all commands; a command's module adds its own."""
    # Imported here: it takes a second, in which an interrupt must end as in any other (see `main`).
    from most_ray.cli import about_commands, cluster_commands, evaluate_command, prepare_commands, run_commands, speech_commands
    from most_ray.cli.parser import Parser, add_commands, remember_flags

    parser = Parser(prog="most-ray", description="Post-train MoST on speech recognition and synthesis.")
    about_commands.add_version(parser)
    commands = add_commands(parser, "command", "COMMAND")
    for each in (prepare_commands, run_commands, evaluate_command, speech_commands, cluster_commands, about_commands):
        each.add(commands)
    remember_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, `argv` (None: that of this process). Returns the exit code. 0: done. 1: a run failed. 2: an error that the user can
    fix. 75: stopped on request; the same command resumes. 130: interrupted by Ctrl-C. 141: whoever read the output has closed it."""
    open_streams()
    try:
        code = _run(argv)
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        code = _READER_GONE
    except BaseException as error:  # an interrupt may come as an error of another kind; all others are raised again
        if not _is_interrupt(error):
            raise
        _tell("; ".join(part for part in ("most-ray: interrupted", str(error) if isinstance(error, Interrupted) else "") if part))
        code = EXIT_INTERRUPTED
    _end_of_libraries(code)
    try:
        sys.stdout.flush()
    except OSError:
        drop_stream(sys.stdout.fileno())  # or the end of the process would try once more, and fail
        code = code or _READER_GONE
    return code


def _run(argv: Sequence[str] | None) -> int:
    """Run a command; see `main`. Interrupts and a screen without a reader are left to it."""
    from most_ray.console.terminal import log_to_stderr  # takes a tenth of a second

    log_to_stderr(logging.WARNING)
    logging.getLogger("most_ray").setLevel(logging.INFO if sys.stderr.isatty() else logging.WARNING)
    args = None
    try:
        args = build_parser().parse_args(argv)
        return _carry_out(args)
    except UserError as error:
        _tell(f"most-ray: {error.kind}: {error}")
        return error.exit_code
    except BrokenPipeError:
        raise
    except UnicodeEncodeError as error:  # of a path: what is shown is written with escapes
        rule = f"cannot be written as {error.encoding}, this system's encoding of names."
        named = ConfigError("name", error.object[:200], rule, "Correct the name, or set LC_ALL=C.UTF-8.")
        _tell(f"most-ray: {named.kind}: {named}")
        return named.exit_code
    except OSError as error:
        logging.getLogger("most_ray").debug("", exc_info=True)  # the error itself is printed; this adds where it was raised
        from most_ray.cli.parser import flag_of

        explained = explain_os_error(error, flag_of(args, error.filename))
        _tell(f"most-ray: {explained.kind}: {explained}")
        return 2


def _carry_out(args: argparse.Namespace) -> int:
    """Run a parsed command. Raises Interrupted where an interrupt ends it, with what the command itself says of that, if anything."""
    try:
        return int(args.run(args))
    except BaseException as error:  # libraries turn an interrupt into errors of any kind; all others are raised again
        if isinstance(error, Interrupted) or not _is_interrupt(error):
            raise
        raise Interrupted(args.interrupted) from error


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether an error is an interrupt, or what a library has made of one: extension modules end their import with their own error."""
    return error is not None and (isinstance(error, KeyboardInterrupt) or _is_interrupt(error.__cause__))


def _end_of_libraries(code: int) -> None:
    """At a command's end, say where the lines of libraries are if it has failed, and keep them from writing after it."""
    from most_ray.console.library_log import LIBRARIES

    if (colorama := sys.modules.get("colorama.initialise")) is not None:  # it would write an escape, to terminals without colours too
        atexit.unregister(colorama.reset_all)
    if (path := LIBRARIES.close_file(keep=code == 1)) is not None and code == 1:
        _tell(f"most-ray: what the libraries said is in {printable(str(path))}")


def _tell(line: str) -> None:
    """Write a last line to standard error; where that has no reader any more, the exit code says it."""
    try:
        sys.stderr.write(line + "\n")
    except OSError:
        drop_stream(sys.stderr.fileno())
