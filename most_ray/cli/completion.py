"""Scripts that complete commands, flags and their choices in bash, zsh and fish, made from the parser: they start no Python at a key."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class _Word:
    """A word that may come next: a command or a flag."""

    name: str
    text: str  # what it does
    choices: tuple[str, ...] = ()  # of a flag's value
    value: bool = False  # a flag takes one


@dataclass(frozen=True)
class _Command:
    """A command and the words that may follow it."""

    path: str  # as `prepare units`; empty for most-ray itself
    words: tuple[_Word, ...]


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for a shell of `SHELLS`."""
    return _SCRIPTS[shell](list(_commands(parser, "")))


def _commands(parser: argparse.ArgumentParser, path: str) -> Iterator[_Command]:
    words, below = [], []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            words += [_Word(choice.dest, choice.help or "") for choice in action._choices_actions]
            below = [(name, command) for name, command in action.choices.items()]
        elif not action.option_strings and action.choices:
            words += [_Word(str(choice), "") for choice in action.choices]
        flags = [flag for flag in action.option_strings if flag.startswith("--")]
        words += [_Word(flag, action.help or "", _choices(action), action.nargs != 0) for flag in flags]
    yield _Command(path, tuple(words))
    for name, command in below:
        yield from _commands(command, f"{path} {name}".strip())


def _choices(action: argparse.Action) -> tuple[str, ...]:
    """The values that a flag may have, where they are few and known."""
    if action.choices:
        return tuple(map(str, action.choices))
    if isinstance(action.metavar, str) and "|" in action.metavar:
        return tuple(action.metavar.split("|"))
    return ("all",) if isinstance(action, argparse._HelpAction) else ()


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _described(word: _Word) -> str:
    """A word's text in a few words."""
    return re.split(r"[,;:(] ?", word.text)[0].strip().replace("%", "")[:60]


def _patterns(commands: list[_Command]) -> list[str]:
    """The paths of commands with a space before their last word, in double quotes."""
    return [f'"{each.path}"' if " " in each.path else f'" {each.path}"' for each in commands if each.path]


def _bash(commands: list[_Command]) -> str:
    lines = [
        "# Completes most-ray in bash.",
        "_most_ray() {",
        '    local current="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" path="" word words=""',
        '    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do',
        '        case "$path $word" in',
        f'            {" | ".join(_patterns(commands))}) path="${{path:+$path }}$word" ;;',
        "        esac",
        "    done",
        '    case "$path $before" in',
    ]
    for each in commands:
        for word in each.words:
            if word.choices:
                lines.append(f'        "{each.path} {word.name}") words="{" ".join(word.choices)}" ;;')
    lines += ["    esac", '    if [ -z "$words" ]; then', '        case "$path" in']
    lines += [f'            "{each.path}") words="{" ".join(word.name for word in each.words)}" ;;' for each in commands]
    lines += [
        "        esac",
        "    fi",
        '    COMPREPLY=($(compgen -W "$words" -- "$current"))',
        "}",
        "complete -o default -F _most_ray most-ray",
    ]
    return "\n".join(lines) + "\n"


def _zsh(commands: list[_Command]) -> str:
    lines = [
        "#compdef most-ray",
        "# Completes most-ray in zsh.",
        "_most_ray() {",
        '    local at="" word before="${words[CURRENT-1]}"',
        "    local -a found",
        '    for word in "${(@)words[2,CURRENT-1]}"; do',
        '        case "$at $word" in',
        f'            {" | ".join(_patterns(commands))}) at="${{at:+$at }}$word" ;;',
        "        esac",
        "    done",
        '    case "$at $before" in',
    ]
    for each in commands:
        for word in each.words:
            if word.choices:
                lines.append(
                    f'        "{each.path} {word.name}") found=({" ".join(map(_quoted, word.choices))}); _describe value found; return ;;'
                )
    lines += ["    esac", '    case "$at" in']
    for each in commands:
        described = (_quoted(f"{word.name}:{_described(word)}") for word in each.words)
        lines.append(f'        "{each.path}") found=({" ".join(described)}) ;;')
    lines += [
        "    esac",
        "    _describe -o word found",
        '    [[ "${words[CURRENT]}" == -* ]] || _files',
        "}",
        "compdef _most_ray most-ray",
    ]
    return "\n".join(lines) + "\n"


def _fish(commands: list[_Command]) -> str:
    lines = [
        "# Completes most-ray in fish.",
        "function __most_ray_at",
        '    set -l at ""',
        "    for word in (commandline -opc)[2..-1]",
        '        switch "$at $word"',
        f"            case {' '.join(_patterns(commands))}",
        '                set at (string trim "$at $word")',
        "        end",
        "    end",
        '    test "$at" = "$argv"',
        "end",
    ]
    for each in commands:
        for word in each.words:
            condition = f"complete -c most-ray -n {_fish_quoted(f'__most_ray_at {each.path}'.strip())}"
            text = _fish_quoted(_described(word))
            if not word.name.startswith("--"):
                lines.append(f"{condition} -f -a {word.name} -d {text}")
                continue
            choices = f" -f -a {_fish_quoted(' '.join(word.choices))}" if word.choices else ""
            lines.append(f"{condition} -l {word.name[2:]} -d {text}{' -r' * word.value}{choices}")
    return "\n".join(lines) + "\n"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


_SCRIPTS: dict[str, Callable[[list[_Command]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
SHELLS = tuple(_SCRIPTS)
