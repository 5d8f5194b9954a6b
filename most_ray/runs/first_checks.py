"""What can be said of a run before torch, transformers or Ray are loaded: mistakes in its configuration and paths, and that it is complete.

Importing those libraries takes seconds, in which a command would seem to do nothing. `resolve.prepare_run` makes all checks, these too.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from typing import Any

from most_ray.checkpoint import catalog
from most_ray.config import OPTIONS, RunConfig, portable_yaml
from most_ray.data.ingest_plan import content_digest, read_units_manifest
from most_ray.data.store import digest
from most_ray.distributed.topology import plan_topologies
from most_ray.errors import ConfigError, UserError, count_of
from most_ray.io import storage
from most_ray.io.json_values import parse_json
from most_ray.io.run_folder import COMMIT, LEDGER, checkpoint_source, model_source, step_uri
from most_ray.presets import PRESETS
from most_ray.records.files import record_files
from most_ray.records.model_files import CONFIG, read_json_object
from most_ray.records.record import TASKS
from most_ray.runs.evaluator_checks import check_evaluators
from most_ray.runs.output_checks import check_outputs
from most_ray.runs.room import cluster_address, machine_gpus, uses_gpus, workers_of, workers_that_fit


def first_checks(config: RunConfig) -> None:
    """Find the mistakes that no library is needed for. Raises UserError."""
    check_outputs(config)
    check_directories(config)
    check_no_sweep(config)
    own = storage.join(config.run_uri, "checkpoints")
    if config.resume_from_checkpoint and not catalog.committed(own):
        catalog.read_marker(checkpoint_source(config.resume_from_checkpoint, "resume_from_checkpoint"))
    if config.model_name_or_path not in PRESETS:
        model_source(config.model_name_or_path, known=PRESETS)
    check_evaluators(config)
    check_sizes(config)


def check_directories(config: RunConfig, must_exist: bool = True) -> None:
    """Check that the directories of records exist and hold records. Raises ConfigError, and DataError for what is in a directory.
    `must_exist`: else those that do not are passed, as in a dry run, which assumes records."""
    if not (config.train_asr_dirs or config.train_tts_dirs or config.train_text_dirs):
        raise ConfigError("train_asr_dirs", (), "no training data is named.", "Name train_asr_dirs, train_tts_dirs or train_text_dirs.")
    for option in (each for each in OPTIONS.values() if each.location and each.location.must_exist):
        directories = option.elements(getattr(config, option.name))
        missing = [directory for directory in directories if not storage.exists(directory)]
        if missing and must_exist:
            remedy = "Check the path; it is taken from where the command runs."
            raise ConfigError(option.name, storage.redact(missing[0]), "does not exist.", remedy)
        there = [directory for directory in directories if directory not in missing]
        for directory in there:
            if not storage.is_remote(directory):
                record_files(directory)  # raises DataError where it holds none, or something that cannot be read
        real = {d if storage.is_remote(d) else os.path.realpath(storage.local(d)) for d in directories}
        if len(real) != len(directories):
            raise ConfigError(option.name, tuple(map(storage.redact, directories)), "names a directory twice.")
        for directory in there:
            read_units_manifest(directory)  # raises DataError for a wrong one


def check_no_sweep(config: RunConfig) -> None:
    """Raise ConfigError where the run's folder is a sweep's."""
    if storage.exists(storage.join(config.run_uri, LEDGER)):
        raise ConfigError("name", config.name, f"is a sweep's: {storage.redact(config.run_uri)} holds {LEDGER}.", "Choose another name.")


def known_workers(config: RunConfig) -> tuple[int, ...] | None:
    """The fewest and the most workers that a configuration requests; None where only the cluster knows them."""
    if cluster_address(config):
        return config.num_workers
    gpus = machine_gpus()
    return workers_of(config, uses_gpus(config, gpus), gpus)


def workers_here(config: RunConfig) -> int | None:
    """The most workers that a run will have on this machine; None where it is on a cluster."""
    if cluster_address(config):
        return None
    gpus = machine_gpus()
    use_gpu = uses_gpus(config, gpus)
    fewest, most = workers_of(config, use_gpu, gpus)
    return max(fewest, min(most, workers_that_fit(config, use_gpu)))


def check_sizes(config: RunConfig) -> None:
    """Raise TopologyError where workers and experts do not fit the sizes that are requested, ConfigError for rows that are longer than the
    model's positions; as far as these are known without torch."""
    model, numbers = _described(config.model_name_or_path), known_workers(config)
    if numbers and (n_experts := model.get("n_routed_experts")):
        plan_topologies(numbers[0], numbers[-1], config.ep_size, config.dp_replicate_size, n_experts)
    if positions := model.get("max_position_embeddings"):
        check_positions(config, positions)


def check_positions(config: RunConfig, positions: int) -> None:
    """Raise ConfigError for rows that are longer than the model's positions."""
    if config.max_seq_length > positions:
        raise ConfigError("max_seq_length", config.max_seq_length, f"is beyond the model's {count_of(positions, 'position')}.")


def _described(model: str) -> dict[str, int]:
    """Positive whole numbers by which a preset, or a model in a folder of this machine, is described; empty where they are not known yet,
    or where the model cannot be read, of which more is said when it is."""
    values: dict[str, Any] | None = PRESETS.get(model)
    if values is None and not storage.is_remote(model) and os.path.isdir(model):
        with contextlib.suppress(UserError):
            values = read_json_object(model, CONFIG)
    return {name: value for name, value in (values or {}).items() if type(value) is int and value > 0}


def inputs_digest(config: RunConfig) -> str:
    """Digest of a configuration, without the place of the run's folder, and of the records that it names."""
    directories = [each for use in ("train", "val") for task in TASKS for each in config.directories(use, task)]
    contents = [content_digest(each, config.store_uri) for each in directories]
    return digest(json.dumps([portable_yaml(config, config.run_uri, without=("output_dir", "name")), contents]).encode())


def unchanged_summary(config: RunConfig) -> dict[str, Any] | None:
    """summary.json of a run that was finished with this very configuration and these records, and whose last checkpoint is intact; None
    where `resolve.prepare_run` has to find out what is left to do."""
    try:
        summary = parse_json(storage.read_bytes(storage.join(config.run_uri, "summary.json")))
        step, inputs = summary["step"], summary["inputs"]
    except (OSError, ValueError, KeyError, TypeError):  # not finished, or by an earlier version
        return None
    checkpoints = storage.join(config.run_uri, "checkpoints")
    if not isinstance(step, int) or not storage.exists(storage.join(step_uri(checkpoints, step), COMMIT)):
        return None
    if inputs != inputs_digest(config) or catalog.latest_valid(checkpoints)[0] != step_uri(checkpoints, step):
        return None
    return dict(summary)


def summary_paths(total_steps: int) -> dict[str, str]:
    """What summary.json names in the run's folder, by paths relative to it: a run that was moved, copied or renamed names its own."""
    return {"checkpoint": step_uri("checkpoints", total_steps), "export": "export", "report": "report.html"}


def placed(summary: dict[str, Any], run_uri: str) -> dict[str, Any]:
    """The content of summary.json as it is shown: with the paths of what is in the run's folder, wherever that was when it was written."""
    ways = summary_paths(int(summary["step"]))
    return {**summary, **{name: storage.redact(storage.join(run_uri, way)) for name, way in ways.items()}}


def completed_line(name: str, total_steps: int, changed: Sequence[str] = ()) -> str:
    """What a start of a run that is complete says. `changed`: settings that were not those of the run."""
    without_effect = f" Changed since, without effect: {', '.join(changed)}." if changed else ""
    return f"The run {name!r} is complete ({count_of(total_steps, 'step')}); nothing to do.{without_effect}"
