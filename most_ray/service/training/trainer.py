"""A training run from its configuration to its summary: everything is checked, then Ray Train's workers carry it out."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from most_ray.checkpoint import catalog
from most_ray.checkpoint.export import export_checkpoint
from most_ray.config import RunConfig, to_yaml
from most_ray.console.progress import ProgressWatcher
from most_ray.console.run_screens import first_screen
from most_ray.errors import ConfigError
from most_ray.evaluation.evaluate import Directories
from most_ray.evaluation.inline import EvaluationJob, open_external_recogniser
from most_ray.evaluation.scoring import EvaluationSettings
from most_ray.io import storage
from most_ray.io.journal import read_journal
from most_ray.io.run_folder import RunFolder, local_copy
from most_ray.model.build import read_config
from most_ray.model.configuration import MostConfig
from most_ray.planner.memory import checkpoint_bytes
from most_ray.records.record import TASKS
from most_ray.report import write_report
from most_ray.report.environment import environment
from most_ray.runs.job import overrides_of
from most_ray.runs.resolve import Prepared, check_given, devices_of, keep_kit, prepare_run, store_dir_of
from most_ray.service.cluster.capacity import usable_nodes
from most_ray.service.cluster.connection import check_resources, cluster_gpus, start_ray
from most_ray.service.cluster.stop_requests import ShutdownSignal
from most_ray.service.preflight.checks import check_cluster, check_safety, check_space, check_tracking, report_findings
from most_ray.service.tasks.ingest_tasks import ingest_runner
from most_ray.service.training.attempts import RunIncompleteError, is_complete, run_attempts

logger = logging.getLogger(__name__)


def run_training(config: RunConfig, console: Console) -> dict[str, Any]:
    """Train, export, evaluate. The same name goes on where it stopped; a complete run is left as it is. Returns the summary.

    Raises:
        UserError: what the user can mend, a run that was asked to stop, or one that ended short of its goal.
    """
    with ShutdownSignal().on_sigterm() as terminated:
        return _run(config, console, terminated)


def _run(config: RunConfig, console: Console, terminated: ShutdownSignal) -> dict[str, Any]:
    gpus = cluster_gpus(config)
    if gpus is not None:
        terminated.install()
        check_given(config)
        use_gpu, fewest, most = devices_of(config, gpus=gpus)
        if not storage.exists(storage.join(config.run_uri, "summary.json")):  # a run that is complete needs nothing
            check_resources(config, fewest, most, use_gpu)
            report_findings(check_cluster(config), console)
    prepared = prepare_run(config, ingest_runner, gpus=gpus)
    job, folder = prepared.job, prepared.folder
    last = catalog.step_uri(folder.checkpoints, job.total_steps)
    for uri, reason in prepared.corrupt:
        console.print(
            f"Checkpoint {storage.redact(uri)} is damaged and is passed over: {reason}.", highlight=False, soft_wrap=True, markup=False
        )
    folder.pull("summary.json")
    summary = _read_summary(folder.local / "summary.json")
    if summary and summary.get("step") == job.total_steps and prepared.done_steps >= job.total_steps:
        console.print(f"The run {config.name!r} is complete ({job.total_steps} steps); nothing to do.", highlight=False, soft_wrap=True)
        return summary
    if prepared.done_steps > job.total_steps:
        raise ConfigError(
            "max_steps",
            job.total_steps,
            f"lies behind the run's newest checkpoint (step {prepared.done_steps}).",
            "Raise it or rename the run.",
        )
    keep_kit(prepared)
    if prepared.job.has_validation:  # what judges its speech is tried before a worker starts
        open_external_recogniser(evaluation_job(config).settings, folder.uri, prepared.job.units_identity, use_gpu=False)
    storage.write_bytes(folder.at("config.yaml"), to_yaml(config.redacted()).encode())
    storage.write_bytes(folder.at("environment.json"), json.dumps(environment(), indent=1).encode())
    size = checkpoint_bytes(_model_config(prepared), job.topology, config.optimizer_state)
    report_findings([*check_space(config, size), *check_tracking(config), *check_safety(config)], console)
    first_screen(prepared, console, validation=_evaluation_plan(prepared))
    started = time.monotonic()
    if prepared.done_steps < job.total_steps or not is_complete(prepared):
        start_ray(config, prepared.topologies[0].world_size, prepared.topologies[-1].world_size, prepared.use_gpu)
        on_each = math.ceil(job.topology.world_size / max(1, len(usable_nodes())))
        validation = evaluation_job(config, job.threads * on_each) if job.has_validation else None
        terminated.install()
        with ProgressWatcher(folder.local / "metrics.jsonl", job.total_steps, prepared.done_steps, console):
            run_attempts(prepared, validation, console, terminated)
    if not is_complete(prepared):
        rule = "was not reached: its checkpoint or its evaluation is missing."
        raise RunIncompleteError("step", job.total_steps, rule, "Start it again.")
    trained = time.monotonic() - started
    export_checkpoint(last, folder.local / "export")
    folder.push_folder("export", "config.json")
    return finish_run(prepared, trained, last)


def _model_config(prepared: Prepared) -> MostConfig:
    return read_config(local_copy(prepared.job.model_path), overrides_of(prepared.job.config))


def _read_summary(path: Path) -> dict[str, Any] | None:
    """summary.json of a finished run."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return loaded if isinstance(loaded, dict) else None


def evaluation_job(config: RunConfig, training_threads: int = 0) -> EvaluationJob:
    """How a run's validation sets are scored."""
    settings = EvaluationSettings(
        batch_size=config.eval_batch_size,
        max_new_tokens=config.max_new_tokens,
        max_new_units=config.max_new_units,
        num_beams=config.num_beams,
        length_penalty=config.length_penalty,
        normaliser=config.normaliser,
        max_rejected_fraction=config.max_rejected_fraction,
        recogniser=config.recogniser and storage.absolute_if_exists(config.recogniser),
        vocoder=config.vocoder and storage.absolute_if_exists(config.vocoder),
    )
    directories = Directories(*(tuple(map(storage.absolute, getattr(config, f"val_{task}_dirs"))) for task in TASKS))
    return EvaluationJob(directories, settings, store_dir_of(config), config.eval_workers, config.eval_gpus, training_threads)


def _evaluation_plan(prepared: Prepared) -> str | None:
    """What the first screen says of evaluations."""
    config, cores = prepared.job.config, os.cpu_count() or 1
    if not prepared.job.has_validation:
        return None
    when = f"every {config.eval_steps} steps and at the end" if config.eval_steps else "at the end"
    if config.eval_inline:
        return f"{when}, in between steps on the training workers"
    where = f"on {config.eval_gpus:g} GPUs" if config.eval_gpus else "on CPUs" if prepared.use_gpu else f"sharing the {cores} CPUs"
    tasks = f" in {config.eval_workers} tasks" if config.eval_workers > 1 else ""
    return f"{when}, beside training{tasks}, {where}"


def finish_run(prepared: Prepared, seconds: float, last: str) -> dict[str, Any]:
    """The summary, with the last step's evaluation as evaluation.json and hypotheses.jsonl."""
    job, folder = prepared.job, prepared.folder
    folder.pull("metrics.jsonl")
    lines = read_journal(folder.local / "metrics.jsonl", "train")
    summary: dict[str, Any] = {
        "name": job.config.name,
        "step": job.total_steps,
        "wer": {},
        "loss": lines[-1]["loss"] if lines else None,
        "records": prepared.plan.consumed(job.total_steps),
        "rejected": prepared.n_rejected,
        "training_seconds": round(seconds, 1),
        "tokens_per_second": round(sorted(line["tokens_per_second"] for line in lines)[len(lines) // 2]) if lines else None,
        "checkpoint": storage.redact(last),
        "export": storage.redact(folder.at("export")),
        "report": storage.redact(folder.at("report.html")),
    }
    if job.has_validation:
        name = f"evaluations/step-{job.total_steps:09d}"
        folder.pull(f"{name}.json", f"{name}.hypotheses.jsonl")
        for source, target in ((f"{name}.json", "evaluation.json"), (f"{name}.hypotheses.jsonl", "hypotheses.jsonl")):
            storage.write_bytes(folder.local / target, (folder.local / source).read_bytes())
        result = json.loads((folder.local / "evaluation.json").read_bytes())
        summary |= {key: result[key] for key in ("wer", "sets", "routing", "samples")}
    storage.write_bytes(folder.local / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False).encode())
    folder.push("evaluation.json", "hypotheses.jsonl", "summary.json")
    save_report(folder)
    return summary


def save_report(folder: RunFolder) -> None:
    """Write report.html of a run or a sweep into its folder; a failure is logged, for everything that it shows is stored already."""
    try:
        write_report([folder.uri], folder.local / "report.html")
        folder.push("report.html")
    except Exception as error:  # noqa: BLE001 - whatever fails, the report can be written again
        logger.warning("report.html could not be written (%s); `most-ray report` tries again", error)
