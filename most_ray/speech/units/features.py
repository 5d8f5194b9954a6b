"""Frames of acoustic features, and the settings of what extracts them: MFCC (mfcc.py) or a layer of an encoder (encoder.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from most_ray.errors import ConfigError
from most_ray.io import storage


@dataclass(frozen=True)
class Frames:
    """Features of one recording. `values` is float32 (frames, features); `first` frames were cut off before them (silence)."""

    values: np.ndarray
    first: int = 0


class Extractor(Protocol):
    """Features of recordings. The same recording gives the same frames, whatever it is handed in with.

    `identity` is what the units manifest says of the features: {"features", "settings", "normalisation"}, JSON-ready. `per_speaker`:
    frames are to be normalised by their speaker's mean and variance before k-means.
    """

    sample_rate: int  # Hz, of the samples that it takes
    rate_hz: float  # frames a second
    width: int  # features of a frame
    per_speaker: bool
    identity: dict[str, Any]

    def __call__(self, waves: Sequence[np.ndarray]) -> list[Frames]:
        """One Frames for each of the recordings, float32 (samples,) at `sample_rate`; without frames where one is too short."""
        ...


@dataclass(frozen=True)
class MfccSettings:
    """Kaldi-style MFCC (Davis & Mermelstein 1980, as in Kaldi's feat/) with first and second differences.

    Frequencies stop at 4 kHz by default, so that 8 kHz and 16 kHz recordings fall into the same units.
    """

    sample_rate: int = 16000
    frame_shift_ms: float = 10.0
    frame_length_ms: float = 25.0
    num_mels: int = 23
    num_ceps: int = 13
    low_freq: float = 60.0
    high_freq: float = 3800.0
    delta_order: int = 2
    trim: float | None = 5.5  # cut ends whose mean log mel energy is that far below the recording's 95th percentile; None: keep all
    keep_every: int = 2  # of the frames; differences are taken before, at the full rate

    @property
    def rate_hz(self) -> float:
        """Frames, and so units before repeats are removed, per second."""
        return 1000.0 / (self.frame_shift_ms * self.keep_every)


@dataclass(frozen=True)
class EncoderSettings:
    """A layer of a speech encoder in transformers: `kind` as the user calls it (hubert, wavlm, ...), `place` a folder or hub name, `layer`
    counted from 1 as in fairseq (0: what enters the first)."""

    kind: str
    source: str
    layer: int


FeatureSettings = MfccSettings | EncoderSettings


def parse_features(text: str) -> FeatureSettings:
    """`mfcc`, or KIND:PLACE:LAYER as hubert:facebook/hubert-base-ls960:9.

    Raises:
        ConfigError: it is neither.
    """
    if text == "mfcc":
        return MfccSettings()
    kind, _, rest = text.partition(":")
    place, _, layer = rest.rpartition(":")
    if not kind or not place or not layer.isdecimal():
        remedy = "As hubert:facebook/hubert-base-ls960:9, or wavlm:DIR:6."
        raise ConfigError("features", text, "is neither mfcc nor KIND:NAME_OR_PATH:LAYER.", remedy)
    return EncoderSettings(kind, storage.absolute_if_exists(place), int(layer))  # other processes have other working directories


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch on one CPU thread: several would add in another order, and the last bits would depend on their number."""
    import torch  # takes seconds to import, and MFCC does without

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
