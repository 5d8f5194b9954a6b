"""What has changed since the checkpoint that a run resumes from, apart from its data: its settings, and the model.

A changed setting is named. Where steps depend on it, the run continues, but not as one that had it from the start; with others (threads,
save_steps, places of files, numbers of workers) it continues exactly. Weights in another model than they were trained in
mean nothing: that is refused.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config

from most_ray.config import OPTIONS, DataOptions, RunConfig, portable_yaml, to_yaml
from most_ray.data.plan import Cursor, Plan, check_cursor
from most_ray.errors import CheckpointError, shown
from most_ray.io import storage
from most_ray.io.json_values import parse_json
from most_ray.io.yaml_values import parse_yaml
from most_ray.model.build import RoutingOverrides, config_json, read_config
from most_ray.model.configuration import MostConfig
from most_ray.options import stored_values

# Settings from which it follows which records a step holds, see `data.plan.Plan.ingredients`.
_OF_DATA = {each.name for each in fields(DataOptions) if not each.name.startswith("val_") and not OPTIONS[each.name].inert}
_OF_DATA = (_OF_DATA | {"seed", "global_batch_size"}) - {"accept_data_change", "trace_records"}
_OF_LENGTH = {name for name in OPTIONS if name == "max_steps" or name.startswith("epochs")}
_OF_EACH_RUN, _OF_EACH_START = {"name", "output_dir"}, {"resume_from_checkpoint", "ignore_optimizer_state"}
# Fields of a model that a run may set: a change of one is a changed setting.
_SETTINGS = tuple(name for name in RoutingOverrides.__annotations__ if name in OPTIONS)
# Fields that no output of the forward pass depends on.
_NO_PART = {"initializer_range", "use_cache", "pretraining_tp", "attention_dropout", "output_router_logits", "use_balance_bias"}
_NO_PART |= {"max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"}
_MODEL = tuple(name for kind in (DeepseekV2Config, MostConfig) for name in kind.__annotations__ if name not in (*_SETTINGS, *_NO_PART))
_GROUPS = ("text_expert_indices", "audio_expert_indices")


def all_changes(
    uri: str, content: Mapping[str, Any], plan: Plan, config: RunConfig, model: MostConfig, total_steps: int
) -> tuple[list[str], list[str]]:
    """What has changed since a checkpoint: what makes the run continue otherwise than an uninterrupted one (data, and settings that steps
    depend on), and other settings.

    Args:
        content: of the checkpoint's state.json.
        plan, config, model, total_steps: of the run that resumes.

    Raises:
        CheckpointError: as `data.plan.check_cursor` and `check_model`.
    """
    data = check_cursor(plan, Cursor(**content["cursor"]), content["ingredients"], config.accept_data_change)
    learned = changes_since(uri, content, config, model, total_steps)
    of_data, others = other_changes(uri, config, learned, not data)
    keys = {text.split(" ", 1)[0] for text in of_data}
    return [*(name for name in data if name not in keys), *of_data, *learned], others


def changes_since(uri: str, content: Mapping[str, Any], config: RunConfig, model: MostConfig, total_steps: int) -> list[str]:
    """What has changed since a checkpoint, each as `name (before -> now)`.

    Args:
        content: of the checkpoint's state.json.
        config, model, total_steps: of the run that resumes.

    Raises:
        CheckpointError: as `check_model`.
    """
    before, now = check_model(uri, model), _described(model)
    pairs = {name: (before[name], now[name]) for name in _SETTINGS}
    stored = stored_values(OPTIONS, parse_yaml(storage.read_bytes(storage.join(uri, "config.yaml"))))
    learned = [option.name for option in OPTIONS.values() if option.learns and stored.get(option.name) is not None]
    pairs |= {name: (stored[name], getattr(config, name)) for name in learned}
    steps = content.get("total_steps", stored.get("max_steps"))
    # On which the learning rate of each step depends.
    if steps is not None and (config.lr_scheduler != "constant" or (config.warmup_ratio and not config.warmup_steps)):
        pairs["total_steps"] = (steps, total_steps)
    return [f"{name} ({shown(old)} -> {shown(new)})" for name, (old, new) in pairs.items() if old != new]


def other_changes(uri: str, config: RunConfig, changed: Sequence[str], same_data: bool) -> tuple[list[str], list[str]]:
    """The settings that have changed since a checkpoint and that `changes_since` does not name, each as `name (before -> now)`: those that
    the data of steps follows from, and those on which no step depends. Of settings that the checkpoint does not state nothing is known.

    Args:
        changed: what `changes_since` has found.
        same_data: steps hold the records that they held (then no setting has changed them).
    """
    stored = stored_values(OPTIONS, parse_yaml(storage.read_bytes(storage.join(uri, "config.yaml"))))
    # Paths as the checkpoint of this version has them, and as earlier versions have written them.
    portable, absolute = (stored_values(OPTIONS, parse_yaml(text)) for text in (portable_yaml(config, uri), to_yaml(config.redacted())))
    named = {*_SETTINGS, *_OF_EACH_RUN, *_OF_EACH_START, *(option.name for option in OPTIONS.values() if option.learns)}
    named |= _OF_LENGTH if any(each.startswith("total_steps ") for each in changed) else set()
    known = [name for name in OPTIONS if name in stored and name not in named]
    other = [name for name in known if stored[name] not in (portable.get(name), absolute.get(name))]
    found = {name: f"{name} ({shown(stored[name])} -> {shown(portable.get(name))})" for name in other}
    of_data = [name for name in found if name in _OF_DATA and not same_data]
    return [found[name] for name in of_data], [text for name, text in found.items() if name not in of_data]


def check_model(uri: str, model: MostConfig) -> dict[str, Any]:
    """The fields of the model that a checkpoint's weights were trained in.

    Raises:
        CheckpointError: they mean nothing in `model`, since a part of it that the shapes of weights do not show is another, or since a
            modality would have none of the experts that it was trained with.
    """
    with tempfile.TemporaryDirectory(prefix="most_ray-resume-") as folder:
        (Path(folder) / "config.json").write_bytes(storage.read_bytes(storage.join(uri, "config.json")))
        before, now = _described(read_config(folder)), _described(model)
    if other := next((name for name in _MODEL if before[name] != now[name]), None):
        rule = f"has weights that were trained with {other} = {shown(before[other])}, and model_name_or_path has {shown(now[other])}."
        raise CheckpointError("checkpoint", storage.redact(uri), rule, "Name the model that the run began with.")
    if before["use_modality_aware_routing"] and now["use_modality_aware_routing"]:
        for name in _GROUPS:
            if not set(before[name]) & set(now[name]):
                modality, rule = name.split("_", 1)[0], f"were {before[name]} up to the checkpoint: "
                rule += f"no expert that it was trained with would be left to {modality}."
                raise CheckpointError(name, now[name], rule, "Restore both groups, or start another run from a model that has these.")
    return before


def _described(model: MostConfig) -> dict[str, Any]:
    """The fields of a model as JSON values, so that those that were read and those that are in use compare."""
    fields = parse_json(config_json(model))
    return {name: fields.get(name) for name in (*_SETTINGS, *_MODEL)}
