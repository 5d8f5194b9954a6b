"""Frames of acoustic features from samples. MFCC needs no download; transformers' speech encoders join them here."""

from __future__ import annotations

from dataclasses import dataclass

import kaldi_native_fbank as knf
import numpy as np


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


def mfcc(samples: np.ndarray, settings: MfccSettings) -> np.ndarray:
    """Features of one recording, float32, shape (frames, num_ceps * (delta_order + 1)).

    A recording shorter than one frame gives shape (0, ...). The first coefficient is the mel-weighted one (no raw energy),
    and there is no dither: the same samples always give the same features.
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
    extractor.accept_waveform(settings.sample_rate, (samples * 32768.0).tolist())
    extractor.input_finished()
    width = settings.num_ceps * (settings.delta_order + 1)
    if extractor.num_frames_ready == 0:
        return np.zeros((0, width), np.float32)
    static = np.stack([extractor.get_frame(i) for i in range(extractor.num_frames_ready)]).astype(np.float32)
    if settings.trim is not None:
        static = trim_ends(static, static[:, 0] / np.sqrt(settings.num_mels), settings.trim)
    if settings.delta_order:
        options_delta = knf.DeltaOptions(order=settings.delta_order, window=2)
        static = np.asarray(knf.compute_deltas(options_delta, static), dtype=np.float32)
    return static[settings.keep_every // 2 :: settings.keep_every]


def trim_ends(frames: np.ndarray, energy: np.ndarray, depth: float) -> np.ndarray:
    """Frames (frames, features) from the first to the last whose log energy (frames,) is within `depth` of its 95th percentile."""
    loud = np.flatnonzero(energy > np.percentile(energy, 95) - depth)
    return frames[loud[0] : loud[-1] + 1] if len(loud) else frames
