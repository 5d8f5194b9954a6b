"""SIGHUP stops a run as SIGTERM does: it is what comes when a terminal or a connection ends."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from most_ray.distributed.stop_signals import hangup_blocked, stop_signals
from most_ray.service.cluster.stop_requests import RunStoppedError, ShutdownSignal
from most_ray.train.run import _stop_on_signal


@pytest.fixture(autouse=True)
def hangup() -> Iterator[None]:
    """The default for SIGHUP, whoever runs the tests; put back, as is SIGTERM."""
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_hangup_is_a_stop_and_is_named() -> None:
    shutdown = ShutdownSignal()
    with shutdown.on_sigterm():
        with shutdown.grace_period():
            signal.raise_signal(signal.SIGHUP)
            assert shutdown.is_set() and shutdown.name == "SIGHUP"
        with pytest.raises(RunStoppedError, match="SIGHUP: was received"):
            signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_under_nohup_it_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert stop_signals() == [signal.SIGTERM]
    with ShutdownSignal().on_sigterm() as shutdown:
        shutdown.install()  # again, after ray.init
        signal.raise_signal(signal.SIGHUP)
        assert not shutdown.is_set()
    stop = threading.Event()
    _stop_on_signal(stop)
    signal.raise_signal(signal.SIGHUP)
    assert not stop.is_set() and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_without_ray_too(number: signal.Signals) -> None:
    stop = threading.Event()
    _stop_on_signal(stop)
    signal.raise_signal(number)
    assert stop.is_set()


def test_processes_that_are_started_meanwhile_outlive_it_and_this_one_gets_it_after() -> None:
    """A terminal sends it to all processes of a command: Ray's must live until the checkpoint is written."""
    received: list[int] = []
    signal.signal(signal.SIGHUP, lambda number, _: received.append(number))
    with hangup_blocked():
        child = subprocess.Popen([sys.executable, "-ESc", "input()"], stdin=subprocess.PIPE)
        child.send_signal(signal.SIGHUP)
        signal.pthread_kill(threading.get_ident(), signal.SIGHUP)  # other threads of the tests do not block it
        assert received == []
    assert received == [signal.SIGHUP]
    child.communicate(b"\n", timeout=30)
    assert child.returncode == 0


_DRIVER = """
import os, signal, sys
from most_ray.service.cluster.stop_requests import ShutdownSignal
shutdown = ShutdownSignal()
with shutdown.on_sigterm(), shutdown.grace_period():
    os.write(int(sys.argv[1]), b"r")
    shutdown.wait()
    print("a line of progress", flush=True)
    sys.stderr.write("the last line\\n")
os.write(int(sys.argv[1]), b"d")
os._exit(75)
"""


def test_a_terminal_that_is_gone_does_not_end_the_run_in_an_error() -> None:
    """What is written to it raises; the checkpoint, and the exit code, come first."""
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", _DRIVER, str(writing)])
    os.close(writing)
    assert os.read(reading, 1) == b"r"
    os.close(terminal)
    assert os.read(reading, 1) == b"d"
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
