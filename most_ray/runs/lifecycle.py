"""What a start of a run does before and after training, under Ray and without: files of the run, the export, the summary."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from most_ray.checkpoint import catalog
from most_ray.checkpoint.export import check_export, export_checkpoint
from most_ray.config import RunConfig, portable_yaml
from most_ray.config_files import OWN
from most_ray.data.plan import distinct_names
from most_ray.errors import ConfigError, UserError
from most_ray.evaluation.hypotheses import warn_of_version
from most_ray.evaluation.inline import EvaluationJob, open_external_recogniser
from most_ray.io import storage
from most_ray.io.journal import evaluated_steps, read_journal
from most_ray.io.json_values import json_text, parse_json
from most_ray.io.run_folder import RunFolder, local_copy
from most_ray.metrics.notes import run_notes
from most_ray.metrics.rows import kind_of
from most_ray.metrics.totals import clock_of
from most_ray.model.build import read_config
from most_ray.optim.train_state import warmup_of
from most_ray.records.data_card import Source, data_card
from most_ray.records.record import TASKS
from most_ray.runs.environment import environment
from most_ray.runs.first_checks import inputs_digest, summary_paths
from most_ray.runs.job import overrides_of
from most_ray.runs.resolve import Prepared, keep_speech_assets

logger = logging.getLogger(__name__)
WriteReport = Callable[[Sequence[str], Path], None]  # URIs of runs, the HTML file


def finished_summary(prepared: Prepared) -> dict[str, Any] | None:
    """summary.json of a run that has made all its steps and was evaluated and exported; None where something is left to do."""
    folder, total_steps = prepared.folder, prepared.job.total_steps
    folder.pull("summary.json")
    try:
        summary = parse_json((folder.local / "summary.json").read_bytes())
    except (OSError, ValueError):  # missing, or cut off by a kill: the end of the run writes it again
        return None
    finished = isinstance(summary, dict) and summary.get("step") == total_steps and prepared.done_steps >= total_steps
    return summary if finished else None


def is_complete(prepared: Prepared) -> bool:
    """Whether the last step's checkpoint exists, and its evaluation where the run has validation sets. Not while workers train."""
    job, folder = prepared.job, prepared.folder
    committed = catalog.step_uri(folder.checkpoints, job.total_steps) in catalog.committed(folder.checkpoints)
    return committed and (not job.has_validation or job.total_steps in evaluated_steps(folder))


def begin_run(prepared: Prepared, config: RunConfig) -> None:
    """Write what a run's folder holds from its start: config.yaml (as the user gave it), environment.json, cards.json, the files that turn
    recordings into units. Raises UserError where the goal is before the newest checkpoint, the run's export holds what would be lost, or
    the recogniser of evaluations cannot be opened."""
    job, folder = prepared.job, prepared.folder
    if prepared.done_steps > job.total_steps:
        rule = f"is below the step of the run's newest checkpoint ({prepared.done_steps})."
        raise ConfigError("max_steps", job.total_steps, rule, "Raise it or rename the run.")
    if (warmup := warmup_of(job.config, job.total_steps)) >= job.total_steps:
        text = "warmup_steps: the warm-up takes %d steps, the run has %d: the learning rate only rises, to %.3g at the end instead of %.3g."
        last = job.config.learning_rate * (job.total_steps - 1) / warmup  # the first step is made with a rate of 0
        logger.warning(text, warmup, job.total_steps, last, job.config.learning_rate)
    check_export("output_dir", folder.local / "export")  # which the run's end replaces
    keep_speech_assets(prepared)
    if job.has_validation:
        open_external_recogniser(EvaluationJob.of(config).settings, folder.uri, job.units_identity, use_gpu=False)
        _warn_of_version(folder, config)
    storage.write_bytes(folder.at("environment.json"), json.dumps(environment(), indent=1).encode())
    storage.write_bytes(folder.at(OWN), portable_yaml(config, folder.uri).encode())
    _write_cards(prepared, config)


def _write_cards(prepared: Prepared, config: RunConfig) -> None:
    """Write cards.json, which the report shows: `model`, the model's config.json, and `data`, see `data_card`. What cannot be read is left
    out: no run ends for want of it."""
    found: dict[str, Any] = {}
    try:
        model = read_config(local_copy(prepared.job.model_path), overrides_of(config)).to_dict()
        found["model"] = {key: value for key, value in model.items() if not key.startswith("_")}
        found["data"] = data_card(sources_of(config, [len(store) for store in prepared.plan.stores]))
    except (UserError, OSError) as error:
        logger.warning("the report will not describe all of the model and the data: %s", error)
    storage.write_bytes(prepared.folder.at("cards.json"), json.dumps(found, indent=1, default=str).encode())


def sources_of(config: RunConfig, counts: Sequence[int]) -> dict[str, list[Source]]:
    """A run's directories of records for `training` and `validation`. `counts`: the usable records of each training source, in the order of
    tasks and directories."""
    found: dict[str, list[Source]] = {}
    for use, called in (("train", "training"), ("val", "validation")):
        named = [(task, uri) for task in TASKS for uri in config.directories(use, task)]  # type: ignore[arg-type]
        names = distinct_names([uri for _, uri in named], [task for task, _ in named])
        sizes: Sequence[int | None] = counts if called == "training" else [None] * len(named)
        found[called] = [(f"{task}/{name}", uri, size) for (task, uri), name, size in zip(named, names, sizes, strict=True)]
    return found


def _warn_of_version(folder: RunFolder, config: RunConfig) -> None:
    """Log a warning where earlier evaluations of the run, with which best_metric compares new ones, are of other normalised texts."""
    if steps := evaluated_steps(folder):
        uri = folder.at(f"evaluations/step-{max(steps):09d}.json")
        try:
            settings = parse_json(storage.read_bytes(uri))["settings"]
        except (OSError, ValueError, KeyError, TypeError):  # it was removed, or is damaged: what is unknown is not reported
            return
        if isinstance(settings, dict):
            warn_of_version(uri, settings, config.normaliser)


def finish_run(prepared: Prepared, config: RunConfig, write_report: WriteReport) -> dict[str, Any]:
    """Export a run that has made its last step, write evaluation.json and hypotheses.jsonl (the last step's), summary.json and report.html.
    `config`: as the user gave it. Returns the content of summary.json, in which paths are relative to the run's folder."""
    job, folder = prepared.job, prepared.folder
    last = catalog.step_uri(folder.checkpoints, job.total_steps)
    export_checkpoint(last, folder.local / "export")
    folder.push_folder("export", "config.json")
    folder.pull("metrics.jsonl")
    lines = read_journal(folder.local / "metrics.jsonl")
    summary: dict[str, Any] = {
        "name": job.config.name,
        "step": job.total_steps,
        "wer": {},
        "records": prepared.plan.consumed(job.total_steps),
        "rejected": prepared.n_rejected,
        "inputs": inputs_digest(config),
        **training_figures(lines, prepared.done_steps),
        **summary_paths(job.total_steps),
    }
    if job.has_validation:
        name = f"evaluations/step-{job.total_steps:09d}"
        folder.pull(f"{name}.json", f"{name}.hypotheses.jsonl")
        for source, target in ((f"{name}.json", "evaluation.json"), (f"{name}.hypotheses.jsonl", "hypotheses.jsonl")):
            storage.write_bytes(folder.local / target, (folder.local / source).read_bytes())
        result = parse_json((folder.local / "evaluation.json").read_bytes())
        summary |= {key: result[key] for key in ("wer", "sets", "routing", "samples")}
    newest = {kind: line for line in lines if (kind := kind_of(line)) in ("start", "train")}
    summary["notes"] = run_notes(newest.get("start", {}), newest.get("train", {}), summary.get("sets", {}), job.config.load_alert)
    storage.write_bytes(folder.local / "summary.json", json_text(summary, indent=1).encode())
    folder.push("evaluation.json", "hypotheses.jsonl", "summary.json")
    save_report(folder, write_report)
    return summary


def training_figures(lines: Sequence[Mapping[str, Any]], first_step: int) -> dict[str, Any]:
    """What summary.json says of a run's training, by all its lines of metrics.jsonl: last losses, time, amounts, speed; and the training
    time of the steps beyond `first_step`, which the last start of the command has made."""
    last: Mapping[str, Any] = next((line for line in reversed(lines) if kind_of(line) == "train"), {})
    clock = clock_of(lines)
    totals, speed = clock.totals, clock.totals.tokens_per_second
    return {
        "loss": last.get("loss"),
        "losses": {task: last[f"{task}_loss"] for task in TASKS if f"{task}_loss" in last},
        "starts": clock.starts,
        "training_seconds": round(totals.seconds, 1),
        "start_seconds": round(clock.since(first_step), 1),
        "trained_records": totals.records,
        "tokens": totals.tokens,
        "tokens_per_second": None if speed is None else round(speed),
    }


def save_report(folder: RunFolder, write_report: WriteReport) -> None:
    """Write report.html of a run or a sweep into its folder; a failure is logged, for everything that it shows is stored already."""
    try:
        write_report([folder.uri], folder.local / "report.html")
        folder.push("report.html")
    except Exception as error:  # noqa: BLE001 - whatever fails, the report can be written again
        logger.warning("report.html could not be written (%s); `most-ray report` tries again", error)
