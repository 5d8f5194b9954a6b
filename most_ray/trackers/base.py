"""Trackers: Weights & Biases and TensorBoard. Each holds every line of metrics.jsonl once per step, after any kill and resume."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from most_ray.io import storage

logger = logging.getLogger(__name__)
_BACKLOG = 20_000  # lines that wait for a tracker, at most
_CLOSING_S = 60.0  # for what a tracker has not brought to its place yet


class Tracker(Protocol):
    """Where else the numbers go, on rank 0. failure: why they do no longer, once that is so."""

    failure: str | None

    def begin(self, step: int, metrics: Path) -> None:
        """metrics.jsonl has been cut back to `step`; all its lines stand for what has happened."""

    def log(self, line: dict[str, Any]) -> None:
        """A line, of any kind, as it is written to metrics.jsonl."""

    def checkpoint(self, step: int, uri: str) -> None:
        """A checkpoint was committed."""

    def close(self) -> None:
        """There will be no more."""


class Secret:
    """A text that is shown nowhere: not when printed, not as JSON."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return "***"


def one_line(error: BaseException, key: Secret | None = None) -> str:
    """What an error says, in one line without secrets."""
    text = storage.redact(str(error)).strip() or type(error).__name__
    return (text.replace(key.reveal(), "***") if key else text).splitlines()[0][:300]


class Background:
    """A tracker on a thread of its own: one that is slow is not waited for, one that fails is dropped, both with a warning. What it
    misses then is in metrics.jsonl, and goes to it at the run's next start.

    Args:
        patience: seconds that `close` waits.
    """

    def __init__(self, name: str, tracker: Tracker, key: Secret | None = None, patience: float = _CLOSING_S) -> None:
        self._name, self._tracker, self._key, self._patience = name, tracker, key, patience
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._dropped = threading.Event()
        self.failure: str | None = None
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._closed = False

    def begin(self, step: int, metrics: Path) -> None:
        self._thread.start()
        self._put(lambda: self._tracker.begin(step, metrics))

    def log(self, line: dict[str, Any]) -> None:
        self._put(lambda: self._tracker.log(line))

    def checkpoint(self, step: int, uri: str) -> None:
        self._put(lambda: self._tracker.checkpoint(step, uri))

    def close(self) -> None:
        """Waits until everything is written, but not for ever."""
        if self._closed or not self._thread.is_alive():
            return
        self._closed = True
        self._calls.put(self._tracker.close)
        self._calls.put(None)
        self._thread.join(self._patience)
        if self._thread.is_alive():
            logger.warning("%s has not taken everything within %g s and is left behind.", self._name, self._patience)

    def _put(self, call: Callable[[], None]) -> None:
        if self._dropped.is_set():
            return
        if self._calls.qsize() > _BACKLOG:
            self._drop(f"more than {_BACKLOG} lines wait for it")
        self._calls.put(call)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            if self._dropped.is_set() and call != self._tracker.close:
                continue
            try:
                call()
            except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
                self._drop(one_line(error, self._key))

    def _drop(self, reason: str) -> None:
        if not self._dropped.is_set():
            self._dropped.set()
            self.failure = f"{self._name} is not written to any more: {reason}"
            logger.warning("%s is not written to any more, training goes on: %s", self._name, reason)
