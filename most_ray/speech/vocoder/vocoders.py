"""Opens vocoders: one that `prepare vocoder` fitted, or SeamlessM4T's."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from most_ray.errors import CheckpointError
from most_ray.io import storage
from most_ray.records.files import UNITS_MANIFEST, VOCODER
from most_ray.speech.vocoder.unit_vocoder import UnitVocoder

Vocoder = Callable[[Sequence[Sequence[int]]], tuple[list[np.ndarray], int]]  # units -> waveforms, float32 (samples,), and their rate in Hz


def open_vocoder(source: str, units: dict[str, Any] | None, language: str | None = None, speaker: int = 0) -> Vocoder:
    """Open a vocoder.

    Args:
        source: a file, or a folder with vocoder.safetensors; or else a folder or name on the hub of SeamlessM4T's vocoder in transformers.
        units: identity of the manifest of the units that it must know; None: unknown.
        language, speaker: of SeamlessM4T's vocoder; see CodeHifiGan.

    Raises:
        CheckpointError: there is no vocoder, it is damaged, or it was made for other units.
    """
    if storage.is_remote(source):
        raise CheckpointError("vocoder", storage.redact(source), "is not on this machine.", "Copy it here and name the copy.")
    path = storage.local(source)
    if path.is_dir() and (path / VOCODER).exists():
        path = path / VOCODER
    elif path.is_dir() and (path / UNITS_MANIFEST).exists():
        raise CheckpointError("vocoder", source, f"holds no {VOCODER}.", "Make one: `most-ray prepare vocoder --records DIR`.")
    if not path.is_file():
        from most_ray.speech.vocoder.code_hifigan import CodeHifiGan  # transformers' models take seconds to import

        return CodeHifiGan(source, int(units["n_units"]) if units else None, language, speaker)
    vocoder = UnitVocoder.load(path)
    if units is not None and units != vocoder.units:
        rule = f"speaks the units {json.dumps(vocoder.units, sort_keys=True)}, not {json.dumps(units, sort_keys=True)}."
        raise CheckpointError("vocoder", source, rule, "Name the vocoder that was fitted with these units.")
    return vocoder
