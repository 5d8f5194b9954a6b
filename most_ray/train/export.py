"""A checkpoint as a model folder in Hugging Face layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from most_ray.errors import ConfigError
from most_ray.model.build import read_config, save_model
from most_ray.model.modeling import MostForCausalLM
from most_ray.model.tokenizer import load_tokenizer
from most_ray.train import checkpoint


def export_checkpoint(directory: Path, output: Path) -> None:
    """Write the weights, configuration and tokenizer of a complete checkpoint, from any number of ranks, to `output`.

    Raises:
        CheckpointError: the checkpoint is incomplete, or its tensors are not the model's.
    """
    checkpoint.read_state(directory)
    _check_output(directory, output)
    config = read_config(str(directory))
    with torch.device("meta"):
        model = MostForCausalLM(config)
    model.to_empty(device="cpu")
    checkpoint.read_tensors(directory, checkpoint.model_tensors(model))
    output = output.absolute()
    temporary, old = output.with_name(f".{output.name}.tmp"), output.with_name(f".{output.name}.old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    save_model(model, load_tokenizer(directory), temporary)
    if output.exists():
        output.rename(old)
    temporary.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def _check_output(directory: Path, output: Path) -> None:
    """Only what is an export already may be replaced by one.

    Raises:
        ConfigError: the folder holds something else.
    """
    if not output.exists():
        return
    if output.resolve() in (directory.resolve(), *directory.resolve().parents):
        raise ConfigError("output", str(output), "holds the checkpoint itself.", "Name another folder.")
    names = {path.name for path in output.iterdir()} if output.is_dir() else {output.name}
    if names and not {"config.json", "generation_config.json"} <= names:
        raise ConfigError("output", str(output), "exists and is no exported model.", "Name another folder.")
