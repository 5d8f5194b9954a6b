"""A command as a job on a Ray cluster: what is sent, under which name, and what becomes of it."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import requests
from ray._private.runtime_env import packaging
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from rich.console import Console

from most_ray.errors import STOPPED, ConfigError, UserError, nearest
from most_ray.service.address import NO_TOKEN, TOKEN_REMEDY, WRONG_TOKEN, check_address, use_token, version_rule

DEFAULT = "http://127.0.0.1:8265"
# What never goes along; .gitignore and .rayignore add to it.
EXCLUDES = (".git", ".venv", "venv", "runs", "wandb", "**/__pycache__", "*.egg-info", ".mypy_cache", ".ruff_cache", ".pytest_cache")
ENVIRONMENT = {
    "RAY_JOB_STOP_WAIT_TIME_S": "600",  # by default a job that is stopped has 3 s, too few for a checkpoint
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # the dashboard's page of training runs
    "PYTHONUNBUFFERED": "1",
}
for _name in ("ray._private.runtime_env.packaging", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
    logging.getLogger(_name).setLevel(logging.WARNING)  # they tell of each file that stays here, and of each request
_LOOK_S, _EXPLAIN_S = 0.5, 10.0


class JobFailedError(UserError):
    """A job did not succeed; its own log has said why."""

    kind = "job"
    exit_code = 1


@dataclass(frozen=True)
class Package:
    """The folder that goes along. bytes: of its files, unpacked; largest: (name, bytes) of what is largest directly below it."""

    folder: Path
    bytes: int
    largest: tuple[tuple[str, int], ...]

    def check(self) -> None:
        """Raises ConfigError where Ray would refuse it, after having packed it for minutes."""
        limit = packaging.GCS_STORAGE_MAX_SIZE
        if self.bytes >= limit:
            shown = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in self.largest)
            rule = f"holds {self.bytes / 2**20:.0f} MiB, a job takes at most {limit / 2**20:.0f}: {shown}."
            raise ConfigError("working_dir", str(self.folder), rule, "Name in .gitignore or .rayignore what shall stay here.")


def package_of(folder: Path) -> Package:
    """What of a folder would go along.

    Raises:
        ConfigError: it is no folder.
    """
    if not folder.is_dir():
        raise ConfigError("working_dir", str(folder), "is no folder.", "Name the one that the job's files lie in.")
    sizes: dict[str, int] = {}

    def count(path: Path) -> None:
        if path.is_file():
            top = path.relative_to(folder).parts[0]
            sizes[top] = sizes.get(top, 0) + path.stat().st_size

    excludes = packaging.get_excludes_from_ignore_files(folder, include_gitignore=True)
    packaging._dir_travel(folder, [*excludes, packaging._get_excludes(folder, list(EXCLUDES))], count, include_gitignore=True)
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    return Package(folder, sum(sizes.values()), tuple(ordered[:3]))


def job_name(name: str, place: str) -> str:
    """The submission id of a run's first job, the same for the same run: its name, and a mark of its folder."""
    mark = hashlib.blake2b(place.encode(), digest_size=3).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)[:60]}-{mark}"


def next_job(base: str, jobs: Iterable[tuple[str, bool]]) -> tuple[str, bool]:
    """The id of a run's job, and whether that one is under way already; `jobs`: ids, and whether they have ended. Pure."""
    matches = ((re.fullmatch(rf"{re.escape(base)}(?:-(\d+))?", name), ended) for name, ended in jobs)
    known = {int(match[1] or 1): ended for match, ended in matches if match}
    going = [number for number, ended in known.items() if not ended]
    number = max(going) if going else max(known, default=0) + 1
    return base if number == 1 else f"{base}-{number}", bool(going)


def open_client(address: str | None, environ: Mapping[str, str] = os.environ) -> JobSubmissionClient:
    """The cluster's job server: at `address`, else RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or this machine's dashboard.

    Raises:
        ConfigError: it does not answer, wants another token, or runs another Ray.
    """
    given = address or environ.get("RAY_API_SERVER_ADDRESS") or environ.get("RAY_ADDRESS")
    shown = given or DEFAULT
    if not re.match(r"https?://", shown):
        check_address(shown)
    os.environ["RAY_API_SERVER_ADDRESS"] = shown  # which Ray prefers to what it is told
    use_token()
    try:
        client = JobSubmissionClient(shown)
    except AuthenticationError as error:
        rule = WRONG_TOKEN if re.search("invalid|403", str(error), re.IGNORECASE) else NO_TOKEN
        raise ConfigError("address", shown, rule, TOKEN_REMEDY) from error
    except (ConnectionError, RuntimeError, ValueError, requests.exceptions.RequestException) as error:
        hint = "Check it." if given else "Start a cluster (cluster/local/up.sh does on this machine), or name its dashboard by --address."
        raise ConfigError("address", shown, "does not answer as a Ray dashboard.", hint) from error
    theirs = client._server_ray_version
    if theirs and theirs != ray.__version__:
        raise ConfigError("address", shown, *version_rule(theirs))
    return client


def describe_cluster(client: JobSubmissionClient) -> dict[str, float]:
    """Nodes that are alive, and their resources in all, by Ray's names; empty where the dashboard does not tell."""
    try:
        nodes = client._do_request("GET", "/api/v0/nodes?detail=1").json()["data"]["result"]["result"]
    except (requests.exceptions.RequestException, ValueError, KeyError, TypeError):
        return {}
    alive = [node for node in nodes if node.get("state") == "ALIVE"]
    total: dict[str, float] = {"nodes": len(alive)}
    for node in alive:
        for name in ("CPU", "GPU"):
            total[name] = total.get(name, 0.0) + float((node.get("resources_total") or {}).get(name, 0.0))
    return total


def submit(client: JobSubmissionClient, base: str, words: Sequence[str], package: Package) -> tuple[str, bool]:
    """Make the run's job, or find the one that is under way: its id, and whether it is new. Two that submit at once make one job.

    Raises:
        ConfigError: the folder is too large, or the cluster refuses the job.
    """
    submission, going = next_job(base, ((job.submission_id, job.status.is_terminal()) for job in client.list_jobs() if job.submission_id))
    if going:
        return submission, False
    package.check()
    environment = {"working_dir": str(package.folder), "excludes": list(EXCLUDES), "env_vars": dict(ENVIRONMENT)}
    try:
        client.submit_job(entrypoint=shlex.join(words), submission_id=submission, runtime_env=environment, metadata={"run": base})
    except (RuntimeError, ValueError) as error:
        if "already" in str(error):  # another submitter was faster by a moment
            return submission, False
        raise ConfigError("job", submission, f"was refused ({' '.join(str(error).split())[:300]}).") from error
    return submission, True


def why_pending(job: JobDetails, cluster: Mapping[str, float], package: Package) -> str:
    """What a job may be waiting for. Pure."""
    if cluster and not cluster.get("nodes"):
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
    """
    began, told = time.monotonic(), 0.0
    while (job := client.get_job_info(submission)).status == JobStatus.PENDING:
        waited = time.monotonic() - began
        if waited - told >= _EXPLAIN_S:
            told = waited
            out(f"PENDING for {waited:.0f} s: {explain(job)}.\n")
        time.sleep(_LOOK_S)
    asyncio.run(_tail(client, submission, out))
    job = client.get_job_info(submission)
    while not job.status.is_terminal():  # the log ends a moment before the status
        time.sleep(_LOOK_S)
        job = client.get_job_info(submission)
    return _exit_code(submission, job)


def _exit_code(submission: str, job: JobDetails) -> int:
    if job.status == JobStatus.SUCCEEDED:
        return 0
    if job.status == JobStatus.STOPPED:
        return STOPPED
    if job.driver_exit_code:
        return int(job.driver_exit_code)
    reason = " ".join((job.message or "it does not say why").split())
    raise JobFailedError("job", submission, f"did not run: {reason[:400]}", "Submit it again once that is mended.")


async def _tail(client: JobSubmissionClient, submission: str, out: Callable[[str], Any]) -> None:
    """The whole log, also over a connection that breaks: the job server sends it from its beginning each time."""
    written = 0
    while True:
        passed = 0
        try:
            async for chunk in client.tail_job_logs(submission):
                new = chunk[max(0, written - passed) :]
                passed += len(chunk)
                if new:
                    out(new)
                    written = passed
            if client.get_job_info(submission).status.is_terminal():
                return
        except (RuntimeError, OSError, requests.exceptions.RequestException):
            pass  # the dashboard may be restarting
        await asyncio.sleep(_LOOK_S)


def stop(client: JobSubmissionClient, submission: str, console: Console) -> int:
    """Ask a job to stop, and wait until it has: a run stops behind a checkpoint.

    Raises:
        ConfigError: there is no such job.
    """
    jobs = [(job.submission_id, job.status.is_terminal()) for job in client.list_jobs() if job.submission_id]
    newest, going = next_job(submission, jobs)
    target = newest if going else submission
    if target not in dict(jobs):
        remedy = nearest(submission, [name for name, _ in jobs]) if jobs else "It has none."
        raise ConfigError("stop", submission, "is no job of this cluster.", remedy)
    client.stop_job(target)
    while not (job := client.get_job_info(target)).status.is_terminal():
        time.sleep(_LOOK_S)
    console.print(f"{target}: {job.status.value}. Submitted again it goes on from its last checkpoint.", highlight=False, soft_wrap=True)
    return 0
