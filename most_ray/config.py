"""The one place of defaults: frozen dataclasses, filled from a YAML file and flags of the same names. Unknown keys are errors."""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from most_ray.errors import ConfigError, DataError, nearest
from most_ray.io import storage


def option(default: Any, help_text: str) -> Any:
    """A field with its default and the line that --help shows."""
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class ModelOptions:
    """What is trained."""

    model_name_or_path: str = option("tiny", "directory in Hugging Face or MoST layout, hub name, or the name of a preset (tiny)")
    use_modality_aware_routing: bool | None = option(None, "text tokens to text experts, audio tokens to audio experts")
    text_expert_indices: tuple[int, ...] | None = option(None, "routed experts of text tokens, as 0,1,2,3 (default: the model's)")
    audio_expert_indices: tuple[int, ...] | None = option(None, "routed experts of audio tokens, as 4,5,6,7 (default: the model's)")
    num_experts_per_tok: int | None = option(None, "routed experts that each token goes through, top-k (default: the model's)")
    aux_loss_alpha: float | None = option(None, "weight of the load-balancing loss (default: the model's)")
    seq_aux: bool | None = option(None, "balance experts within each record rather than over the batch (default: the model's)")


@dataclass(frozen=True)
class DataOptions:
    """What it is trained and validated on."""

    train_asr_dirs: tuple[str, ...] = option((), "directories of ASR records, each a path or a URI as s3://bucket/records")
    train_tts_dirs: tuple[str, ...] = option((), "directories of TTS records")
    train_text_dirs: tuple[str, ...] = option((), "directories of text-only records")
    val_asr_dirs: tuple[str, ...] = option((), "directories of ASR records for word error rates; a set is called by its folder")
    val_tts_dirs: tuple[str, ...] = option((), "directories of TTS records: loss, and speech that is decoded and recognised again")
    val_text_dirs: tuple[str, ...] = option((), "directories of text-only records for validation loss")
    asr_tts_mix_ratio: float = option(0.5, "share of ASR among the ASR and TTS records trained on (0.5 = equal)")
    text_mix_ratio: float = option(0.0, "share of text-only records among all records trained on")
    train_asr_weights: tuple[float, ...] | None = option(None, "weight of each ASR directory among them (default: by size)")
    train_tts_weights: tuple[float, ...] | None = option(None, "weight of each TTS directory among them (default: by size)")
    train_text_weights: tuple[float, ...] | None = option(None, "weight of each text directory among them (default: by size)")
    weight_unit: Literal["rows", "tokens"] = option(
        "rows", "what the mix is exact in: after each record every source is within one of its share"
    )
    unit_swap_prob: float = option(0.0, "share of the input units of ASR records swapped for a near unit, redrawn at every use")
    unit_replace_prob: float = option(0.0, "share of them replaced by any unit")
    unit_drop_prob: float = option(0.0, "share of them left out")
    max_seq_length: int = option(2048, "tokens in a packed row; longer records are never cut")
    overlong: Literal["reject", "set_aside", "split"] = option(
        "reject", "records longer than that: bad records, set aside without counting as bad, or (text-only ones) split over several rows"
    )
    max_rejected_fraction: float = option(0.01, "a source with a larger share of bad records ends the run before training")
    store_dir: str | None = option(None, "where token stores are kept, a path or a URI as s3://bucket/store (default: OUTPUT_DIR/store)")
    data_timeout_s: float = option(600.0, "seconds without a batch after which a run ends, naming the stage that is stuck (0: never)")
    accept_data_change: bool = option(False, "go on over data, units, tokenizer, template or batches that changed since the checkpoint")
    trace_records: str | None = option(None, "file that gets, per optimizer step, the ids of the records trained on")


@dataclass(frozen=True)
class OptimizerOptions:
    """How it is trained."""

    train_batch_size: int = option(1, "packed rows per worker and forward pass")
    gradient_accumulation_steps: int = option(16, "sets the default of global_batch_size")
    global_batch_size: int | None = option(
        None, "records per optimizer step over all workers (default: train_batch_size x gradient_accumulation_steps x workers)"
    )
    max_steps: int | None = option(None, "optimizer steps of the whole run (default: from epochs)")
    epochs: float = option(1.0, "without max_steps: until the sources of epochs_of have been seen this often")
    epochs_of: str = option("all", "the source whose epochs count, by its folder as train_asr or asr/train_asr; all: the slowest")
    learning_rate: float = option(1e-4, "peak learning rate of AdamW")
    lr_scheduler: Literal["linear", "cosine", "constant"] = option("cosine", "learning rate after the warm-up")
    warmup_steps: int = option(0, "steps of linear warm-up")
    warmup_ratio: float = option(0.0, "the same as a share of all steps, where warmup_steps is 0")
    asr_loss_weight: float = option(1.0, "weight of a supervised ASR token's loss, against 1 for TTS and text tokens")
    weight_decay: float = option(0.01, "AdamW weight decay of matrices (norms have none)")
    adam_beta1: float = option(0.9, "AdamW beta1")
    adam_beta2: float = option(0.95, "AdamW beta2")
    adam_epsilon: float = option(1e-8, "AdamW epsilon")
    max_grad_norm: float = option(1.0, "gradient norm to clip to (0: off)")
    balance_bias_rate: float = option(
        0.0, "step by which biases on the choice of experts follow each step's load, as 0.001: balances without a loss (0: off)"
    )
    max_skipped_steps: int = option(20, "steps in a row with a loss or gradient that is not finite, and so skipped, that end the run")
    fp16: bool = option(False, "float16 autocast with loss scaling")
    bf16: bool | None = option(None, "bfloat16 autocast (default: where the device is made for it; a run goes on with what it began with)")
    optimizer_state: Literal["float32", "int8"] = option(
        "float32", "AdamW's moments: int8 takes 2 bytes a parameter instead of 8, needs most_ray[int8], and compiles for a minute on GPUs"
    )
    gradient_checkpointing: bool = option(False, "the same as recompute: full")
    recompute: Literal["none", "selective", "full"] = option(
        "none", "activations that the backward pass computes again: those of attention (selective), or of whole layers (full)"
    )
    compile_layers: bool = option(False, "compile norms and MLPs (not attention and routed experts, whose shapes change): costs a minute")
    deterministic: bool = option(False, "the same run gives the same weights to the bit on the same machines; slower")
    seed: int = option(0, "seed of initialisation, mixing and shuffling")


@dataclass(frozen=True)
class ParallelOptions:
    """Where it is trained."""

    num_workers: tuple[int, ...] | None = option(
        None, "training processes, as 4; or fewest and most, as 2,4: as many as the cluster has room for (default: one per GPU, or 1)"
    )
    cpus_per_worker: float = option(1.0, "CPUs of the cluster that a worker takes; a part of one, as 0.5, lets others share it")
    gpus_per_worker: float = option(1.0, "GPUs that a worker takes where GPUs are used: 1, or, of a run with one worker, a part")
    ep_size: int = option(1, "expert-parallel size; divides the workers and the experts")
    dp_replicate_size: int = option(1, "replicas of the sharded model (HSDP)")
    check_replicas_steps: int = option(1000, "steps between comparisons, to the bit, of the weights that several workers hold (0: never)")
    use_gpu: bool | None = option(None, "train on GPUs (default: where there are any)")
    threads_per_worker: int | None = option(None, "CPU threads of each worker (default: the machine's cores shared out)")
    max_failures: int = option(3, "lost workers within failure_window_s that a run goes on after; one more ends it")
    failure_window_s: float = option(3600.0, "seconds after which a failure no longer counts (0: it always counts)")
    room_timeout_s: float = option(600.0, "seconds to wait for the cluster to have room for the workers again")
    ray_address: str | None = option(None, "cluster to use (default: the one of RAY_ADDRESS, else one on this machine)")


@dataclass(frozen=True)
class CheckpointOptions:
    """What is kept."""

    output_dir: str = option("runs", "where runs are kept; a run's folder is OUTPUT_DIR/NAME")
    name: str = option("run", "the run's name; the same name resumes")
    save_steps: int = option(1000, "steps between checkpoints")
    keep_last: int = option(2, "checkpoints to keep")
    keep_best: int = option(0, "checkpoints to keep besides, the best by best_metric (needs eval_steps)")
    best_metric: str = option("wer", "what is best, lowest first: wer or loss over all validation sets, or of one set as wer/test_takes")
    async_save: bool = option(True, "write checkpoints while training goes on")
    resume_from_checkpoint: str | None = option(None, "checkpoint of another run to start from")
    ignore_optimizer_state: bool = option(False, "with resume_from_checkpoint: take only the weights and start at step 0")


@dataclass(frozen=True)
class EvaluationOptions:
    """How it is judged."""

    eval_steps: int | None = option(None, "steps between evaluations of a checkpoint (default: only at the end)")
    eval_inline: bool = option(False, "evaluate in between steps, on the training workers, rather than beside training")
    eval_workers: int = option(1, "tasks that share out an evaluation beside training")
    eval_gpus: float = option(0.0, "GPUs of each of them")
    eval_batch_size: int = option(64, "records decoded at once")
    num_beams: int = option(1, "beams of the search for an output (1: greedy)")
    length_penalty: float = option(1.0, "with beams: a hypothesis' score is its log probability over its length to this power")
    max_new_tokens: int = option(256, "length cap of a decoded text, beside the one from the number of units")
    max_new_units: int = option(1500, "length cap of decoded speech in units, beside the one from the text's length")
    normaliser: Literal["none", "basic", "whisper-english"] = option("basic", "what both sides go through before words are compared")
    recogniser: str | None = option(None, "Whisper or CTC checkpoint that transcribes the model's speech as well (default: none)")
    vocoder: str | None = option(None, "what makes that speech sound for it (default: vocoder.safetensors beside the training records)")


@dataclass(frozen=True)
class TrackingOptions:
    """What is written down."""

    logging_steps: int = option(1, "steps between lines of metrics.jsonl")
    load_alert: float = option(4.0, "warn when an expert has so many times the mean load of its modality's experts in a line (0: never)")
    tensorboard: bool = option(False, "TensorBoard files as well, in RUN/tensorboard")
    wandb_project: str | None = option(None, "Weights & Biases project (default: not used)")
    wandb_mode: Literal["online", "offline", "disabled"] | None = option(
        None, "how Weights & Biases is used (default: online where there is a key, else offline)"
    )
    wandb_tags: tuple[str, ...] = option((), "tags of the run in Weights & Biases")
    wandb_group: str | None = option(None, "group of the run in Weights & Biases (default: none; a sweep's trials: the sweep's name)")


@dataclass(frozen=True)
class RunConfig(TrackingOptions, EvaluationOptions, CheckpointOptions, ParallelOptions, OptimizerOptions, DataOptions, ModelOptions):
    """Everything that a training run is asked for."""

    @property
    def recomputed(self) -> Literal["none", "selective", "full"]:
        """Activations that the backward pass computes again, whichever way it was asked for."""
        return "full" if self.gradient_checkpointing else self.recompute

    @property
    def run_uri(self) -> str:
        """The run's folder, a path or a URI."""
        return storage.join(storage.absolute(self.output_dir), self.name)

    def redacted(self) -> RunConfig:
        """The configuration as it may be written down: without the credentials that URIs of directories can hold."""
        shown: dict[str, Any] = {}
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if value and each.name.endswith(("_dir", "_dirs", "_path", "_checkpoint", "_records", "recogniser", "vocoder")):
                shown[each.name] = tuple(map(storage.redact, value)) if isinstance(value, tuple) else storage.redact(value)
        return dataclasses.replace(self, **shown)


SECTIONS = (
    ModelOptions,
    DataOptions,
    OptimizerOptions,
    ParallelOptions,
    CheckpointOptions,
    EvaluationOptions,
    TrackingOptions,
)
UNIT_NOISE = ("unit_swap_prob", "unit_replace_prob", "unit_drop_prob")
_HINTS = typing.get_type_hints(RunConfig)
_FIELDS = {f.name: f for f in dataclasses.fields(RunConfig)}


def _choices(hint: Any) -> tuple[Any, bool]:
    """A field's type without its None, and whether None is allowed."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):  # the latter where a Literal is part of it
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return inner[0], True
    return hint, False


def coerce(name: str, value: Any, hints: Mapping[str, Any] = _HINTS) -> Any:
    """A YAML value or a flag's text as the field's type.

    Raises:
        ConfigError: it is of another type.
    """
    hint, optional = _choices(hints[name])
    if value is None or (optional and isinstance(value, str) and value.lower() in ("none", "null", "")):
        if optional:
            return None
        raise ConfigError(name, value, "needs a value.")
    origin = typing.get_origin(hint)
    if origin is tuple:
        parts = value if isinstance(value, list | tuple) else str(value).split(",")
        return tuple(_scalar(name, typing.get_args(hint)[0], part) for part in parts if part != "")
    if origin is Literal:
        options = typing.get_args(hint)
        if value not in options:
            raise ConfigError(name, value, "is not one of its choices.", nearest(str(value), options))
        return value
    return _scalar(name, hint, value)


def _scalar(name: str, hint: type, value: Any) -> Any:
    if hint is bool:
        truth = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(str(value).lower())
        if truth is None:
            raise ConfigError(name, value, "is neither true nor false.")
        return truth
    if hint is str:
        if isinstance(value, str) and "\0" in value:
            raise ConfigError(name, value, "holds a NUL character.")
        if isinstance(value, list | dict | bool):
            raise ConfigError(name, value, "is not a string.")
        return str(value)
    if isinstance(value, bool | list | dict) or (hint is int and isinstance(value, float) and not value.is_integer()):
        raise ConfigError(name, value, f"is not {'a whole number' if hint is int else 'a number'}.")
    try:
        number = hint(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(name, value, f"is not {'a whole number' if hint is int else 'a number'}.") from error
    if not math.isfinite(number):
        raise ConfigError(name, value, "is not finite.")
    return number


def config_from(values: Mapping[str, Any]) -> RunConfig:
    """A checked RunConfig from names and values.

    Raises:
        ConfigError: an unknown key (names the nearest known one), a value of the wrong type or outside its range.
    """
    for name in values:
        if name not in _FIELDS:
            raise ConfigError(str(name), None, "is no known flag or configuration key.", nearest(str(name), _FIELDS))
    config = RunConfig(**{name: coerce(name, value) for name, value in values.items()})
    _check(config)
    return config


def _check(config: RunConfig) -> None:
    at_least_one = (
        "train_batch_size gradient_accumulation_steps max_seq_length save_steps keep_last logging_steps eval_batch_size "
        "max_new_tokens max_new_units num_beams eval_workers "
        "ep_size dp_replicate_size global_batch_size max_steps eval_steps threads_per_worker max_skipped_steps num_experts_per_tok"
    )
    for name in at_least_one.split():
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(name, value, "must be at least 1.")
    for name in ("asr_tts_mix_ratio", "text_mix_ratio", "max_rejected_fraction", "warmup_ratio", *UNIT_NOISE):
        if not 0.0 <= getattr(config, name) <= 1.0:
            raise ConfigError(name, getattr(config, name), "must lie in 0..1.")
    for name in ("learning_rate", "epochs", "adam_epsilon", "asr_loss_weight", "cpus_per_worker", "gpus_per_worker"):
        if not getattr(config, name) > 0:
            raise ConfigError(name, getattr(config, name), "must be above 0.")
    if config.num_workers is not None and not (len(config.num_workers) in (1, 2) and 1 <= config.num_workers[0] <= config.num_workers[-1]):
        raise ConfigError("num_workers", config.num_workers, "is neither a number from 1 on nor two of them, the fewest and the most.")
    if config.gpus_per_worker != 1 and not (config.gpus_per_worker < 1 and config.num_workers == (1,)):
        raise ConfigError("gpus_per_worker", config.gpus_per_worker, "is neither 1 nor, with num_workers 1, a part of one.")
    if config.keep_best and (config.eval_steps is None or not (config.val_asr_dirs or config.val_tts_dirs or config.val_text_dirs)):
        raise ConfigError("keep_best", config.keep_best, "needs eval_steps and a validation set to tell what is best.")
    if config.best_metric.split("/", 1)[0] not in ("wer", "loss"):
        raise ConfigError("best_metric", config.best_metric, "is neither wer nor loss, alone or with the name of a set behind a slash.")
    not_negative = (
        "weight_decay max_grad_norm warmup_steps max_failures seed data_timeout_s keep_best failure_window_s room_timeout_s "
        "check_replicas_steps balance_bias_rate eval_gpus length_penalty"
    )
    for name in not_negative.split():
        if getattr(config, name) < 0:
            raise ConfigError(name, getattr(config, name), "must not be negative.")
    if config.load_alert != 0 and not config.load_alert > 1:
        raise ConfigError("load_alert", config.load_alert, "must be 0 or above 1, the even load.")
    if config.aux_loss_alpha is not None and config.aux_loss_alpha < 0:
        raise ConfigError("aux_loss_alpha", config.aux_loss_alpha, "must not be negative.")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0.0 <= getattr(config, name) < 1.0:
            raise ConfigError(name, getattr(config, name), "must lie in 0..1, without the 1.")
    if config.fp16 and config.bf16:
        raise ConfigError("fp16", True, "and bf16 exclude each other.", "Choose one.")
    if config.gradient_checkpointing and config.recompute == "selective":
        raise ConfigError("recompute", config.recompute, "and gradient_checkpointing (recompute: full) exclude each other.", "Choose one.")
    if not config.name or Path(config.name).name != config.name or config.name in (".", ".."):
        raise ConfigError("name", config.name, "must be a plain folder name.", "Put the path into output_dir.")
    for task in ("asr", "tts", "text"):
        weights, dirs = getattr(config, f"train_{task}_weights"), getattr(config, f"train_{task}_dirs")
        if weights is not None and (len(weights) != len(dirs) or min(weights, default=0) <= 0):
            raise ConfigError(f"train_{task}_weights", weights, f"needs one positive weight for each of {len(dirs)} directories.")
    if config.ignore_optimizer_state and not config.resume_from_checkpoint:
        raise ConfigError("ignore_optimizer_state", True, "needs resume_from_checkpoint, the weights to start from.")


def read_yaml(place: str | Path) -> dict[str, Any]:
    """The keys and values of a configuration file, a path or a URI.

    Raises:
        ConfigError: the file is missing, is not YAML, or is no mapping.
    """
    shown = storage.redact(str(place))
    try:
        values = yaml.safe_load(storage.read_bytes(place).decode("utf-8"))
    except (OSError, UnicodeDecodeError, DataError) as error:
        raise ConfigError("config", shown, f"cannot be read ({error}).") from error
    except yaml.YAMLError as error:
        raise ConfigError("config", shown, f"is not YAML ({' '.join(str(error).split())}).") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError("config", shown, "holds no `key: value` lines.")
    return {str(key): value for key, value in values.items()}


def to_yaml(config: RunConfig) -> str:
    """The whole configuration, defaults included, readable by `read_yaml`."""
    values = {
        name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(config).items() if name in _FIELDS
    }
    ordered = {f.name: values[f.name] for section in SECTIONS for f in dataclasses.fields(section)}
    return yaml.safe_dump(ordered, sort_keys=False)


def add_flags(parser: argparse.ArgumentParser, sections: Sequence[type] = SECTIONS) -> None:
    """One `--flag` per field, grouped and with its default in --help. Absent flags leave the namespace untouched."""
    for section in sections:
        hints = typing.get_type_hints(section)
        group = parser.add_argument_group(str(section.__doc__).rstrip(".").lower())
        for f in dataclasses.fields(section):
            hint, _ = _choices(hints[f.name])
            shown = "none" if f.default is None or f.default == () else f.default
            text = f.metadata["help"]
            keywords: dict[str, Any] = {
                "help": text if "(default" in text else f"{text} (default: {shown})",
                "default": argparse.SUPPRESS,
                "metavar": f.name.upper(),
            }
            if hint is bool:
                keywords.update(nargs="?", const="true", metavar="true|false")
            elif typing.get_origin(hint) is Literal:
                keywords.update(metavar="|".join(typing.get_args(hint)))
            elif typing.get_origin(hint) is tuple and typing.get_args(hint)[0] is str:
                keywords.update(nargs="+")
            group.add_argument(f"--{f.name}", **keywords)


def flag_values(namespace: argparse.Namespace) -> dict[str, Any]:
    """The flags that were given."""
    return {name: value for name, value in vars(namespace).items() if name in _FIELDS}


def load_config(path: str | Path | None, flags: Mapping[str, Any] | Sequence[tuple[str, Any]] = ()) -> RunConfig:
    """A file's values, overruled by flags."""
    values = read_yaml(path) if path else {}
    return config_from({**values, **dict(flags)})
