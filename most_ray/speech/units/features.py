"""Frames of acoustic features from samples: MFCC, which needs no download, or a layer of any speech encoder (encoder.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import kaldi_native_fbank as knf
import numpy as np

from most_ray.errors import ConfigError
from most_ray.io import storage

_BLOCK = 1 << 20  # samples handed to Kaldi at once: its own copies stay small, however long a recording


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
    place: str
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
    return EncoderSettings(kind, storage.absolute_if_there(place), int(layer))  # other processes have other working directories


def open_extractor(settings: FeatureSettings, device: str | None = None) -> Extractor:
    """What makes such features, on a torch device where it has use for one (None: the best there is).

    Raises:
        ConfigError, CheckpointError: no such encoder, or no such layer in it.
    """
    if isinstance(settings, MfccSettings):
        return MfccExtractor(settings)
    import torch  # takes seconds to import, as does transformers, and MFCC does without

    from most_ray.speech.units.encoder import EncoderExtractor

    return EncoderExtractor(settings, device or ("cuda" if torch.cuda.is_available() else "cpu"))


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


class MfccExtractor:
    """MFCC as an Extractor, normalised per speaker."""

    per_speaker = True

    def __init__(self, settings: MfccSettings) -> None:
        self._settings = settings
        self.sample_rate = settings.sample_rate
        self.rate_hz = settings.rate_hz
        self.width = settings.num_ceps * (settings.delta_order + 1)
        self.identity: dict[str, Any] = {
            "features": "mfcc",
            "settings": asdict(settings),
            "normalisation": "mean and variance per speaker",
        }

    def __call__(self, waves: Sequence[np.ndarray]) -> list[Frames]:
        return [mfcc(wave, self._settings) for wave in waves]


def mfcc(samples: np.ndarray, settings: MfccSettings) -> Frames:
    """Features of one recording, values float32 (frames, num_ceps * (delta_order + 1)).

    A recording shorter than one frame gives none. The first coefficient is the mel-weighted one (no raw energy), and there is no
    dither: the same samples always give the same features.
    """
    options = knf.MfccOptions()
    options.frame_opts.samp_freq = settings.sample_rate
    options.frame_opts.frame_shift_ms = settings.frame_shift_ms
    options.frame_opts.frame_length_ms = settings.frame_length_ms
    options.frame_opts.dither = 0.0
    options.frame_opts.snip_edges = False
    options.mel_opts.num_bins = settings.num_mels
    options.mel_opts.low_freq = settings.low_freq
    options.mel_opts.high_freq = settings.high_freq
    options.num_ceps = settings.num_ceps
    options.use_energy = False
    extractor = knf.OnlineMfcc(options)
    # Kaldi's scale is 16-bit integers; the scale only shifts the first coefficient, but keeps energy floors meaningful.
    for start in range(0, len(samples), _BLOCK):
        extractor.accept_waveform(settings.sample_rate, samples[start : start + _BLOCK] * 32768.0)
    extractor.input_finished()
    width = settings.num_ceps * (settings.delta_order + 1)
    if extractor.num_frames_ready == 0:
        return Frames(np.zeros((0, width), np.float32))
    static = np.stack([extractor.get_frame(i) for i in range(extractor.num_frames_ready)]).astype(np.float32)
    start, end = 0, len(static)
    if settings.trim is not None:
        start, end = loud_part(static[:, 0] / np.sqrt(settings.num_mels), settings.trim)
        static = static[start:end]
    if settings.delta_order:
        options_delta = knf.DeltaOptions(order=settings.delta_order, window=2)
        static = np.asarray(knf.compute_deltas(options_delta, static), dtype=np.float32)
    # In frames that are kept: the one at `first` begins within one kept frame of where the values begin.
    return Frames(static[settings.keep_every // 2 :: settings.keep_every], start // settings.keep_every)


def loud_part(energy: np.ndarray, depth: float) -> tuple[int, int]:
    """The range of frames from the first to the last whose log energy (frames,) is within `depth` of its 95th percentile."""
    loud = np.flatnonzero(energy > np.percentile(energy, 95) - depth)
    return (int(loud[0]), int(loud[-1]) + 1) if len(loud) else (0, len(energy))
