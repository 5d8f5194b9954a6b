"""Mel-frequency cepstral coefficients with their differences, computed by kaldi-native-fbank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import kaldi_native_fbank as knf
import numpy as np

from most_ray.errors import shown
from most_ray.speech.units.features import Frames

_BLOCK = 1 << 20  # samples passed to Kaldi at once: its copies stay small, however long the recording


@dataclass(frozen=True)
class MfccSettings:
    """Kaldi-style MFCC (Davis & Mermelstein 1980, as in Kaldi's feat/) with first and second differences. By default frequencies stop at 4
    kHz, so that recordings at 8 kHz and at 16 kHz give the same units."""

    cluster_bytes: ClassVar[int] = 512 << 20
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

    def __post_init__(self) -> None:
        """ValueError for settings of which no features can be made: they may come from a file, and Kaldi ends the process."""
        whole = {"sample_rate": (1000, 1 << 20), "num_mels": (4, 1024), "num_ceps": (1, self.num_mels), "delta_order": (0, 8)}
        whole |= {"keep_every": (1, 1000)}
        real = {"frame_shift_ms": (1.0, 1000.0), "frame_length_ms": (1.0, 1000.0), "low_freq": (0.0, self.high_freq)}
        real |= {"high_freq": (0.0, self.sample_rate / 2), "trim": (0.0, 1e6)}
        for name, (least, most) in (whole | real).items():
            value, kinds = getattr(self, name), int if name in whole else (int, float)
            if name == "trim" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
                raise ValueError(f"{name} {shown(value)} is not in {least:g}..{most:g}")

    @property
    def rate_hz(self) -> float:
        """Frames per second, which is units per second before repeats are removed."""
        return 1000.0 / (self.frame_shift_ms * self.keep_every)


class MfccExtractor:
    """MFCC, to be normalised per speaker."""

    per_speaker = True
    source: str | None = None

    def __init__(self, settings: MfccSettings) -> None:
        self._settings, self.sample_rate, self.rate_hz = settings, settings.sample_rate, settings.rate_hz
        self.width = settings.num_ceps * (settings.delta_order + 1)
        self.identity: dict[str, Any] = {"features": "mfcc", "settings": asdict(settings), "normalisation": "mean and variance per speaker"}

    def __call__(self, waves: Sequence[np.ndarray]) -> list[Frames]:
        return [mfcc(wave, self._settings) for wave in waves]


def mfcc(samples: np.ndarray, settings: MfccSettings) -> Frames:
    """Compute the features of one recording, values float32 (frames, num_ceps * (delta_order + 1)). A recording, float32 (samples,),
    shorter than one frame gives no frames. The first coefficient is the mel-weighted one (no raw energy). There is no dither: equal samples
    always give equal features."""
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
    # Kaldi expects the range of 16-bit integers: the scale only shifts the first coefficient, but the energy floor depends on it.
    for start in range(0, len(samples), _BLOCK):
        extractor.accept_waveform(settings.sample_rate, samples[start : start + _BLOCK] * 32768.0)
    extractor.input_finished()
    width = settings.num_ceps * (settings.delta_order + 1)
    if extractor.num_frames_ready == 0:
        return Frames(np.zeros((0, width), np.float32))
    static = np.stack([extractor.get_frame(i) for i in range(extractor.num_frames_ready)]).astype(np.float32)
    start, end = 0, len(static)
    if settings.trim is not None:
        start, end = loud_range(static[:, 0] / np.sqrt(settings.num_mels), settings.trim)
        static = static[start:end]
    if settings.delta_order:
        static = np.asarray(knf.compute_deltas(knf.DeltaOptions(order=settings.delta_order, window=2), static), dtype=np.float32)
    # `first` counts kept frames, so it is exact to within one of them.
    return Frames(static[settings.keep_every // 2 :: settings.keep_every], start // settings.keep_every)


def loud_range(energy: np.ndarray, depth: float) -> tuple[int, int]:
    """Start and stop of the range from the first to the last frame whose log energy, (frames,), is within `depth` of its 95th
    percentile."""
    loud = np.flatnonzero(energy > np.percentile(energy, 95) - depth)
    return (int(loud[0]), int(loud[-1]) + 1) if len(loud) else (0, len(energy))
