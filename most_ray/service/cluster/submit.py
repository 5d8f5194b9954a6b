"""A command as a job on a Ray cluster: what is sent, under which name, and what becomes of it."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import shlex
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import ray
import requests
from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE, RAY_RUNTIME_ENV_IGNORE_GITIGNORE
from ray._private.runtime_env import packaging
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from most_ray.errors import STOPPED, ConfigError, UserError, nearest
from most_ray.io import storage
from most_ray.service.cluster.address import NO_TOKEN, TOKEN_REMEDY, WRONG_TOKEN, check_address, use_token, version_rule

T = TypeVar("T")
DEFAULT = "http://127.0.0.1:8265"
# What never goes along; .gitignore and .rayignore add to it.
EXCLUDES = (".git", ".venv*", "venv", "runs", "wandb", "**/__pycache__", "*.egg-info", ".mypy_cache", ".ruff_cache", ".pytest_cache")
ENVIRONMENT = {
    "RAY_JOB_STOP_WAIT_TIME_S": "600",  # by default a job that is stopped has 3 s, too few for a checkpoint
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # the dashboard's page of training runs
    "PYTHONUNBUFFERED": "1",
}
_RUNTIME, _JOBS = "ray._private.runtime_env", "ray.dashboard.modules"
for _name in (f"{_RUNTIME}.packaging", f"{_RUNTIME}.working_dir", f"{_JOBS}.dashboard_sdk", f"{_JOBS}.job.sdk"):
    logging.getLogger(_name).setLevel(logging.ERROR)  # they tell of each file that stays here, and of each request
_LOOK_S, _EXPLAIN_S, _QUIET_S, _SILENCE_S, _REQUEST_S = 0.5, 10.0, 10.0, 300.0, 120.0
_NO_ANSWER = (aiohttp.ClientError, RuntimeError, OSError)  # Ray's of any status but 200 are RuntimeErrors, those of requests OSErrors
_TOO_LARGE = r"status code 413|Entity ?Too ?Large|exceeds the maximum size"  # of a proxy, the dashboard (within a 500) and the GCS
_RESUMES = r"(most_ray\.cli|most-ray) (train|sweep)\b(?!.* --dry_run)|jobs/(train|tune)\.py\b"


class JobFailedError(UserError):
    """A job did not succeed; its own log has said why."""

    kind = "job"
    exit_code = 1


@dataclass(frozen=True)
class Package:
    """The folder that goes along. bytes: of the archive that Ray makes of it; largest: (name, bytes) of what is largest directly below
    it; files: their paths relative to it, with "/"."""

    folder: Path
    bytes: int
    largest: tuple[tuple[str, int], ...]
    files: frozenset[str]

    def check(self) -> None:
        """Raises ConfigError where Ray would refuse it, after having packed it for minutes."""
        limit = min(DASHBOARD_CLIENT_MAX_SIZE, packaging.GCS_STORAGE_MAX_SIZE - 1)
        if self.bytes > limit:
            raise self.too_large(f"a job takes at most {limit / 2**20:.0f}")

    def too_large(self, rule: str) -> ConfigError:
        shown = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in self.largest)
        rule = f"holds {self.bytes / 2**20:.0f} MiB, {rule}: {shown}."
        return ConfigError("working_dir", str(self.folder), rule, "Name in .gitignore or .rayignore what shall stay here.")

    def check_holds(self, config: str) -> None:
        """Raises ConfigError where a configuration, a path below the folder, does not go along."""
        if config not in self.files:
            cause, remedy = self._kept_back_by(config)
            raise ConfigError("config", config, f"does not go along: {cause}.", remedy)

    def _kept_back_by(self, config: str) -> tuple[str, str]:
        path = self.folder / config
        below = [path, *path.parents][: len(Path(config).parts)]
        for step in reversed(below):
            for pattern in EXCLUDES:
                if packaging._get_excludes(self.folder, [pattern])(step):
                    return f"{pattern} never does", "Copy it to another place in the folder."
            for above in [self.folder, *(each for each in reversed(below) if each in step.parents)]:
                for name in (".gitignore", ".rayignore") if _gitignore_holds() else (".rayignore",):
                    ignores = packaging._get_ignore_file(above, name)
                    if ignores and ignores(step):
                        return (
                            f"{above / name} keeps it here",
                            "Change that file, or copy this one to another place in the folder.",
                        )
        return "it is no file of the folder", "Copy it there."


def _gitignore_holds() -> bool:
    return os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"


def package_of(folder: Path) -> Package:
    """What of a folder would go along.

    Raises:
        ConfigError: it is no folder.
    """
    if not folder.is_dir():
        raise ConfigError("working_dir", str(folder), "is no folder.", "Name the one that the job's files lie in.")
    sizes: dict[str, int] = {}
    files: list[str] = []
    frame = 22  # bytes of a zip's end

    def count(path: Path) -> None:
        nonlocal frame
        name = path.relative_to(folder).as_posix()
        if path.is_file():
            top = name.split("/", 1)[0]
            sizes[top] = sizes.get(top, 0) + path.stat().st_size
            files.append(name)
        elif path.is_dir() and next(path.iterdir(), None) is None:
            name += "/"
        else:
            return
        frame += 76 + 2 * len(name.encode())  # its two headers: Ray stores, it does not compress

    packaging._dir_travel(folder, [packaging._get_excludes(folder, list(EXCLUDES))], count, include_gitignore=_gitignore_holds())
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    return Package(folder, sum(sizes.values()) + frame, tuple(ordered[:3]), frozenset(files))


def job_name(name: str, uri: str) -> str:
    """The submission id of a run's first job, the same for the same run: its name, and a mark of its folder."""
    mark = hashlib.blake2b(uri.encode(), digest_size=3).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)[:60]}-{mark}"


def next_job(base: str, jobs: Iterable[tuple[str, bool]]) -> tuple[str, bool]:
    """The id of a run's job, and whether that one is under way already; `jobs`: ids, and whether they have ended. Pure."""
    matches = ((re.fullmatch(rf"{re.escape(base)}(?:-(\d+))?", name), ended) for name, ended in jobs)
    known = {int(match[1] or 1): ended for match, ended in matches if match}
    going = [number for number, ended in known.items() if not ended]
    number = max(going) if going else max(known, default=0) + 1
    return base if number == 1 else f"{base}-{number}", bool(going)


class _Client(JobSubmissionClient):
    """Ray's waits for ever for a machine that is gone."""

    def _do_request(self, method: str, endpoint: str, **keywords: Any) -> requests.Response:
        return super()._do_request(method, endpoint, **{"timeout": _REQUEST_S, **keywords})


def open_client(address: str | None, environ: Mapping[str, str] = os.environ) -> JobSubmissionClient:
    """The cluster's job server: at `address`, else RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or this machine's dashboard.

    Raises:
        ConfigError: it does not answer, wants another token, or runs another Ray.
    """
    given = address or environ.get("RAY_API_SERVER_ADDRESS") or environ.get("RAY_ADDRESS")
    named = given or DEFAULT
    shown = storage.redact(named)
    if not re.match(r"https?://", named):
        check_address(named)
    os.environ["RAY_API_SERVER_ADDRESS"] = named  # which Ray prefers to what it is told
    use_token()
    try:
        client = _Client(named)
    except AuthenticationError as error:
        raise _token_error(shown, error) from error
    except (ConnectionError, RuntimeError, ValueError, requests.exceptions.RequestException) as error:
        hint = "Check it." if given else "Start a cluster (cluster/local/up.sh does on this machine), or name its dashboard by --address."
        raise ConfigError("address", shown, "does not answer as a Ray dashboard.", hint) from error
    theirs = client._server_ray_version
    if theirs and theirs != ray.__version__:
        raise ConfigError("address", shown, *version_rule(theirs))
    return client


def _token_error(address: str, error: AuthenticationError) -> ConfigError:
    rule = WRONG_TOKEN if re.search("invalid|403", str(error), re.IGNORECASE) else NO_TOKEN
    return ConfigError("address", address, rule, TOKEN_REMEDY)


class _Patience:
    """Questions to a dashboard that may be restarting: asked again until it has not answered for 300 s."""

    def __init__(self, client: JobSubmissionClient, out: Callable[[str], Any]) -> None:
        self._address, self._out = storage.redact(client.get_address()), out

    def ask(self, question: Callable[..., T], *words: Any) -> T:
        """Raises ConfigError: it does not answer, knows no such job, or wants another token."""
        since: float | None = None
        while True:
            try:
                return question(*words)
            except AuthenticationError as error:
                raise _token_error(self._address, error) from error
            except _NO_ANSWER as error:
                now = time.monotonic()
                if since is None:
                    since = now
                    self._out("The dashboard does not answer; trying again.\n")
                if now - since >= _SILENCE_S:
                    raise self._given_up(error) from error
            time.sleep(_LOOK_S)

    def _given_up(self, error: Exception) -> ConfigError:
        if re.search("status code 404.*does not exist", str(error)):
            return ConfigError("address", self._address, "knows the job no more.", "Was it started anew? Submit it again.")
        rule = f"has not answered for {_SILENCE_S:.0f} s."
        return ConfigError("address", self._address, rule, "The job may go on: the same command follows it again.")


def describe_cluster(client: JobSubmissionClient) -> dict[str, float]:
    """Nodes that are alive, and their resources in all, by Ray's names; empty where the dashboard does not tell."""
    try:
        nodes = client._do_request("GET", "/api/v0/nodes?detail=1").json()["data"]["result"]["result"]
    except (*_NO_ANSWER, AuthenticationError, ValueError, KeyError, TypeError):
        return {}
    alive = [node for node in nodes if node.get("state") == "ALIVE"]
    total: dict[str, float] = {"node" if len(alive) == 1 else "nodes": len(alive)}
    for node in alive:
        for name in ("CPU", "GPU"):
            total[name] = total.get(name, 0.0) + float((node.get("resources_total") or {}).get(name, 0.0))
    return total


def submit(client: JobSubmissionClient, base: str, words: Sequence[str], package: Package, out: Callable[[str], Any]) -> tuple[str, bool]:
    """Make the run's job, or find the one that is under way: its id, and whether it is new. Two that submit at once make one job.

    Raises:
        ConfigError: the folder is too large, or the cluster refuses the job.
    """
    submission, going = next_job(base, _known(client, out))
    if going:
        return submission, False
    package.check()
    environment = {"working_dir": str(package.folder), "excludes": list(EXCLUDES), "env_vars": dict(ENVIRONMENT)}
    try:
        client.submit_job(entrypoint=shlex.join(words), submission_id=submission, runtime_env=environment, metadata={"run": base})
    except AuthenticationError as error:
        raise _token_error(storage.redact(client.get_address()), error) from error
    except (*_NO_ANSWER, ValueError) as error:
        if re.search(_TOO_LARGE, str(error)):
            raise package.too_large("more than the cluster takes") from error
        if submission in dict(_known(client, out)):  # another submitter was faster by a moment, or the answer was lost
            return submission, False
        raise ConfigError("job", submission, f"was refused ({' '.join(str(error).split())[:300]}).") from error
    return submission, True


def under_way(client: JobSubmissionClient, base: str, out: Callable[[str], Any]) -> str | None:
    """The id of a run's job that is under way. Raises ConfigError where the dashboard does not answer."""
    submission, going = next_job(base, _known(client, out))
    return submission if going else None


def _known(client: JobSubmissionClient, out: Callable[[str], Any]) -> list[tuple[str, bool]]:
    jobs = _Patience(client, out).ask(client.list_jobs)
    return [(job.submission_id, job.status.is_terminal()) for job in jobs if job.submission_id]


def why_pending(job: JobDetails, cluster: Mapping[str, float], package: Package) -> str:
    """What a job may be waiting for. Pure."""
    if cluster.get("nodes") == 0:
        return "no node of the cluster is alive"
    if job.driver_agent_http_address is None:
        return (
            f"its head node is getting the working directory ready ({package.bytes / 2**20:.0f} MiB) and starting a process; "
            "where that lasts, the head is busy, or out of disk or memory"
        )
    return job.message or "Ray does not say"


def follow(client: JobSubmissionClient, submission: str, explain: Callable[[JobDetails], str], out: Callable[[str], Any]) -> int:
    """Hand a job's log to `out` until the job has ended, and what it waits for before it has begun. Returns what its own exit code would
    have been: 0; 75 where it was stopped.

    Raises:
        JobFailedError: it never ran.
        ConfigError: the dashboard has not answered for 300 s.
    """
    began, told = time.monotonic(), 0.0
    patience = _Patience(client, out)
    while (job := patience.ask(client.get_job_info, submission)).status == JobStatus.PENDING:
        waited = time.monotonic() - began
        if waited - told >= _EXPLAIN_S:
            told = waited
            out(f"PENDING for {waited:.0f} s: {explain(job)}.\n")
        time.sleep(_LOOK_S)
    return _exit_code(submission, _tail(client, submission, patience, out))


def _exit_code(submission: str, job: JobDetails) -> int:
    if job.status == JobStatus.SUCCEEDED:
        return 0
    if job.status == JobStatus.STOPPED:
        return STOPPED
    if job.driver_exit_code:
        return int(job.driver_exit_code)
    reason = " ".join((job.message or "it does not say why").split())
    raise JobFailedError("job", submission, f"did not run: {reason[:400]}", "Submit it again once that is mended.")


class _Log:
    """What has been handed on of a log that the job server sends from its beginning over each connection."""

    def __init__(self, out: Callable[[str], Any]) -> None:
        self._out, self._written = out, 0

    def take(self, text: str, start: int = 0) -> int:
        """`text` stands `start` characters into the log. Returns where it ends."""
        if new := text[max(0, self._written - start) :]:
            self._out(new)
            self._written = start + len(text)
        return start + len(text)


def _tail(client: JobSubmissionClient, submission: str, patience: _Patience, out: Callable[[str], Any]) -> JobDetails:
    """The whole log, also over connections that break or fall silent; the job as it has ended."""
    log, told = _Log(out), False
    with asyncio.Runner() as runner:
        while True:
            chunks: list[str] = []
            # `out` is not called in there: what it raises (a pipe that is closed) is no failure of the connection.
            reading = runner.get_loop().create_task(_collect(client.tail_job_logs(submission), chunks))
            passed, looked = 0, time.monotonic()
            ended = False
            while not (reading.done() or ended):
                runner.run(asyncio.wait({reading}, timeout=_LOOK_S))
                came, chunks[:] = "".join(chunks), []
                passed = log.take(came, passed)
                if came:
                    looked, told = time.monotonic(), False
                elif time.monotonic() - looked >= _QUIET_S:
                    looked = time.monotonic()
                    ended = patience.ask(client.get_job_info, submission).status.is_terminal()
            failure = reading.exception() if reading.done() else None
            reading.cancel()
            if failure and not isinstance(failure, (*_NO_ANSWER, AuthenticationError)):
                raise failure
            job = patience.ask(client.get_job_info, submission)
            if job.status.is_terminal():
                _finish(client, submission, log, out)
                return job
            if failure and not told:
                told = True
                out("The job's log does not come; trying again.\n")
            time.sleep(_LOOK_S)


async def _collect(stream: AsyncIterator[str], chunks: list[str]) -> None:
    async for chunk in stream:
        chunks.append(chunk)


def _finish(client: JobSubmissionClient, submission: str, log: _Log, out: Callable[[str], Any]) -> None:
    """The end of an ended job's log. The machine that holds it may be gone, so it is not waited for."""
    try:
        text = client.get_job_logs(submission)
    except (*_NO_ANSWER, AuthenticationError):
        out("The end of the job's log cannot be read.\n")
    else:
        log.take(text)


def stop(client: JobSubmissionClient, submission: str, out: Callable[[str], Any]) -> int:
    """Ask a job to stop, and wait until it has: a run stops behind a checkpoint. Ctrl-C ends the waiting alone (130).

    Raises:
        ConfigError: there is no such job, or the dashboard has not answered for 300 s.
    """
    patience = _Patience(client, out)
    jobs = _known(client, out)
    newest, going = next_job(submission, jobs)
    target = newest if going else submission
    if target not in dict(jobs):
        remedy = nearest(submission, [name for name, _ in jobs]) if jobs else "It has none."
        raise ConfigError("stop", submission, "is no job of this cluster.", remedy)
    job = patience.ask(client.get_job_info, target)
    if job.status.is_terminal():
        out(f"{target} has ended already ({job.status.value}).\n")
        return 0
    asked = False
    try:
        patience.ask(client.stop_job, target)
        asked = True
        while not (job := patience.ask(client.get_job_info, target)).status.is_terminal():
            time.sleep(_LOOK_S)
    except KeyboardInterrupt:
        rule = "the job goes on stopping" if asked else "the job may not have been asked to stop"
        out(f"\nInterrupted, {rule}. The same command waits for it again.\n")
        return 130
    again = job.status == JobStatus.STOPPED and re.search(_RESUMES, job.entrypoint or "")
    out(f"{target}: {job.status.value}.{' Submitted again it goes on from its last checkpoint.' if again else ''}\n")
    return 0
