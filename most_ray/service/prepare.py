"""From a configuration to a run that can start: everything that a user may have got wrong is found here, before a worker starts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from most_ray import storage
from most_ray.config import RunConfig
from most_ray.data.batch import TokenLayout
from most_ray.data.ingest import Recipe, check_rejected, content_of, ingest_directory
from most_ray.data.plan import Cursor, Plan, check_cursor, make_spec
from most_ray.data.plan import check_units as one_unit_identity
from most_ray.data.store import TokenStore
from most_ray.errors import CheckpointError, ConfigError, RecordError
from most_ray.evaluation.evaluate import EvaluationSettings
from most_ray.model.build import PRESETS, check_template, check_units, init_model, read_config
from most_ray.model.tokenizer import load_tokenizer, vocabulary_of
from most_ray.records import TASKS, Task, parse_record, read_raw, record_files
from most_ray.service.ingest import runner_of
from most_ray.service.preflight import check_places
from most_ray.service.validation import ValidationJob
from most_ray.service.worker import WorkerJob, overrides_of
from most_ray.template import Vocabulary, template_texts
from most_ray.train import checkpoint
from most_ray.train.topology import plan_topology

VERIFIED_BYTES = 2 << 30  # a store of at most so many is read through before a run starts; a larger one is checked as it is read


@dataclass(frozen=True)
class Prepared:
    """A run that passed every check. `done_steps`: steps behind the newest checkpoint; `accepted`: what changed since."""

    job: WorkerJob
    plan: Plan
    done_steps: int
    use_gpu: bool
    n_rejected: int
    accepted: list[str]


def prepare_run(config: RunConfig) -> Prepared:
    """Check everything that can be checked without a worker, and make what the workers need.

    Raises:
        UserError: whatever a user can mend.
    """
    check_places(config)
    _check_directories(config)
    # Workers have another working directory: what they open themselves must not depend on it.
    config = replace(
        config,
        trace_records=_absolute(config.trace_records),
        resume_from_checkpoint=_absolute(config.resume_from_checkpoint),
    )
    run_dir = config.run_dir.absolute()
    use_gpu, n_workers = _devices(config)
    sources = open_sources(config, run_dir, use_gpu)
    model_path, vocabulary, stores, validation_stores = sources.model_path, sources.vocabulary, sources.training, sources.validation
    model_config = read_config(model_path, overrides_of(config))
    topology = plan_topology(n_workers, config.ep_size, config.dp_replicate_size, model_config.n_routed_experts)
    if config.max_seq_length > model_config.max_position_embeddings:
        raise ConfigError(
            "max_seq_length", config.max_seq_length, f"is beyond the model's {model_config.max_position_embeddings} positions."
        )
    for store in stores + validation_stores:
        store.verify(VERIFIED_BYTES)
    start = _starting_point(config, run_dir, vocabulary.fingerprint())
    spec = make_spec(config, stores, _global_batch_size(config, n_workers, start))
    units = one_unit_identity(stores + validation_stores)
    if not config.accept_data_change:
        check_units(model_config, units, model_path)
    plan = Plan(spec)
    total_steps = config.max_steps or plan.steps_for_epochs(config.epochs, config.epochs_of)
    accepted = check_cursor(plan, Cursor(**start["cursor"]), start["ingredients"], config.accept_data_change) if start else []
    done = int(start["step"]) if start else 0
    threads = config.threads_per_worker or (1 if use_gpu else max(1, (os.cpu_count() or 1) // n_workers))
    settings = EvaluationSettings(config.eval_batch_size, config.max_new_tokens, config.max_rejected_fraction)
    job = WorkerJob(
        config=config,
        run_dir=str(run_dir),
        model_path=model_path,
        driver="",
        plan=spec,
        layout=TokenLayout(model_config.first_audio_token, model_config.last_audio_token, vocabulary.ids.pad, vocabulary.ids.unit_base),
        topology=topology,
        total_steps=total_steps,
        threads=threads,
        units_identity=units,
        validation=ValidationJob(
            tuple(map(storage.absolute, config.val_asr_dirs)),
            tuple(map(storage.absolute, config.val_tts_dirs)),
            settings,
            store_dir_of(config),
        )
        if validation_stores
        else None,
    )
    return Prepared(job, plan, done, use_gpu, sources.n_rejected, accepted)


def _absolute(path: str | None) -> str | None:
    return str(Path(path).absolute()) if path else None


def _check_directories(config: RunConfig) -> None:
    if not (config.train_asr_dirs or config.train_tts_dirs or config.train_text_dirs):
        raise ConfigError("train_asr_dirs", (), "no training data is named.", "Name train_asr_dirs, train_tts_dirs or train_text_dirs.")
    for name in ("train_asr_dirs", "train_tts_dirs", "train_text_dirs", "val_asr_dirs", "val_tts_dirs"):
        directories = getattr(config, name)
        for directory in directories:
            if not storage.exists(directory):
                raise ConfigError(name, directory, "does not exist.", "Check the path; it is taken from where the command runs.")
        real = [d if storage.is_remote(d) else os.path.realpath(storage.local(d)) for d in directories]
        if len(set(real)) != len(real):
            raise ConfigError(name, directories, "names a directory twice.")


@dataclass(frozen=True)
class Sources:
    """The token stores of a run, in the order asr, tts, text, and what they were made with."""

    model_path: str
    vocabulary: Vocabulary
    training: list[TokenStore]
    validation: list[TokenStore]
    n_rejected: int


def open_sources(config: RunConfig, run_dir: Path, use_gpu: bool = False) -> Sources:
    """Token stores of all directories: those that are there, and new ones for what is new or has changed.

    Raises:
        UserError: a directory or the model is not there, holds nothing usable, or too many bad records.
    """
    model_path = _model_path(config, run_dir)
    model_config = read_config(model_path, overrides_of(config))
    if not config.accept_data_change:
        check_template(model_config, model_path)
    vocabulary = vocabulary_of(load_tokenizer(model_path))
    run = runner_of(config, use_gpu)
    store_dir = store_dir_of(config)

    def stores_of(use: str, tasks: Sequence[Task], limit: int) -> list[TokenStore]:
        return [
            ingest_directory(directory, Recipe(task, vocabulary, limit, config.overlong if use == "train" else "reject"), store_dir, run)
            for task in tasks
            for directory in getattr(config, f"{use}_{task}_dirs")
        ]

    training = stores_of("train", TASKS, config.max_seq_length)
    # As `most-ray evaluate` does it: a record that the model can read is scored, however long the rows of training are.
    validation = stores_of("val", ("asr", "tts"), model_config.max_position_embeddings)
    n_rejected = check_rejected(training + validation, config.max_rejected_fraction, run_dir / "rejected.jsonl")
    return Sources(model_path, vocabulary, training, validation, n_rejected)


def make_stores(config: RunConfig, verify: bool = False) -> list[TokenStore]:
    """`most-ray prepare store`: the token stores of a configuration; with `verify`, read through.

    Raises:
        UserError: as `open_sources`, or a damaged shard.
    """
    check_places(config)
    _check_directories(config)
    sources = open_sources(config, config.run_dir.absolute())
    stores = sources.training + sources.validation
    for store in stores:
        store.verify(None if verify else VERIFIED_BYTES)
    return stores


def store_dir_of(config: RunConfig) -> str:
    return storage.absolute(config.store_dir or str(Path(config.output_dir) / "store"))


def _model_path(config: RunConfig, run_dir: Path) -> str:
    """The folder to start from; a preset is made once per run, with a tokenizer of the training records."""
    if config.model_name_or_path not in PRESETS:
        local = Path(config.model_name_or_path)
        return str(local.absolute()) if local.exists() else config.model_name_or_path
    directory = run_dir / "init"
    if checkpoint.committed(run_dir / "checkpoints") and (directory / "config.json").exists():
        return str(directory)  # the run has begun with it
    made_from = {"preset": config.model_name_or_path, "seed": config.seed, "content": _training_content(config)}
    note = directory / "made_from.json"
    if not note.exists() or json.loads(note.read_text(encoding="utf-8")) != made_from:
        temporary = run_dir / ".init.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        init_model(config.model_name_or_path, training_texts(config), temporary, config.seed)
        (temporary / note.name).write_text(json.dumps(made_from), encoding="utf-8")
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
    return str(directory)


def _training_content(config: RunConfig) -> list[str]:
    directories = [d for task in TASKS for d in getattr(config, f"train_{task}_dirs")]
    return [content_of(directory, store_dir_of(config)) for directory in directories]


def training_texts(config: RunConfig, limit: int = 200_000) -> Iterator[str]:
    """Texts of the training records, for a tokenizer: at most `limit` records of each directory."""
    for task in TASKS:
        for directory in getattr(config, f"train_{task}_dirs"):
            yield from texts_of(directory, limit)


def texts_of(directory: str | Path, limit: int = 200_000) -> Iterator[str]:
    """Texts of a directory's good records as the template spells them."""
    count = 0
    for entry in record_files(directory):
        for _, raw in read_raw(entry.place):
            if count >= limit:
                return
            try:
                if not isinstance(raw, RecordError):
                    yield from template_texts(parse_record(raw))
                    count += 1
            except RecordError:
                continue  # ingest sets it aside with its reason


def _devices(config: RunConfig) -> tuple[bool, int]:
    gpus = torch.cuda.device_count()
    use_gpu = config.use_gpu if config.use_gpu is not None else gpus > 0
    if use_gpu and gpus == 0 and not (config.ray_address or os.environ.get("RAY_ADDRESS")):
        raise ConfigError("use_gpu", True, "but this machine has no GPU.", "Leave it out, or name a cluster with ray_address.")
    return use_gpu, config.num_workers or (max(1, gpus) if use_gpu else 1)


def _starting_point(config: RunConfig, run_dir: Path, vocabulary: dict[str, str]) -> dict[str, Any] | None:
    """state.json of the checkpoint whose step the run will go on from; None where it begins anew."""
    own = checkpoint.committed(run_dir / "checkpoints")
    if own:
        return checkpoint.read_state(own[-1])
    if config.resume_from_checkpoint:
        content = checkpoint.read_state(Path(config.resume_from_checkpoint))
        if not config.ignore_optimizer_state:
            return content
        if content["ingredients"]["vocabulary"] != vocabulary:
            raise CheckpointError(
                "resume_from_checkpoint",
                config.resume_from_checkpoint,
                "was trained with another tokenizer or template than model_name_or_path's, so its embeddings would mean other tokens.",
                "Name that run's init or export folder as model_name_or_path.",
            )
    return None


def _global_batch_size(config: RunConfig, n_workers: int, start: dict[str, Any] | None) -> int:
    """Where it is not given, a run that goes on keeps what it began with, whatever its number of workers is now."""
    if config.global_batch_size:
        return config.global_batch_size
    if start:
        return int(start["ingredients"]["global_batch_size"])
    return config.train_batch_size * config.gradient_accumulation_steps * n_workers
