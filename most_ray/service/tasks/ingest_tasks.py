"""Ingest spread over a cluster: the same parts as in one process, made by Ray Data tasks."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import ray.data
from ray.data import DataContext

from most_ray.config import RunConfig
from most_ray.data.ingest import Part, Recipe, Runner, make_part, run_here
from most_ray.errors import DataError
from most_ray.service.cluster.connection import start_ray

logger = logging.getLogger(__name__)
SPREAD_BYTES = 256 << 20  # of records; fewer are taken in before a cluster would have started


def runner_of(config: RunConfig, use_gpu: bool = False) -> Runner:
    """Makes parts here where they are small, else on the run's cluster."""

    def run(parts: Sequence[Part], recipe: Recipe) -> None:
        if len(parts) < 2 or sum(part.bytes for part in parts) < SPREAD_BYTES:
            run_here(parts, recipe)
            return
        workers = config.num_workers or (1,)
        start_ray(config, workers[0], workers[-1], use_gpu)
        spread(parts, recipe)

    return run


def spread(parts: Sequence[Part], recipe: Recipe) -> None:
    """Make the parts as tasks of Ray Data, one each. A task that dies is run again; parts that were finished stay.

    Raises:
        DataError: storage failed for good, for some part.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its own progress, which would stand among ours
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    rows = ray.data.from_items([asdict(part) for part in parts], override_num_blocks=len(parts))
    made = rows.map(_make, fn_kwargs={"recipe": recipe}, num_cpus=1)
    failures = []
    for number, row in enumerate(made.iter_rows(), start=1):
        logger.info("part %d of %d", number, len(parts))
        if row["error"]:
            failures.append(row)
    if failures:
        error = failures[0]
        raise DataError(error["field"], error["value"], error["error"], error["remedy"])


def _make(row: dict[str, Any], recipe: Recipe) -> dict[str, str]:
    """One part; runs in a Ray task. What a user can mend comes back as a row, for Ray would wrap it."""
    try:
        make_part(Part(**row), recipe)
    except DataError as error:
        return {"error": error.rule, "field": error.field, "value": str(error.value), "remedy": error.remedy}
    except OSError as error:
        reason = f"cannot be read or written on {socket.gethostname()} ({error.strerror or error})."
        return {
            "error": reason,
            "field": "file",
            "value": str(error.filename or row["file"]),
            "remedy": "Check it there and run this again.",
        }
    return {"error": "", "field": "", "value": "", "remedy": ""}
