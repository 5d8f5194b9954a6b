"""A checkpoint as a model folder in Hugging Face layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

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
    config = read_config(str(directory))
    with torch.device("meta"):
        model = MostForCausalLM(config)
    model.to_empty(device="cpu")
    checkpoint.read_tensors(directory, checkpoint.model_tensors(model))
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    save_model(model, load_tokenizer(directory), temporary)
    shutil.rmtree(output, ignore_errors=True)
    temporary.rename(output)
