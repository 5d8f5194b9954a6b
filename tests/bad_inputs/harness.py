"""Runs one command on one bad input, in a process and a folder of its own, and says what is wrong with how it was refused.

A table is a module with `CASES`; `test_tables.py` runs all of them. A case is refused well where the exit code is the expected one, the
error is one line that names what is at fault, there is neither a traceback nor a control character, the command ends in time, and no file
below its folder was made, changed or removed but those that the case says.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import resource
import select
import signal
import stat
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

_SECONDS = 30.0  # that a command may take
_BYTES = 8 << 30  # of memory that it may address
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Outcome(NamedTuple):
    code: int | None  # None: it did not end
    stdout: str
    stderr: str
    seconds: float
    changed: list[str]  # files and folders below the case's folder that were made, changed or removed


@dataclass(frozen=True)
class Case:
    """One bad input.

    Args:
        name: of the case, unique in its table.
        make: makes the input below an empty folder, the command's working directory, and returns the command's arguments.
        says: regular expressions that the output must hold: the field, the rule.
        code: the exit code.
        never: regular expressions that the output must not hold.
        may_change: patterns of names below the folder that the command may make or change.
        check: raises AssertionError for what else is wrong.
        environment: variables to set, or to remove (None).
        seconds: that the command may take.
        file_bytes: size of the files that it can write, beyond which writing fails as on a full disk.
    """

    name: str
    make: Callable[[Path], Sequence[str | Path]]
    says: str | Sequence[str] = ()
    code: int = 2
    never: Sequence[str] = ()
    may_change: Sequence[str] = ()
    check: Callable[[Path, Outcome], None] | None = None
    environment: dict[str, str | None] = field(default_factory=dict)
    seconds: float = _SECONDS
    file_bytes: int | None = None


def snapshot(folder: Path) -> dict[str, str]:
    """What is below a folder: for each name the kind, and of a file the content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        kind = stat.S_IFMT(status.st_mode)
        content = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(kind) else os.readlink(path) if stat.S_ISLNK(kind) else ""
        found[str(path.relative_to(folder))] = f"{kind}{content}"
    return found


def run(case: Case, root: Path) -> Outcome:
    """Run a case's command below the empty folder `root`."""
    folder, out, err = root / "in", root / "stdout", root / "stderr"
    folder.mkdir()
    for path in (out, err):
        path.touch()
    arguments = [str(word) for word in case.make(folder)]
    before, began = snapshot(folder), time.monotonic()
    pid = os.fork()
    if pid == 0:
        _run_command(case, arguments, folder, out, err)
    code = _wait(pid, began + case.seconds)
    seconds, after = time.monotonic() - began, snapshot(folder)
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    return Outcome(code, out.read_text(errors="replace"), err.read_text(errors="replace"), seconds, changed)


def faults(case: Case, root: Path, outcome: Outcome) -> list[str]:
    """What is wrong with the outcome of a case."""
    both, found = outcome.stdout + outcome.stderr, []
    if outcome.code != case.code:
        found.append(f"did not end within {case.seconds:g} s" if outcome.code is None else f"exit code {outcome.code}, not {case.code}")
    if "Traceback (most recent call last)" in both:
        found.append("a traceback")
    if case.code == 2:
        lines = [line for line in outcome.stderr.splitlines() if line.strip()]
        if len(lines) != 1 or not re.match(r"most-ray: \w[\w ]*error: ", lines[0]):
            found.append(f"{len(lines)} lines instead of one error")
        if len(outcome.stderr) > 3000:
            found.append(f"an error of {len(outcome.stderr)} characters")
    if _CONTROL.search(both):
        found.append(f"control characters: {set(_CONTROL.findall(both))}")
    found += [f"lacks /{each}/" for each in ([case.says] if isinstance(case.says, str) else case.says) if not re.search(each, both)]
    found += [f"shows /{each}/" for each in case.never if re.search(each, both)]
    if changed := [name for name in outcome.changed if not any(fnmatch(name, pattern) for pattern in case.may_change)]:
        found.append(f"changed {changed}")
    if case.check is not None:
        try:
            case.check(root / "in", outcome)
        except AssertionError as error:
            found.append(f"check: {error}")
    return found


def _run_command(case: Case, arguments: Sequence[str], folder: Path, out: Path, err: Path) -> None:
    """In the forked process: the command, with its output in files and limits on what it may use; does not return."""
    code = 99
    try:
        os.setsid()
        os.chdir(folder)
        for path, number, mode in ((Path(os.devnull), 0, os.O_RDONLY), (out, 1, os.O_WRONLY), (err, 2, os.O_WRONLY)):
            descriptor = os.open(path, mode)
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdin = os.fdopen(0, "r", closefd=False)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        os.environ["HOME"] = str(folder.parent)
        for name, value in case.environment.items():
            os.environ.pop(name, None)
            os.environ.update({name: value} if value is not None else {})
        resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if case.file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (case.file_bytes, case.file_bytes))
        from most_ray.cli import main

        logging.getLogger().handlers.clear()  # those of pytest; the command makes its own, which write to its standard error
        try:
            code = main(arguments)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:  # noqa: BLE001 - what a case ends with, its outcome shows
            traceback.print_exc()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit(code)


def _wait(pid: int, deadline: float) -> int | None:
    """The exit code of a child that leads a session of its own, None at the deadline. The session is killed, with all that the command has
    left in it."""
    descriptor = os.pidfd_open(pid)
    ended, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
    os.close(descriptor)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) if ended else None
