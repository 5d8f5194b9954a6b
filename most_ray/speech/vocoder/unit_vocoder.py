"""Units to waveform without a download: a small network learns mel spectra of units in context, Griffin-Lim makes samples of them.

`open_vocoder` also opens the unit vocoders of SeamlessM4T in transformers (code_hifigan.py).
"""

from __future__ import annotations

import functools
import json
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.audio_utils import mel_filter_bank

from most_ray.distributed.determinism import torch_threads
from most_ray.errors import CheckpointError, DataError
from most_ray.io import storage
from most_ray.records.files import UNITS_MANIFEST, VOCODER

_VERSION = 1
_RATE = 16000  # Hz
_MELS = 80
_N_FFT, _WINDOW = 512, 400  # samples: longer windows blur what the units tell apart
_FLOOR = 1e-3  # of mel magnitudes: the noise of 16-bit recordings
_MEL_KERNELS, _DURATION_KERNELS = (5, 5, 3), (3, 3)  # +-5 frames, +-2 units without repeats
_MAX_GAIN = 1.5
_SILENCE = _RATE // 20  # samples, for an utterance without units
_LONGEST = 2.0  # seconds that one unit may last: units that a model made up are like none that were heard
_MAX_RATE_HZ = 200.0
_MOST = {"iterations": 1000, "rate": _MAX_RATE_HZ, "duration": 100.0}  # of what a file may ask for

Vocoder = Callable[[Sequence[Sequence[int]]], tuple[list[np.ndarray], int]]


@dataclass(frozen=True)
class Example:
    """One recording that a vocoder learns from.

    `units` are int (frames,), repeats kept; `wave` is float32 (samples,) at 16 kHz; the units begin `first` frames after it begins.
    """

    units: np.ndarray
    wave: np.ndarray
    first: int
    speaker: str


@dataclass(frozen=True)
class VocoderSettings:
    """`width` channels in each layer; `steps` of `batch` windows of `window` units; what is heard ends after `max_seconds` of audio."""

    seed: int = 0
    steps: int = 600
    batch: int = 24
    window: int = 96
    learning_rate: float = 4e-3
    width: int = 96
    griffin_lim_iterations: int = 60
    max_seconds: float = 1800.0


class _ContextNet(nn.Module):
    """Ids (batch, frames + 2 * context) to (batch, frames, outputs); the id `n_units` stands for nothing there."""

    def __init__(self, n_units: int, width: int, kernels: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        self.context, self.nothing = sum(kernel // 2 for kernel in kernels), n_units
        embedded = 2 * width // 3
        self.embedding = nn.Embedding(n_units + 1, embedded, padding_idx=n_units)
        widths = [embedded, *(width for _ in kernels)]
        self.layers = nn.ModuleList(nn.Conv1d(a, b, kernel) for a, b, kernel in zip(widths, widths[1:], kernels, strict=False))
        self.output = nn.Linear(width, outputs)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids).transpose(1, 2)
        for layer in self.layers:
            x = F.gelu(layer(x))
        return self.output(x.transpose(1, 2))

    @torch.no_grad()
    def of(self, units: np.ndarray) -> torch.Tensor:
        """(units, outputs) of one utterance."""
        ids = torch.from_numpy(units.astype(np.int64))
        return self(F.pad(ids, (self.context, self.context), value=self.nothing)[None])[0]


class UnitVocoder:
    """Speaks units with one voice; made by `fit_vocoder` or `load`. The same units give the same samples, alone or among others.

    Attributes:
        n_units: how many units it knows.
        units: the identity of the units manifest that it was fitted with.
        voice: the speaker as whom it speaks.
    """

    def __init__(self, about: Mapping[str, Any], mel: _ContextNet, duration: _ContextNet | None, statistics: torch.Tensor) -> None:
        self._about, self._mel, self._duration, self._statistics = dict(about), mel.eval(), duration, statistics
        self.n_units: int = int(about["n_units"])
        self.units: dict[str, Any] = about["units"]
        self.voice = str(about["voice"])
        self.made_of = str(about["made_of"])

    def __call__(self, utterances: Sequence[Sequence[int]]) -> tuple[list[np.ndarray], int]:
        """Waveforms, each float32 (samples,) in [-1, 1], and their rate, 16000 Hz. Without units: a short silence.

        Raises:
            DataError: a unit that the vocoder does not know.
        """
        with torch_threads(1):
            return [self._speak(_checked(units, self.n_units)) for units in utterances], _RATE

    def _speak(self, units: np.ndarray) -> np.ndarray:
        if len(units) == 0:
            return np.zeros(_SILENCE, np.float32)
        if self._duration is not None:
            units, _ = _runs(units)
            frames = np.exp(self._duration.of(units).double().numpy()[:, 0]) * self._about["duration_scale"]
            ends = np.round(np.cumsum(np.minimum(frames, _LONGEST * self._about["rate_hz"])))
            units = np.repeat(units, np.maximum(np.diff(ends, prepend=0.0), 1.0).astype(np.int64))
        mean, deviation = self._statistics
        mel = (self._mel.of(units).reshape(-1, _MELS) * deviation + mean).clamp(max=8.0)  # exp() of a log magnitude stays in range
        wave = _griffin_lim(_magnitudes(mel.exp()), self._about["hop"], self._about["settings"]["griffin_lim_iterations"])
        return (wave / max(1.0, float(np.abs(wave).max()))).astype(np.float32)

    def save(self, path: Path) -> None:
        """Write one safetensors file, complete or not at all. Equal vocoders give equal bytes."""
        nets = {"mel": self._mel, "duration": self._duration}
        tensors = {f"{name}.{key}": value for name, net in nets.items() if net is not None for key, value in net.state_dict().items()}
        tensors = {key: value.half().contiguous() for key, value in tensors.items()} | {"statistics": self._statistics}
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            # One key: the order of several is not fixed.
            temporary.write_bytes(safetensors.torch.save(tensors, {"vocoder": json.dumps(self._about, sort_keys=True)}))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> UnitVocoder:
        """What `save` wrote.

        Raises:
            CheckpointError: missing, damaged, or something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["vocoder"])
                tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 - not a dict
            statistics = tensors.pop("statistics")
            if about["version"] != _VERSION or statistics.shape != (2, _MELS) or not 0 < int(about["hop"]) < _N_FFT:
                raise ValueError("another version")
            numbers = {"iterations": about["settings"]["griffin_lim_iterations"], "rate": about["rate_hz"]}
            numbers |= {"duration": about["duration_scale"]} if about["repeats_removed"] else {}
            if not all(isinstance(value, int | float) and 0 < value <= _MOST[name] for name, value in numbers.items()):
                raise ValueError(f"settings that cannot be: {numbers}")
            if not all(bool(tensor.isfinite().all()) for tensor in (statistics, *tensors.values())):
                raise ValueError("numbers that are not finite")
            with torch.device("meta"):  # sizes from a file allocate nothing until the tensors prove them
                mel, duration = _nets(about)
            for name, net in (("mel", mel), ("duration", duration)):
                if net is not None:
                    own = {key.removeprefix(f"{name}."): tensors.pop(key) for key in list(tensors) if key.startswith(f"{name}.")}
                    net.load_state_dict(own, assign=True)
            if tensors:
                raise ValueError(f"unknown tensors {sorted(tensors)[:3]}")
            return cls(about, mel, duration, statistics)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
            reason = f"cannot be read as a vocoder ({' '.join(str(error).split())[:200]})."
            raise CheckpointError("vocoder", str(path), reason, "Fit it again: `most-ray prepare vocoder`.") from error


def fit_vocoder(
    examples: Iterable[Example],
    n_units: int,
    rate_hz: float,
    units: dict[str, Any],
    repeats_removed: bool,
    settings: VocoderSettings = VocoderSettings(),
    made_of: str = "",
) -> UnitVocoder:
    """A vocoder of `n_units` units, `rate_hz` a second, whose manifest has the identity `units`; it speaks as the speaker heard longest.

    Each speaker's log mel spectra are normalised before they are learned, else all voices would be averaged. Where units come with
    `repeats_removed`, durations are learned too. The same examples and seed give the same bytes on the same machine.

    Raises:
        DataError: no example holds a unit, or one that is not in 0..n_units-1, or a rate outside (0, 200] Hz.
    """
    if not 0 < rate_hz <= _MAX_RATE_HZ:
        raise DataError("rate_hz", rate_hz, f"must lie in (0, {_MAX_RATE_HZ:g}].")
    parts = max(1, round(100 / rate_hz))  # mel frames of about 10 ms for each unit
    about: dict[str, Any] = {"version": _VERSION, "n_units": n_units, "rate_hz": rate_hz, "repeats_removed": repeats_removed}
    about |= {"units": units, "made_of": made_of, "settings": asdict(settings), "parts": parts, "hop": round(_RATE / rate_hz / parts)}
    with torch_threads(1), torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        heard = _hear(examples, about)
        voices = {speaker: _statistics([mel for _, mel, other in heard if other == speaker]) for speaker in {entry[2] for entry in heard}}
        lengths: dict[str, int] = defaultdict(int)
        for ids, _, speaker in heard:
            lengths[speaker] += len(ids)
        about["voice"] = max(sorted(lengths), key=lengths.__getitem__)
        normalised = [((mel - voices[speaker][0]) / voices[speaker][1]).reshape(len(ids), -1) for ids, mel, speaker in heard]
        sequences = [ids for ids, _, _ in heard]
        mel, duration = _nets(about)
        _fit(mel, sequences, normalised, settings)
        if duration is not None:
            runs = [_runs(ids) for ids in sequences]
            _fit(duration, [ids for ids, _ in runs], [torch.from_numpy(np.log(counts)).float()[:, None] for _, counts in runs], settings)
            predicted = sum(float(duration.of(ids).double().exp().sum()) for ids, _ in runs)
            about["duration_scale"] = sum(len(ids) for ids in sequences) / predicted  # the mean of logarithms is too short
        own = torch.cat([mel.of(ids).reshape(-1, _MELS) for ids in sequences])
    return UnitVocoder(about, mel, duration, _spread(own, voices[about["voice"]]))


def open_vocoder(place: str, units: dict[str, Any] | None, language: str | None = None, speaker: int = 0) -> Vocoder:
    """A vocoder for units whose manifest has the identity `units` (None: unknown).

    `place` is a file or a folder with vocoder.safetensors, or else a folder or hub name of SeamlessM4T's vocoder in transformers, to
    which `language` and `speaker` apply (code_hifigan.py).

    Raises:
        CheckpointError: there is none, it is damaged, or it was made for other units.
    """
    if storage.is_remote(place):
        raise CheckpointError("vocoder", storage.redact(place), "is not on this machine.", "Copy it here and name the copy.")
    path = storage.local(place)
    if path.is_dir() and (path / VOCODER).exists():
        path = path / VOCODER
    elif path.is_dir() and (path / UNITS_MANIFEST).exists():
        raise CheckpointError("vocoder", place, f"holds no {VOCODER}.", "Make one: `most-ray prepare vocoder --records DIR`.")
    if not path.is_file():
        from most_ray.speech.vocoder.code_hifigan import CodeHifiGan  # transformers' models take seconds to import

        return CodeHifiGan(place, int(units["n_units"]) if units else None, language, speaker)
    vocoder = UnitVocoder.load(path)
    if units is not None and units != vocoder.units:
        rule = f"speaks the units {json.dumps(vocoder.units, sort_keys=True)}, not {json.dumps(units, sort_keys=True)}."
        raise CheckpointError("vocoder", place, rule, "Name the vocoder that was fitted with these units.")
    return vocoder


def _nets(about: Mapping[str, Any]) -> tuple[_ContextNet, _ContextNet | None]:
    """The networks for mel spectra and, where they are needed, for logarithms of durations in frames."""
    n_units, width = about["n_units"], about["settings"]["width"]
    mel = _ContextNet(n_units, width, _MEL_KERNELS, about["parts"] * _MELS)
    return mel, _ContextNet(n_units, width // 2, _DURATION_KERNELS, 1) if about["repeats_removed"] else None


def _hear(examples: Iterable[Example], about: Mapping[str, Any]) -> list[tuple[np.ndarray, torch.Tensor, str]]:
    """Units (frames,), log mel spectra (frames * parts, mels) beside them, and speaker of each example."""
    heard: list[tuple[np.ndarray, torch.Tensor, str]] = []
    seconds, parts, hop = 0.0, about["parts"], about["hop"]
    for example in examples:
        ids = _checked(example.units, about["n_units"])
        if len(ids) and len(example.wave):
            spectra = _stft(torch.from_numpy(example.wave).float(), hop).abs().T @ _filters()
            # By time, not by count: where the hop is no whole number of samples, frames would drift away from units.
            times = (example.first + (np.arange(len(ids) * parts) + 0.5) / parts) / about["rate_hz"]
            frames = np.clip(np.round(times * _RATE / hop).astype(np.int64), 0, len(spectra) - 1)
            heard.append((ids, spectra.clamp(min=_FLOOR).log()[torch.from_numpy(frames)], example.speaker))
            seconds += len(example.wave) / _RATE
        if seconds >= about["settings"]["max_seconds"]:
            break
    if not heard:
        raise DataError("examples", None, "hold no units to learn from.")
    return heard


def _statistics(mels: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean and deviation of a speaker's log mel spectra, float32 (2, mels); bands that hold nothing are not blown up."""
    frames = torch.cat(list(mels))
    return torch.stack([frames.mean(dim=0), frames.std(dim=0, correction=0).clamp(min=0.3)])


def _spread(predicted: torch.Tensor, voice: torch.Tensor) -> torch.Tensor:
    """What predictions (frames, mels) are to be multiplied with and moved by, (2, mels) as `_statistics`, to have the voice's mean and
    deviation: averages vary less than speech does (global variance, Toda & Tokuda 2007)."""
    gain = 1.0 / predicted.std(dim=0, correction=0).clamp(min=1.0 / _MAX_GAIN)
    mean, deviation = voice
    return torch.stack([mean - predicted.mean(dim=0) * gain * deviation, gain * deviation])


def _fit(net: _ContextNet, sequences: Sequence[np.ndarray], targets: Sequence[torch.Tensor], settings: VocoderSettings) -> None:
    """Least absolute error on windows of all utterances laid end to end, with nothing of a context's length between them."""
    gap = torch.full((net.context,), net.nothing)
    ids = torch.cat([gap, *(part for sequence in sequences for part in (torch.from_numpy(sequence), gap))])
    counts = (ids != net.nothing).float()
    wanted = torch.zeros(len(ids), targets[0].shape[1])
    wanted[ids != net.nothing] = torch.cat(list(targets))
    window = min(settings.window, len(ids) - 2 * net.context)
    optimizer = torch.optim.Adam(net.parameters(), settings.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, settings.steps, pct_start=0.1)
    net.train()
    for _ in range(settings.steps):
        starts = torch.randint(0, len(ids) - window - 2 * net.context + 1, (settings.batch, 1))
        inner = starts + net.context + torch.arange(window)
        errors = (net(ids[starts + torch.arange(window + 2 * net.context)]) - wanted[inner]).abs().mean(dim=-1)
        loss = (errors * counts[inner]).sum() / counts[inner].sum().clamp(min=1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        seen = torch.bincount(ids, minlength=net.nothing + 1)[:-1] > 0
        net.embedding.weight[:-1][~seen] = net.embedding.weight[:-1][seen].mean(dim=0)  # an unheard unit sounds like the average one
        for parameter in net.parameters():
            parameter.copy_(parameter.half())  # as `save` keeps it
    net.eval()


def _checked(units: Sequence[int] | np.ndarray, n_units: int) -> np.ndarray:
    ids = np.asarray(units, dtype=np.int64).reshape(-1)
    if len(ids) and not (ids.min() >= 0 and ids.max() < n_units):
        wrong = int(ids[(ids < 0) | (ids >= n_units)][0])
        raise DataError("units", wrong, f"is no unit of this vocoder, which knows 0..{n_units - 1}.")
    return ids


def _runs(units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Units without repeats, and how often each stood there, int (units,)."""
    starts = np.flatnonzero(np.diff(units, prepend=-1))
    return units[starts], np.diff(starts, append=len(units))


@functools.cache
def _filters() -> torch.Tensor:
    """Mel filters of unit area, float32 (bins, mels)."""
    filters = mel_filter_bank(_N_FFT // 2 + 1, _MELS, 0.0, _RATE / 2, _RATE, norm="slaney", mel_scale="slaney")
    filters = np.asarray(filters, np.float32)
    return torch.from_numpy(filters / np.maximum(filters.sum(axis=0, keepdims=True), 1e-9))


def _stft(wave: torch.Tensor, hop: int) -> torch.Tensor:
    """(bins, 1 + samples // hop), complex."""
    window = torch.hann_window(_WINDOW)
    return torch.stft(wave, _N_FFT, hop, _WINDOW, window, center=True, pad_mode="constant", return_complex=True)


def _magnitudes(mel: torch.Tensor) -> torch.Tensor:
    """Nonnegative magnitudes (bins, frames) with these mel spectra (frames, mels): least squares by Lee & Seung's (2001) updates."""
    filters = _filters()
    projected = mel @ filters.T
    x = projected + 1e-8
    for _ in range(20):
        x = x * projected / (x @ filters @ filters.T + 1e-8)
    return x.T


def _griffin_lim(magnitudes: torch.Tensor, hop: int, iterations: int) -> np.ndarray:
    """Samples (frames * hop,) with these magnitudes (bins, frames): fast Griffin-Lim (Perraudin et al. 2013), momentum 0.99."""
    length = magnitudes.shape[1] * hop
    magnitudes = torch.cat([magnitudes, magnitudes[:, -1:]], dim=1)  # centred frames: one more than whole hops
    window = torch.hann_window(_WINDOW)
    spectrum, previous = magnitudes.to(torch.complex64), torch.zeros_like(magnitudes, dtype=torch.complex64)
    for iteration in range(iterations + 1):
        wave = torch.istft(spectrum, _N_FFT, hop, _WINDOW, window, center=True, length=length)
        if iteration < iterations:
            rebuilt = _stft(wave, hop)
            ahead = rebuilt + 0.99 * (rebuilt - previous) if iteration else rebuilt
            spectrum, previous = magnitudes * ahead / ahead.abs().clamp(min=1e-12), rebuilt
    return wave.numpy()
