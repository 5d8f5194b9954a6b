"""Mel spectra of 16 kHz audio, and samples from them."""

from __future__ import annotations

import functools

import numpy as np
import torch
from transformers.audio_utils import mel_filter_bank

RATE = 16000  # Hz
MELS = 80  # bands
N_FFT = 512
_WINDOW = 400  # samples: longer windows blur the differences between units
_FLOOR = 1e-3  # of mel magnitudes: the noise of 16-bit recordings


def log_mel(wave: torch.Tensor, hop: int) -> torch.Tensor:
    """Log mel magnitudes, float32 (1 + samples // hop, mels), of a waveform (samples,)."""
    return (_stft(wave, hop).abs().T @ _filters()).clamp(min=_FLOOR).log()


@functools.cache
def _filters() -> torch.Tensor:
    """Mel filters of unit area, float32 (bins, mels)."""
    filters = mel_filter_bank(N_FFT // 2 + 1, MELS, 0.0, RATE / 2, RATE, norm="slaney", mel_scale="slaney")
    filters = np.asarray(filters, np.float32)
    return torch.from_numpy(filters / np.maximum(filters.sum(axis=0, keepdims=True), 1e-9))


def _stft(wave: torch.Tensor, hop: int) -> torch.Tensor:
    """Complex spectrum (bins, 1 + samples // hop) of a waveform (samples,)."""
    return torch.stft(wave, N_FFT, hop, _WINDOW, torch.hann_window(_WINDOW), center=True, pad_mode="constant", return_complex=True)


def _magnitudes(mel: torch.Tensor) -> torch.Tensor:
    """Nonnegative magnitudes (bins, frames) with these mel spectra (frames, mels): least squares by Lee & Seung's (2001) updates."""
    filters, projected = _filters(), mel @ _filters().T
    x = projected + 1e-8
    for _ in range(20):
        x = x * projected / (x @ filters @ filters.T + 1e-8)
    return x.T


def mel_to_wave(mel: torch.Tensor, hop: int, iterations: int) -> np.ndarray:
    """Samples, float32 (frames * hop,), with these mel magnitudes (frames, mels); phases by `iterations` of fast Griffin-Lim (Perraudin et
    al. 2013), momentum 0.99."""
    magnitudes, length = _magnitudes(mel), len(mel) * hop
    magnitudes = torch.cat([magnitudes, magnitudes[:, -1:]], dim=1)  # centred frames: one more than whole hops
    window = torch.hann_window(_WINDOW)
    spectrum, previous = magnitudes.to(torch.complex64), torch.zeros_like(magnitudes, dtype=torch.complex64)
    for iteration in range(iterations + 1):
        wave = torch.istft(spectrum, N_FFT, hop, _WINDOW, window, center=True, length=length)
        if iteration < iterations:
            rebuilt = _stft(wave, hop)
            ahead = rebuilt + 0.99 * (rebuilt - previous) if iteration else rebuilt
            spectrum, previous = magnitudes * ahead / ahead.abs().clamp(min=1e-12), rebuilt
    return wave.numpy()
