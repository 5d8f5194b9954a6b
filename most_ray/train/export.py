"""A checkpoint as a model folder in Hugging Face layout."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

from most_ray import storage
from most_ray.errors import ConfigError
from most_ray.model.build import read_config, save_model
from most_ray.model.modeling import MostForCausalLM
from most_ray.model.tokenizer import load_tokenizer
from most_ray.train import checkpoint


def export_checkpoint(place: str | Path, output: Path) -> None:
    """Write the weights, configuration and tokenizer of a complete checkpoint, from any number of ranks, to the local folder `output`.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged, or its tensors are not the model's.
    """
    place = str(place)
    checkpoint.read_state(place)
    _check_output(place, output)
    with tempfile.TemporaryDirectory(prefix="most_ray-export-") as scratch:
        folder = _model_files(place, Path(scratch))
        config, tokenizer = read_config(folder), load_tokenizer(folder)
    with torch.device("meta"):
        model = MostForCausalLM(config)
    model.to_empty(device="cpu")
    checkpoint.read_model(place, model)
    output = output.absolute()
    temporary, old = output.with_name(f".{output.name}.tmp"), output.with_name(f".{output.name}.old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    save_model(model, tokenizer, temporary)
    if output.exists():
        output.rename(old)
    temporary.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def _model_files(place: str, scratch: Path) -> str:
    """A local folder with the checkpoint's configuration and tokenizer."""
    if not storage.is_remote(place):
        return str(storage.local(place))
    for entry in storage.list_files(place, ("",)):
        if not entry.name.endswith(".safetensors"):
            (scratch / entry.name).parent.mkdir(parents=True, exist_ok=True)
            storage.download(entry.place, scratch / entry.name)
    return str(scratch)


def _check_output(place: str, output: Path) -> None:
    """Only what is an export already may be replaced by one.

    Raises:
        ConfigError: the folder holds something else.
    """
    if not output.exists():
        return
    directory = None if storage.is_remote(place) else storage.local(place).resolve()
    if directory and output.resolve() in (directory, *directory.parents):
        raise ConfigError("output", str(output), "holds the checkpoint itself.", "Name another folder.")
    names = {path.name for path in output.iterdir()} if output.is_dir() else {output.name}
    if names and not {"config.json", "generation_config.json"} <= names:
        raise ConfigError("output", str(output), "exists and is no exported model.", "Name another folder.")
