"""Ingests records on a cluster: Ray Data tasks make the same parts of a token store as one process would."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import ray.data
from ray.data import DataContext

from most_ray.config import RunConfig
from most_ray.data.ingest import Part, Recipe, Runner, build_part, run_here
from most_ray.errors import DataError
from most_ray.io.json_values import parse_json
from most_ray.runs.room import cluster_address, machine_cores
from most_ray.service.cluster.connection import start_ray

logger = logging.getLogger(__name__)
SPREAD_BYTES = 256 << 20  # bytes of records; fewer are ingested in less time than a cluster takes to start


def ingest_runner(config: RunConfig, use_gpu: bool = False) -> Runner:
    """A runner that makes parts in this process where there are few bytes of records, else by tasks of the run's cluster."""

    def run(parts: Sequence[Part], recipe: Recipe) -> None:
        if len(parts) < 2 or sum(part.bytes for part in parts) < SPREAD_BYTES:
            run_here(parts, recipe)
            return
        workers = config.num_workers or (1,)
        # A configuration for a cluster is ingested on a smaller machine too; of workers on GPUs there are no more than it has.
        most = machine_cores() if not cluster_address(config) and not use_gpu else workers[-1]
        start_ray(config, min(workers[0], most), min(workers[-1], most), use_gpu)
        run_in_tasks(parts, recipe)

    return run


def run_in_tasks(parts: Sequence[Part], recipe: Recipe) -> None:
    """Make each part in a task of its own. A task that dies is run again; parts that are finished stay. Raises DataError where a part
    could not be made, for example because storage keeps failing."""
    made = dataset_of(parts).map(_make, fn_kwargs={"recipe": recipe}, num_cpus=1)
    failures = []
    for number, row in enumerate(made.iter_rows(), start=1):
        logger.info("part %d of %d", number, len(parts))
        if row["error"]:
            failures.append(row["error"])
    if failures:
        raise DataError(*parse_json(failures[0]))


def dataset_of(parts: Sequence[Any]) -> ray.data.Dataset:
    """A dataset with a row and a block for each of `parts`, which are dataclasses. Ray Data's own progress is turned off."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return ray.data.from_items([asdict(part) for part in parts], override_num_blocks=len(parts))


def _make(row: dict[str, Any], recipe: Recipe) -> dict[str, str]:
    """Make one part; runs in a task. Returns the four parts of a DataError (JSON, or ""): Ray would wrap an error that is raised."""
    try:
        build_part(Part(**row), recipe)
    except DataError as error:
        return {"error": json.dumps([error.field, str(error.value), error.rule, error.remedy])}
    except OSError as error:
        rule = f"cannot be read or written on {socket.gethostname()} ({error.strerror or error})."
        return {"error": json.dumps(["file", str(error.filename or row["file"]), rule, "Check it there and run this again."])}
    return {"error": ""}
