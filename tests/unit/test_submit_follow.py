"""A job's log is followed to its end over connections that break, fall silent or never come; nothing waits for ever."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
import requests
from ray.job_submission import JobDetails

from most_ray.errors import ConfigError
from most_ray.service.cluster import submit as service
from tests.unit.test_submit import job

DIGITS = str(Path(__file__).resolve().parents[2] / "jobs" / "configs" / "digits.yaml")


@dataclass
class Server:
    """Stands in for a client of the job server. statuses, tails: what is answered by turns, the last for ever; an exception is raised, and
    within a tail a None never comes."""

    statuses: list[str | Exception]
    tails: list[list[str | Exception | None]]
    logs: str | Exception = ""

    def get_address(self) -> str:
        return "http://x"

    def get_job_info(self, submission: str) -> JobDetails:
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        if isinstance(status, Exception):
            raise status
        return JobDetails(**job(submission, status), driver_exit_code=0)

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        for each in self.tails.pop(0) if len(self.tails) > 1 else self.tails[0]:
            if each is None:
                await asyncio.Event().wait()
            elif isinstance(each, Exception):
                raise each
            else:
                yield each

    def get_job_logs(self, _: str) -> str:
        if isinstance(self.logs, Exception):
            raise self.logs
        return self.logs


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"_POLL_S": 0.001, "_QUIET_S": 0.005, "_SILENCE_S": 0.02}.items():
        monkeypatch.setattr(service, name, seconds)


def followed(server: Server) -> tuple[int, str]:
    said: list[str] = []
    code = service.follow(server, "a", lambda _: "", said.append)  # type: ignore[arg-type]
    return code, "".join(said)


NO_ANSWERS = [
    aiohttp.ClientConnectionError("gone"),
    RuntimeError("Request failed with status code 503: x."),
    requests.exceptions.ConnectionError("gone"),
    OSError("no route"),
]


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("error", NO_ANSWERS, ids=lambda error: type(error).__name__)
def test_a_log_over_connections_that_break_is_whole(error: Exception) -> None:
    server = Server(
        ["RUNNING"] * 3 + ["SUCCEEDED"],
        [["one\n", "two\n", error], ["one\ntwo\nth", error], ["one\n", "two\nthree\n"]],
        "one\ntwo\nthree\nend\n",
    )
    again = "The job's log cannot be read; trying again.\n"
    assert followed(server) == (0, f"one\ntwo\n{again}th{again}ree\nend\n")


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("error", NO_ANSWERS, ids=lambda error: type(error).__name__)
def test_a_log_that_never_comes_ends_with_the_job(error: Exception) -> None:
    """The node of the log may be gone for good."""
    server = Server(["RUNNING"] * 5 + ["STOPPED"], [[error]], RuntimeError("Request failed with status code 500: no agent."))
    assert followed(server) == (75, "The job's log cannot be read; trying again.\nThe end of the job's log cannot be read.\n")


@pytest.mark.usefixtures("at_once")
def test_a_connection_that_fell_silent_ends_with_the_job() -> None:
    server = Server(["RUNNING"] * 3 + ["SUCCEEDED"], [["one\n", None]], "one\ntwo\n")
    assert followed(server) == (0, "one\ntwo\n")


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("error", NO_ANSWERS, ids=lambda error: type(error).__name__)
def test_a_dashboard_that_answers_again_is_followed_on(error: Exception) -> None:
    server = Server(["PENDING", error, error, "RUNNING", error, "SUCCEEDED"], [["one\n"]], "one\n")
    again = "The dashboard does not answer; trying again.\n"
    assert followed(server) == (0, f"{again}one\n{again}")


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("before", [[], ["RUNNING"]])
@pytest.mark.parametrize("error", NO_ANSWERS, ids=lambda error: type(error).__name__)
def test_a_dashboard_that_is_silent_for_good_is_given_up(error: Exception, before: list[str | Exception]) -> None:
    with pytest.raises(
        ConfigError, match=r"address = 'http://x': has not answered for .* The job may still run: the same command follows it"
    ):
        followed(Server([*before, error], [[error]]))


@pytest.mark.usefixtures("at_once")
def test_a_job_that_a_new_cluster_does_not_know_is_said() -> None:
    with pytest.raises(ConfigError, match="does not know the job any more"):
        followed(Server(["RUNNING", RuntimeError("Request failed with status code 404: Job a does not exist.")], [["one\n"]]))


@pytest.mark.usefixtures("at_once")
def test_a_reader_that_has_gone_ends_the_following() -> None:
    def out(_: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        service.follow(Server(["RUNNING"], [["one\n", None]]), "a", lambda _: "", out)  # type: ignore[arg-type]


@pytest.mark.usefixtures("at_once")
def test_an_interrupt_while_the_log_is_silent_is_heard_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Server):
        async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
            yield "one\n"
            signal.raise_signal(signal.SIGINT)
            await asyncio.Event().wait()

    monkeypatch.setattr(service, "_POLL_S", 60.0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs the tests in the background has it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            followed(Interrupted(["RUNNING"], []))
    finally:
        signal.signal(signal.SIGINT, before)
