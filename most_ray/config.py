"""The configuration of a run: its options, one line each, with defaults. The only place where defaults and rules of options are stated.

Values come from a YAML file and from flags of the same names; unknown keys are errors.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from most_ray import config_files, options
from most_ray.config_files import read_yaml
from most_ray.errors import ConfigError, count_of, printable
from most_ray.io import storage
from most_ray.io.run_folder import TRIALS
from most_ray.options import (
    ABOVE_0,
    AT_LEAST_1,
    BELOW_1,
    CHECKPOINT,
    FOLDER,
    LOCAL_FILE,
    MODEL,
    MOST_SEED,
    NOT_NEGATIVE,
    RECORDS,
    SHARE,
    Range,
    everyday,
    option,
)

_LONGEST_NAME = 255  # bytes; of a folder's name, on most file systems
_PROCESSES = 100_000  # more than any cluster starts
_MOST_RECORDS = 1_000_000  # of a step: its plan is made at once
_WORKERS = "is neither a number from 1 on nor two of them, the fewest and the most."

# Choices that other modules name, too.
WeightUnit = Literal["records", "tokens"]
Overlong = Literal["reject", "set_aside", "split"]
Moments = Literal["float32", "int8"]
Recompute = Literal["none", "selective", "full"]
Normaliser = Literal["none", "basic", "whisper-english"]


@dataclass(frozen=True)
class ModelOptions:
    """The model that is trained."""

    model_name_or_path: str = everyday(
        "tiny",
        "a model's folder or hf:OWNER/NAME or preset; a folder in Hugging Face or MoST layout, the preset tiny",
        location=MODEL,
    )
    use_modality_aware_routing: bool | None = option(
        None, "route text tokens to text experts and audio tokens to audio experts (default: the model's)"
    )
    text_expert_indices: tuple[int, ...] | None = option(
        None, "routed experts of text tokens, as 0,1,2,3 (default: the model's)", range=NOT_NEGATIVE
    )
    audio_expert_indices: tuple[int, ...] | None = option(
        None, "routed experts of audio tokens, as 4,5,6,7 (default: the model's)", range=NOT_NEGATIVE
    )
    num_experts_per_tok: int | None = option(
        None, "routed experts that each token goes through, top-k (default: the model's)", range=AT_LEAST_1
    )
    aux_loss_alpha: float | None = option(
        None, "weight of the load-balancing loss (default: the model's)", range=NOT_NEGATIVE, sweep="adapts"
    )
    seq_aux: bool | None = option(None, "balance experts within each record rather than over the batch (default: the model's)")


@dataclass(frozen=True)
class DataOptions:
    """The data that it is trained and validated on."""

    train_asr_dirs: tuple[str, ...] = everyday(
        (), "directories of ASR records, each a path or a URI as s3://bucket/records", location=RECORDS
    )
    train_tts_dirs: tuple[str, ...] = everyday((), "directories of TTS records", location=RECORDS)
    train_text_dirs: tuple[str, ...] = option((), "directories of text-only records", location=RECORDS)
    val_asr_dirs: tuple[str, ...] = everyday(
        (), "directories of ASR records for word error rates; a set is called by its folder", location=RECORDS, sweep="shared"
    )
    val_tts_dirs: tuple[str, ...] = everyday(
        (), "directories of TTS records: loss, and speech that is decoded and recognised again", location=RECORDS, sweep="shared"
    )
    val_text_dirs: tuple[str, ...] = option((), "directories of text-only records for validation loss", location=RECORDS, sweep="shared")
    asr_tts_mix_ratio: float = everyday(0.5, "share of ASR among ASR and TTS records; 0.5: equal", range=SHARE, sweep="adapts")
    text_mix_ratio: float = option(0.0, "share of text-only records among all records trained on", range=SHARE, sweep="adapts")
    train_asr_weights: tuple[float, ...] | None = option(
        None, "weight of each ASR directory among them (default: by size)", range=ABOVE_0, most=1e15, sweep="adapts"
    )
    train_tts_weights: tuple[float, ...] | None = option(
        None, "weight of each TTS directory among them (default: by size)", range=ABOVE_0, most=1e15, sweep="adapts"
    )
    train_text_weights: tuple[float, ...] | None = option(
        None, "weight of each text directory among them (default: by size)", range=ABOVE_0, most=1e15, sweep="adapts"
    )
    weight_unit: WeightUnit = option(
        "records", "what the mix is exact in: after each record every source is within one of its share", old_words={"rows": "records"}
    )
    unit_swap_prob: float = option(
        0.0, "share of the input units of ASR records swapped for a near unit, redrawn at every use", range=SHARE, sweep="adapts"
    )
    unit_replace_prob: float = option(0.0, "share of them replaced by any unit", range=SHARE, sweep="adapts")
    unit_drop_prob: float = option(0.0, "share of them left out", range=SHARE, sweep="adapts")
    max_seq_length: int = option(2048, "tokens in a packed row; longer records are never cut", range=AT_LEAST_1, most=1 << 24)
    overlong: Overlong = option(
        "reject", "records longer than that: bad records, skipped without counting as bad, or (text-only ones) split over several rows"
    )
    max_rejected_fraction: float = option(0.01, "a source with a larger share of bad records ends the run before training", range=SHARE)
    store_dir: str | None = option(
        None,
        "where token stores are kept, a path or a URI as s3://bucket/store (default: OUTPUT_DIR/store)",
        location=FOLDER,
        sweep="shared",
        inert=True,
    )
    data_timeout_s: float = option(
        600.0, "seconds without a batch after which a run ends, naming the stage that is stuck (0: never)", range=NOT_NEGATIVE, inert=True
    )
    accept_data_change: bool = option(False, "resume although data, units, tokenizer, template or batches changed since the checkpoint")
    trace_records: str | None = option(
        None, "file that gets, per optimizer step, the ids of the records trained on", location=LOCAL_FILE, sweep="shared"
    )


@dataclass(frozen=True)
class OptimizerOptions:
    """How it is trained."""

    train_batch_size: int = option(1, "packed rows per worker and forward pass", range=AT_LEAST_1, most=_MOST_RECORDS)
    gradient_accumulation_steps: int = option(16, "sets the default of global_batch_size", range=AT_LEAST_1, most=_MOST_RECORDS)
    global_batch_size: int | None = everyday(
        None,
        "records per optimizer step over all workers (default: train_batch_size x gradient_accumulation_steps x workers)",
        range=AT_LEAST_1,
        most=_MOST_RECORDS,
    )
    max_steps: int | None = everyday(
        None, "optimizer steps of the whole run (default: from epochs)", range=AT_LEAST_1, sweep="shared", length=True
    )
    epochs: float = option(
        1.0, "without max_steps: until the sources of epochs_of have been seen this often", range=ABOVE_0, sweep="shared", length=True
    )
    epochs_of: str = option(
        "all", "the source whose epochs count, by its folder as train_asr or asr/train_asr; all: the slowest", sweep="shared"
    )
    learning_rate: float = everyday(1e-4, "peak learning rate of AdamW", range=ABOVE_0, sweep="adapts", learns=True)
    lr_scheduler: Literal["linear", "cosine", "constant"] = option("cosine", "learning rate after the warm-up", learns=True)
    warmup_steps: int = option(0, "steps of linear warm-up", range=NOT_NEGATIVE, learns=True)
    warmup_ratio: float = option(0.0, "steps of linear warm-up as a share of all steps, where warmup_steps is 0", range=SHARE, learns=True)
    asr_loss_weight: float = option(
        1.0, "weight of a supervised ASR token's loss, against 1 for TTS and text tokens", range=ABOVE_0, sweep="adapts", learns=True
    )
    weight_decay: float = option(0.01, "AdamW weight decay of matrices (norms have none)", range=NOT_NEGATIVE, sweep="adapts", learns=True)
    adam_beta1: float = option(0.9, "AdamW beta1", range=BELOW_1, learns=True)
    adam_beta2: float = option(0.95, "AdamW beta2", range=BELOW_1, learns=True)
    adam_epsilon: float = option(1e-8, "AdamW epsilon", range=ABOVE_0, learns=True)
    max_grad_norm: float = option(1.0, "gradient norm to clip to (0: off)", range=NOT_NEGATIVE, sweep="adapts", learns=True)
    balance_bias_rate: float = option(
        0.0,
        "step by which biases on the choice of experts follow each step's load, as 0.001: balances without a loss (0: off)",
        range=NOT_NEGATIVE,
        sweep="adapts",
        learns=True,
    )
    max_skipped_steps: int = option(
        20, "steps in a row with a loss or gradient that is not finite, and so skipped, that end the run", range=AT_LEAST_1
    )
    fp16: bool = option(False, "float16 autocast with loss scaling", learns=True)
    bf16: bool | None = option(
        None, "bfloat16 autocast (default: where the device is made for it; a resumed run keeps what it began with)", learns=True
    )
    optimizer_state: Moments = option(
        "float32",
        "AdamW's moments: int8 takes 2 bytes a parameter instead of 8, needs most_ray[int8], and compiles for a minute on GPUs",
        learns=True,
    )
    gradient_checkpointing: bool = option(False, "the same as recompute: full")
    recompute: Recompute = option(
        "none", "activations that the backward pass computes again: those of attention (selective), or of whole layers (full)"
    )
    compile_layers: bool = option(False, "compile norms and MLPs (not attention and routed experts, whose shapes change): costs a minute")
    deterministic: bool = option(False, "the same run gives bitwise identical weights on the same machines; slower")
    seed: int = option(0, "seed of initialisation, mixing and shuffling", range=NOT_NEGATIVE, most=MOST_SEED)


@dataclass(frozen=True)
class ParallelOptions:
    """The processes and devices that train it."""

    num_workers: tuple[int, ...] | None = everyday(
        None,
        "training processes, as 4; or fewest and most, as 2,4: as many as the cluster has room for (default: one per GPU, or 1)",
        range=Range(_WORKERS, "at least 1", AT_LEAST_1.holds),
        most=_PROCESSES,
        sweep="shared",
    )
    cpus_per_worker: float = option(
        1.0, "CPUs of the cluster that a worker takes; a part of one, as 0.5, lets others share it", range=ABOVE_0, sweep="shared"
    )
    gpus_per_worker: float = option(
        1.0, "GPUs that a worker takes where GPUs are used: 1, or, of a run with one worker, a part", range=ABOVE_0, sweep="shared"
    )
    ep_size: int = everyday(1, "expert-parallel size; divides the workers and the experts", range=AT_LEAST_1)
    dp_replicate_size: int = option(1, "replicas of the sharded model (HSDP)", range=AT_LEAST_1)
    check_replicas_steps: int = option(
        1000, "steps between bitwise comparisons of the weights that several workers hold (0: never)", range=NOT_NEGATIVE
    )
    use_gpu: bool | None = option(None, "train on GPUs (default: where there are any)", sweep="shared")
    threads_per_worker: int | None = option(
        None, "CPU threads of each worker (default: the machine's cores shared out)", range=AT_LEAST_1, most=10_000, sweep="shared"
    )
    max_failures: int = option(
        3, "lost workers within failure_window_s that a run recovers from; one more ends it", range=NOT_NEGATIVE, inert=True
    )
    failure_window_s: float = option(
        3600.0, "seconds after which a failure no longer counts (0: it always counts)", range=NOT_NEGATIVE, inert=True
    )
    room_timeout_s: float = option(
        600.0, "seconds to wait for the cluster to have room for the workers again", range=NOT_NEGATIVE, inert=True
    )
    ray_address: str | None = option(
        None, "cluster to use (default: the one of RAY_ADDRESS, else one on this machine)", sweep="shared", inert=True
    )


@dataclass(frozen=True)
class CheckpointOptions:
    """The run's folder and its checkpoints."""

    output_dir: str = everyday(
        "runs", "where runs are kept; a run's folder is OUTPUT_DIR/NAME", location=FOLDER, sweep="shared", inert=True
    )
    name: str = everyday("run", "the run's name; the same name resumes", sweep="shared")
    save_steps: int = everyday(1000, "steps between checkpoints", range=AT_LEAST_1, sweep="shared", length=True)
    keep_last: int = option(2, "checkpoints to keep", range=AT_LEAST_1, inert=True)
    keep_best: int = option(
        0, "checkpoints to keep in addition, the best by best_metric (needs eval_steps)", range=NOT_NEGATIVE, inert=True
    )
    best_metric: str = option(
        "wer", "what is best, lowest first: wer or loss over all validation sets, or of one set as wer/test_takes", inert=True
    )
    async_save: bool = option(True, "write checkpoints while training continues")
    resume_from_checkpoint: str | None = option(None, "checkpoint of another run to start from", location=CHECKPOINT, sweep="shared")
    ignore_optimizer_state: bool = option(False, "with resume_from_checkpoint: take only the weights and start at step 0", sweep="shared")


@dataclass(frozen=True)
class EvaluationOptions:
    """How it is evaluated."""

    eval_steps: int | None = everyday(
        None, "steps between evaluations of a checkpoint (default: only at the end)", range=AT_LEAST_1, sweep="shared", length=True
    )
    eval_inline: bool = option(False, "evaluate in between steps, on the training workers, rather than beside training")
    eval_workers: int = option(1, "tasks that share out an evaluation beside training", range=AT_LEAST_1, most=_PROCESSES, sweep="shared")
    eval_gpus: float = option(0.0, "GPUs of each of them", range=NOT_NEGATIVE, sweep="shared")
    eval_batch_size: int = option(64, "records decoded at once", range=AT_LEAST_1)
    num_beams: int = option(1, "beams of the search for an output (1: greedy)", range=AT_LEAST_1, most=10_000)
    length_penalty: float = option(
        1.0, "with beams: a hypothesis' score is its log probability over its length to this power", range=NOT_NEGATIVE
    )
    max_new_tokens: int = option(256, "length cap of a decoded text, beside the one from the number of units", range=AT_LEAST_1)
    max_new_units: int = option(1500, "length cap of decoded speech in units, beside the one from the text's length", range=AT_LEAST_1)
    normaliser: Normaliser = option("basic", "what both sides go through before words are compared", sweep="shared")
    recogniser: str | None = option(
        None, "Whisper or CTC checkpoint that transcribes the model's speech as well (default: none)", location=MODEL, sweep="shared"
    )
    vocoder: str | None = option(
        None,
        "what makes that speech sound for it (default: vocoder.safetensors beside the training records)",
        location=MODEL,
        sweep="shared",
    )


@dataclass(frozen=True)
class TrackingOptions:
    """What is logged, and where."""

    logging_steps: int = option(1, "steps between lines of metrics.jsonl", range=AT_LEAST_1)
    load_alert: float = option(
        4.0,
        "warn when an expert has so many times the mean load of its modality's experts in a line, or nearly all it can have (0: never)",
        range=Range("must be 0 or above 1, the even load.", "0, or above 1", lambda number: number == 0 or number > 1),
        inert=True,
    )
    tensorboard: bool = option(False, "TensorBoard files as well, in RUN/tensorboard", inert=True)
    wandb_project: str | None = everyday(None, "Weights & Biases project (default: not used)", sweep="shared", inert=True)
    wandb_mode: Literal["online", "offline", "disabled"] | None = option(
        None, "how Weights & Biases is used (default: online where there is a key, else offline)", sweep="shared", inert=True
    )
    wandb_tags: tuple[str, ...] = option((), "tags of the run in Weights & Biases", inert=True)
    wandb_group: str | None = option(
        None, "group of the run in Weights & Biases (default: none; a sweep's trials: the sweep's name)", sweep="shared", inert=True
    )


@dataclass(frozen=True)
class RunConfig(TrackingOptions, EvaluationOptions, CheckpointOptions, ParallelOptions, OptimizerOptions, DataOptions, ModelOptions):
    """The whole configuration of a training run."""

    @property
    def recomputed(self) -> Recompute:
        """Activations that the backward pass computes again, by `recompute` or by `gradient_checkpointing`."""
        return "full" if self.gradient_checkpointing else self.recompute

    @property
    def run_uri(self) -> str:
        """The run's folder, a path or a URI that does not depend on the working directory."""
        return storage.join(storage.absolute(self.output_dir), self.name)

    @property
    def store_uri(self) -> str:
        """The folder of token stores, a path or a URI that does not depend on the working directory."""
        return storage.absolute(self.store_dir) if self.store_dir else storage.join(storage.absolute(self.output_dir), "store")

    def directories(self, use: Literal["train", "val"], task: str) -> tuple[str, ...]:
        """Directories of a task's records, for training or for validation."""
        found: tuple[str, ...] = getattr(self, f"{use}_{task}_dirs")
        return found

    def redacted(self) -> RunConfig:
        """The configuration as it may be written down: without the credentials that paths, URIs and addresses can hold."""
        texts = (each for each in OPTIONS.values() if each.type is str and not each.choices)
        shown = {each.name: each.map(storage.redact, getattr(self, each.name)) for each in texts}
        return dataclasses.replace(self, **shown)


SECTIONS = (ModelOptions, DataOptions, OptimizerOptions, ParallelOptions, CheckpointOptions, EvaluationOptions, TrackingOptions)
OPTIONS = options.options_of(RunConfig)  # by name, in the order of the sections


def config_from(values: Mapping[str, Any]) -> RunConfig:
    """A checked RunConfig from names and values.

    Raises:
        ConfigError: an unknown key (names the nearest known one), a value of the wrong type or outside of its range, or values that
            exclude each other.
    """
    config = RunConfig(**options.parse_values(OPTIONS, values))
    _check_together(config)
    return config


def _check_together(config: RunConfig) -> None:
    """Raises ConfigError where options exclude each other, or one lacks what it needs."""
    if config.num_workers is not None and not (len(config.num_workers) in (1, 2) and config.num_workers[0] <= config.num_workers[-1]):
        raise ConfigError("num_workers", config.num_workers, _WORKERS)
    if config.gpus_per_worker != 1 and not (config.gpus_per_worker < 1 and config.num_workers == (1,)):
        raise ConfigError("gpus_per_worker", config.gpus_per_worker, "is neither 1 nor, with num_workers 1, a part of one.")
    if config.keep_best and (config.eval_steps is None or not (config.val_asr_dirs or config.val_tts_dirs or config.val_text_dirs)):
        raise ConfigError("keep_best", config.keep_best, "needs eval_steps and a validation set, by which checkpoints are compared.")
    if config.best_metric.split("/", 1)[0] not in ("wer", "loss"):
        raise ConfigError("best_metric", config.best_metric, "is neither wer nor loss, alone or with a slash and the name of a set.")
    if config.fp16 and config.bf16:
        raise ConfigError("fp16", True, "and bf16 exclude each other.", "Choose one.")
    if config.gradient_checkpointing and config.recompute == "selective":
        raise ConfigError("recompute", config.recompute, "and gradient_checkpointing (recompute: full) exclude each other.", "Choose one.")
    if not config.name or Path(config.name).name != config.name or config.name in (".", ".."):
        raise ConfigError("name", config.name, "must be a plain folder name.", "Put the path into output_dir.")
    if printable(config.name) != config.name:
        raise ConfigError("name", config.name, "holds characters that a terminal acts on instead of showing.", "Leave them out.")
    if len(config.name.encode()) > _LONGEST_NAME:
        raise ConfigError(
            "name", config.name, f"is longer than the {_LONGEST_NAME} bytes that a folder's name may have.", "Choose a shorter one."
        )
    for task in ("asr", "tts", "text"):
        weights, n_dirs = getattr(config, f"train_{task}_weights"), len(config.directories("train", task))
        if weights is not None and len(weights) != n_dirs:
            raise ConfigError(f"train_{task}_weights", weights, f"needs one positive weight for each of {count_of(n_dirs, 'directory')}.")
    if config.ignore_optimizer_state and not config.resume_from_checkpoint:
        raise ConfigError("ignore_optimizer_state", True, "needs resume_from_checkpoint, the weights to start from.")


def load_config(path: str | Path | None, flags: Mapping[str, Any] | None = None) -> RunConfig:
    """The configuration of a YAML file, or of a shipped one by its name (None: no file), overruled by flags. Raises as `config_from` and
    `read_yaml`."""
    return config_from({**(read_yaml(path, OPTIONS) if path is not None else {}), **(flags or {})})


def to_yaml(config: RunConfig) -> str:
    """The whole configuration, defaults included, readable by `load_config`."""
    return yaml.safe_dump(options.to_plain(vars(config)), sort_keys=False)


def portable_yaml(config: RunConfig, folder: str, without: Sequence[str] = ()) -> str:
    """The configuration, but for some keys, as `load_config` reads it from a file in `folder`, which is the run's or below it, without
    credentials; see `config_files.portable_yaml`."""
    root = storage.parent(config.run_uri)
    if storage.base_name(root) == TRIALS:  # a sweep's trial moves with the sweep, and with what is beside that
        root = storage.parent(storage.parent(root))
    plain = {**vars(config), **{name: vars(config.redacted())[name] for name, each in OPTIONS.items() if not each.location}}
    return config_files.portable_yaml({name: plain[name] for name in plain if name not in without}, OPTIONS, folder, root)


def add_flags(parser: argparse.ArgumentParser, level: options.Level | None = None) -> None:
    """One flag per key of a run's configuration, grouped by section. `level`: see `options.add_flags`."""
    options.add_flags(parser, SECTIONS, level)


def flag_values(namespace: argparse.Namespace) -> dict[str, Any]:
    """The keys that were given as flags."""
    return options.flag_values(namespace, OPTIONS)
