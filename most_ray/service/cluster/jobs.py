"""The jobs of a cluster as users name them: by the run's name, the run's first job, or the job itself. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ray.job_submission import JobDetails

from most_ray.errors import ConfigError, nearest
from most_ray.io import storage

_NUMBERED = r"(?P<base>.+-[0-9a-f]{6})(?:-\d+)?"  # submission ids that `most-ray submit` makes: those of a run end in 2, 3, ...
_PROGRAM = re.compile(r"^\S*python[\d.]* (?:-u )?(?:-m most_ray\.cli )?|^most-ray ")


@dataclass(frozen=True)
class Job:
    """A job that was submitted to a cluster."""

    name: str  # of its run, or of what it does, as evaluate-x; empty where it was not submitted by `most-ray submit`
    submission: str  # its id
    run: str  # the id of the run's first job
    state: str  # Ray's: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED
    under_way: bool  # has not ended
    started: float | None  # UNIX seconds
    ended: float | None
    command: str  # its entrypoint, without credentials
    message: str  # Ray's, about its state

    @property
    def short_command(self) -> str:
        """The command without the program that runs it: `train --config FILE`."""
        return _PROGRAM.sub("", self.command)

    def age(self, now: float) -> float | None:
        """Seconds since it was submitted, at `now` (UNIX seconds)."""
        return None if self.started is None else max(0.0, now - self.started)


def jobs_of(details: Iterable[JobDetails]) -> list[Job]:
    """The submitted jobs among a cluster's, those under way first, then the newest."""
    found = [_job(each, each.submission_id) for each in details if each.submission_id]
    return sorted(found, key=lambda job: (not job.under_way, -(job.started or 0.0), job.submission))


def _job(details: JobDetails, submission: str) -> Job:
    numbered = re.fullmatch(_NUMBERED, submission)
    run = (details.metadata or {}).get("run") or (numbered["base"] if numbered else submission)
    given = re.search(r"--name[ =]'?([\w.-]+)", details.entrypoint or "")
    return Job(
        name=re.sub("-[0-9a-f]{6}$", "", run) if run != submission or numbered else given[1] if given else "",
        submission=submission,
        run=run,
        state=details.status.value,
        under_way=not details.status.is_terminal(),
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
        command=storage.redact(details.entrypoint or ""),
        message=storage.redact(" ".join((details.message or "").split())),
    )


def find_job(field: str, named: str, jobs: Sequence[Job]) -> Job:
    """The job that a user means: the one under way, else the newest, of those with this id, of this run's first job, or of a run of this
    name. Raises ConfigError where there is none, or several that are under way.

    Args:
        field: the flag that names it.
        named: its name.
        jobs: as `jobs_of` returns them.
    """
    meant = [
        job for job in jobs if named in (job.submission, job.run, job.name) or re.fullmatch(rf"{re.escape(named)}-\d+", job.submission)
    ]
    if not (named and meant):
        known = {name for job in jobs for name in (job.submission, job.name) if name}
        raise ConfigError(field, named, "is no job of this cluster.", nearest(named, known) if known else "It has none.")
    exact = [job for job in meant if job.submission == named]
    under_way = [job for job in exact if job.under_way] or [job for job in meant if job.under_way]
    if len(under_way) > 1:
        ids = ", ".join(job.submission for job in under_way)
        raise ConfigError(field, named, f"is the name of {len(under_way)} jobs that are under way: {ids}.", "Name one of these.")
    return (under_way or exact or meant)[0]
