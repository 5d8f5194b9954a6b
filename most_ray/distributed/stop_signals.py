"""Signals that stop a run after a checkpoint: SIGTERM, SIGHUP, which comes when the terminal or the connection of a command ends, and
SIGINT, which a terminal sends at Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

# What a run says at the first Ctrl-C while it trains.
STOPPING = "stopping after the current step, with a checkpoint; Ctrl-C again stops now"


def stop_signals() -> list[signal.Signals]:
    """The signals that always stop a run. SIGHUP is not one of them where this process ignores it, as under nohup."""
    return [signal.SIGTERM, *([] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP])]


def interrupt_signals() -> list[signal.Signals]:
    """The signal of Ctrl-C, which stops a run once it trains. Not where this process ignores it, as where a script starts it in the
    background."""
    return [] if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else [signal.SIGINT]


@contextlib.contextmanager
def hangup_blocked() -> Iterator[None]:
    """Processes that are started within the block are never ended by SIGHUP: a terminal sends it to all processes of a command at once. For
    this process it comes after the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
