"""Checks of the models that evaluations use beside the run's own, before anything starts: the recogniser of its speech, and its vocoder."""

from __future__ import annotations

import os
from collections.abc import Iterable

from most_ray.config import RunConfig
from most_ray.errors import CheckpointError, ConfigError
from most_ray.io import storage
from most_ray.io.hub import check_model_name, model_path
from most_ray.records.files import SPEECH_FOLDER, VOCODER

_ON_THIS_MACHINE = "Copy it here and name the copy."


def check_evaluators(config: RunConfig) -> None:
    """Raise UserError where a recogniser or a vocoder is named that does not exist, or a vocoder without a recogniser, which has no use."""
    if config.vocoder and not config.recogniser:
        raise ConfigError("vocoder", config.vocoder, "is of use only with a recogniser.", "Name one, or leave it out.")
    for field, source in (("recogniser", config.recogniser), ("vocoder", config.vocoder)):
        if source and storage.is_remote(source):
            raise CheckpointError(field, storage.redact(source), "is not on this machine.", _ON_THIS_MACHINE)
        if source and not (field == "vocoder" and os.path.isfile(model_path(source))):
            check_model_name(source, field)


def check_vocoder_is_found(config: RunConfig, model: str) -> None:
    """Raise CheckpointError where a recogniser is named and nothing makes speech of units for it: no vocoder is named, and none is beside
    the training records, in the starting model or in the run's folder. `model`: the starting model's folder, or a name."""
    if not config.recogniser or config.vocoder or not (config.val_asr_dirs or config.val_tts_dirs or config.val_text_dirs):
        return
    folders: Iterable[str] = (*config.train_asr_dirs, *config.train_tts_dirs)
    folders = [*folders, storage.join(config.run_uri, SPEECH_FOLDER), storage.join(model, SPEECH_FOLDER)]
    if not any(storage.exists(storage.join(folder, VOCODER)) for folder in folders):
        remedy = "Make one by `most-ray prepare vocoder` in the folder of the training records, or name one: vocoder."
        raise CheckpointError("recogniser", config.recogniser, "needs a vocoder, and none is beside the training records.", remedy)
