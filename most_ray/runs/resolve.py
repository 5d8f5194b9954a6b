"""From a configuration to a run that can start. Everything that a user may have got wrong is found here, before a worker starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from most_ray.checkpoint import catalog, reader
from most_ray.checkpoint.resume import all_changes, check_model
from most_ray.config import OPTIONS, Overlong, RunConfig
from most_ray.data.batch import TokenLayout
from most_ray.data.ingest import Recipe, Runner, check_rejected, ingest_directory, run_here
from most_ray.data.ingest_plan import content_digest
from most_ray.data.plan import Plan, make_spec
from most_ray.data.plan import check_units as one_unit_identity
from most_ray.data.store import TokenStore
from most_ray.distributed.devices import prefers_bf16
from most_ray.distributed.topology import Topology, plan_topologies
from most_ray.errors import CheckpointError, ConfigError, RecordError, count_of, nearest
from most_ray.io import storage
from most_ray.io.json_values import parse_json
from most_ray.io.run_folder import RunFolder, checkpoint_source, local_copy, model_source
from most_ray.model.build import check_template, check_units, init_model, read_config, read_description
from most_ray.model.compat import check_workers
from most_ray.optim.optimizer import check_available
from most_ray.presets import PRESETS
from most_ray.records.files import REJECTED, SPEECH_FOLDER, read_raw, record_files
from most_ray.records.record import TASKS, parse_record
from most_ray.records.template import Vocabulary, template_texts
from most_ray.records.tokenizer import vocabulary_of
from most_ray.runs.environment import command_line
from most_ray.runs.evaluator_checks import check_evaluators, check_vocoder_is_found
from most_ray.runs.first_checks import check_directories, check_no_sweep, check_positions
from most_ray.runs.job import Job, overrides_of, threads_of
from most_ray.runs.output_checks import check_outputs
from most_ray.runs.overlap import warn_of_overlaps
from most_ray.runs.room import cluster_address, machine_gpus, no_gpu, uses_gpus, workers_of, workers_that_fit
from most_ray.runs.start_checks import walk
from most_ray.speech.units.assets import copy_assets, find_assets

# The checksums of a token store of at most this size are compared before a run starts; a larger one's as it is read.
VERIFIED_BYTES = 2 << 30
MADE_FROM = "made_from.json"  # in the folder of a preset's starting model: what it was made from

MakeRunner = Callable[[RunConfig, bool], Runner]  # a configuration and whether GPUs are used -> what ingests records
IngestFn = Callable[[str, Recipe, str, Runner], TokenStore]  # directory, recipe, folder of token stores, runner -> its token store


def ingest_here(_config: RunConfig, _use_gpu: bool) -> Runner:
    """The runner that ingests records in this process."""
    return run_here


@dataclass(frozen=True)
class Prepared:
    """A run that passed every check."""

    job: Job  # laid out for the largest of `topologies`
    plan: Plan
    folder: RunFolder
    topologies: tuple[Topology, ...]  # by ascending number of workers; the run may have any of these numbers
    done_steps: int  # the step of the newest valid checkpoint
    use_gpu: bool
    n_rejected: int  # bad records of all sources
    corrupt: list[tuple[str, str]]  # (URI, reason) of newer checkpoints, which are damaged
    changed: list[str]  # what changed since that checkpoint and makes the run continue otherwise, settings with their values
    also_changed: list[str] = field(default_factory=list)  # settings that changed since then and on which no step depends

    def job_for(self, topology: Topology, driver: str) -> Job:
        """The job of one attempt, which process `driver` starts. At any number of workers its steps hold the same records."""
        threads = threads_of(self.job.config, self.use_gpu, topology.world_size)
        return replace(self.job, topology=topology, threads=threads, driver=driver)


def prepare_run(config: RunConfig, runner: MakeRunner = ingest_here, workers: int | None = None, gpus: int | None = None) -> Prepared:
    """Check everything that can be checked without a worker, and make what the workers need: token stores and a starting model. Raises
    UserError for anything that a user can fix.

    Args:
        runner: makes what ingests records.
        workers: the number of workers, where it is fixed already.
        gpus: GPUs of the cluster (None: of this machine).
    """
    room = partial(devices_of, config, gpus=gpus)
    checked = walk({"storage": partial(check_outputs, config), "data": partial(_check_all_inputs, config), "room": room})
    use_gpu, fewest, most = checked["room"]
    folder = RunFolder(config.run_uri)
    sources = open_sources(config, folder, runner(config, use_gpu))
    # Of a range, as many workers as there is room for: on this machine that does not change.
    here = workers is None and gpus is None and not cluster_address(config)
    fit = workers_that_fit(config, use_gpu) if here else None
    return resolve_run(config, folder, sources, use_gpu, workers or fewest, workers or most, fit)


def resolve_run(
    config: RunConfig, folder: RunFolder, sources: Sources, use_gpu: bool, fewest: int, most: int, fit: int | None = None
) -> Prepared:
    """The run of a configuration and its sources, with `fewest` to `most` workers, of which there is room for `fit` (None: for all). Raises
    UserError where configuration, sources and checkpoint contradict each other."""
    # Workers have another working directory, on which the paths that they open must not depend.
    opened = [option for option in OPTIONS.values() if option.location and option.location.by_workers]
    config = replace(config, **{option.name: option.map(storage.absolute, getattr(config, option.name)) for option in opened})
    stores = sources.training + sources.validation
    model_config = read_config(local_copy(sources.model_path), overrides_of(config))
    planned = plan_topologies(fewest, most, config.ep_size, config.dp_replicate_size, model_config.n_routed_experts)
    topologies = tuple(each for each in planned if fit is None or each.world_size <= fit) or planned[:1]
    check_positions(config, model_config.max_position_embeddings)
    for store in stores:
        store.verify(VERIFIED_BYTES)
    _check_best_metric(config, sources.validation)
    uri, start, corrupt = _starting_point(config, folder, sources.vocabulary.fingerprint())
    if config.bf16 is None:
        # Checkpoints that do not state it are from versions in which float32 was the default.
        config = replace(config, bf16=not config.fp16 and (bool(start.get("bf16")) if start else prefers_bf16(use_gpu)))
    spec = make_spec(config, sources.training, _global_batch_size(config, most, start))
    units = one_unit_identity(stores)
    if not config.accept_data_change:
        check_units(model_config, units, sources.model_path)
    plan = Plan(spec, sources.training)
    plan.source_named(config.epochs_of)  # also where max_steps leaves it unused: a name that is wrong was meant to have an effect
    ids = sources.vocabulary.ids
    job = Job(
        config=config,
        run_uri=folder.uri,
        model_path=sources.model_path,
        driver="",
        plan=spec,
        layout=TokenLayout(model_config.first_audio_token, model_config.last_audio_token, ids.pad, ids.unit_base),
        topology=topologies[-1],
        total_steps=config.max_steps or plan.steps_for_epochs(config.epochs, config.epochs_of),
        threads=threads_of(config, use_gpu, topologies[-1].world_size),
        units_identity=units,
        has_validation=bool(sources.validation),
        command=command_line(),
    )
    changed, also, done = list[str](), list[str](), int(start["step"]) if start else 0
    if start and uri:
        changed, also = all_changes(uri, start, plan, config, model_config, job.total_steps)
        _check_trained(uri, start, job.total_steps)
    elif uri:
        check_model(uri, model_config)
    return Prepared(job, plan, folder, topologies, done, use_gpu, sources.n_rejected, corrupt, changed, also)


def _check_trained(uri: str, start: dict[str, Any], total_steps: int) -> None:
    """Raise CheckpointError where a run has made all its steps and has skipped every one: its last checkpoint is its first model."""
    if start["step"] >= total_steps and start["skipped_in_row"] >= start["step"]:
        skipped = count_of(start["step"], "step")
        rule = f"ends a run that has trained nothing: of {skipped} all were skipped, as losses or gradients were not finite."
        raise CheckpointError("checkpoint", storage.redact(uri), rule, "See the run's warnings, and give it another name.")


def _check_best_metric(config: RunConfig, validation: Sequence[TokenStore]) -> None:
    """Raises ConfigError where best_metric would never have a value, so that keep_best would keep nothing."""
    kind, _, name = config.best_metric.partition("/")
    sets = [f"{store.task}/{store.name}" for store in validation if kind == "loss" or store.task == "asr"]
    if config.keep_best and not any(not name or known == name or known.endswith(f"/{name}") for known in sets):
        raise ConfigError("best_metric", config.best_metric, "is measured on no validation set.", nearest(name, [*sets, "wer", "loss"]))


def check_inputs(config: RunConfig, must_exist: bool = True) -> None:
    """Check that the directories of records exist, that the run's folder is not a sweep's, and that the libraries it needs are installed,
    else raise ConfigError. `must_exist`: see `check_directories`."""
    check_available(config)
    check_directories(config, must_exist)
    check_no_sweep(config)


def _check_all_inputs(config: RunConfig) -> None:
    """`check_inputs`, and that a model in a folder of this machine and a checkpoint to start from can be read: before anything is made for
    the run."""
    check_inputs(config)
    if config.resume_from_checkpoint and not catalog.committed(storage.join(config.run_uri, "checkpoints")):
        reader.read_state(checkpoint_source(config.resume_from_checkpoint, "resume_from_checkpoint"))
    check_evaluators(config)
    model = config.model_name_or_path
    if model not in PRESETS and not storage.is_remote(model):
        model = local_copy(model_source(model, known=PRESETS))
        read_description(model, overrides_of(config))
    check_vocoder_is_found(config, model)


@dataclass(frozen=True)
class Sources:
    """The token stores of a run, and the model whose tokenizer they were made with."""

    model_path: str  # folder or name on the hub of the model to start from
    vocabulary: Vocabulary
    training: list[TokenStore]  # in the order asr, tts, text
    validation: list[TokenStore]  # in the same order
    n_rejected: int  # bad records of all stores


def open_sources(config: RunConfig, folder: RunFolder, run: Runner = run_here, ingest: IngestFn = ingest_directory) -> Sources:
    """Open the token stores of all directories; build those that are missing or whose records have changed. Raises UserError where a
    directory or the model is missing, holds nothing usable, or has too many bad records.

    Args:
        folder: the run's folder, for a preset's model and for the list of rejected records.
        run: carries out the parts of an ingestion.
        ingest: opens or builds the token store of one directory.
    """
    model_path = _model_path(config, folder)
    model_config, tokenizer = read_description(local_copy(model_path), overrides_of(config))
    if not config.accept_data_change:
        check_template(model_config, model_path)
    vocabulary = vocabulary_of(tokenizer)

    def stores_of(use: Literal["train", "val"], limit: int, overlong: Overlong) -> list[TokenStore]:
        return [
            ingest(directory, Recipe(task, vocabulary, limit, overlong), config.store_uri, run)
            for task in TASKS
            for directory in config.directories(use, task)
        ]

    training = stores_of("train", config.max_seq_length, config.overlong)
    # As in `most-ray evaluate`: a record that the model has positions for is scored, however long the packed rows of training are.
    validation = stores_of("val", model_config.max_position_embeddings, "reject")
    n_rejected = check_rejected(training + validation, config.max_rejected_fraction, folder.local / REJECTED)
    folder.push(REJECTED)
    warn_of_overlaps(training, validation)
    return Sources(model_path, vocabulary, training, validation, n_rejected)


def keep_speech_assets(prepared: Prepared) -> None:
    """Copy the files that convert recordings to the run's units, and units to sound, into the run's folder: from the training records, or
    from the model that the run starts from."""
    config, identity = prepared.job.config, prepared.job.units_identity
    start = find_assets(prepared.job.model_path, identity)
    copy_assets([*config.train_asr_dirs, *config.train_tts_dirs, *filter(None, [start])], prepared.folder.at(SPEECH_FOLDER), identity)


def make_stores(config: RunConfig, verify: bool = False, runner: MakeRunner = ingest_here) -> list[TokenStore]:
    """The token stores of a configuration, for `most-ray prepare store`. Raises UserError as `open_sources`, and for a damaged shard.
    `verify`: compare the checksums of all stores, however large they are, `runner`: makes what ingests records."""
    check_outputs(config)
    check_directories(config)
    sources = open_sources(config, RunFolder(config.run_uri), runner(config, False))
    stores = sources.training + sources.validation
    for store in stores:
        store.verify(None if verify else VERIFIED_BYTES)
    return stores


def _model_path(config: RunConfig, folder: RunFolder) -> str:
    """Folder or name on the hub of the model to start from. A preset's model is made once per run, with a tokenizer for the training
    records."""
    name = config.model_name_or_path
    if name not in PRESETS:
        return model_source(name, known=PRESETS)
    uri = folder.at("init")
    if catalog.committed(folder.checkpoints) and storage.exists(storage.join(uri, "config.json")):
        return uri  # the run has started from it
    directories = [directory for task in TASKS for directory in config.directories("train", task)]
    made_from = {"preset": name, "seed": config.seed, "content": [content_digest(each, config.store_uri) for each in directories]}
    try:
        made = parse_json(storage.read_bytes(storage.join(uri, MADE_FROM)))
    except (FileNotFoundError, ValueError):  # no model yet, or one whose making was cut short
        made = None
    if made != made_from:
        temporary = folder.local / ".init.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        init_model(name, training_texts(config), temporary, config.seed)
        (temporary / MADE_FROM).write_text(json.dumps(made_from), encoding="utf-8")
        shutil.rmtree(folder.local / "init", ignore_errors=True)
        temporary.rename(folder.local / "init")
        folder.push_folder("init", MADE_FROM)
    return uri


def training_texts(config: RunConfig, limit: int = 200_000) -> Iterator[str]:
    """Texts of the training records, to train a tokenizer on: of at most `limit` records of each directory."""
    for task in TASKS:
        for directory in config.directories("train", task):
            yield from texts_of(directory, limit)


def texts_of(directory: str | Path, limit: int = 200_000) -> Iterator[str]:
    """Texts of a directory's first `limit` valid records, as the template spells them."""
    count = 0
    for entry in record_files(directory):
        for _, raw in read_raw(entry.uri):
            if count >= limit:
                return
            try:
                if not isinstance(raw, RecordError):
                    yield from template_texts(parse_record(raw))
                    count += 1
            except RecordError:
                continue  # ingestion rejects it and reports the reason


def devices_of(config: RunConfig, must_be_here: bool = True, gpus: int | None = None) -> tuple[bool, int, int]:
    """Whether a run uses GPUs, and its fewest and most workers. Raises ConfigError where GPUs are requested and there are none, or the
    installed transformers cannot lay a model out over that many workers.

    Args:
        must_be_here: GPUs must be on this machine or on a cluster that is named.
        gpus: GPUs of the cluster (None: of this machine).
    """
    here = must_be_here and gpus is None and not cluster_address(config)
    gpus = machine_gpus() if gpus is None else gpus
    use_gpu = uses_gpus(config, gpus)
    if here and use_gpu and gpus == 0:
        raise no_gpu()
    fewest, most = workers_of(config, use_gpu, gpus)
    check_workers(most)
    return use_gpu, fewest, most


def _starting_point(
    config: RunConfig, folder: RunFolder, vocabulary: dict[str, str]
) -> tuple[str | None, dict[str, Any] | None, list[tuple[str, str]]]:
    """Where a run starts from. Raises CheckpointError where resume_from_checkpoint is damaged, or was made with another vocabulary.

    Returns:
        The URI of the checkpoint whose weights it starts with (None: the model's); the content of its state.json where the run also resumes
        from its step (None: it starts at step 0); and (URI, reason) of newer checkpoints, which are damaged.
    """
    own, corrupt = catalog.latest_valid(folder.checkpoints)
    catalog.require_valid(own, corrupt)
    if own:
        return own, reader.read_state(own), corrupt
    given = config.resume_from_checkpoint
    if not given:
        return None, None, corrupt
    given = checkpoint_source(given, "resume_from_checkpoint")
    content = reader.read_state(given)
    if damage := catalog.find_corruption(given, deep=True):
        raise CheckpointError("resume_from_checkpoint", storage.redact(given), f"is damaged: {damage}.", "Name another one.")
    if not config.ignore_optimizer_state:
        return given, content, corrupt
    if content["ingredients"]["vocabulary"] != vocabulary:
        rule = "was trained with another tokenizer or template than model_name_or_path's, so its embeddings would mean other tokens."
        remedy = "Name that run's init or export folder as model_name_or_path."
        raise CheckpointError("resume_from_checkpoint", storage.redact(given), rule, remedy)
    return given, None, corrupt


def _global_batch_size(config: RunConfig, n_workers: int, start: dict[str, Any] | None) -> int:
    """Records per optimizer step. Without a key for it, a resumed run keeps the number that it began with, however many workers it has."""
    if config.global_batch_size:
        return config.global_batch_size
    if start:
        return int(start["ingredients"]["global_batch_size"])
    size = config.train_batch_size * config.gradient_accumulation_steps * n_workers
    OPTIONS["global_batch_size"].check(size)
    return size
