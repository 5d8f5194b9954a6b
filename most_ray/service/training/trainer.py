"""A training run from its configuration to its summary: checks everything first, then trains by Ray Train's workers."""

from __future__ import annotations

import itertools
import math
import time
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
from most_ray.runs.interrupts import explained_interrupt
from most_ray.runs.job import overrides_of
from most_ray.runs.lifecycle import begin_run, completed_line, finish_run, finished_summary, is_complete
from most_ray.runs.output_checks import check_outputs
from most_ray.runs.resolve import check_inputs, devices_of, prepare_run
from most_ray.runs.run_lock import RunLock
from most_ray.runs.start_checks import walk
from most_ray.service.cluster.capacity import usable_nodes
from most_ray.service.cluster.connection import check_resources, cluster_gpus, start_ray
from most_ray.service.cluster.stop_requests import ShutdownSignal
from most_ray.service.preflight.checks import check_cluster, check_safety, check_space, check_tracking, report_findings
from most_ray.service.tasks.ingest_tasks import ingest_runner
from most_ray.service.training.attempts import RunIncompleteError, run_attempts
from most_ray.trackers.select import with_environment


def run_training(config: RunConfig, console: Console) -> dict[str, Any]:
    """Train, evaluate and export a run. A run of the same name resumes; a complete one is not changed. Returns the summary. Raises
    UserError where the user can fix something, the run was asked to stop, or it ended before its last step."""
    check_outputs(config)
    with explained_interrupt(config.run_uri), ShutdownSignal().on_sigterm() as shutdown, RunLock(config.run_uri, "trained"):
        return _run(config, console, shutdown)


def _run(config: RunConfig, console: Console, shutdown: ShutdownSignal) -> dict[str, Any]:
    tracked, gpus = with_environment(config), cluster_gpus(config)
    if gpus is not None:
        shutdown.install()
        _check_on_cluster(config, gpus, console)
    prepared = prepare_run(tracked, ingest_runner, gpus=gpus)
    job, folder = prepared.job, prepared.folder
    for uri, reason in prepared.corrupt:
        text = f"Checkpoint {storage.redact(uri)} is damaged and is skipped: {reason}."
        print_line(console, text)
    if (summary := finished_summary(prepared)) is not None:
        print_line(console, completed_line(prepared))
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
    started = time.monotonic()
    if prepared.done_steps < job.total_steps or not is_complete(prepared):
        start_ray(config, prepared.topologies[0].world_size, prepared.topologies[-1].world_size, prepared.use_gpu)
        on_each = math.ceil(job.topology.world_size / max(1, len(usable_nodes())))
        validation = EvaluationJob.of(config, job.threads * on_each) if job.has_validation else None
        shutdown.install()
        with ProgressWatcher(folder.local / "metrics.jsonl", job.total_steps, prepared.done_steps, console):
            run_attempts(prepared, validation, console, shutdown)
    if not is_complete(prepared):
        rule = "was not reached: its checkpoint or its evaluation is missing."
        raise RunIncompleteError("step", job.total_steps, rule, "Start it again.")
    return finish_run(prepared, time.monotonic() - started, write_report)


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
