"""What each worker of Ray Train imports first: everything else, in one go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from most_ray.large_imports import at_once

with at_once():
    from most_ray.service.training import worker

if TYPE_CHECKING:
    from most_ray.service.training.worker import WorkerJob


def run_worker(work: WorkerJob) -> None:
    """The training function: see `worker.train_worker`."""
    worker.train_worker(work)
