"""A small vocoder that needs no download: a network predicts mel spectra of units in context, Griffin-Lim turns them into samples.

`fit.py` fits one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from most_ray.distributed.determinism import torch_threads
from most_ray.errors import CheckpointError, DataError
from most_ray.io import storage
from most_ray.io.json_values import parse_json
from most_ray.io.outputs import Kind, begins_with
from most_ray.records.model_files import loading
from most_ray.records.record import N_UNITS
from most_ray.speech.vocoder.spectrogram import MELS, N_FFT, RATE, mel_to_wave

VERSION = 1  # of the file
MAX_RATE_HZ = 200.0  # units per second
_MEL_KERNELS, _DURATION_KERNELS = (5, 5, 3), (3, 3)  # context of +-5 frames, and of +-2 units without repeats
_SILENCE = RATE // 20  # samples, for an utterance without units
_BEYOND = 0.5  # seconds that the beginning of an utterance needs of what follows it
_LONGEST = 2.0  # seconds that one unit may last: in generated units there are sequences unlike any in the recordings
# Largest values that a file may have.
_LIMITS = {"iterations": 1000, "rate": MAX_RATE_HZ, "hop": N_FFT - 1, "units": N_UNITS, "width": 1 << 14, "parts": 1000, "duration": 100.0}


class ContextNet(nn.Module):
    """Convolutions over embedded units. The id `n_units` stands for no unit."""

    def __init__(self, n_units: int, width: int, kernels: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        self.context, self.padding = sum(kernel // 2 for kernel in kernels), n_units
        embedded = 2 * width // 3
        self.embedding = nn.Embedding(n_units + 1, embedded, padding_idx=n_units)
        widths = [embedded, *(width for _ in kernels)]
        self.layers = nn.ModuleList(nn.Conv1d(a, b, kernel) for a, b, kernel in zip(widths, widths[1:], kernels, strict=False))
        self.output = nn.Linear(width, outputs)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (batch, frames + 2 * context) to predictions (batch, frames, outputs)."""
        x = self.embedding(ids).transpose(1, 2)
        for layer in self.layers:
            x = F.gelu(layer(x))
        return self.output(x.transpose(1, 2))

    @torch.no_grad()
    def predict(self, units: np.ndarray) -> torch.Tensor:
        """Predictions (units, outputs) for one utterance (units,)."""
        ids = torch.from_numpy(units.astype(np.int64))
        return self(F.pad(ids, (self.context, self.context), value=self.padding)[None])[0]


def build_nets(about: Mapping[str, Any]) -> tuple[ContextNet, ContextNet | None]:
    """The networks that predict mel spectra and, for units without repeats, logarithms of durations in frames; see UnitVocoder.about."""
    n_units, width = about["n_units"], about["settings"]["width"]
    mel = ContextNet(n_units, width, _MEL_KERNELS, about["parts"] * MELS)
    return mel, ContextNet(n_units, width // 2, _DURATION_KERNELS, 1) if about["repeats_removed"] else None


VOCODER_FILE = Kind("vocoder that `most-ray prepare vocoder` has written", begins_with(rb'.{8}\{"__metadata__":\{"vocoder"'))


class UnitVocoder:
    """Synthesises units in one voice; made by `fit_vocoder` or `load`. The same units give the same samples, alone or among others.

    Args:
        about: what the file keeps beside the tensors: version, n_units, rate_hz (units per second), repeats_removed, units (identity of the
            units manifest that it was fitted with), made_of (hash of what it was fitted to), settings (VocoderSettings), parts (mel frames
            of a unit), hop (samples of a mel frame), voice (the speaker), duration_scale (only with repeats_removed).
        mel, duration: see `build_nets`.
        statistics: float32 (2, mels): offset and scale of the predicted log mel spectra.
    """

    def __init__(self, about: Mapping[str, Any], mel: ContextNet, duration: ContextNet | None, statistics: torch.Tensor) -> None:
        self.about, self._mel, self._duration, self._statistics = dict(about), mel.eval(), duration, statistics
        self.n_units, self.voice, self.made_of = int(about["n_units"]), str(about["voice"]), str(about["made_of"])
        self.units: dict[str, Any] = about["units"]

    def __call__(self, utterances: Sequence[Sequence[int]]) -> tuple[list[np.ndarray], int]:
        """Waveforms, each float32 (samples,) in [-1, 1], and their rate, 16000 Hz. An utterance without units gives a short silence. Raises
        DataError for a unit that the vocoder does not know."""
        with torch_threads(1):
            return [self._synthesise(check_units(units, self.n_units)) for units in utterances], RATE

    def beginning(self, units: Sequence[int], seconds: float) -> tuple[np.ndarray, float]:
        """The first `seconds` of an utterance, float32 (samples,) at 16000 Hz, without the work for its rest; the seconds of the whole."""
        with torch_threads(1):
            frames, each = self._frames(check_units(units, self.n_units)), self.about["parts"] * self.about["hop"] / RATE
            wave = self._synthesise_frames(frames[: math.ceil((seconds + _BEYOND) / each)])
        return wave[: round(seconds * RATE)], len(frames) * each if len(frames) else len(wave) / RATE

    def _synthesise(self, units: np.ndarray) -> np.ndarray:
        return self._synthesise_frames(self._frames(units))

    def _frames(self, units: np.ndarray) -> np.ndarray:
        """The unit of each frame, (frames,): units as often as they last."""
        if self._duration is not None and len(units):
            units, _ = run_lengths(units)
            frames = np.exp(self._duration.predict(units).double().numpy()[:, 0]) * self.about["duration_scale"]
            ends = np.round(np.cumsum(np.minimum(frames, _LONGEST * self.about["rate_hz"])))
            units = np.repeat(units, np.maximum(np.diff(ends, prepend=0.0), 1.0).astype(np.int64))
        return units

    def _synthesise_frames(self, units: np.ndarray) -> np.ndarray:
        if len(units) == 0:
            return np.zeros(_SILENCE, np.float32)
        mean, deviation = self._statistics
        mel = (self._mel.predict(units).reshape(-1, MELS) * deviation + mean).clamp(max=8.0)  # exp() of a log magnitude stays in range
        wave = mel_to_wave(mel.exp(), self.about["hop"], self.about["settings"]["griffin_lim_iterations"])
        return (wave / max(1.0, float(np.abs(wave).max()))).astype(np.float32)

    def save(self, path: Path) -> None:
        """Write one safetensors file, completely or not at all. Equal vocoders give equal bytes."""
        nets = {"mel": self._mel, "duration": self._duration}
        tensors = {f"{name}.{key}": value for name, net in nets.items() if net is not None for key, value in net.state_dict().items()}
        tensors = {key: value.half().contiguous() for key, value in tensors.items()} | {"statistics": self._statistics}
        # One key: the order of several is not fixed.
        storage.write_bytes(path, safetensors.torch.save(tensors, {"vocoder": json.dumps(self.about, sort_keys=True)}))

    @classmethod
    def load(cls, path: Path) -> UnitVocoder:
        """Read a file that `save` wrote. Raises CheckpointError if it is missing, damaged, or something else."""
        remedy = "Fit it again: `most-ray prepare vocoder`."
        with loading(CheckpointError, "vocoder", str(path), "cannot be read as a vocoder", remedy):
            if not path.is_file():
                raise ValueError("there is no such file")
            with safe_open(path, framework="pt") as file:
                about = parse_json((file.metadata() or {})["vocoder"])
                tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 - not a dict
            statistics = tensors.pop("statistics")
            if about["version"] != VERSION or statistics.shape != (2, MELS):
                raise ValueError("another version")
            _check_about(about)
            if not all(bool(tensor.isfinite().all()) for tensor in (statistics, *tensors.values())):
                raise ValueError("numbers that are not finite")
            with torch.device("meta"):  # sizes from a file allocate nothing until the tensors prove them
                mel, duration = build_nets(about)
            for name, net in (("mel", mel), ("duration", duration)):
                if net is not None:
                    own = {key.removeprefix(f"{name}."): tensors.pop(key) for key in list(tensors) if key.startswith(f"{name}.")}
                    net.load_state_dict(own, assign=True)
            if tensors:
                raise ValueError(f"unknown tensors {sorted(tensors)[:3]}")
            return cls(about, mel, duration, statistics)


def _check_about(about: Mapping[str, Any]) -> None:
    """Raise ValueError, KeyError or TypeError unless what a file says of its vocoder (see `UnitVocoder.about`) can be computed with."""
    numbers = {"iterations": about["settings"]["griffin_lim_iterations"], "rate": about["rate_hz"], "hop": about["hop"]}
    numbers |= {"units": about["n_units"], "width": about["settings"]["width"], "parts": about["parts"]}
    numbers |= {"duration": about["duration_scale"]} if about["repeats_removed"] else {}
    for name, value in numbers.items():
        kinds: Any = int | float if name in ("rate", "duration") else int
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value <= _LIMITS[name]:
            raise ValueError(f"impossible settings: {name} {value!r}"[:200])
    if not isinstance(about["repeats_removed"], bool) or not isinstance(about["units"], dict):
        raise ValueError("impossible settings: its units")


def check_units(units: Sequence[int] | np.ndarray, n_units: int) -> np.ndarray:
    """Units of an utterance as int64 (units,). Raises DataError if one of them is not in 0..n_units-1."""
    ids = np.asarray(units, dtype=np.int64).reshape(-1)
    if len(wrong := ids[(ids < 0) | (ids >= n_units)]):
        raise DataError("units", int(wrong[0]), f"is not a unit of this vocoder, which knows 0..{n_units - 1}.")
    return ids


def run_lengths(units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Units without repeats, and the length of the run that each stands for, int (runs,) both."""
    starts = np.flatnonzero(np.diff(units, prepend=-1))
    return units[starts], np.diff(starts, append=len(units))
