"""Signals that stop a run after a checkpoint: SIGTERM, and SIGHUP, which comes when the terminal or the connection of a command ends."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


def stop_signals() -> list[signal.Signals]:
    """The signals that stop a run. SIGHUP is not one of them where this process ignores it, as under nohup."""
    return [signal.SIGTERM, *([] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP])]


@contextlib.contextmanager
def hangup_blocked() -> Iterator[None]:
    """Processes that are started within the block are never ended by SIGHUP: a terminal sends it to all processes of a command at once. For
    this process it comes after the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
