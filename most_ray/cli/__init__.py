"""The command line, `most-ray COMMAND`: turns flags into calls of the other rooms, and their errors into one line and an exit code."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Sequence

from most_ray.cli import cluster_commands, evaluate_command, prepare_commands, run_commands, speech_commands
from most_ray.cli.parser import Parser, print_error, remember_flags
from most_ray.errors import UserError


def build_parser() -> Parser:
    """The parser of all commands; a command's module adds its own."""
    parser = Parser(prog="most-ray", description="Post-train MoST on speech recognition and synthesis.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for each in (prepare_commands, run_commands, evaluate_command, speech_commands, cluster_commands):
        each.add(commands)
    remember_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, `argv` (None: that of this process). Returns the exit code. 0: done. 1: a run failed. 2: an error that the user can
    fix. 75: stopped on request; the same command resumes. 130: interrupted. 141: whoever read the output has closed it."""
    # Read when torch is loaded, here and in the Ray processes that this one starts. Threads that wait without spinning lose nothing on an
    # idle machine, and on a busy one they make a step up to 25 times faster (tests/benchmarks/RESULTS.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # shows progress as it happens, in a log file too
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("most_ray").setLevel(logging.INFO if sys.stderr.isatty() else logging.WARNING)
    try:
        args = build_parser().parse_args(argv)
        return int(args.run(args))
    except UserError as error:
        print_error(error)
        return error.exit_code
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        logging.getLogger("most_ray").debug("", exc_info=True)  # the error itself is printed; this adds where it was raised
        print(f"most-ray: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("most-ray: interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        return 130
