"""The standard streams of a process, made fit for any start of it. Imports nothing, so that it can come before everything else."""

from __future__ import annotations

import io
import os
import sys


def open_streams() -> None:
    """Replace closed standard streams by ones that go nowhere, show lines as they happen (in a log file too), and write characters that the
    screen's encoding lacks as escapes."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Gets the lowest free number, which is this one. Left closed, the next file that is opened would be the screen.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed when Python started
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for the whole process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")


def drop_stream(number: int) -> None:
    """Let what is written to a file descriptor from now on go nowhere: its reader has gone, and even what is buffered would raise."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


def drop_lost_streams() -> None:
    """Let what is written to a terminal that has ended go nowhere: it would raise an error in whoever writes. Called on a signal."""
    for stream in (sys.stdout, sys.stderr):
        try:
            number = stream.fileno()
        except (OSError, ValueError, AttributeError):  # no stream of the system, as in a test
            continue
        try:
            os.write(number, b"")
        except OSError:
            drop_stream(number)
