"""A small run of the engine in this process, without Ray: folders, checkpoints, metrics and trace as any run has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from most_ray.config import RunConfig, config_from
from most_ray.io.journal import read_journal
from most_ray.runs.job import Job
from most_ray.runs.resolve import Prepared, prepare_run
from most_ray.train.attempt import claim_run
from most_ray.train.hooks import TrainHooks
from most_ray.train.session import run_rank
from tests.support.builders import asr, text, tts, write_records
from tests.support.gloo import run_ranks
from tests.support.training import CPU

# What two runs of the same steps need not agree in.
MEASURED = {
    "time",
    "training_seconds",
    "run_tokens_per_second",
    "tokens_per_second",
    "supervised_tokens_per_second",
    "samples_per_second",
    "step_time",
}
MEASURED |= {"data_wait", "save_stall", "mfu", "memory_gb"}


def prepare_small(root: Path, name: str = "small", **changes: Any) -> Prepared:
    """A run on ASR, TTS and text records with rows that hold several of them, and steps of several forward passes."""
    data = root / "data"
    if not data.exists():
        write_records(data / "heard", [asr(i, 3 + i * 7 % 30) for i in range(17)])
        write_records(data / "spoken", [tts(i, 3 + i * 11 % 30) for i in range(13)])
        write_records(data / "written", [text(i) for i in range(7)])
    options: dict[str, Any] = {
        "output_dir": str(root),
        "name": name,
        "model_name_or_path": "tiny",
        "train_asr_dirs": [str(data / "heard")],
        "train_tts_dirs": [str(data / "spoken")],
        "train_text_dirs": [str(data / "written")],
        "asr_tts_mix_ratio": 0.6,
        "text_mix_ratio": 0.25,
        "max_seq_length": 128,
        "train_batch_size": 2,
        "global_batch_size": 23,
        "max_steps": 4,
        "save_steps": 1,
        "keep_last": 100,
        "async_save": False,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "asr_loss_weight": 3.0,
        "aux_loss_alpha": 0.02,
        "trace_records": str(root / f"{name}.trace"),
        "use_gpu": False,
        "threads_per_worker": 1,
        "bf16": False,
    }
    return prepare_run(config_from({**options, **changes}))


def go(prepared: Prepared, stop_at: int | None = None) -> bool:
    """Train, or go on, to the goal, or to the checkpoint behind step `stop_at`. Returns whether the goal was reached."""
    job = prepared.job_for(prepared.topologies[-1], claim_run(prepared.folder))
    threads = torch.get_num_threads()

    def should_stop() -> bool:
        asked.append(True)
        return stop_at is not None and done + len(asked) >= stop_at

    asked: list[bool] = []  # once in every step
    done = prepare_run(job.config).done_steps
    try:
        return run_rank(job, CPU, TrainHooks(should_stop=should_stop))
    finally:
        torch.set_num_threads(threads)


def numbers_in(value: Any, path: str = "") -> dict[str, float]:
    """The numbers in nested objects and lists, by their paths."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {inner: number for key, item in items for inner, number in numbers_in(item, f"{path}.{key}").items()}
    return {path: value}


def lines_of(prepared: Prepared, kind: str | None = None) -> list[dict[str, Any]]:
    """metrics.jsonl, or its lines of a kind."""
    lines = read_journal(prepared.folder.local / "metrics.jsonl")
    return [line for line in lines if kind in (None, line["kind"])]


def train_rank(job: Job) -> bool:
    """This rank's part of a run."""
    return run_rank(job, CPU, TrainHooks())


def run_on_ranks(config: RunConfig, workers: int = 1) -> None:
    """Train to the goal on so many gloo ranks, without evaluations and export."""
    prepared = prepare_run(config, workers=workers)
    job = prepared.job_for(prepared.topologies[-1], claim_run(prepared.folder))
    assert all(run_ranks(workers, train_rank, job))
