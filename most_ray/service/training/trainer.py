"""A training run from its checks to its summary: it is prepared, then trained by Ray Train's workers. It begins in `start.run_training`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from rich.console import Console

from most_ray.config import RunConfig
from most_ray.console.progress import ProgressWatcher
from most_ray.console.run_screens import evaluation_plan, first_screen
from most_ray.console.terminal import print_line
from most_ray.evaluation.inline import EvaluationJob
from most_ray.io import storage
from most_ray.io.run_folder import local_copy
from most_ray.model.build import read_config
from most_ray.planner.memory import checkpoint_bytes
from most_ray.report import write_report
from most_ray.runs.first_checks import completed_line
from most_ray.runs.job import overrides_of
from most_ray.runs.lifecycle import begin_run, finish_run, finished_summary, is_complete
from most_ray.runs.resolve import check_inputs, devices_of, prepare_run
from most_ray.runs.start_checks import walk
from most_ray.service.cluster.capacity import usable_nodes
from most_ray.service.cluster.connection import check_resources, start_ray
from most_ray.service.cluster.stop_requests import ShutdownSignal
from most_ray.service.preflight.checks import check_cluster, check_safety, check_space, check_tracking, report_findings
from most_ray.service.tasks.ingest_tasks import ingest_runner
from most_ray.service.training.attempts import RunIncompleteError, run_attempts
from most_ray.trackers.select import with_environment

Wait = Callable[[], None]


def train_run(config: RunConfig, console: Console, shutdown: ShutdownSignal, gpus: int | None, ray_started: Wait) -> dict[str, Any]:
    """What `start.run_training` does once this machine is known to have nothing against it.

    Args:
        shutdown: handles the signals that stop the run.
        gpus: of the cluster that was joined; None for a run on this machine.
        ray_started: waits for the start of Ray on this machine, where that has begun.
    """
    tracked = with_environment(config)
    if gpus is not None:
        shutdown.install()
        _check_on_cluster(config, gpus, console)
    prepared = prepare_run(tracked, ingest_runner, gpus=gpus)
    job, folder = prepared.job, prepared.folder
    for uri, reason in prepared.corrupt:
        text = f"Checkpoint {storage.redact(uri)} is damaged and is skipped: {reason}."
        print_line(console, text)
    if (summary := finished_summary(prepared)) is not None:
        print_line(console, completed_line(job.config.name, job.total_steps, prepared.changed))
        return summary
    begin_run(prepared, config)
    model = read_config(local_copy(job.model_path), overrides_of(job.config))
    size = checkpoint_bytes(model, job.topology, config.optimizer_state)
    checks = {
        "space": partial(check_space, config, size),
        "tracking": partial(check_tracking, config),
        "safety": partial(check_safety, config),
    }
    report_findings(list(itertools.chain(*walk(checks).values())), console)
    first_screen(prepared, console, validation=evaluation_plan(prepared, config.eval_inline))
    if prepared.done_steps < job.total_steps or not is_complete(prepared):
        ray_started()
        start_ray(config, prepared.topologies[0].world_size, prepared.topologies[-1].world_size, prepared.use_gpu)
        on_each = math.ceil(job.topology.world_size / max(1, len(usable_nodes())))
        validation = EvaluationJob.of(config, job.threads * on_each) if job.has_validation else None
        shutdown.install()
        with ProgressWatcher(folder.local / "metrics.jsonl", job.total_steps, prepared.done_steps, console):
            run_attempts(prepared, validation, console, shutdown)
    if not is_complete(prepared):
        rule = "was not reached: its checkpoint or its evaluation is missing."
        raise RunIncompleteError("step", job.total_steps, rule, "Start it again.")
    return finish_run(prepared, config, write_report)


def _check_on_cluster(config: RunConfig, gpus: int, console: Console) -> None:
    """Make the checks that a cluster needs before records are ingested on it; `prepare_run` makes the others."""
    complete = storage.exists(storage.join(config.run_uri, "summary.json"))  # such a run needs no resources

    def room() -> None:
        use_gpu, fewest, most = devices_of(config, gpus=gpus)
        if not complete:
            check_resources(config, fewest, most, use_gpu)

    def nodes() -> None:
        if not complete:
            report_findings(check_cluster(config), console)

    walk({"data": lambda: check_inputs(config), "room": room, "nodes": nodes})
