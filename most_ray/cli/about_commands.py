"""`most-ray --version`, `most-ray env` and `most-ray completion`: what is installed here, and flags for shells. They load no library."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import most_ray
from most_ray.cli.completion import SHELLS, script
from most_ray.cli.parser import Parser, add_command
from most_ray.console.terminal import say
from most_ray.runs.environment import installation, source_commit


class _Version(argparse.Action):
    """Prints the version, with the commit where this is a checkout."""

    def __init__(self, option_strings: Any, dest: str, **keywords: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, **keywords)

    def __call__(self, parser: Any, *_: Any) -> None:
        say(version_text())
        parser.exit()


def version_text() -> str:
    """The version, as `most-ray 0.1.0 (commit 1a2b3c4d5e6f, modified)`."""
    found = source_commit()
    changed = ", modified" if found.get("modified") else ""
    return f"most-ray {most_ray.__version__}" + (f" (commit {found['commit'][:12]}{changed})" if found else "")


def add_version(parser: Parser) -> None:
    parser.add_argument("--version", action=_Version, help="show the version, and the commit where this is a checkout")


def add(commands: Any) -> None:
    env = add_command(commands, "env", _env, "show versions, devices and variables, for reports of faults")
    env.add_argument("--json", action="store_true", help="as JSON")
    text = "print the script that completes commands and flags in a shell"
    completion = add_command(commands, "completion", _completion, text)
    completion.epilog = (
        'bash: add eval "$(most-ray completion bash)" to ~/.bashrc. zsh: add the same with zsh to ~/.zshrc, after compinit. '
        "fish: most-ray completion fish > ~/.config/fish/completions/most-ray.fish."
    )
    completion.add_argument("shell", choices=SHELLS, help="the shell")


def _env(args: argparse.Namespace) -> int:
    found = installation()
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    for name, value in found.items():
        if isinstance(value, dict):
            for part, text in value.items():
                say(f"{part:<16} {text if text is not None else 'not installed'}")
        else:
            say(f"{name:<16} {', '.join(value) or 'none' if isinstance(value, list) else 'unknown' if value is None else value}")
    return 0


def _completion(args: argparse.Namespace) -> int:
    from most_ray.cli import build_parser  # which imports this module

    sys.stdout.write(script(build_parser(), args.shell))
    return 0
