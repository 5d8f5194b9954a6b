"""What a run would be: its plan, layout, memory, checkpoints and time, without a worker and with nothing written into its folder.

The run is prepared as `prepare.py` prepares it, in a temporary folder, so every mistake that is found there is found here. A model needs
no weights; one that is not on this machine has its published sizes. The network is never asked.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from most_ray.checkpoint import catalog
from most_ray.config import RunConfig
from most_ray.data.batch import rank_batch
from most_ray.data.ingest import Recipe, Runner, ingest_directory, read_units_manifest, run_here
from most_ray.data.store import TokenStore
from most_ray.distributed.topology import Topology
from most_ray.errors import ConfigError, DataError, RecordError
from most_ray.io import storage
from most_ray.io.run_folder import RunFolder, local_copy
from most_ray.model.build import PRESETS, init_model, read_config
from most_ray.model.configuration import MostConfig
from most_ray.planner.calibration import CALIBRATED, Calibration, calibrate
from most_ray.planner.hardware import Device, device_of
from most_ray.planner.layouts import Choice, Layout, LayoutEstimator, steps_of
from most_ray.planner.memory import Memory, Shapes
from most_ray.planner.published_sizes import PUBLISHED, published_name
from most_ray.records.files import UNITS_MANIFEST, read_with_offsets, record_files
from most_ray.records.record import TASKS
from most_ray.records.tokenizer import token_ids, train_tokenizer
from most_ray.runs.job import overrides_of
from most_ray.runs.resolve import Prepared, check_inputs, devices_of, open_sources, resolve_run, training_texts
from most_ray.train.step import Precision

SMALL_BYTES = 256 << 20  # records of so many bytes in all are taken in, larger ones by a sample
SAMPLE_RECORDS = 2000  # of each directory
_STEPS = 32  # of the plan that are looked at
_STAND_IN_TOKENS = 16_000  # of a tokenizer in place of one that is not here: about a token for each word, as a large one


@dataclass(frozen=True)
class Source:
    """One directory's records and tokens, its share of what weights count, and passes over it in the run."""

    name: str
    records: int
    tokens: int
    share: float
    passes: float


@dataclass(frozen=True)
class DryRun:
    """What a run would be. layouts: on its fewest and its most workers, one where these are the same; choices: all layouts of the most,
    the best first. calibration: what was measured of this machine's CPU, where it is the device. Records, tokens, supervised tokens and
    packed rows are those of a mean step. notes: what its figures rest on. about_records: records were counted by samples; about_tokens:
    or were tokenised by a stand-in. What follows from them is an estimate too."""

    config: RunConfig
    device: Device
    use_gpu: bool
    model_name: str
    parameters: int
    sources: tuple[Source, ...]
    rejected: int
    done_steps: int
    total_steps: int
    first_checkpoint: int
    records: int
    tokens: float
    supervised: float
    packs: float
    layouts: tuple[Layout, ...]
    choices: tuple[Choice, ...]
    calibration: Calibration | None
    notes: tuple[str, ...]
    about_records: bool
    about_tokens: bool

    @property
    def topology(self) -> Topology:
        return self.layouts[-1].topology

    @property
    def memory(self) -> Memory:
        return self.layouts[-1].memory

    @property
    def checkpoint_bytes_per_rank(self) -> int:
        return self.layouts[-1].checkpoint_bytes_per_rank

    @property
    def checkpoint_bytes(self) -> int:
        return self.layouts[-1].checkpoint_bytes

    @property
    def kept_bytes(self) -> int:
        """All that stays on disk at most; one more is there while it is written."""
        return (self.config.keep_last + self.config.keep_best) * self.checkpoint_bytes

    @property
    def seconds_per_step(self) -> float:
        return self.layouts[-1].cost.seconds

    @property
    def seconds_to_first_checkpoint(self) -> float:
        return (self.first_checkpoint - self.done_steps) * self.seconds_per_step

    @property
    def seconds_to_end(self) -> float:
        return (self.total_steps - self.done_steps) * self.seconds_per_step


def dry_run(config: RunConfig, device: str = "") -> DryRun:
    """What the run would be, reckoned with a device (see `device_of`).

    Raises:
        UserError: whatever `prepare_run` finds wrong that does not depend on where it runs; no such device; a model that is not here.
    """
    check_inputs(config)
    with tempfile.TemporaryDirectory(prefix="most_ray-dry-") as folder:
        trial = _Trial(config, Path(folder))
        prepared = trial.prepare()
        return _reckon(config, prepared, trial, device)


class _Trial:
    """A run that is prepared in a temporary folder."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.notes: list[str] = []
        self.sampled = self.stand_in = False
        directories = {d for use in ("train", "val") for task in TASKS for d in config.directories(use, task)}
        self._small = sum(entry.size for directory in directories for entry in record_files(directory)) < SMALL_BYTES
        self._samples = 0

    def prepare(self) -> Prepared:
        """As `prepare_run`, over what is in this folder; checkpoints are looked for in the run's own."""
        use_gpu, fewest, most = devices_of(self.config, must_be_here=False)
        store_dir = str(self.folder / "store")
        here = dataclasses.replace(self.config, model_name_or_path=self._model(), output_dir=str(self.folder), store_dir=store_dir)
        scratch = RunFolder(str(self.folder / "run"))
        try:
            sources = open_sources(here, scratch, run_here, self._take_in)
        except DataError as error:
            if error.field != "max_rejected_fraction":
                raise
            raise DataError(error.field, error.value, error.rule, "Mend the records or raise max_rejected_fraction.") from error
        if self.sampled or self.stand_in:  # then the plan is not that which a run has begun with, and need not be
            here = dataclasses.replace(here, accept_data_change=True)
        begun = storage.exists(self.config.run_uri)
        return resolve_run(here, RunFolder(self.config.run_uri) if begun else scratch, sources, use_gpu, fewest, most)

    def _model(self) -> str:
        """A folder with the model's configuration and a tokenizer."""
        name, uri = self.config.model_name_or_path, self.folder / "model"
        if name in PRESETS:
            init = storage.join(self.config.run_uri, "init")
            if catalog.committed(storage.join(self.config.run_uri, "checkpoints")) and storage.exists(init):
                return init
            init_model(name, training_texts(self.config), uri, self.config.seed)
            return str(uri)
        if storage.is_remote(name) or Path(name).exists():
            return storage.absolute(name)
        if cached := _cached(name):
            return str(cached)
        known = published_name(name)
        if known is None:
            rule = "is neither a folder nor in this machine's cache of hub models."
            raise ConfigError("model_name_or_path", storage.redact(name), rule, "Check the path; a dry run does not ask the network.")
        target = "models/most" if name in PUBLISHED else name
        self.notes.append(f"{name} is not on this machine: published sizes of {known}, a tokenizer made of the records in place of its own")
        self.notes.append(f"before the run: most-ray init-model --from_deepseek {known} --output {target}")
        if name in PUBLISHED:
            self.notes.append(f"and for the run: model_name_or_path: {target}")
        self.stand_in = True
        tokenizer = train_tokenizer(training_texts(self.config, SAMPLE_RECORDS), _STAND_IN_TOKENS)
        ids = token_ids(tokenizer)
        MostConfig(**PUBLISHED[known], first_audio_token=ids.unit_base, last_audio_token=ids.end_audio).save_pretrained(uri)
        tokenizer.save_pretrained(uri)
        return str(uri)

    def _take_in(self, directory: str, recipe: Recipe, store_dir: str, run: Runner) -> TokenStore:
        """All of a small run's records; of others the store that is there, or a sample."""
        if self._small:
            return ingest_directory(directory, recipe, store_dir, run)
        root = self.config.store_uri
        if any(m.get("source") == storage.redact(storage.absolute(directory)) for m in _manifests(root)):
            try:
                return ingest_directory(directory, recipe, root, _refuse)
            except _NotThereError:
                pass  # it is another recipe's, or its records have changed
        self.sampled = True
        self._samples += 1
        sampled = self.folder / f"sample-{self._samples}" / storage.base_name(directory)
        factor = _sample(directory, sampled)
        store = _Extrapolated(ingest_directory(sampled, recipe, store_dir, run), factor, storage.absolute(directory))
        self.notes.append(f"{storage.redact(directory)}: about {len(store):,} records, by the first {SAMPLE_RECORDS:,}")
        return store


class _NotThereError(Exception):
    """Parts of a token store would have to be made."""


def _refuse(parts: object, recipe: object) -> None:
    del parts, recipe
    raise _NotThereError


def _cached(name: str) -> Path | None:
    """Where a hub model lies on this machine."""
    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # it cannot be a hub name
        return None
    return Path(found).parent if isinstance(found, str) else None


def _manifests(root: str) -> Iterator[dict[str, object]]:
    """Of all token stores below a folder."""
    for entry in storage.list_files(root, ("manifest.json",)) if storage.exists(root) else ():
        yield json.loads(storage.read_bytes(entry.uri))


def _sample(directory: str, target: Path) -> float:
    """Write the first records of a directory, the bad ones too, to a folder. Returns how many times as large the directory is."""
    target.mkdir(parents=True)
    entries = record_files(directory)
    lines: list[str] = []
    size = 0.0
    for entry in entries:
        room, start, last = SAMPLE_RECORDS - len(lines), len(lines), 0
        if room <= 0:
            break
        values = read_with_offsets(entry.uri)
        for byte, value in values:
            if len(lines) - start == room:
                last = byte
                break
            lines.append(json.dumps("not JSON" if isinstance(value, RecordError) else value))
        if not last:
            size += entry.size
        elif entry.name.endswith(".gz"):  # how small the bytes up to there were made cannot be told: these are, as small
            size += len(gzip.compress("\n".join(lines[start:]).encode()))
        else:
            size += last
    (target / "records.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if units := read_units_manifest(storage.absolute(directory)):
        (target / UNITS_MANIFEST).write_text(json.dumps(units), encoding="utf-8")
    return max(1.0, sum(entry.size for entry in entries) / max(1.0, size))


class _Extrapolated(TokenStore):
    """As many records as a whole directory has, about: those of its sample over and over."""

    def __init__(self, sample: TokenStore, factor: float, source: str) -> None:
        super().__init__(sample.uri)
        count = round(len(sample) * factor)
        self.lengths = np.resize(sample.lengths, count)
        self.prompt_lengths = np.resize(sample.prompt_lengths, count)
        n_tokens = int(self.lengths.sum(dtype=np.int64))
        self.manifest = {**sample.manifest, "n_records": count, "n_tokens": n_tokens, "source": storage.redact(source)}
        self._sampled = len(sample)

    def record(self, row: int) -> tuple[str, np.ndarray]:
        return super().record(row % self._sampled)


def _reckon(config: RunConfig, prepared: Prepared, trial: _Trial, asked: str) -> DryRun:
    job, plan = prepared.job, prepared.plan
    config = dataclasses.replace(config, bf16=job.config.bf16)
    dtype = Precision.of(config).dtype
    device = device_of(asked, prepared.use_gpu, dtype, job.topology.world_size, job.threads)
    model_config = read_config(local_copy(job.model_path), overrides_of(config))
    shapes = Shapes(model_config)
    steps = steps_of(plan, prepared.done_steps + 1, job.total_steps, _STEPS)
    calibration = None
    if device.speed is None:
        world, first = job.topology.world_size, prepared.done_steps + 1
        batches = [rank_batch(plan, first + k, 0, world, config.train_batch_size, job.layout) for k in range(CALIBRATED)]
        calibration = calibrate(model_config, config, batches, dtype, device.half, job.threads)

    def reckoning(workers: int) -> LayoutEstimator:
        speed = calibration.speed(workers) if calibration else device.speed
        assert speed is not None, "what no table has was measured"
        return LayoutEstimator(config, shapes, steps, workers, speed, device.is_gpu)

    ends = dict.fromkeys((prepared.topologies[0], prepared.topologies[-1]))
    reckonings = {topology: reckoning(topology.world_size) for topology in ends}
    mix = plan.mix(job.total_steps)
    every = [config.save_steps, *([config.eval_steps] if job.has_validation and config.eval_steps else [])]
    return DryRun(
        config=config,
        device=device,
        use_gpu=prepared.use_gpu,
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
        layouts=tuple(reckonings[topology].layout(topology) for topology in ends),
        choices=reckonings[job.topology].choices(device.memory),
        calibration=calibration,
        notes=tuple(trial.notes),
        about_records=trial.sampled,
        about_tokens=trial.sampled or trial.stand_in,
    )
