"""The dry run: plan, layout, memory, checkpoints and time of a run, without workers and without writing to its folder.

The run is prepared as runs/resolve.py does it, but in a temporary folder, so every mistake that is found there is found here. A model needs
no weights; if it is not on this machine, its published sizes are used. The network is never accessed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from most_ray.checkpoint import catalog
from most_ray.config import RunConfig
from most_ray.data.batch import rank_batch
from most_ray.data.ingest import Recipe, Runner, ingest_directory, run_here
from most_ray.data.store import TokenStore, read_checksummed_json
from most_ray.errors import ConfigError, DataError, count_of
from most_ray.io import hub, storage
from most_ray.io.run_folder import RunFolder, local_copy, model_source
from most_ray.model.build import init_model, read_config
from most_ray.model.configuration import MostConfig
from most_ray.planner import sampling
from most_ray.planner.assumed_records import TRAINING_RECORDS, WRITTEN_RECORDS, notes_of, write_assumed
from most_ray.planner.calibration import CALIBRATION_BATCHES, Calibration, calibrate
from most_ray.planner.hardware import Device, device_of
from most_ray.planner.layouts import LayoutChoice, LayoutEstimate, LayoutEstimator, steps_of
from most_ray.planner.memory import ModelShapes
from most_ray.planner.published_sizes import PUBLISHED, published_name
from most_ray.presets import PRESETS
from most_ray.records.files import record_files
from most_ray.records.record import TASKS
from most_ray.records.tokenizer import token_ids, train_tokenizer
from most_ray.runs.job import overrides_of
from most_ray.runs.resolve import Prepared, check_inputs, devices_of, open_sources, resolve_run, training_texts
from most_ray.runs.start_checks import walk
from most_ray.train.step import autocast_dtype

SMALL_BYTES = 256 << 20  # records of up to this size, all directories together, are ingested in full; of larger ones a sample
_STEPS = 32  # of the plan that are sampled
_STAND_IN_TOKENS = 16_000  # vocabulary of a stand-in for a missing tokenizer: about a token for each word, as in a large one


class Source(NamedTuple):
    """One directory of training records."""

    name: str
    records: int
    tokens: int
    share: float  # of the mix, in records or tokens as weight_unit has it
    passes: float  # over the directory in the run


@dataclass(frozen=True)
class DryRun:
    """The estimate of a run. Records, tokens, supervised tokens and packs are those of a mean step."""

    config: RunConfig
    device: Device
    model_name: str
    parameters: int
    sources: tuple[Source, ...]
    rejected: int  # records
    done_steps: int
    total_steps: int
    first_checkpoint: int  # step of the next checkpoint
    records: int
    tokens: float
    supervised: float
    packs: float  # packed rows
    layouts: tuple[LayoutEstimate, ...]  # on the fewest and on the most workers; one if these are equal
    choices: tuple[LayoutChoice, ...]  # all layouts of the most workers, best first
    calibration: Calibration | None  # what was measured, if the device is this machine's CPU
    notes: tuple[str, ...]  # what the figures are based on
    about_records: bool  # records were counted by samples, so that everything is an estimate
    about_tokens: bool  # or tokenised by a stand-in

    @property
    def layout(self) -> LayoutEstimate:
        """The run on the most workers."""
        return self.layouts[-1]

    @property
    def kept_bytes(self) -> int:
        """All checkpoints that stay on disk at most; one more is there while it is written."""
        return (self.config.keep_last + self.config.keep_best) * self.layout.checkpoint_bytes

    @property
    def seconds_to_first_checkpoint(self) -> float:
        return (self.first_checkpoint - self.done_steps) * self.layout.cost.seconds

    @property
    def seconds_to_end(self) -> float:
        return (self.total_steps - self.done_steps) * self.layout.cost.seconds


def dry_run(config: RunConfig, device: str = "") -> DryRun:
    """Estimate a run on a device (see `device_of`). Raises UserError for a mistake that `prepare_run` finds too, if it does not depend on
    where it runs; an unknown device; an unknown model."""
    checked = walk({"data": lambda: check_inputs(config, must_exist=False), "room": lambda: devices_of(config, must_be_here=False)})
    use_gpu, fewest, most = checked["room"]
    with tempfile.TemporaryDirectory(prefix="most_ray-dry-") as folder:
        preparation = _Preparation(config, Path(folder))
        return _estimate(config, preparation.prepare(use_gpu, fewest, most), preparation, device)


class _Preparation:
    """Prepares a run in a temporary folder."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.notes: list[str] = []  # what the run's figures are based on
        self.sampled = False  # some records were counted by samples
        self.stand_in = False  # the model's tokenizer was replaced by one trained on the records
        self._assumed: dict[str, Path] = {}  # where the records are that stand in for those of a directory that does not exist
        directories = {d: task for use in ("val", "train") for task in TASKS for d in config.directories(use, task)}
        for directory in (d for d in directories if not storage.exists(d)):
            target = folder / f"assumed-{len(self._assumed)}" / storage.base_name(directory)
            write_assumed(target, directories[directory], config.max_seq_length, len(self._assumed))
            self._assumed[directory] = target
        trained = {d for task in TASKS for d in config.directories("train", task)}
        for count, some in ((TRAINING_RECORDS, trained), (WRITTEN_RECORDS, directories.keys() - trained)):
            self.notes += notes_of([d for d in directories if d in self._assumed and d in some], count, config.max_seq_length)
        self._repeated = {directory: TRAINING_RECORDS / WRITTEN_RECORDS if directory in trained else 1.0 for directory in self._assumed}
        there = directories.keys() - self._assumed
        self._small = sum(entry.size for directory in there for entry in record_files(directory)) < SMALL_BYTES
        self._samples = 0

    def prepare(self, use_gpu: bool, fewest: int, most: int) -> Prepared:
        """Prepare the run on `fewest` to `most` workers as `prepare_run` does, with the run's own checkpoints if it has any."""
        store_dir = str(self.folder / "store")
        local = dataclasses.replace(self.config, model_name_or_path=self._model(), output_dir=str(self.folder), store_dir=store_dir)
        if self._assumed:  # which have no units.json, by which units are swapped: that leaves lengths as they are
            local = dataclasses.replace(local, unit_swap_prob=0.0)
        scratch = RunFolder(str(self.folder / "run"))
        try:
            sources = open_sources(local, scratch, run_here, self._ingest)
        except DataError as error:
            if error.field != "max_rejected_fraction":
                raise
            raise DataError(error.field, error.value, error.rule, "Fix the records or raise max_rejected_fraction.") from error
        if self.sampled or self.stand_in:  # then the plan differs from the one that a run has started with
            local = dataclasses.replace(local, accept_data_change=True)
        folder = RunFolder(self.config.run_uri) if storage.exists(self.config.run_uri) else scratch
        return resolve_run(local, folder, sources, use_gpu, fewest, most)

    def _texts(self, limit: int) -> Iterator[str]:
        """Texts of the training records, `limit` of each directory, for a tokenizer."""
        changes: dict[str, Any] = {
            f"train_{task}_dirs": tuple(str(self._assumed.get(d, d)) for d in self.config.directories("train", task)) for task in TASKS
        }
        return training_texts(dataclasses.replace(self.config, **changes), limit)

    def _model(self) -> str:
        """Return a folder with the model's configuration and a tokenizer."""
        name, folder = self.config.model_name_or_path, self.folder / "model"
        if name in PRESETS:
            init = storage.join(self.config.run_uri, "init")
            if catalog.committed(storage.join(self.config.run_uri, "checkpoints")) and storage.exists(init):
                return init
            init_model(name, self._texts(200_000), folder, self.config.seed)
            return str(folder)
        if storage.is_remote(name) or Path(name).exists():
            return model_source(name, known=PRESETS)
        if cached := hub.cached_folder(name):
            return cached
        known = published_name(name)
        if known is None:
            error = hub.missing_model(name, known=PRESETS)
            raise ConfigError(error.field, error.value, error.rule, f"{error.remedy} A dry run does not use the network.")
        is_published = name.removeprefix(hub.PREFIX) in PUBLISHED
        target = "models/most" if is_published else name
        stand_in = "and a tokenizer trained on the records instead of its own"
        make = f"most-ray init-model --from_deepseek {hub.PREFIX}{known} --output {target}"
        if hub.base_model(name) is None:
            make = f"the run whose export this is, {storage.parent(name)}"
        self.notes += [
            f"{name} is not on this machine: estimated with the published sizes of {known}, {stand_in}",
            f"before the run: {make}",
            *([f"and for the run: model_name_or_path: {target}"] if is_published else []),
        ]
        self.stand_in = True
        tokenizer = train_tokenizer(self._texts(sampling.SAMPLE_RECORDS), _STAND_IN_TOKENS)
        ids = token_ids(tokenizer)
        MostConfig(**PUBLISHED[known], first_audio_token=ids.unit_base, last_audio_token=ids.end_audio).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    def _ingest(self, directory: str, recipe: Recipe, store_dir: str, run: Runner) -> TokenStore:
        """Ingest all records of a small run; of a large one use the existing store, or a sample; of a directory that does not exist assume
        records."""
        if directory in self._assumed:
            self.sampled = True
            written = ingest_directory(self._assumed[directory], recipe, store_dir, run)
            return sampling.ExtrapolatedStore(written, self._repeated[directory], storage.absolute(directory))
        if self._small:
            return ingest_directory(directory, recipe, store_dir, run)
        root, source = self.config.store_uri, storage.redact(storage.absolute(directory))
        stores = storage.list_files(root, ("manifest.json",)) if storage.exists(root) else ()
        if any(_source_of(entry.uri) == source for entry in stores):
            with contextlib.suppress(_StoreMissingError):  # it has another recipe, or its records have changed: they are sampled
                return ingest_directory(directory, recipe, root, _refuse)
        self.sampled, self._samples = True, self._samples + 1
        sample = self.folder / f"sample-{self._samples}" / storage.base_name(directory)
        factor = sampling.copy_sample(directory, sample)
        store = sampling.ExtrapolatedStore(ingest_directory(sample, recipe, store_dir, run), factor, storage.absolute(directory))
        self.notes.append(f"{storage.redact(directory)}: about {count_of(len(store), 'record')}, by the first {sampling.SAMPLE_RECORDS:,}")
        return store


def _source_of(manifest: str) -> str | None:
    """The records that a token store was made from; None where its manifest is damaged."""
    try:
        return read_checksummed_json(manifest, "token store").get("source")
    except DataError:
        return None


class _StoreMissingError(Exception):
    """Parts of a token store would have to be made."""


def _refuse(*_: object) -> None:
    raise _StoreMissingError


def _estimate(config: RunConfig, prepared: Prepared, preparation: _Preparation, requested: str) -> DryRun:
    job, plan, first, world = prepared.job, prepared.plan, prepared.done_steps + 1, prepared.job.topology.world_size
    config = dataclasses.replace(config, bf16=job.config.bf16)
    dtype = autocast_dtype(config)
    device = device_of(requested, prepared.use_gpu, dtype, world, job.threads)
    model_config = read_config(local_copy(job.model_path), overrides_of(config))
    shapes, steps = ModelShapes(model_config), steps_of(plan, first, job.total_steps, _STEPS)
    calibration = None
    if device.speed is None:
        batches = [rank_batch(plan, first + k, 0, world, config.train_batch_size, job.layout) for k in range(CALIBRATION_BATCHES)]
        calibration = calibrate(model_config, config, batches, dtype, device.half_flops, job.threads)

    def estimator(workers: int) -> LayoutEstimator:
        speed = calibration.speed(workers) if calibration else device.speed
        assert speed is not None, "a device without assumed speed was measured"
        return LayoutEstimator(config, shapes, steps, workers, speed, device.is_gpu)

    ends = (prepared.topologies[0], prepared.topologies[-1])
    estimators = {topology: estimator(topology.world_size) for topology in ends}
    mix = plan.mix(job.total_steps)
    every = [config.save_steps, *([config.eval_steps] if job.has_validation and config.eval_steps else [])]
    return DryRun(
        config=config,
        device=device,
        model_name=storage.redact(config.model_name_or_path),
        parameters=shapes.count,
        sources=tuple(
            Source(name, len(store), store.manifest["n_tokens"], part["target"], part["records"] / len(store))
            for store, (name, part) in zip(plan.stores, mix.items(), strict=True)
        ),
        rejected=prepared.n_rejected,
        done_steps=prepared.done_steps,
        total_steps=job.total_steps,
        first_checkpoint=min(job.total_steps, *((prepared.done_steps // each + 1) * each for each in every)),
        records=job.plan.global_batch_size,
        tokens=float(np.mean([step.lengths.sum() for step in steps])),
        supervised=float(np.mean([step.supervised.sum() for step in steps])),
        packs=float(np.mean([len(step.packs) for step in steps])),
        layouts=tuple(each.estimate(topology) for topology, each in estimators.items()),
        choices=estimators[job.topology].choices(device.memory),
        calibration=calibration,
        notes=tuple(preparation.notes),
        about_records=preparation.sampled,
        about_tokens=preparation.sampled or preparation.stand_in,
    )
