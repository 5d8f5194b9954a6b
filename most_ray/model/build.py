"""Creates models from presets, loads folders of MoST and DeepSeek-V2, and saves models in Hugging Face layout."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerFast, initialization
from transformers.distributed import DistributedConfig

from most_ray.errors import CheckpointError, count_of, one_line
from most_ray.io import storage
from most_ray.io.json_values import parse_json
from most_ray.io.outputs import open_to_readers
from most_ray.io.run_folder import local_copy
from most_ray.model.configuration import MostConfig, OriginalMostConfig, parse_config
from most_ray.model.modeling import MostForCausalLM
from most_ray.model.placement import place_experts
from most_ray.model.routing import BALANCE_BIAS
from most_ray.presets import PRESETS, check_preset
from most_ray.records.model_files import CONFIG, check_model_files, check_weight_count, loading, read_json_object, warn_once, weight_shapes
from most_ray.records.template import template_hash
from most_ray.records.tokenizer import AUDIO_TOKENS, add_audio_tokens, load_tokenizer, token_ids, train_tokenizer

_GENERATION = "generation_config.json"
_OTHER_TOKENIZER = "They belong to different models: use the tokenizer that it was made with."


@dataclass(frozen=True)
class RoutingOverrides:
    """Fields of MostConfig that a run changes in the model it starts from; None keeps the model's value."""

    use_modality_aware_routing: bool | None = None
    text_expert_indices: tuple[int, ...] | None = None
    audio_expert_indices: tuple[int, ...] | None = None
    aux_loss_alpha: float | None = None
    seq_aux: bool | None = None
    num_experts_per_tok: int | None = None
    use_balance_bias: bool | None = None

    def apply(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """`values`, fields of a MostConfig, with the changes. Where these name one group of experts, the other is the remaining ones."""
        given = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items() if value is not None}
        text, audio = given.get("text_expert_indices"), given.get("audio_expert_indices")
        merged = {**values, **given}
        if merged.get("use_modality_aware_routing") and (text is None) != (audio is None):
            remaining = sorted(set(range(merged.get("n_routed_experts", 64))) - set(text or audio or ()))
            merged["audio_expert_indices" if audio is None else "text_expert_indices"] = remaining
        return merged


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress the library's progress bars and warnings."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()


def init_model(preset: str, texts: Iterable[str], output: Path, seed: int = 0) -> MostForCausalLM:
    """Create a model of a preset's size with random weights and a tokenizer trained on `texts`, and save both to `output`."""
    check_preset(preset)
    settings = dict(PRESETS[preset])
    tokenizer = train_tokenizer(texts, settings.pop("text_vocab_size"))
    ids = token_ids(tokenizer)
    config = MostConfig(
        **settings,
        vocab_size=-(-len(tokenizer) // 64) * 64,
        first_audio_token=ids.unit_base,
        last_audio_token=ids.end_audio,
        bos_token_id=ids.bos,
        eos_token_id=ids.eos,
        pad_token_id=ids.pad,
    )
    torch.manual_seed(seed)
    model = MostForCausalLM(config)
    save_model(model, tokenizer, output)
    return model


def from_deepseek(source: str, output: Path, overrides: RoutingOverrides | None = None) -> MostForCausalLM:
    """Convert DeepSeek-V2(-Lite), a folder or name on the hub in Hugging Face layout, to a MoST folder `output`.

    Units and markers are added to the vocabulary, and the experts are assigned to groups. Where the embedding has too few rows, new ones
    are added, which start as the mean of the others. Raises CheckpointError as `read_description` does.
    """
    source = local_copy(source, field="from_deepseek")
    unusable = loading(CheckpointError, "model_name_or_path", source, f"has a {_GENERATION} that cannot be saved again")
    with quiet_transformers(), unusable:
        if (Path(source) / _GENERATION).is_file():
            transformers.GenerationConfig.from_pretrained(source).validate(strict=True)
    with quiet_transformers():
        tokenizer = add_audio_tokens(load_tokenizer(source))
        ids = token_ids(tokenizer)
        model = load_model(source, overrides, first_audio_token=ids.unit_base, last_audio_token=ids.end_audio)
        if model.config.vocab_size <= ids.end_audio:
            model.resize_token_embeddings(-(-(ids.end_audio + 1) // 64) * 64)
    check_vocabulary(model.config, tokenizer, source)
    save_model(model, tokenizer, output)
    return model


def read_config(path: str, overrides: RoutingOverrides | None = None, **changes: Any) -> MostConfig:
    """The configuration of a model folder (MoST, the original MoST or DeepSeek-V2), as MostConfig, with the run's overrides and further
    changes of fields.

    Raises:
        CheckpointError: there is no configuration, or it is of another model type.
        ConfigError: the overrides do not fit it.
    """
    check_model_files(path)
    values = read_json_object(path, CONFIG)
    if values is None:
        raise CheckpointError("model_name_or_path", path, f"holds no {CONFIG}.")
    kind = values.get("model_type")
    known = (MostConfig.model_type, OriginalMostConfig.model_type, "deepseek_v2")
    if kind not in known:
        raise CheckpointError("model_name_or_path", path, f"holds a model of type {kind!r}, not one of {sorted(known)}.")
    unusable = f"has a {CONFIG} that cannot be used"
    try:
        values, unknown = parse_config(values)
    except ValueError as error:
        remedy = "Correct it, or get the model again."
        raise CheckpointError("model_name_or_path", path, f"{unusable} ({one_line(error)}).", remedy) from error
    if unknown:
        warn_once(f"{storage.redact(path)}/{CONFIG}: {', '.join(unknown[:12])}: not known, not used")
    with loading(CheckpointError, "model_name_or_path", path, unusable):
        return MostConfig(**(overrides or RoutingOverrides()).apply({**values, **changes}))


def read_description(path: str, overrides: RoutingOverrides | None = None) -> tuple[MostConfig, PreTrainedTokenizerFast]:
    """The configuration and the tokenizer of a model folder, which fit each other. Raises what `read_config`, `load_tokenizer` and
    `check_vocabulary` raise."""
    config, tokenizer = read_config(path, overrides), load_tokenizer(path)
    check_vocabulary(config, tokenizer, path)
    return config, tokenizer


def check_vocabulary(config: MostConfig, tokenizer: PreTrainedTokenizerFast, path: str) -> None:
    """Raise CheckpointError unless a model and its tokenizer agree on what is audio: else all speech would go to the experts of text. The
    tokens in the audio range of the configuration must be the units and the audio markers, and every token must have an embedding. `path`
    is only shown."""
    vocabulary, where = tokenizer.get_vocab(), storage.redact(path)
    make = f"most-ray init-model --from_deepseek {where} --output models/most"
    if not vocabulary.keys() & set(AUDIO_TOKENS):
        remedy = f"Make a model that does, and name its folder: {make}."
        raise CheckpointError("model_name_or_path", where, "has a tokenizer that knows no speech units.", remedy)
    ids = token_ids(tokenizer)
    audio, first, last = {vocabulary[token] for token in AUDIO_TOKENS}, config.first_audio_token, config.last_audio_token
    if {number for number in vocabulary.values() if first <= number <= last} != audio:
        rule = f"has audio tokens {first}..{last} by its {CONFIG}, and by its tokenizer units and audio markers {min(audio)}..{max(audio)}"
        rule += f" ({len(audio)} of them)."
        raise CheckpointError("model_name_or_path", where, rule, _OTHER_TOKENIZER)
    if (most := max(vocabulary.values())) >= config.vocab_size:
        rule = f"has a tokenizer with ids up to {most}, and by its {CONFIG} {count_of(config.vocab_size, 'embedding')} (vocab_size)."
        raise CheckpointError("model_name_or_path", where, rule, _OTHER_TOKENIZER)
    if special := audio & {ids.bos, ids.eos, ids.pad}:
        raise CheckpointError("model_name_or_path", where, f"has a tokenizer whose special token {min(special)} is an audio token.")


def load_model(
    path: str, overrides: RoutingOverrides | None = None, distributed: DistributedConfig | None = None, **changes: Any
) -> MostForCausalLM:
    """Load a model with weights in float32, from a folder. It must have every tensor and no other; only balance biases may be missing, and
    are zeros then.

    Args:
        overrides, changes: as in `read_config`, whose errors are raised too.
        distributed: how the model is laid out over ranks; experts are placed as most_ray/model/placement.py plans.

    Raises:
        CheckpointError: a weight is missing, unexpected or of another shape.
    """
    config = read_config(path, overrides, **changes)
    check_weight_count(count_parameters(config, path), weight_shapes(path), path)
    keywords: dict[str, Any] = {"distributed_config": distributed} if distributed else {}
    keywords |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "trust_remote_code": False, "use_safetensors": True}
    with quiet_transformers(), loading(CheckpointError, "model_name_or_path", path, "cannot be loaded"):
        model, info = MostForCausalLM.from_pretrained(path, config=config, dtype=torch.float32, **keywords)
    biases = {name for name, _ in model.named_buffers() if name.endswith(BALANCE_BIAS)}
    if biases <= set(info["missing_keys"]):
        info["missing_keys"] = set(info["missing_keys"]) - biases
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(what):
            first = sorted(map(str, info[what]))[0]
            raise CheckpointError("model_name_or_path", path, f"has {len(info[what])} {what.replace('_', ' ')}, the first {first}.")
    if distributed and distributed.ep_size > 1:
        place_experts(model, distributed.ep_size)
    return model


def not_finite(model: torch.nn.Module) -> list[str]:
    """Names of a model's weights and buffers that hold a value which is not finite, in this rank's shards."""
    tensors = {name: _local(tensor) for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    finite = {name: torch.stack(tensor.aminmax()).isfinite().all() for name, tensor in tensors.items() if tensor.numel()}
    return [name for name, good in zip(finite, torch.stack([*finite.values()]).tolist(), strict=True) if not good] if finite else []


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def count_parameters(config: MostConfig, path: str) -> int:
    """The number of parameters of a model, for which no memory is allocated. `path` is only shown. Raises CheckpointError if no model can
    be made of the configuration."""
    unusable = loading(CheckpointError, "model_name_or_path", path, f"has a {CONFIG} of which no model can be made")
    with unusable, torch.device("meta"), initialization.no_init_weights():
        return sum(parameter.numel() for parameter in MostForCausalLM(config).parameters())


def save_model(model: MostForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Save a model and its tokenizer in Hugging Face layout (with keys per expert, as DeepSeek-V2); `AutoModelForCausalLM` loads it after
    `import most_ray`."""
    model.config.template_hash = template_hash()
    eos = model.config.eos_token_id
    model.generation_config.eos_token_id = sorted({*(eos if isinstance(eos, list) else [eos]), token_ids(tokenizer).end_audio})
    model.generation_config.pad_token_id = token_ids(tokenizer).pad
    with quiet_transformers():
        try:
            model.save_pretrained(output)
            tokenizer.save_pretrained(output)
            open_to_readers(output)  # safetensors makes its files for this user alone
        except Exception as error:  # libraries in Rust have classes of their own for "No space left on device (os error 28)"
            if code := re.search(r"\(os error (\d+)\)", str(error)):
                raise OSError(int(code[1]), os.strerror(int(code[1])), str(output)) from error
            raise


def check_template(config: MostConfig, path: str) -> None:
    """Raise CheckpointError if a model was trained with another prompt template. `path` is only shown."""
    stored = getattr(config, "template_hash", None)
    if stored is not None and stored != template_hash():
        rule = f"is the one that {storage.redact(path)} was trained with; this version's is {template_hash()!r}."
        raise CheckpointError("template", stored, rule, "To continue training with the new one anyway: --accept_data_change true.")


def check_units(config: MostConfig, units: str | None, path: str) -> None:
    """Raise CheckpointError if the units of records were made differently from those that a model was trained on. `path` is only shown;
    `units` is the hash of the records' units manifest (see `records.record.units_hash`), None where it is not known."""
    stored = getattr(config, "units_identity", None)
    if stored is not None and units is not None and stored != units:
        rule = f"of the records differ from those that {storage.redact(path)} was trained on ({stored!r})."
        remedy = "Prepare them with its k-means, or continue training anyway: --accept_data_change true."
        raise CheckpointError("units", units, rule, remedy)


def config_json(config: MostConfig) -> str:
    """The content of config.json in a model folder."""
    return json.dumps(parse_json(config.to_json_string()), indent=2)
