"""A command in a terminal of its own, with a process group that the keys of the terminal reach."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

INTERRUPT = b"\x03"  # the key Ctrl-C: the kernel sends SIGINT to all processes of the command
# How what libraries say begins: tracebacks, Python's warnings, Ray's own logs and those of its processes, stacks of absl and of Ray's C++.
_NOISE = re.compile(
    r"Traceback|\S*(Future|User|Deprecation|Runtime|Resource)Warning|.*\.py:\d+: \w*Warning|\[transformers\]|\(\w[\w ]*(pid|ip)=|\(raylet"
    r"|\(autoscaler|\[20\d\d-|\d{4}-\d\d-\d\d [\d:,]+\t|\*\*\* |\[\S+ : \d+\] logging\.cc|PC: @|    @ +0x|INFO worker\.py"
)


def noise(text: str) -> list[str]:
    """The lines of an output that are no command's but some library's."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return [line for line in plain.splitlines() if _NOISE.match(line)]


class TerminalCommand:
    """A command that was started in a new terminal.

    Args:
        words: of the command.
        folder: its working directory.
        environment: variables beside those of this process.
    """

    def __init__(self, words: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        self.shown = b""
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.chdir(folder)
            for number in (signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            os.execve(words[0], list(words), {**os.environ, "TERM": "dumb", **environment})

    def press(self, key: bytes) -> None:
        os.write(self._terminal, key)

    def read_until(self, holds: Callable[[], bool], seconds: float) -> None:
        """Read what is shown until `holds` returns true."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, self.shown[-3000:]
            self._read()

    def end(self, seconds: float) -> int:
        """Read to the end. Returns the exit code."""
        deadline = time.monotonic() + seconds
        while self._read():
            assert time.monotonic() < deadline, self.shown[-3000:]
        os.close(self._terminal)
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])

    def _read(self) -> bool:
        """Read what is there within half a second. Returns False at the end."""
        if select.select([self._terminal], [], [], 0.5)[0]:
            try:
                found = os.read(self._terminal, 65536)
            except OSError:  # of a terminal that no process has open any more
                return False
            self.shown += found
            return bool(found)
        return True
