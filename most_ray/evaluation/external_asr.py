"""Recognises synthesised speech independently of the model: units to audio by a vocoder, audio to text by a recogniser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import soxr
import torch

from most_ray.errors import CheckpointError
from most_ray.io.hub import model_folder
from most_ray.model.build import quiet_transformers
from most_ray.records.model_files import check_foreign_model, loading, no_panic_output, weight_files
from most_ray.speech.vocoder.vocoders import Vocoder

_FIELD = "recogniser"  # of errors


class ExternalRecogniser:
    """A transformers recogniser for units, which a vocoder turns into audio first; a `scoring.Recogniser`.

    `checkpoint` is a folder, or a name on the hub, of any model that transformers' automatic-speech-recognition pipeline takes (Whisper,
    wav2vec2, ...); CheckpointError if it is not. `use_gpu`: where there is one."""

    def __init__(self, vocoder: Vocoder, checkpoint: str, use_gpu: bool = True) -> None:
        from transformers import pipeline  # takes seconds to import

        device = 0 if use_gpu and torch.cuda.is_available() else -1
        folder = model_folder(checkpoint, _FIELD)
        check_foreign_model(folder, _FIELD)
        weight_files(folder, _FIELD)
        remedy = "Name a Whisper or CTC checkpoint in Hugging Face layout."
        with loading(CheckpointError, _FIELD, checkpoint, "is not a usable recogniser", remedy), no_panic_output(), quiet_transformers():
            safe = {"trust_remote_code": False, "model_kwargs": {"use_safetensors": True}}
            self._pipeline: Any = pipeline("automatic-speech-recognition", model=folder, device=device, **safe)
            self._rate = int(self._pipeline.feature_extractor.sampling_rate)
        self._vocoder = vocoder

    def __call__(self, units: Sequence[Sequence[int]]) -> list[str]:
        """The text recognised in each utterance."""
        waves, rate = self._vocoder(units)
        own = self._rate
        waves = waves if rate == own else [soxr.resample(wave, rate, own) for wave in waves]
        inputs = [{"raw": wave.astype(np.float32), "sampling_rate": own} for wave in waves]
        # One at a time: models such as wav2vec2 recognise something else in an utterance that is padded to a longer one's length.
        return [str(output["text"]).strip() for output in self._pipeline(inputs, batch_size=1)]
