"""A training run from its configuration to its summary: everything is checked, then Ray Train's workers carry it out."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.train
import torch
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from rich.console import Console

from most_ray.config import RunConfig, write_yaml
from most_ray.data.batch import TokenLayout
from most_ray.data.ingest import check_rejected, content_hash, ingest_directory
from most_ray.data.plan import Cursor, Plan, check_cursor, make_spec
from most_ray.data.plan import check_units as one_unit_identity
from most_ray.data.store import TokenStore
from most_ray.errors import CheckpointError, ConfigError, UserError
from most_ray.evaluation.evaluate import EvaluationSettings, evaluate_model, write_result
from most_ray.model.build import PRESETS, check_template, check_units, init_model, read_config
from most_ray.model.tokenizer import load_tokenizer, vocabulary_of
from most_ray.records import TASKS, RecordError, Task, parse_record, read_raw, record_files
from most_ray.service.cluster import start_ray
from most_ray.service.journal import read_journal
from most_ray.service.preflight import check_places
from most_ray.service.telemetry import ProgressWatcher
from most_ray.service.validation import ValidationJob
from most_ray.service.worker import WorkerJob, claim_run, overrides_of, run_summary, train_worker
from most_ray.template import Vocabulary, template_texts
from most_ray.train import checkpoint
from most_ray.train.export import export_checkpoint
from most_ray.train.topology import plan_topology

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A run that passed every check. `done_steps`: steps behind the newest checkpoint."""

    job: WorkerJob
    plan: Plan
    done_steps: int
    use_gpu: bool
    n_rejected: int


class RunIncompleteError(UserError):
    """The workers ended short of the goal."""

    kind = "training failed"


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
    model_path = _model_path(config, run_dir)
    use_gpu, n_workers = _devices(config)
    model_config = read_config(model_path, overrides_of(config))
    check_template(model_config, model_path)
    topology = plan_topology(n_workers, config.ep_size, config.dp_replicate_size, model_config.n_routed_experts)
    if config.max_seq_length > model_config.max_position_embeddings:
        raise ConfigError(
            "max_seq_length", config.max_seq_length, f"is beyond the model's {model_config.max_position_embeddings} positions."
        )
    vocabulary = vocabulary_of(load_tokenizer(model_path))
    store_dir = _store_dir(config)
    stores = _ingest(config, "train", TASKS, vocabulary, config.max_seq_length, store_dir)
    # As `most-ray evaluate` does it: a record that the model can read is scored, however long the rows of training are.
    validation_stores = _ingest(config, "val", ("asr", "tts"), vocabulary, model_config.max_position_embeddings, store_dir)
    n_rejected = check_rejected(stores + validation_stores, config.max_rejected_fraction, run_dir / "rejected.jsonl")
    start = _starting_point(config, run_dir, vocabulary.fingerprint())
    spec = make_spec(config, stores, _global_batch_size(config, n_workers, start))
    units = one_unit_identity(stores + validation_stores)
    check_units(model_config, units, model_path)
    plan = Plan(spec)
    total_steps = config.max_steps or plan.steps_for_epochs(config.epochs)
    if start:
        check_cursor(plan, Cursor(**start["cursor"]), start["ingredients"])
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
            tuple(str(Path(p).absolute()) for p in config.val_asr_dirs),
            tuple(str(Path(p).absolute()) for p in config.val_tts_dirs),
            settings,
            str(store_dir),
        )
        if validation_stores
        else None,
    )
    return Prepared(job, plan, done, use_gpu, n_rejected)


def _absolute(path: str | None) -> str | None:
    return str(Path(path).absolute()) if path else None


def _check_directories(config: RunConfig) -> None:
    if not (config.train_asr_dirs or config.train_tts_dirs or config.train_text_dirs):
        raise ConfigError("train_asr_dirs", (), "no training data is named.", "Name train_asr_dirs, train_tts_dirs or train_text_dirs.")
    for name in ("train_asr_dirs", "train_tts_dirs", "train_text_dirs", "val_asr_dirs", "val_tts_dirs"):
        directories = getattr(config, name)
        for directory in directories:
            if not Path(directory).exists():
                raise ConfigError(name, directory, "does not exist.", "Check the path; it is taken from where the command runs.")
        if len(set(directories)) != len(directories):
            raise ConfigError(name, directories, "names a directory twice.")


def _ingest(config: RunConfig, use: str, tasks: Sequence[Task], vocabulary: Vocabulary, limit: int, store_dir: Path) -> list[TokenStore]:
    """Token stores of the `train_..._dirs` or `val_..._dirs`, in the order of the tasks."""
    return [
        ingest_directory(Path(directory), task, vocabulary, limit, store_dir)
        for task in tasks
        for directory in getattr(config, f"{use}_{task}_dirs")
    ]


def _store_dir(config: RunConfig) -> Path:
    return (Path(config.store_dir) if config.store_dir else Path(config.output_dir) / "store").absolute()


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
    directories = [Path(d) for task in TASKS for d in getattr(config, f"train_{task}_dirs")]
    return [content_hash(record_files(directory), directory) for directory in directories]


def training_texts(config: RunConfig, limit: int = 200_000) -> Iterator[str]:
    """Texts of the training records, for a tokenizer: at most `limit` records of each directory."""
    for task in TASKS:
        for directory in getattr(config, f"train_{task}_dirs"):
            yield from texts_of(Path(directory), limit)


def texts_of(directory: Path, limit: int = 200_000) -> Iterator[str]:
    """Texts of a directory's good records as the template spells them."""
    count = 0
    for path in record_files(directory):
        for _, raw in read_raw(path):
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


def run_training(config: RunConfig, console: Console) -> dict[str, Any]:
    """Train, export, evaluate. The same name goes on where it stopped; a complete run is left as it is. Returns the summary.

    Raises:
        UserError: what the user can mend, or a run that ended short of its goal.
    """
    prepared = prepare_run(config)
    job, run_dir = prepared.job, Path(prepared.job.run_dir)
    summary = run_summary(run_dir / "summary.json")
    last = checkpoint.step_dir(run_dir / "checkpoints", job.total_steps)
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
    write_yaml(config, run_dir / "config.yaml")
    describe(prepared, console)
    started = time.monotonic()
    if prepared.done_steps < job.total_steps:
        _fit(prepared, console)
    if not (last / checkpoint.COMMIT).exists():
        raise RunIncompleteError("step", job.total_steps, "was not reached: no checkpoint of the last step was completed.")
    trained = time.monotonic() - started
    export_checkpoint(last, run_dir / "export")
    summary = finish_run(prepared, trained, last)
    write_result(summary, run_dir / "summary.json")
    return summary


def describe(prepared: Prepared, console: Console) -> None:
    job = prepared.job
    records = ", ".join(f"{len(store)} {store.task} ({store.name})" for store in prepared.plan.stores)
    console.print(
        f"Run {job.run_dir}: {job.total_steps} steps of {job.plan.global_batch_size} records; {records}", highlight=False, soft_wrap=True
    )
    if prepared.n_rejected:
        console.print(f"{prepared.n_rejected} records were set aside: {job.run_dir}/rejected.jsonl", highlight=False, soft_wrap=True)
    cursor = prepared.plan.cursor(prepared.done_steps)
    consumed = prepared.plan.consumed(prepared.done_steps)
    verb = "Resuming" if prepared.done_steps else "Starting"
    console.print(
        f"{verb} after step {prepared.done_steps}, epoch {cursor.epoch:.3f}, records trained on {consumed}, exact: yes",
        highlight=False,
        soft_wrap=True,
    )


def _fit(prepared: Prepared, console: Console) -> None:
    config = prepared.job.config
    job = replace(prepared.job, driver=claim_run(Path(prepared.job.run_dir)))
    n_workers = job.topology.world_size
    start_ray(config, n_workers, prepared.use_gpu)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=job,
        scaling_config=ray.train.ScalingConfig(
            num_workers=n_workers,
            use_gpu=prepared.use_gpu,
            resources_per_worker={"CPU": 1.0, **({"GPU": 1.0} if prepared.use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name="ray", storage_path=job.run_dir, failure_config=ray.train.FailureConfig(max_failures=config.max_failures)
        ),
    )
    with ProgressWatcher(Path(job.run_dir) / "metrics.jsonl", job.total_steps, prepared.done_steps, console):
        for losses_left in range(config.max_failures, -1, -1):
            try:
                trainer.fit()
                return
            except TrainingFailedError as error:
                raise _user_error(error) from error
            except ray.exceptions.RayError as error:
                # The controller of the workers itself was lost (out of memory, its node gone): the next one goes on from the last
                # checkpoint, like the same command would.
                reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
                if losses_left == 0:
                    raise RunIncompleteError("workers", None, f"were lost for good: {reason}") from error
                console.print(f"The workers were lost ({reason}); going on from the last checkpoint.", highlight=False, soft_wrap=True)


def _user_error(error: BaseException) -> UserError:
    """The worker's own error where a user can mend it; else a short account of what failed, with the rank's last lines."""
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {}) or {}
    for rank, failure in sorted(failures.items()):
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, UserError):
                return cause
            cause = getattr(cause, "cause", None) or cause.__cause__
        logger.error("rank %d: %s", rank, failure)
    return RunIncompleteError("workers", None, f"failed for good: {str(error).strip().splitlines()[-1] if str(error).strip() else error!r}")


def _spread(items: Sequence[Any], count: int) -> Sequence[Any]:
    """About `count` of the items, evenly spaced."""
    return items[:: max(1, len(items) // count)][:count]


def finish_run(prepared: Prepared, seconds: float, last: Path) -> dict[str, Any]:
    """Evaluate the export on every validation set; the summary."""
    job, run_dir = prepared.job, Path(prepared.job.run_dir)
    lines = read_journal(run_dir / "metrics.jsonl")
    summary: dict[str, Any] = {
        "name": job.config.name,
        "step": job.total_steps,
        "wer": {},
        "loss": lines[-1]["loss"] if lines else None,
        "records": prepared.plan.consumed(job.total_steps),
        "rejected": prepared.n_rejected,
        "training_seconds": round(seconds, 1),
        "tokens_per_second": round(sorted(line["tokens_per_second"] for line in lines)[len(lines) // 2]) if lines else None,
        "checkpoint": str(last),
        "export": str(run_dir / "export"),
    }
    if job.validation:
        torch.set_num_threads(os.cpu_count() or 1)
        result = evaluate_model(
            str(run_dir / "export"),
            [Path(p) for p in job.validation.asr_dirs],
            [Path(p) for p in job.validation.tts_dirs],
            job.validation.settings,
            Path(job.validation.store_dir),
        )
        write_result(result, run_dir / "evaluation.json")
        summary["wer"] = result["wer"]
        summary["routing"] = result["routing"]
        summary["sets"] = {
            name: {key: value for key, value in section.items() if key != "hypotheses"} for name, section in result["sets"].items()
        }
        summary["samples"] = [
            {"set": name, **sample} for name, section in result["sets"].items() for sample in _spread(section.get("hypotheses", []), 5)
        ]
    return summary
