"""What feature extractors have in common: frames, and the protocols of extractors and of their settings.

To add a kind of features, write its settings and its extractor in a module of its own, as `mfcc` is one, and name it in `extractors.KINDS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np


@dataclass(frozen=True)
class Frames:
    """Features of one recording."""

    values: np.ndarray  # float32 (frames, features)
    first: int = 0  # frames that were cut off before them, as silence


class Extractor(Protocol):
    """Computes features of recordings. A recording's frames do not depend on the recordings that come with it."""

    sample_rate: int  # Hz, of the samples that it takes
    rate_hz: float  # frames per second
    width: int  # features of a frame
    per_speaker: bool  # frames are to be normalised by their speaker's mean and variance before k-means
    identity: dict[str, Any]  # what the units manifest keeps of the features: {"features", "settings", "normalisation"}, JSON-ready
    source: str | None  # folder or name on the hub that the weights were loaded from; not part of `identity`, which has their hash

    def __call__(self, waves: Sequence[np.ndarray]) -> list[Frames]:
        """Features of each recording, given as float32 (samples,) at `sample_rate`; one that is too short has no frames."""
        ...


class FeatureSettings(Protocol):
    """Settings of one kind of features: a frozen dataclass, from which an extractor can be opened in any process."""

    cluster_bytes: ClassVar[int]  # of audio, from which on a cluster is worth its start: some two minutes' work of one core
    uses_gpu: ClassVar[bool]  # whether the extractor runs on a GPU where there is one


@dataclass(frozen=True)
class EncoderSettings:
    """A layer of a speech encoder in transformers."""

    cluster_bytes: ClassVar[int] = 16 << 20
    uses_gpu: ClassVar[bool] = True

    kind: str  # hubert, wavlm, ..., or auto for any
    source: str  # folder or name on the hub
    layer: int  # counted from 1 as in fairseq; 0: what enters the first
