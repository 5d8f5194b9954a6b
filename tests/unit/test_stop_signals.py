"""SIGHUP stops a run as SIGTERM does: it is what comes when a terminal or a connection ends."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from most_ray.distributed.stop_signals import STOPPING, hangup_blocked, stop_signals
from most_ray.errors import Interrupted
from most_ray.runs.interrupts import explained_interrupt, stopped_text
from most_ray.service.cluster.stop_requests import RunStoppedError, ShutdownSignal
from most_ray.train.run import _stop_on_interrupt, _stop_on_signal


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


def interrupt() -> bool:
    """Press Ctrl-C. Returns whether it was an end, rather than a request."""
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        return True
    return False


def test_the_first_interrupt_of_a_run_that_trains_is_a_stop_and_the_second_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    shutdown = ShutdownSignal()
    with shutdown.on_sigterm():
        assert interrupt()  # data is prepared: there is nothing to save
        with shutdown.grace_period(trains=False):
            assert interrupt() and not shutdown.is_set()  # workers are started
            shutdown.begin_training()
            assert not interrupt() and shutdown.is_set() and shutdown.name == "Ctrl-C"
            assert interrupt()
        assert interrupt()
    for thread in threading.enumerate():
        if thread.name == "say-in-handler":
            thread.join()
    assert capsys.readouterr().err == f"{STOPPING}\n"


def test_an_interrupt_that_was_ignored_stays_so() -> None:
    """As where a script starts the command in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ShutdownSignal().on_sigterm() as shutdown, shutdown.grace_period(), _stop_on_interrupt(shutdown):
            assert not interrupt() and not shutdown.is_set()
    finally:
        signal.signal(signal.SIGINT, before)


def test_without_ray_the_first_interrupt_is_a_stop_too() -> None:
    stop, before = threading.Event(), signal.getsignal(signal.SIGINT)
    with _stop_on_interrupt(stop):
        assert not interrupt() and stop.is_set() and interrupt()
    assert signal.getsignal(signal.SIGINT) is before and interrupt()


@pytest.mark.parametrize("steps", [(), (4, 12)])
def test_what_an_interrupt_leaves_is_said(steps: tuple[int, ...], tmp_path: Path) -> None:
    """Only what is true: the step of the newest complete checkpoint, where there is one."""
    for step in (*steps, 16):
        (folder := tmp_path / "checkpoints" / f"step-{step:09d}").mkdir(parents=True)
        if step != 16:  # which is not complete
            (folder / "commit.json").touch()
    with pytest.raises(Interrupted) as error, explained_interrupt(str(tmp_path)):
        raise KeyboardInterrupt
    assert str(error.value) == "the same command " + ("resumes after step 12" if steps else "begins the run: it has no checkpoint yet")
    assert stopped_text(str(tmp_path)) == ("the checkpoint of step 12 was written" if steps else "a checkpoint was written")


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
