"""Models in and out: presets, DeepSeek-V2 and MoST folders, export in Hugging Face layout."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast
from transformers.distributed import DistributedConfig

from most_ray.errors import CheckpointError, ConfigError, nearest
from most_ray.io import storage
from most_ray.model.configuration import MostConfig, OriginalMostConfig
from most_ray.model.modeling import MostForCausalLM
from most_ray.model.placement import place_experts
from most_ray.model.routing import BALANCE_BIAS
from most_ray.records.template import template_hash
from most_ray.records.tokenizer import add_audio_tokens, load_tokenizer, token_ids, train_tokenizer

PRESETS: dict[str, dict[str, Any]] = {
    # About 1 M parameters: spoken digits in minutes on two cores.
    "tiny": {
        "text_vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 64,
        "q_lora_rank": None,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "max_position_embeddings": 4096,
        "norm_topk_prob": True,
        "aux_loss_alpha": 0.001,
    },
}


@dataclass(frozen=True)
class RoutingOverrides:
    """What a run changes in the model it starts from; None leaves the model's own value."""

    use_modality_aware_routing: bool | None = None
    text_expert_indices: tuple[int, ...] | None = None
    audio_expert_indices: tuple[int, ...] | None = None
    aux_loss_alpha: float | None = None
    seq_aux: bool | None = None
    num_experts_per_tok: int | None = None
    use_balance_bias: bool | None = None

    def values(self) -> dict[str, Any]:
        given = {name: value for name, value in vars(self).items() if value is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the library's progress bars and advice."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()


def init_model(preset: str, texts: Iterable[str], output: Path, seed: int = 0) -> MostForCausalLM:
    """A new model of a preset's size with a tokenizer trained on `texts`, saved to `output`.

    Raises:
        ConfigError: no such preset.
    """
    if preset not in PRESETS:
        raise ConfigError("preset", preset, "is not known.", nearest(preset, PRESETS))
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
    """A MoST folder from DeepSeek-V2(-Lite) in Hugging Face layout: the units and markers join its vocabulary, its experts the groups.

    New embedding rows, where the vocabulary had no room left, start as the mean of the old ones.
    """
    with quiet_transformers():
        tokenizer = add_audio_tokens(load_tokenizer(source))
        ids = token_ids(tokenizer)
        model = load_model(source, overrides, first_audio_token=ids.unit_base, last_audio_token=ids.end_audio)
        if model.config.vocab_size <= ids.end_audio:
            model.resize_token_embeddings(-(-(ids.end_audio + 1) // 64) * 64)
    save_model(model, tokenizer, output)
    return model


def read_config(path: str, overrides: RoutingOverrides | None = None, **changes: Any) -> MostConfig:
    """The configuration of a model folder (ours, the original's, or DeepSeek-V2's) or hub name, as MoST's.

    Raises:
        CheckpointError: there is none, or it is of another kind. ConfigError: the overrides do not fit it.
    """
    try:
        values, _ = transformers.PreTrainedConfig.get_config_dict(path)
    except (OSError, ValueError) as error:
        raise CheckpointError("model_name_or_path", path, f"holds no model configuration ({_line(error)}).") from error
    if not values:
        raise CheckpointError("model_name_or_path", path, "holds no config.json.")
    kind = values.get("model_type")
    known = {MostConfig.model_type, OriginalMostConfig.model_type, "deepseek_v2"}
    if kind not in known:
        raise CheckpointError("model_name_or_path", path, f"holds a model of type {kind!r}, not one of {sorted(known)}.")
    for key in ("auto_map", "model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path"):
        values.pop(key, None)
    merged = {**values, **changes, **(overrides.values() if overrides else {})}
    if merged.get("use_modality_aware_routing") and overrides and (overrides.text_expert_indices or overrides.audio_expert_indices):
        # One group named: the other is what is left.
        experts = set(range(merged.get("n_routed_experts", 64)))
        if overrides.text_expert_indices is None:
            merged["text_expert_indices"] = sorted(experts - set(overrides.audio_expert_indices or ()))
        if overrides.audio_expert_indices is None:
            merged["audio_expert_indices"] = sorted(experts - set(overrides.text_expert_indices or ()))
    try:
        return MostConfig(**merged)
    except StrictDataclassError as error:
        raise CheckpointError("model_name_or_path", path, f"has a config.json that cannot be used ({_line(error)}).") from error


def load_model(
    path: str,
    overrides: RoutingOverrides | None = None,
    distributed: DistributedConfig | None = None,
    **changes: Any,
) -> MostForCausalLM:
    """Weights in float32, laid out over ranks where `distributed` says so (experts as most_ray/model/placement.py plans). Every tensor
    must be there, and no other; balance biases, where the folder is of a model without them, are zeros.

    Raises:
        CheckpointError: a weight is missing, left over or of another shape.
    """
    config = read_config(path, overrides, **changes)
    keywords: dict[str, Any] = {"distributed_config": distributed} if distributed else {}
    with quiet_transformers():
        try:
            model, info = MostForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
                **keywords,
            )
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointError("model_name_or_path", path, f"cannot be loaded ({_line(error)}).") from error
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


def save_model(model: MostForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Hugging Face layout (per-expert keys, as DeepSeek-V2's), loadable by `AutoModelForCausalLM` after `import most_ray`."""
    model.config.template_hash = template_hash()
    model.generation_config.eos_token_id = sorted({model.config.eos_token_id, token_ids(tokenizer).end_audio})
    model.generation_config.pad_token_id = token_ids(tokenizer).pad
    with quiet_transformers():
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)


def check_template(config: MostConfig, path: str) -> None:
    """Refuse a model that was trained with another prompt template.

    Raises:
        CheckpointError: names both hashes.
    """
    stored = getattr(config, "template_hash", None)
    if stored is not None and stored != template_hash():
        raise CheckpointError(
            "template",
            stored,
            f"is what {storage.redact(path)} was trained with; this version's is {template_hash()!r}.",
            "To train it on in the new one all the same: --accept_data_change true.",
        )


def check_units(config: MostConfig, units: str | None, path: str) -> None:
    """Refuse records whose units were made differently from those a model was trained on.

    Raises:
        CheckpointError: names both identities.
    """
    stored = getattr(config, "units_identity", None)
    if stored is not None and units is not None and stored != units:
        raise CheckpointError(
            "units",
            units,
            f"of the records differ from those that {storage.redact(path)} was trained on ({stored!r}).",
            "Prepare them with its k-means, or train it on all the same: --accept_data_change true.",
        )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def config_json(config: MostConfig) -> str:
    """The configuration as it stands in a model folder's config.json."""
    return json.dumps(json.loads(config.to_json_string()), indent=2)
