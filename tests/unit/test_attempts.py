"""Promise 36's other half: which failures a run goes on after, and which rank's error is shown (promise 8 of docs/promises.md)."""

from __future__ import annotations

import contextlib
import signal
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import ControllerError
from rich.console import Console

from most_ray.config import config_from
from most_ray.errors import ConfigError
from most_ray.service.cluster import capacity
from most_ray.service.cluster.stop_requests import RESIZED, TERMINATED, RunStoppedError, ShutdownSignal
from most_ray.service.training import attempts
from most_ray.service.training.attempts import FailureWindow, RunIncompleteError, _cause, run_attempts


def test_three_within_the_window_and_no_more() -> None:
    window = FailureWindow(3, 100.0)
    assert [window.allows(t) for t in (0.0, 10.0, 20.0, 99.0)] == [True, True, True, False]
    window = FailureWindow(3, 100.0)
    assert all(window.allows(t) for t in (0.0, 10.0, 20.0, 100.0, 110.0, 120.0, 200.0))


@given(st.integers(0, 5), st.lists(st.floats(0, 50), max_size=40))
def test_the_window_counts_what_lies_in_it(most: int, gaps: list[float]) -> None:
    window, now, times = FailureWindow(most, 60.0), 0.0, []
    for gap in gaps:
        now += gap
        times.append(now)
        assert window.allows(now) == (sum(t > now - 60.0 for t in times) <= most)


def test_without_a_window_every_failure_counts() -> None:
    window = FailureWindow(2, 0.0)
    assert [window.allows(t) for t in (0.0, 1e6, 1e9)] == [True, True, False]


class FailedError(Exception):
    def __init__(self, failures: dict[int, BaseException]) -> None:
        super().__init__("training failed")
        self.worker_failures = failures


def test_the_rank_that_failed_first_is_shown_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    failures = {0: RuntimeError("[gloo] Connection closed by peer"), 1: ValueError("Traceback ...\nZeroDivisionError: division by zero")}
    assert _cause(FailedError(failures)) == "rank 1: ZeroDivisionError: division by zero"
    assert "rank 1 failed: Traceback" in caplog.text


def test_what_a_user_can_mend_comes_through() -> None:
    inner = ConfigError("a", 1, "is wrong.")
    outer = RuntimeError("wrapped")
    outer.__cause__ = inner
    assert _cause(FailedError({0: RuntimeError("x"), 1: outer})) is inner


def test_exit_codes_tell_the_ends_apart() -> None:
    assert (ConfigError.exit_code, RunIncompleteError.exit_code, RunStoppedError.exit_code) == (2, 1, 75)


def test_sigterm_leaves_time_only_while_workers_train() -> None:
    """Exit code 75 at any moment; once more, or outside of training, it ends at once."""
    for graceful, expected in ((True, [False, True]), (False, [True, True])):
        shutdown = ShutdownSignal()
        with shutdown.on_sigterm(), shutdown.grace_period() if graceful else contextlib.nullcontext():
            raised = []
            for _ in expected:
                try:
                    signal.raise_signal(signal.SIGTERM)
                    raised.append(False)
                except RunStoppedError:
                    raised.append(True)
            assert raised == expected and shutdown.is_set()


PREPARED = SimpleNamespace(job=SimpleNamespace(config=config_from({})), use_gpu=False, topologies=[SimpleNamespace(world_size=1)])


def ended(monkeypatch: pytest.MonkeyPatch, reasons: list[str], complete: list[bool], terminated: ShutdownSignal) -> int:
    """`run_attempts` over attempts that end without an error, for these reasons; how many were made."""
    made: list[str] = []

    def attempt(*_: object) -> tuple[SimpleNamespace, None]:
        made.append(reasons[len(made)])
        return SimpleNamespace(reason=made[-1]), None

    monkeypatch.setattr(attempts, "_attempt", attempt)
    monkeypatch.setattr(attempts, "_wait_for_resources", lambda *_: PREPARED.topologies[0])
    monkeypatch.setattr(attempts, "is_complete", lambda _: complete[len(made) - 1])
    attempts.run_attempts(PREPARED, None, Console(quiet=True), terminated)  # type: ignore[arg-type]
    return len(made)


def test_a_stop_during_the_last_evaluation_is_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps are made, their evaluation is not: exit code 75, and another attempt where only the size was to change."""
    terminated = ShutdownSignal()
    assert ended(monkeypatch, [RESIZED, RESIZED], [False, True], terminated) == 2
    terminated.set()
    with pytest.raises(RunStoppedError) as stop:
        ended(monkeypatch, [TERMINATED], [False], terminated)
    assert stop.value.exit_code == 75
    assert ended(monkeypatch, [TERMINATED], [True], terminated) == 1


def test_a_worker_that_was_killed_for_memory_is_told_so() -> None:
    """In a line, for a run and for a sweep's ledger; of another end, what Ray says of it."""
    gone = "The actor died unexpectedly before finishing this task.\n\tclass_name: RayTrainWorker\n"
    full = gone + "Worker exit type: NODE_OUT_OF_MEMORY Worker exit detail: Task was killed due to the node running low on memory."
    for text, told in ((full, "its process was killed because the node ran out of memory"), (gone, gone.splitlines()[0])):
        failure = WorkerHealthCheckFailedError("A worker health check failed.", RuntimeError(text))
        assert _cause(FailedError({0: failure})) == f"rank 0: {told}"


def test_a_worker_whose_host_is_gone_is_told_with_the_address() -> None:
    died = "The actor died unexpectedly before finishing this task.\n\tclass_name: RayTrainWorker\n\tip: 10.0.0.7\n"
    failure = WorkerHealthCheckFailedError("...", RuntimeError(died + "The actor died because its node has died. Node Id: c53e"))
    assert _cause(FailedError({1: failure})) == "rank 1: its node 10.0.0.7 is gone"


def test_a_group_that_could_not_be_made_is_told_in_its_own_words() -> None:
    """Not by Ray Train's first line, which only says that there was an error; and brackets are no markup."""
    task = RuntimeError("ray::execute._setup_torch_process_group() (pid=400, ip=10.0.0.7)\n  ^^^^\nRuntimeError: ...")
    task.cause = RuntimeError("[/third_party/gloo/tcp/pair.cc:152] Connection refused")  # type: ignore[attr-defined]
    assert _cause(ControllerError(task)) == "[/third_party/gloo/tcp/pair.cc:152] Connection refused"


def test_what_is_said_of_a_loss_may_hold_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo's errors begin with a path in brackets, which a console would take for a mark that is closed."""
    lost = ControllerError(RuntimeError("[/third_party/gloo/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3456"))
    endings = [(SimpleNamespace(reason=None), lost), (SimpleNamespace(reason=None), None)]
    monkeypatch.setattr(attempts, "_wait_for_resources", lambda *_: PREPARED.topologies[0])
    monkeypatch.setattr(attempts, "_attempt", lambda *args: endings.pop(0))
    console = Console(record=True, width=300)
    run_attempts(PREPARED, None, console, ShutdownSignal())  # type: ignore[arg-type]
    assert "([/third_party/gloo/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3456); starting again" in console.export_text()


def test_room_is_wished_for_as_long_as_a_run_needs_it_and_only_where_a_cluster_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """An autoscaler hears of a run that waits for room (promise 33 of docs/promises.md), again before it forgets, and that it is over."""
    said: list[object] = []

    class Coordinator:
        def __init__(self, requester: str) -> None:
            self.requester = requester

        def request_resources(self, resources: list[dict[str, float]], expire_after_s: float) -> None:
            said.append((self.requester, resources, expire_after_s))

        def cancel_request(self) -> None:
            said.append(self.requester)

    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(default_autoscaling_coordinator, "DefaultAutoscalingCoordinator", Coordinator)
    monkeypatch.setattr(capacity.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(capacity, "has_autoscaler", lambda: False)
    for grows, expected in ((False, 0), (True, 3)):
        monkeypatch.setattr(capacity, "has_autoscaler", lambda grows=grows: grows)
        request = capacity.AutoscalerRequest(capacity.WorkerShare(2, 1), 3, 1.0)
        for _ in range(70):
            clock.now += 1
            request.renew()
        assert len(said) == expected
        request.cancel()
    assert said[0] == (said[-1], [{"CPU": 2, "GPU": 1}] * 3 + [{"CPU": 1.0}], 180.0)
    assert len({entry[0] for entry in said[:-1]}) == 1  # type: ignore[index]
