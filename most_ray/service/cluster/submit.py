"""Submits a command as a job to a Ray cluster, follows its log and stops it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import os
import re
import shlex
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import aiohttp
import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from most_ray.console.terminal import write_log
from most_ray.errors import EXIT_STOPPED, ConfigError, UserError, one_line
from most_ray.io import storage
from most_ray.io.waits import waiting_for
from most_ray.service.cluster.address import NO_TOKEN, TOKEN_REMEDY, WRONG_TOKEN, check_address, use_token, version_mismatch
from most_ray.service.cluster.job_package import Package
from most_ray.service.cluster.jobs import Job, find_job, jobs_of
from most_ray.service.cluster.stop_requests import RunStoppedError

T = TypeVar("T")
Write = Callable[[str], Any]  # writes text to the screen
LOCAL_DASHBOARD = "http://127.0.0.1:8265"
_POLL_S = 0.5  # seconds between two questions
_EXPLAIN_S = 5.0  # seconds between two lines about a pending job
_QUIET_S = 10.0  # seconds without a line of the log, after which the job's status is looked up
_SILENCE_S = 300.0  # seconds without an answer, after which the dashboard is given up
_CONNECT_S, _FIRST_S, _REQUEST_S = 10.0, 60.0, 120.0  # seconds for a connection; for the first answer, and for each later one
_STOP_S = 600.0  # seconds that a job has to stop
ENVIRONMENT = {  # of every job
    "RAY_JOB_STOP_WAIT_TIME_S": f"{_STOP_S:.0f}",  # by default a job that is stopped has 3 s, too few for a checkpoint
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # the dashboard's page of training runs
    "PYTHONUNBUFFERED": "1",
}
_RUNTIME, _JOBS = "ray._private.runtime_env", "ray.dashboard.modules"
for _name in (f"{_RUNTIME}.packaging", f"{_RUNTIME}.working_dir", f"{_JOBS}.dashboard_sdk", f"{_JOBS}.job.sdk"):
    logging.getLogger(_name).setLevel(logging.ERROR)  # they log each file that is excluded, and each request
_NO_ANSWER = (aiohttp.ClientError, RuntimeError, OSError)  # Ray raises RuntimeError for any status but 200; requests' errors are OSErrors
_TOO_LARGE = r"status code 413|Entity ?Too ?Large|exceeds the maximum size"  # of a proxy, the dashboard (within a 500) and the GCS
_RESUMES = r"(most_ray\.cli|most-ray) (train|sweep)\b(?!.* --dry_run)|jobs/(train|tune)\.py\b"  # entrypoints that resume


class JobFailedError(UserError):
    """A job did not succeed; the reason is in its own log."""

    kind, exit_code = "job", 1


def job_name(name: str, uri: str) -> str:
    """The submission id of a run's first job: the run's name and a hash of its folder, so that it is equal for the same run."""
    mark = hashlib.blake2b(uri.encode(), digest_size=3).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)[:60]}-{mark}"


def next_job(base: str, jobs: Iterable[tuple[str, bool]]) -> tuple[str, bool]:
    """The submission id of a run's next job, and whether this job is running or pending already. Pure. `base`: the submission id of the
    run's first job; the k-th one is BASE-k. `jobs`: submission ids of the cluster's jobs, each with whether it has ended."""
    matches = ((re.fullmatch(rf"{re.escape(base)}(?:-(\d+))?", name), ended) for name, ended in jobs)
    known = {int(match[1] or 1): ended for match, ended in matches if match}
    running = [number for number, ended in known.items() if not ended]
    number = max(running) if running else max(known, default=0) + 1
    return base if number == 1 else f"{base}-{number}", bool(running)


class _Client(JobSubmissionClient):
    """Ray's client with a timeout: by itself it waits without end for a machine that is gone. While it waits, it says so by `write`."""

    def __init__(self, address: str, write: Write) -> None:
        self._write, self._limit = write, _FIRST_S
        super().__init__(address)
        self._limit = _REQUEST_S

    def _do_request(self, method: str, endpoint: str, **keywords: Any) -> requests.Response:
        with _saying(self._write, f"the dashboard at {self._address}", self._limit):
            return super()._do_request(method, endpoint, **{"timeout": (_CONNECT_S, self._limit), **keywords})


def _saying(write: Write, what: str, limit_s: float | None = None) -> contextlib.AbstractContextManager[None]:
    """`waiting_for`, by `write`."""
    return waiting_for(what, limit_s, lambda line: write(f"{line}\n"))


def open_client(address: str | None, environ: Mapping[str, str] = os.environ, write: Write = write_log) -> JobSubmissionClient:
    """Connect to a cluster's job server: at `address`, else RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or this machine's dashboard. While it is
    waited for, `write` gets a line every few seconds. Raises ConfigError where it does not answer, requires another token, or runs another
    version of Ray."""
    given = address or environ.get("RAY_API_SERVER_ADDRESS") or environ.get("RAY_ADDRESS")
    named = given or LOCAL_DASHBOARD
    if not re.match(r"https?://", named):
        with _saying(write, f"Ray at {named}"):
            check_address(named)
    os.environ["RAY_API_SERVER_ADDRESS"] = named  # which Ray prefers to its client's argument
    use_token()
    try:
        with _saying(write, f"the dashboard at {named}", _FIRST_S):
            client = _Client(named, write)
    except AuthenticationError as error:
        raise _token_error(named, error) from error
    except (ConnectionError, RuntimeError, ValueError, requests.exceptions.RequestException, KeyError, TypeError) as error:
        hint = "Check it." if given else "Start a cluster (cluster/local/up.sh does on this machine), or name its dashboard by --address."
        raise ConfigError("address", storage.redact(named), "does not answer as a Ray dashboard.", hint) from error
    if (theirs := client._server_ray_version) and theirs != ray.__version__:
        raise ConfigError("address", storage.redact(named), *version_mismatch(theirs))
    return client


def _token_error(address: str, error: AuthenticationError) -> ConfigError:
    rule = WRONG_TOKEN if re.search("invalid|403", str(error), re.IGNORECASE) else NO_TOKEN
    return ConfigError("address", storage.redact(address), rule, TOKEN_REMEDY)


def _retrying(client: JobSubmissionClient, write: Write, method: Callable[..., T], *arguments: Any) -> T:
    """Call a method of a client whose dashboard may be restarting, again until it has not answered for `_SILENCE_S` seconds. Raises
    ConfigError where the dashboard does not answer, does not know the job, or requires another token."""
    with _saying(write, f"the dashboard at {client.get_address()}", _SILENCE_S):
        return _try_on(client, write, method, *arguments)


def _try_on(client: JobSubmissionClient, write: Write, method: Callable[..., T], *arguments: Any) -> T:
    """`_retrying`, which says what it waits for."""
    since: float | None = None
    while True:
        try:
            return method(*arguments)
        except AuthenticationError as error:
            raise _token_error(client.get_address(), error) from error
        except _NO_ANSWER as error:
            now = time.monotonic()
            if since is None:
                since = now
                write("The dashboard does not answer; trying again.\n")
            if now - since >= _SILENCE_S:
                rule, remedy = f"has not answered for {_SILENCE_S:.0f} s.", "The job may still run: the same command follows it again."
                if re.search("status code 404.*does not exist", str(error)):
                    rule, remedy = "does not know the job any more.", "Was the cluster restarted? Submit it again."
                raise ConfigError("address", storage.redact(client.get_address()), rule, remedy) from error
        time.sleep(_POLL_S)


def describe_cluster(client: JobSubmissionClient) -> dict[str, float]:
    """The number of live nodes and their resources in total, by Ray's names; empty where the dashboard does not report them."""
    try:
        nodes = client._do_request("GET", "/api/v0/nodes?detail=1").json()["data"]["result"]["result"]
    except (*_NO_ANSWER, AuthenticationError, ValueError, KeyError, TypeError):  # only shown on the screen, which then says so
        return {}
    alive = [node for node in nodes if node.get("state") == "ALIVE"]
    total: dict[str, float] = {"node" if len(alive) == 1 else "nodes": len(alive)}
    for node in alive:
        for name in ("CPU", "GPU"):
            total[name] = total.get(name, 0.0) + float((node.get("resources_total") or {}).get(name, 0.0))
    return total


def submit(client: JobSubmissionClient, base: str, command: Sequence[str], package: Package, write: Write) -> tuple[str, bool]:
    """Submit a run's job, unless it is running or pending already. Two calls at once make one job. `base`: the submission id of the run's
    first job, `command`: the job's entrypoint. Returns the job's submission id, and whether it is new. Raises ConfigError where the folder
    is too large or the cluster refuses the job."""
    submission, running = next_job(base, _ids(client, write))
    if running:
        return submission, False
    package.check_size()
    environment = {"working_dir": str(package.folder), "excludes": package.excludes, "env_vars": dict(ENVIRONMENT)}
    try:
        with _saying(write, f"the dashboard at {client.get_address()} to take {package.amount}"):
            client.submit_job(entrypoint=shlex.join(command), submission_id=submission, runtime_env=environment, metadata={"run": base})
    except AuthenticationError as error:
        raise _token_error(client.get_address(), error) from error
    except (*_NO_ANSWER, ValueError) as error:
        if re.search(_TOO_LARGE, str(error)):
            raise package.too_large("more than the cluster takes") from error
        if submission in dict(_ids(client, write)):  # another call was faster, or the answer was lost
            return submission, False
        sent = f"{package.amount} were to be sent: `most-ray submit --what` shows the largest."
        raise ConfigError("job", submission, f"was refused ({one_line(error)}).", sent) from error
    return submission, True


def running_job(client: JobSubmissionClient, base: str, write: Write) -> str | None:
    """The submission id of a run's job that is running or pending, if any. Raises ConfigError where the dashboard does not answer."""
    submission, running = next_job(base, _ids(client, write))
    return submission if running else None


def list_jobs(client: JobSubmissionClient, write: Write) -> list[Job]:
    """The cluster's jobs, see `jobs_of`. Raises ConfigError where the dashboard does not answer."""
    return jobs_of(_retrying(client, write, client.list_jobs))


def _ids(client: JobSubmissionClient, write: Write) -> list[tuple[str, bool]]:
    """The submission ids of the cluster's jobs, each with whether it has ended."""
    return [(job.submission, not job.under_way) for job in list_jobs(client, write)]


def why_pending(job: JobDetails, cluster: Mapping[str, float], package: Package | None = None) -> str:
    """What a pending job is probably waiting for. `cluster`: as `describe_cluster` returns it; `package`: what was sent with it, where that
    is known. Pure."""
    if cluster.get("nodes") == 0:
        return "no node of the cluster is alive"
    if job.driver_agent_http_address is None:
        return (
            f"its head node is unpacking the working directory{f' ({package.amount})' if package else ''} and starting a process; "
            "if that takes long, the head is busy, or out of disk or memory"
        )
    return job.message or "Ray gives no reason"


def follow(client: JobSubmissionClient, submission: str, explain: Callable[[JobDetails], str], write: Write) -> int:
    """Write a job's log until the job has ended and, while it is pending, what it waits for, which `explain` returns. Returns the exit code
    of the job's own process, 75 where it was stopped; raises JobFailedError where the job never ran."""
    began, explained = time.monotonic(), 0.0
    while (job := _retrying(client, write, client.get_job_info, submission)).status == JobStatus.PENDING:
        waited = time.monotonic() - began
        if waited - explained >= _EXPLAIN_S:
            explained = waited
            write(f"PENDING for {waited:.0f} s: {explain(job)}.\n")
        time.sleep(_POLL_S)
    job = _tail(client, submission, write)
    if job.status == JobStatus.SUCCEEDED:
        return 0
    if job.status == JobStatus.STOPPED:
        return EXIT_STOPPED
    if job.driver_exit_code:
        return int(job.driver_exit_code)
    reason = " ".join((job.message or "Ray gives no reason").split())
    raise JobFailedError("job", submission, f"did not run: {reason[:400]}", "Submit it again once that is fixed.")


class _LogWriter:
    """Writes each character of a log once, although the job server sends the log from its beginning over each connection."""

    def __init__(self, write: Write) -> None:
        self._write, self._written = write, 0

    def take(self, text: str, start: int = 0) -> int:
        """Write what is new of `text`, which begins `start` characters into the log. Returns where it ends."""
        if new := text[max(0, self._written - start) :]:
            self._write(new)
            self._written = start + len(text)
        return start + len(text)


def _tail(client: JobSubmissionClient, submission: str, write: Write) -> JobDetails:
    """Write the whole log, also over connections that break or fall silent, until the job has ended. Returns the job's last state."""
    log, warned = _LogWriter(write), -math.inf  # when the last line about a log that cannot be read was written
    with asyncio.Runner() as runner:
        while True:
            chunks: list[str] = []
            # `write` is not called in the task: an exception of its own, as of a closed pipe, is no failure of the connection.
            reading = runner.get_loop().create_task(_collect(client.tail_job_logs(submission), chunks))
            position, last_news, ended = 0, time.monotonic(), False
            while not (reading.done() or ended):
                runner.run(asyncio.wait({reading}, timeout=_POLL_S))
                text, chunks[:] = "".join(chunks), []
                position = log.take(text, position)
                if text:
                    last_news, warned = time.monotonic(), -math.inf
                elif time.monotonic() - last_news >= _QUIET_S:
                    last_news = time.monotonic()
                    ended = _retrying(client, write, client.get_job_info, submission).status.is_terminal()
            failure = reading.exception() if reading.done() else None
            reading.cancel()
            if failure and not isinstance(failure, (*_NO_ANSWER, AuthenticationError)):
                raise failure
            job = _retrying(client, write, client.get_job_info, submission)
            if job.status.is_terminal():
                try:  # once: the machine that has the log may be gone
                    log.take(client.get_job_logs(submission))
                except (*_NO_ANSWER, AuthenticationError):
                    write("The end of the job's log cannot be read.\n")
                return job
            if failure and time.monotonic() - warned >= _EXPLAIN_S:
                warned = time.monotonic()
                write("The job's log cannot be read; trying again.\n")
            time.sleep(_POLL_S)


async def _collect(stream: AsyncIterator[str], chunks: list[str]) -> None:
    async for chunk in stream:
        chunks.append(chunk)


def stop(client: JobSubmissionClient, name: str, write: Write) -> int:
    """Ask a job to stop, and wait until it has: a run stops after a checkpoint. `name`: of the run or the job, see `find_job`. Returns the
    exit code: 0; 130 where Ctrl-C ended the waiting, which leaves the job stopping. Raises ConfigError where there is no such job, or it
    does not end."""
    target = find_job("stop", name, list_jobs(client, write)).submission
    job = _retrying(client, write, client.get_job_info, target)
    if job.status.is_terminal():
        write(f"{target} has ended already ({job.status.value}).\n")
        return 0
    requested = False
    try:
        _retrying(client, write, client.stop_job, target)
        requested = True
        job = _wait_until_stopped(client, target, write)
    except KeyboardInterrupt:
        state = "the job is still stopping" if requested else "the job may not have been asked to stop"
        write(f"\nInterrupted, {state}. The same command waits for it again.\n")
        return 130
    if last := _stopped_line(client, target):
        write(f"{target} says: {last}\n")
    resumes = job.status == JobStatus.STOPPED and re.search(_RESUMES, job.entrypoint or "")
    write(
        f"{target}: {job.status.value}.{' Submit it again: it resumes from its newest checkpoint, where it has one.' if resumes else ''}\n"
    )
    return 0


def _wait_until_stopped(client: JobSubmissionClient, target: str, write: Write) -> JobDetails:
    """Wait for the end of a job that was asked to stop, saying so. Returns its last state; raises ConfigError where it does not end."""
    began = time.monotonic()
    with _saying(write, f"{target} to stop, a run after a checkpoint", _STOP_S):
        while not (job := _retrying(client, write, client.get_job_info, target)).status.is_terminal():
            if time.monotonic() - began > _STOP_S + _REQUEST_S:  # Ray ends it after the first of these itself
                remedy = "The same command waits for it again; the dashboard shows its node."
                raise ConfigError("stop", target, f"has not stopped within {_STOP_S + _REQUEST_S:.0f} s.", remedy)
            time.sleep(_POLL_S)
    return job


def _stopped_line(client: JobSubmissionClient, target: str) -> str:
    """What a run has said as it stopped (whether a checkpoint was written); empty where its log does not have it."""
    try:
        lines = client.get_job_logs(target).splitlines()
    except (*_NO_ANSWER, AuthenticationError, ValueError, TypeError, KeyError):  # it is a courtesy
        return ""
    marks = (line.partition(f"most-ray: {RunStoppedError.kind}: ")[2] for line in reversed(lines))
    return next((rest for rest in marks if rest), "")
