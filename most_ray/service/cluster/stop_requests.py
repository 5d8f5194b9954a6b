"""How a driver asks its workers to stop after a checkpoint, and when: on a signal, before a node is taken away, to use more workers.

A request is a key in Ray's key-value store, named after the driver. Rank 0 looks it up once a second, and the ranks agree on the step to
stop after in the all-reduce that every step makes in any case.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import ray

from most_ray.console.streams import drop_lost_streams
from most_ray.console.terminal import say, say_in_handler
from most_ray.distributed.stop_signals import STOPPING, interrupt_signals, stop_signals
from most_ray.errors import EXIT_STOPPED, UserError
from most_ray.service.cluster.ray_internals import draining_nodes, kv_delete, kv_get, kv_put, local_ray_has_ended

logger = logging.getLogger(__name__)
POLL_S = 1.0  # seconds between two looks at the key-value store
TERMINATED, PREEMPTED, RESIZED = "terminated", "preempted", "resized"  # reasons of a request


def _key(driver: str, name: str) -> bytes:
    return f"most_ray/{name}/{driver}".encode()


def register_worker_node(driver: str, rank: int) -> None:
    """Record the node that a worker runs on; called in the worker."""
    kv_put(_key(driver, f"node/{rank}"), ray.get_runtime_context().get_node_id().encode())


def clear_run_keys(driver: str, n_workers: int) -> None:
    """Remove the keys of an attempt from the store."""
    for name in ("stop", *(f"node/{rank}" for rank in range(n_workers))):
        kv_delete(_key(driver, name))


class StopListener:
    """Looks for the driver's request to stop, on a thread of its own in rank 0's worker. Calling it returns whether there is one."""

    def __init__(self, driver: str) -> None:
        self._driver, self._requested, self._ended = driver, threading.Event(), threading.Event()
        threading.Thread(target=self._poll, name="stop-listener", daemon=True).start()

    def _poll(self) -> None:
        while not self._ended.wait(POLL_S) and not self._requested.is_set():
            try:
                if kv_get(_key(self._driver, "stop")):
                    self._requested.set()
            except Exception as error:  # noqa: BLE001 - a store that is gone for good ends the worker in any case
                logger.warning("requests to stop could not be looked up, which is tried again in %g s: %s", POLL_S, error)

    def __call__(self) -> bool:
        return self._requested.is_set()

    def close(self) -> None:
        self._ended.set()


class RunStoppedError(UserError):
    """The run was asked to stop and has stopped; nothing is lost."""

    kind, exit_code = "stopped", EXIT_STOPPED


def run_stopped(rule: str, name: str) -> RunStoppedError:
    """The error that ends a run after the signal `name`; `rule` continues the sentence that begins with the name."""
    return RunStoppedError(name, None, rule, "Run the same command again to resume.")


class ShutdownSignal(threading.Event):
    """Set once the process has received SIGTERM, SIGHUP or Ctrl-C (SIGINT).

    Within `grace_period` the first signal only sets the event, so that workers have the time to write a checkpoint. Outside of it, and
    from the second signal on, the handler ends the process: it raises RunStoppedError, on Ctrl-C KeyboardInterrupt.
    """

    name = "SIGTERM"  # of the signal that was received, or Ctrl-C
    _graceful = _trains = False

    def install(self) -> None:
        """Handle the signals. To be called again after `ray.init`, which installs its own handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in (*stop_signals(), *interrupt_signals()):
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        del frame
        repeated, interrupt = self.is_set(), number == signal.SIGINT
        if interrupt and (repeated or not (self._graceful and self._trains)):
            raise KeyboardInterrupt
        self.name = "Ctrl-C" if interrupt else signal.Signals(number).name
        self.set()
        if number == signal.SIGHUP:
            drop_lost_streams()
        if repeated or not self._graceful:
            raise run_stopped("was received.", self.name)
        if interrupt:
            say_in_handler(STOPPING)

    @contextlib.contextmanager
    def grace_period(self, trains: bool = True) -> Iterator[None]:
        """The time in which workers run, and a first signal lets them finish with a checkpoint. A first Ctrl-C does so from when they
        train, for whoever sits in front of a run that only starts has nothing to wait for: see `begin_training`.

        Args:
            trains: whether they train already.
        """
        self._graceful, self._trains = True, trains
        try:
            yield
        finally:
            self._graceful = False

    def begin_training(self) -> None:
        """Workers have begun to train: from now on Ctrl-C waits for their checkpoint, once."""
        self._trains = True

    @contextlib.contextmanager
    def on_sigterm(self) -> Iterator[ShutdownSignal]:
        """Handle the signals within the block, and restore their handlers at its end."""
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
        self.install()
        try:
            yield self
        finally:
            if threading.current_thread() is threading.main_thread():
                for number, handler in before.items():
                    signal.signal(number, handler)


class LocalRayWatcher:
    """Within a block, ends this process once the Ray that it has started has ended, as where a signal went to the whole process group:
    calls into Ray would wait a minute for it, and then end the process without a word.

    Args:
        reason: the error to report then.
    """

    def __init__(self, reason: Callable[[], UserError]) -> None:
        self._reason, self._ended = reason, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ray-watcher", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(1.0):
            if local_ray_has_ended() and not self._ended.wait(1.0):  # the signal may be this process's, too, and not be handled yet
                error = self._reason()
                with contextlib.suppress(OSError):
                    say(f"most-ray: {error.kind}: {error}", sys.stderr)
                    sys.stdout.flush()
                os._exit(error.exit_code)


class AttemptWatcher:
    """While an attempt runs, informs `shutdown` when its workers have begun, and asks it to stop when the job is to end, a node of it is
    draining, or more workers would fit, which `can_grow` says, called from the watching thread every `every_s` seconds. `driver`: the
    attempt's name in the key-value store."""

    def __init__(self, driver: str, n_workers: int, shutdown: ShutdownSignal, can_grow: Callable[[], bool], every_s: float = 2.0) -> None:
        self.reason: str | None = None  # of the request that was made: TERMINATED, PREEMPTED or RESIZED
        self._driver, self._n_workers, self._shutdown, self._can_grow, self._every = driver, n_workers, shutdown, can_grow, every_s
        self._ended, self._next_look, self._room_seen, self._began = threading.Event(), 0.0, 0, False
        self._thread = threading.Thread(target=self._watch, name="attempt-watcher", daemon=True)

    def __enter__(self) -> AttemptWatcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(timeout=10)

    def _watch(self) -> None:
        warned = False
        while not self._ended.wait(0.2) and self.reason != TERMINATED:
            try:
                if not self._began and kv_get(_key(self._driver, "node/0")):
                    self._began = True
                    self._shutdown.begin_training()
                if found := TERMINATED if self._shutdown.is_set() else self._look():
                    kv_put(_key(self._driver, "stop"), found.encode())
                    self.reason = found
            except Exception as error:  # noqa: BLE001 - Ray may be handling a failure of the attempt, or be gone
                if not warned:  # one line is enough: it is tried again, several times a second, until the attempt ends
                    logger.warning("Ray did not answer: requests to stop or to resize wait until it does (%s)", error)
                warned = True

    def _look(self) -> str | None:
        """Every `every_s` seconds, until a request has been made: the reason for which the attempt should stop."""
        if self.reason or time.monotonic() < self._next_look:
            return None
        self._next_look = time.monotonic() + self._every
        found = (kv_get(_key(self._driver, f"node/{rank}")) for rank in range(self._n_workers))
        nodes = [node.decode() for node in found if node]  # of the workers that have started
        if set(nodes) & set(draining_nodes()):
            return PREEMPTED
        # Until all workers have started, their own resources look free; and others may be waiting for what was just freed.
        self._room_seen = self._room_seen + 1 if len(nodes) == self._n_workers and self._can_grow() else 0
        return RESIZED if self._room_seen > 2 else None
