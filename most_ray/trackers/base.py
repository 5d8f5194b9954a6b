"""What a tracker is, and how one is kept from holding up or ending a run."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from most_ray.errors import printable
from most_ray.io import storage
from most_ray.io.run_folder import RunFolder
from most_ray.metrics.figures import SAMPLE

logger = logging.getLogger(__name__)
Line = Mapping[str, Any]  # of metrics.jsonl
SAMPLE_COLUMNS = tuple(SAMPLE.keys)  # of an evaluation's samples in a table
_BACKLOG = 20_000  # the most lines that wait for a tracker
_BEGINNING_S = 600.0  # the most seconds that the end of a run waits until a tracker has the lines of earlier starts
_CLOSING_S = 60.0  # seconds for a tracker to write what it was given


def sample_cells(sample: Mapping[str, Any]) -> list[str]:
    """The texts of a sample in the order of `SAMPLE_COLUMNS`, each in one line, as trackers can take and show them."""
    return [printable(str(sample.get(name, "")).replace("\n", " ")) for name in SAMPLE_COLUMNS]


class Tracker(Protocol):
    """Gets the lines of metrics.jsonl, on rank 0. A new tracker is a class like this in a module of this package, listed in `select`."""

    failure: str | None  # why the tracker has stopped; None while it works

    def begin(self, step: int, lines: Iterable[Line]) -> None:
        """Start, once per start of the run, which resumes from `step` (0: it does not).

        `lines` are those of metrics.jsonl at this moment, cut back to `step`. Earlier starts may have logged these lines or not: in the end
        each must be in the tracker once, whenever a start was killed.
        """

    def log(self, line: Line) -> None:
        """Log a new line, of any kind, as it is written to metrics.jsonl."""

    def checkpoint(self, step: int, uri: str) -> None:
        """Log that a checkpoint was committed."""

    def close(self) -> None:
        """Write everything. No other call follows."""


class Secret:
    """A text that is not shown when it is printed, logged or dumped as JSON."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return "***"


def one_line(error: BaseException, key: Secret | None = None) -> str:
    """The first line of an error's text, without secrets."""
    text = storage.redact(str(error)).strip() or type(error).__name__
    return printable((text.replace(key.reveal(), "***") if key else text).splitlines()[0])[:300]


class Background:
    """Runs a tracker on a thread of its own. A slow tracker is not waited for, and one that raises is dropped; either is logged as a
    warning. The lines that it misses are in metrics.jsonl, and it gets them at the run's next start. `patience`: seconds that `close` waits
    once `begin` is through."""

    def __init__(self, name: str, tracker: Tracker, key: Secret | None = None, patience: float = _CLOSING_S) -> None:
        self._name, self._tracker, self._key, self._patience = name, tracker, key, patience
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._begun, self._dropped = threading.Event(), threading.Event()
        self.failure: str | None = None
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._closed = False

    def begin(self, step: int, lines: Iterable[Line]) -> None:
        self._thread.start()
        self._put(lambda: self._tracker.begin(step, lines))
        self._calls.put(self._begun.set)  # also after a failure

    def log(self, line: Line) -> None:
        self._put(lambda: self._tracker.log(line))

    def checkpoint(self, step: int, uri: str) -> None:
        self._put(lambda: self._tracker.checkpoint(step, uri))

    def close(self) -> None:
        """Wait until everything is written, for a limited time."""
        if self._closed or not self._thread.is_alive():
            return
        self._closed = True
        self._calls.put(self._tracker.close)
        self._calls.put(None)
        self._begun.wait(_BEGINNING_S)
        self._thread.join(self._patience)
        if self._thread.is_alive():
            logger.warning("%s has not written everything within %g s; the run does not wait for it any longer", self._name, self._patience)

    def _put(self, call: Callable[[], None]) -> None:
        if self._dropped.is_set():
            return
        if self._calls.qsize() > _BACKLOG:
            self._drop(f"more than {_BACKLOG} lines wait for it")
        self._calls.put(call)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                if not self._dropped.is_set() or call in (self._begun.set, self._tracker.close):
                    call()
            except Exception as error:  # noqa: BLE001 - whatever it is, training continues
                self._drop(one_line(error, self._key))

    def _drop(self, reason: str) -> None:
        if not self._dropped.is_set():
            self._dropped.set()
            self.failure = f"{self._name} is not written to any more: {reason}"
            logger.warning("%s is not written to any more, training continues: %s", self._name, reason)


def push_files(folder: RunFolder, name: str) -> None:
    """Copy the files of a subfolder that are new or have grown to the run's URI. Does nothing if the run is on a path."""
    if not folder.remote:
        return
    here = folder.local / name
    sizes = {path.relative_to(here).as_posix(): path.stat().st_size for path in here.rglob("*") if path.is_file() and not path.is_symlink()}
    there = {entry.name: entry.size for entry in storage.list_files(folder.at(name), ("",))} if storage.exists(folder.at(name)) else {}
    folder.push(*(f"{name}/{part}" for part, size in sizes.items() if there.get(part, -1) < size))
