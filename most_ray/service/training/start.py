"""The start of a training run: it answers within a second, finds mistakes and complete runs without torch, and starts Ray on this machine
while the libraries are loaded."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from most_ray.config import RunConfig
from most_ray.console.library_log import LIBRARIES_LOG, divert_native
from most_ray.console.terminal import print_line
from most_ray.io import storage
from most_ray.io.run_folder import RunFolder
from most_ray.large_imports import at_once
from most_ray.runs.first_checks import completed_line, first_checks, unchanged_summary, workers_here
from most_ray.runs.interrupts import explained_interrupt
from most_ray.runs.run_lock import RunLock


def run_training(config: RunConfig, console: Console) -> dict[str, Any]:
    """Train, evaluate and export a run. A run of the same name resumes; a complete one is not changed. Returns the summary. Raises
    UserError where the user can fix something, the run was asked to stop, or it ended before its last step."""
    print_line(console, f"Run {storage.redact(config.run_uri)}: checking its configuration and data")
    first_checks(config)
    if (summary := unchanged_summary(config)) is not None:
        print_line(console, completed_line(config.name, summary["step"]))
        return summary
    from most_ray.service.cluster.connection import check_local_room, cluster_gpus, start_beside  # Ray, half a second
    from most_ray.service.cluster.stop_requests import ShutdownSignal

    check_local_room(config)
    with explained_interrupt(config.run_uri), ShutdownSignal().on_sigterm() as shutdown, RunLock(config.run_uri, "trained"):
        gpus, here = cluster_gpus(config), workers_here(config)
        divert_native(RunFolder(config.run_uri).local / LIBRARIES_LOG)  # makes the folder
        print_line(console, "Starting Ray on this machine, loading torch and transformers" if here else "Loading torch and transformers")
        ray_started = start_beside(config, here) if here else lambda: None
        with at_once():
            from most_ray.service.training.trainer import train_run
        return train_run(config, console, shutdown, gpus, ray_started)
