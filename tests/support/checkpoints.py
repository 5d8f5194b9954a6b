"""Small states saved and read without Ray, for tests of checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from most_ray.checkpoint import catalog, reader
from most_ray.checkpoint.writer import CheckpointWriter
from most_ray.optim.train_state import TrainState
from tests.conftest import ROOT
from tests.support.training import bare_state


def save(
    uri: str | Path, state: TrainState, files: Callable[[Path], None] = lambda _: None, may_commit: Callable[[], bool] = lambda: True
) -> None:
    made = CheckpointWriter(background=False)
    made.save(str(uri), state, {}, files, may_commit)
    made.close()


def copy_tokenizer(folder: Path) -> None:
    """Put the tokenizer of the stored run, which has the ids of `builders.IDS`, into a folder."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "tests" / "fixtures" / "run-0.1" / "stored" / "init" / name, folder)


def small(value: float = 0.0) -> Any:
    """A state of a few numbers around `value`, which every weight holds."""
    model = nn.Linear(40, 60)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return bare_state(model)


def saved_at(checkpoints: str | Path, *steps: int) -> list[str]:
    """Checkpoints of these steps, each with its step in its weights."""
    for step in steps:
        state = small(float(step))
        state.step = step
        save(catalog.step_uri(str(checkpoints), step), state)
    return [catalog.step_uri(str(checkpoints), step) for step in steps]


def weight_in(uri: str | Path) -> float:
    state = small(-1.0)
    reader.load(uri, state)
    values = {float(value) for parameter in state.model.parameters() for value in parameter.detach().flatten()}
    assert len(values) == 1
    return values.pop()
