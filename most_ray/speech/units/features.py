"""What feature extractors have in common: frames, the protocol, and the settings of each kind.

To add a kind of features, write an extractor in a module of its own, its settings here, and name both in extractors.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from most_ray.errors import ConfigError
from most_ray.io import storage


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
    source: str | None  # folder or hub name that the weights were loaded from; not part of `identity`, which has their hash

    def __call__(self, waves: Sequence[np.ndarray]) -> list[Frames]:
        """Features of each recording, given as float32 (samples,) at `sample_rate`; one that is too short has no frames."""
        ...


@dataclass(frozen=True)
class MfccSettings:
    """Kaldi-style MFCC (Davis & Mermelstein 1980, as in Kaldi's feat/) with first and second differences.

    By default frequencies stop at 4 kHz, so that recordings at 8 kHz and at 16 kHz give the same units.
    """

    cluster_bytes: ClassVar[int] = 512 << 20  # of audio, from which on a cluster is worth its start: some two minutes' work of one core
    uses_gpu: ClassVar[bool] = False

    sample_rate: int = 16000  # Hz
    frame_shift_ms: float = 10.0
    frame_length_ms: float = 25.0
    num_mels: int = 23
    num_ceps: int = 13
    low_freq: float = 60.0  # Hz
    high_freq: float = 3800.0  # Hz
    delta_order: int = 2  # 2: first and second differences
    trim: float | None = 5.5  # cut ends whose mean log mel energy is that far below the recording's 95th percentile; None: keep all
    keep_every: int = 2  # keep one frame in so many; differences are computed before, at the full rate

    @property
    def rate_hz(self) -> float:
        """Frames per second, which is units per second before repeats are removed."""
        return 1000.0 / (self.frame_shift_ms * self.keep_every)


@dataclass(frozen=True)
class EncoderSettings:
    """A layer of a speech encoder in transformers."""

    cluster_bytes: ClassVar[int] = 16 << 20  # as for MfccSettings
    uses_gpu: ClassVar[bool] = True

    kind: str  # hubert, wavlm, ..., or auto for any
    source: str  # folder or hub name
    layer: int  # counted from 1 as in fairseq; 0: what enters the first


FeatureSettings = MfccSettings | EncoderSettings


def parse_features(text: str) -> FeatureSettings:
    """Parse `mfcc`, or KIND:SOURCE:LAYER as hubert:facebook/hubert-base-ls960:9. A source that is a folder becomes an absolute path.

    Raises:
        ConfigError: the text is of neither form.
    """
    if text == "mfcc":
        return MfccSettings()
    kind, _, rest = text.partition(":")
    source, _, layer = rest.rpartition(":")
    if not kind or not source or not layer.isdecimal():
        remedy = "As hubert:facebook/hubert-base-ls960:9, or wavlm:DIR:6."
        raise ConfigError("features", text, "is neither mfcc nor KIND:NAME_OR_PATH:LAYER.", remedy)
    return EncoderSettings(kind, storage.absolute_if_exists(source), int(layer))  # other processes have other working directories
