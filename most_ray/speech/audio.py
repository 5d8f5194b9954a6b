"""Recordings in: any format libsndfile reads, mixed down to one channel, resampled, optionally played faster or slower."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
import soxr

from most_ray.errors import DataError


def load_audio(path: Path, sample_rate: int, speed: float = 1.0) -> np.ndarray:
    """Read a recording as float32 samples in [-1, 1], shape (samples,), at `sample_rate` Hz.

    `speed` plays it that many times as fast by resampling, so that pitch and formants move with the tempo (Ko et al.,
    "Audio augmentation for speech recognition", 2015).

    Raises:
        DataError: the file is missing, is no audio, or holds no samples.
    """
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, soundfile.SoundFileError) as error:
        raise DataError("recording", str(path), f"cannot be read as audio ({error}).") from error
    if samples.shape[0] == 0:
        raise DataError("recording", str(path), "holds no samples.")
    mono = samples.mean(axis=1)
    if not np.isfinite(mono).all():
        raise DataError("recording", str(path), "holds samples that are not finite.")
    source_rate = rate * speed
    if source_rate != sample_rate:
        mono = soxr.resample(mono, source_rate, sample_rate)
    return np.ascontiguousarray(mono, dtype=np.float32)
