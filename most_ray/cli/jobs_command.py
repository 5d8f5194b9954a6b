"""`most-ray jobs`: the jobs of a cluster, one of them followed or stopped."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Column, Table

from most_ray.cli.parser import add_command
from most_ray.console.terminal import Terminal, say, write_log
from most_ray.errors import ConfigError
from most_ray.io import storage
from most_ray.io.json_values import json_text
from most_ray.metrics.texts import rough_duration as duration

if TYPE_CHECKING:
    from most_ray.service.cluster.jobs import Job

ADDRESS_HELP = (
    "the cluster's dashboard as http://HOST:8265, or its head as HOST:6379 (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, this machine)"
)
_LEAST, _COMMAND = 20, 60  # characters of a command in the table
_ENDED = 20  # jobs that have ended and are shown


def add(commands: Any) -> None:
    jobs = add_command(commands, "jobs", _jobs, "list the jobs of a cluster; follow or stop one")
    jobs.add_argument("--address", help=ADDRESS_HELP)
    jobs.add_argument(
        "--stop", metavar="NAME", help="stop a job, a run after a checkpoint, and wait until it has: the run's name or the job's id"
    )
    jobs.add_argument("--follow", metavar="NAME", help="show a job's log until it ends; Ctrl-C detaches, the job continues")
    jobs.add_argument("--json", action="store_true", help="list all jobs as JSON, times in UNIX seconds")


def _jobs(args: argparse.Namespace) -> int:
    given = [flag for flag in ("stop", "follow", "json") if getattr(args, flag) not in (None, False)]
    if len(given) > 1:
        raise ConfigError(given[0], None, f"and {given[1]} exclude each other.", "Give one of them.")
    from most_ray.service.cluster import submit as service

    write: Callable[[str], Any] = _to_stderr if args.json else write_log
    client = service.open_client(args.address, write=write)
    if args.stop is not None:
        return service.stop(client, args.stop, write)
    if args.follow is not None:
        return _follow(client, args, write)
    jobs = service.list_jobs(client, write)
    if args.json:
        say(json_text([asdict(job) for job in jobs]))
    else:
        show(jobs, storage.redact(client.get_address()), time.time(), Terminal(120))
    return 0


def _to_stderr(text: str) -> None:
    say(text.rstrip("\n"), sys.stderr)


def _follow(client: Any, args: argparse.Namespace, write: Callable[[str], Any]) -> int:
    """Show the log of the job that is named. Returns the job's own exit code, 0 where it was left by Ctrl-C."""
    from most_ray.service.cluster import submit as service
    from most_ray.service.cluster.jobs import find_job

    job = find_job("follow", args.follow, service.list_jobs(client, write))
    where = f" --address {shlex.quote(storage.redact(args.address))}" if args.address else ""
    cluster = service.describe_cluster(client)
    try:
        return service.follow(client, job.submission, lambda details: service.why_pending(details, cluster), write)
    except KeyboardInterrupt:
        write(f"\nDetached, the job continues. The same command follows it again. Stop it: most-ray jobs --stop {job.submission}{where}\n")
        return 0


def _age(job: Job, now: float) -> str:
    age = job.age(now)
    return "-" if age is None else duration(age)


def show(jobs: Sequence[Job], address: str, now: float, console: Terminal) -> None:
    """Print a table of jobs: those under way, and the newest that have ended. `now`: UNIX seconds."""
    under_way = [job for job in jobs if job.under_way]
    ended = [job for job in jobs if not job.under_way]
    if not jobs:
        say(f"{address} has no jobs. `most-ray submit` makes one.")
        return
    rows = [(job.name or "-", job.state, _age(job, now), job.submission, job.short_command) for job in (*under_way, *ended[:_ENDED])]
    left = console.width - sum(max(map(len, column)) + 3 for column in list(zip(*rows, strict=True))[:-1]) - 4
    most = min(_COMMAND, max(_LEAST, left))  # a command takes the rest of the line, for it is the part that one can do without
    table = Table("name", "state", "age", Column("job", overflow="fold"), "command", title=f"Jobs of {address}")
    for *cells, command in rows:
        table.add_row(*cells, command if len(command) <= most else f"{command[: most - 3]}...")
    console.print(table)
    if len(ended) > _ENDED:
        say(f"{len(ended) - _ENDED} more have ended earlier; --json lists all.")
