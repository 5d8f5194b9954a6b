"""Fits a UnitVocoder to recordings and their units."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from most_ray.distributed.determinism import torch_threads
from most_ray.errors import DataError
from most_ray.speech.vocoder.spectrogram import MELS, RATE, log_mel
from most_ray.speech.vocoder.unit_vocoder import MAX_RATE_HZ, VERSION, ContextNet, UnitVocoder, build_nets, check_units, run_lengths

_MAX_GAIN = 1.5  # by which the predicted spectra's deviation is raised at most


@dataclass(frozen=True)
class Example:
    """One recording to fit a vocoder to."""

    units: np.ndarray  # int (frames,), with repeats
    wave: np.ndarray  # float32 (samples,) at 16 kHz
    first: int  # frames by which the units begin after the recording does
    speaker: str


@dataclass(frozen=True)
class VocoderSettings:
    """How a vocoder is fitted. Its file keeps these."""

    seed: int = 0
    steps: int = 600
    batch: int = 24  # windows of a step
    window: int = 96  # units
    learning_rate: float = 4e-3
    width: int = 96  # channels of each layer
    griffin_lim_iterations: int = 60
    max_seconds: float = 1800.0  # of audio; later examples are not used


def fit_vocoder(
    examples: Iterable[Example],
    n_units: int,
    rate_hz: float,
    units: dict[str, Any],
    repeats_removed: bool,
    settings: VocoderSettings = VocoderSettings(),
    made_of: str = "",
) -> UnitVocoder:
    """Fit a vocoder; its voice is that of the speaker with the most frames.

    Each speaker's log mel spectra are normalised before they are learned, else all voices would be averaged. Equal examples and seeds give
    equal bytes on one machine.

    Args:
        n_units, rate_hz: the units are 0..n_units-1; so many per second, before repeats are removed.
        units: identity of the units manifest.
        repeats_removed: the vocoder will get units without repeats, so durations are learned too.
        made_of: hash of the examples' source, to be kept in the file.

    Raises:
        DataError: the examples have no unit, or one that is not in 0..n_units-1, or the rate is outside (0, 200] Hz.
    """
    if not 0 < rate_hz <= MAX_RATE_HZ:
        raise DataError("rate_hz", rate_hz, f"must be in (0, {MAX_RATE_HZ:g}].")
    parts = max(1, round(100 / rate_hz))  # mel frames of about 10 ms for each unit
    about: dict[str, Any] = {"version": VERSION, "n_units": n_units, "rate_hz": rate_hz, "repeats_removed": repeats_removed}
    about |= {"units": units, "made_of": made_of, "settings": asdict(settings), "parts": parts, "hop": round(RATE / rate_hz / parts)}
    with torch_threads(1), torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        data = _spectra(examples, about)
        voices = {speaker: _statistics([mel for _, mel, other in data if other == speaker]) for speaker in {entry[2] for entry in data}}
        lengths: dict[str, int] = defaultdict(int)
        for ids, _, speaker in data:
            lengths[speaker] += len(ids)
        about["voice"] = max(sorted(lengths), key=lengths.__getitem__)
        normalised = [((mel - voices[speaker][0]) / voices[speaker][1]).reshape(len(ids), -1) for ids, mel, speaker in data]
        sequences = [ids for ids, _, _ in data]
        mel, duration = build_nets(about)
        _fit(mel, sequences, normalised, settings)
        if duration is not None:
            runs = [run_lengths(ids) for ids in sequences]
            logs = [torch.from_numpy(np.log(counts)).float()[:, None] for _, counts in runs]
            _fit(duration, [ids for ids, _ in runs], logs, settings)
            predicted = sum(float(duration.predict(ids).double().exp().sum()) for ids, _ in runs)
            about["duration_scale"] = sum(len(ids) for ids in sequences) / predicted  # exp() of a mean of logarithms is too short
        own = torch.cat([mel.predict(ids).reshape(-1, MELS) for ids in sequences])
    return UnitVocoder(about, mel, duration, _match_voice(own, voices[about["voice"]]))


def _spectra(examples: Iterable[Example], about: Mapping[str, Any]) -> list[tuple[np.ndarray, torch.Tensor, str]]:
    """Of each example the units (frames,), the log mel spectra (frames * parts, mels) at their times, and the speaker."""
    data: list[tuple[np.ndarray, torch.Tensor, str]] = []
    seconds, parts, hop = 0.0, about["parts"], about["hop"]
    for example in examples:
        ids = check_units(example.units, about["n_units"])
        if len(ids) and len(example.wave):
            spectra = log_mel(torch.from_numpy(example.wave).float(), hop)
            # By time, not by count: if the hop is not a whole number of samples, frames would drift away from units.
            times = (example.first + (np.arange(len(ids) * parts) + 0.5) / parts) / about["rate_hz"]
            frames = np.clip(np.round(times * RATE / hop).astype(np.int64), 0, len(spectra) - 1)
            data.append((ids, spectra[torch.from_numpy(frames)], example.speaker))
            seconds += len(example.wave) / RATE
        if seconds >= about["settings"]["max_seconds"]:
            break
    if not data:
        raise DataError("examples", None, "hold no units to learn from.")
    return data


def _statistics(mels: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean and deviation of a speaker's log mel spectra (frames, mels), float32 (2, mels); the floor keeps empty bands from being
    amplified."""
    frames = torch.cat(list(mels))
    return torch.stack([frames.mean(dim=0), frames.std(dim=0, correction=0).clamp(min=0.3)])


def _match_voice(predicted: torch.Tensor, voice: torch.Tensor) -> torch.Tensor:
    """Offset and scale (2, mels) that give predictions (frames, mels) the mean and deviation of a voice, (2, mels) as `_statistics`:
    averages vary less than speech does (global variance, Toda & Tokuda 2007)."""
    gain = 1.0 / predicted.std(dim=0, correction=0).clamp(min=1.0 / _MAX_GAIN)
    mean, deviation = voice
    return torch.stack([mean - predicted.mean(dim=0) * gain * deviation, gain * deviation])


def _fit(net: ContextNet, sequences: Sequence[np.ndarray], targets: Sequence[torch.Tensor], settings: VocoderSettings) -> None:
    """Minimise the absolute error on windows of all utterances in a row, each of units (frames,) and targets (frames, outputs), with
    padding of a context's length between them."""
    gap = torch.full((net.context,), net.padding)
    ids = torch.cat([gap, *(part for sequence in sequences for part in (torch.from_numpy(sequence), gap))])
    counts = (ids != net.padding).float()
    wanted = torch.zeros(len(ids), targets[0].shape[1])
    wanted[ids != net.padding] = torch.cat(list(targets))
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
        seen = torch.bincount(ids, minlength=net.padding + 1)[:-1] > 0
        net.embedding.weight[:-1][~seen] = net.embedding.weight[:-1][seen].mean(dim=0)  # an unseen unit sounds like the average one
        for parameter in net.parameters():
            parameter.copy_(parameter.half())  # as `save` keeps it
    net.eval()
