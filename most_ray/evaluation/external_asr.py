"""Recognises synthesised speech independently of the model: units to audio by a vocoder, audio to text by a recogniser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import soxr
import torch

from most_ray.errors import CheckpointError, one_line
from most_ray.speech.vocoder.vocoders import Vocoder


class ExternalRecogniser:
    """A transformers recogniser for units, which a vocoder turns into audio first; a `scoring.Recogniser`.

    `checkpoint` is a folder or hub name of any model that transformers' automatic-speech-recognition pipeline takes (Whisper, wav2vec2,
    ...); CheckpointError if it is not. `use_gpu`: where there is one."""

    def __init__(self, vocoder: Vocoder, checkpoint: str, use_gpu: bool = True) -> None:
        from transformers import pipeline  # takes seconds to import

        device = 0 if use_gpu and torch.cuda.is_available() else -1
        try:
            self._pipeline: Any = pipeline("automatic-speech-recognition", model=checkpoint, device=device, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            reason = f"is not a usable recogniser ({one_line(error)})."
            raise CheckpointError("recogniser", checkpoint, reason, "Name a Whisper or CTC checkpoint in Hugging Face layout.") from error
        self._vocoder = vocoder

    def __call__(self, units: Sequence[Sequence[int]]) -> list[str]:
        """The text recognised in each utterance."""
        waves, rate = self._vocoder(units)
        own = int(self._pipeline.feature_extractor.sampling_rate)
        waves = waves if rate == own else [soxr.resample(wave, rate, own) for wave in waves]
        inputs = [{"raw": wave.astype(np.float32), "sampling_rate": own} for wave in waves]
        # One at a time: models such as wav2vec2 recognise something else in an utterance that is padded to a longer one's length.
        return [str(output["text"]).strip() for output in self._pipeline(inputs, batch_size=1)]
