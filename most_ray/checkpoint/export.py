"""Exporting a checkpoint to a model folder in Hugging Face layout, and opening either."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerFast, initialization

from most_ray.checkpoint import catalog, reader
from most_ray.errors import ConfigError
from most_ray.io import storage
from most_ray.io.json_values import parse_json
from most_ray.io.outputs import check_folder, replacing_folder
from most_ray.io.run_folder import local_copy
from most_ray.model.build import count_parameters, load_model, read_description, save_model
from most_ray.model.configuration import MostConfig
from most_ray.model.modeling import MostForCausalLM
from most_ray.records.files import SPEECH_FOLDER
from most_ray.speech.units.assets import copy_assets, find_assets

# Names in an export, of this version and earlier ones.
_EXPORTED = re.compile(
    rf"(generation_)?config\.json|model.*\.safetensors(\.index\.json)?|.*token.*\.json|chat_template\.\w+|{SPEECH_FOLDER}"
)


def export_checkpoint(uri: str | Path, output: Path) -> None:
    """Write weights, configuration and tokenizer of a complete checkpoint, saved by any number of ranks, to a model folder. If the run has
    speech assets (which convert recordings to units and back), they are copied to the folder's speech/.

    Args:
        output: local folder; an earlier export there is replaced, as a whole.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged, or its tensors are not the model's.
        ConfigError: `output` holds something else than an export.
    """
    uri = str(uri)
    check_export("output", output)
    directory = None if storage.is_remote(uri) else storage.local(uri).resolve()
    if directory and output.resolve() in (directory, *directory.parents):
        raise ConfigError("output", str(output), "holds the checkpoint itself.", "Name another folder.")
    reader.read_state(uri)
    model, tokenizer = _checkpoint_model(uri)
    identity = getattr(model.config, "units_identity", None)
    with replacing_folder("output", output) as folder:
        save_model(model, tokenizer, folder)
        if kit := find_assets(uri, identity):
            copy_assets([kit], str(folder / SPEECH_FOLDER), identity)


def open_model(uri: str) -> tuple[MostForCausalLM, PreTrainedTokenizerFast]:
    """Load model and tokenizer of a model folder, a name on the Hugging Face hub, or a complete checkpoint, in float32 in this process.
    Raises CheckpointError if it holds no usable model."""
    if _is_checkpoint(uri):
        return _checkpoint_model(uri)
    folder = local_copy(uri)
    _, tokenizer = read_description(folder)
    return load_model(folder), tokenizer


def open_description(uri: str) -> tuple[MostConfig, PreTrainedTokenizerFast]:
    """Load configuration and tokenizer of what `open_model` opens, without the weights."""
    if not _is_checkpoint(uri):
        return read_description(local_copy(uri))
    reader.read_state(uri)
    with tempfile.TemporaryDirectory(prefix="most_ray-export-") as scratch:
        folder = _model_files(uri, Path(scratch))
        return read_description(folder)


def _is_checkpoint(uri: str) -> bool:
    return storage.exists(storage.join(uri, catalog.COMMIT))


def _checkpoint_model(uri: str) -> tuple[MostForCausalLM, PreTrainedTokenizerFast]:
    config, tokenizer = open_description(uri)
    reader.check_model_size(uri, count_parameters(config, uri))
    with initialization.no_init_weights():  # buffers that no file holds are still initialised
        model = MostForCausalLM(config)
    reader.read_model(uri, model)
    return model, tokenizer


def _model_files(uri: str, scratch: Path) -> str:
    """Return a local folder with the checkpoint's configuration and tokenizer: its own, or copies in `scratch`."""
    if not storage.is_remote(uri):
        return str(storage.local(uri))
    for entry in storage.list_files(uri, ("",)):
        if not entry.name.endswith(".safetensors"):
            (scratch / entry.name).parent.mkdir(parents=True, exist_ok=True)
            storage.download(entry.uri, scratch / entry.name)
    return str(scratch)


def check_export(field: str, output: Path) -> None:
    """Raise ConfigError if `output` cannot be written to, or is not an earlier export, which may be replaced as a whole."""
    check_folder(field, output)
    if not output.exists():
        return
    names = sorted(path.name for path in output.iterdir())
    if names and not ({"config.json", "generation_config.json"} <= set(names) and _model_type(output) == MostConfig.model_type):
        raise ConfigError(field, str(output), "exists and is no exported model.", "Name another folder, or move it away.")
    if mine := next((name for name in names if not _EXPORTED.fullmatch(name)), None):
        raise ConfigError(field, str(output), f"holds {mine}, which is of no export: it would be lost.", "Move it away.")


def _model_type(folder: Path) -> object:
    """What config.json of a folder says that the model is; None where it cannot be read."""
    try:
        return parse_json((folder / "config.json").read_bytes())["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
