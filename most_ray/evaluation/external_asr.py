"""Speech that the model has made, judged by somebody else: units to audio, audio to text by a transformers recogniser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import soxr
import torch

from most_ray.errors import CheckpointError

Vocoder = Callable[[Sequence[Sequence[int]]], tuple[list[np.ndarray], int]]  # units -> waveforms (samples,) float32, and their rate in Hz


class ExternalRecogniser:
    """What a recogniser hears in units that a vocoder speaks; for `share.score_shard`.

    Args:
        vocoder: see `Vocoder`.
        use_gpu: where there is one.
        checkpoint: folder or hub name of any model that transformers' automatic-speech-recognition pipeline takes (Whisper, wav2vec2, ...).

    Raises:
        CheckpointError: the checkpoint holds no such model.
    """

    def __init__(self, vocoder: Vocoder, checkpoint: str, use_gpu: bool = True) -> None:
        from transformers import pipeline  # takes seconds to import

        device = 0 if use_gpu and torch.cuda.is_available() else -1
        try:
            self._pipeline: Any = pipeline("automatic-speech-recognition", model=checkpoint, device=device, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            reason = f"is no recogniser that can be used ({' '.join(str(error).split())[:200]})."
            raise CheckpointError("recogniser", checkpoint, reason, "Name a Whisper or CTC checkpoint in Hugging Face layout.") from error
        self._vocoder = vocoder

    def __call__(self, units: Sequence[Sequence[int]]) -> list[str]:
        """Texts of so many utterances."""
        waves, rate = self._vocoder(units)
        own = int(self._pipeline.feature_extractor.sampling_rate)
        if rate != own:
            waves = [soxr.resample(wave, rate, own) for wave in waves]
        inputs = [{"raw": wave.astype(np.float32), "sampling_rate": own} for wave in waves]
        # One at a time: wav2vec2 and its likes hear another thing where an utterance is padded to a longer one's length.
        return [str(output["text"]).strip() for output in self._pipeline(inputs, batch_size=1)]
