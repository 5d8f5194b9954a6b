"""Reads recordings: any format of libsndfile, mixed down to one channel, resampled, optionally played faster or slower."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr

from most_ray.errors import DataError, count_of
from most_ray.speech.corpora.containers import find_hidden_audio, find_wrong_count

MAX_SECONDS = 120.0  # of an utterance: a longer one is likely a recording that was not cut into utterances
ANY_CHANNEL = -1  # a channel is meant, but which one is not known: the recording must have one only
UNREAD = frozenset(  # suffixes of recordings that libsndfile does not read
    {".m4a", ".m4b", ".mp4", ".webm", ".aac", ".wma", ".amr", ".3gp", ".mka", ".mkv", ".mov", ".avi", ".ac3", ".ape", ".wv", ".dsf", ".ra"}
)
_SLACK = 0.05  # seconds by which a part may end after its recording: tables round
_EXACT = ("FLAC",)  # formats whose header gives the exact number of samples
_INEXACT = 0.3  # seconds by which a part may be short in the other formats
_PAGE = 10  # seconds, more than an Ogg page: libsndfile misses a position in the last page of Vorbis by the samples that its end cuts off
_UNKNOWN = 1 << 50  # samples: what libsndfile reports for a FLAC that was written to a pipe is larger
_LOUDEST = 2.0**32  # of a sample: the range of 32-bit integers in a float file is still sound; squares of more are not finite
_LEAST_HZ, _MOST_A_SECOND = 1000, 1 << 21  # sample rate; samples of all channels: what a damaged header says would fill the memory
_CANCELLED = 1e-4  # power of the mix by that of the channels below which they cancel each other out
_LEAST_SHARE, _AND_SECONDS = 0.7, 0.5  # of a recording, less seconds: a table that gives it less means a part of it, or another one
# What libsndfile notes about a file that ends too soon: for WAV, AIFF, AU, W64 and RF64 the size of the chunk of samples (4 GB stand for
# "not known"), for Ogg the stream's last page. For an MP3 it notes nothing.
_CUT_CHUNK = re.compile(r"^ *(?:data|SSND|Data Size|riff|Riff size) *: (\d{1,9}) \(should be (\d+)\)", re.MULTILINE)
_CUT_OGG = re.compile(r"Last page lacks an end-of-stream bit|Junk after the last page|without an End-Of-Stream flag")
# After a W64's or an RF64's end: another file, which libsndfile reads as samples or not at all.
_LONG_RIFF = re.compile(r"^ *(?:riff|Riff size) *: (\d{1,9}) \(should be (\d+)\)", re.MULTILINE)


class _Part(NamedTuple):
    start: float
    duration: float | None
    channel: int | None
    length: float | None


def load_audio(
    path: Path,
    sample_rate: int,
    speed: float = 1.0,
    start: float = 0.0,
    duration: float | None = None,
    max_seconds: float = MAX_SECONDS,
    channel: int | None = None,
    length: float | None = None,
) -> np.ndarray:
    """Read a recording, or a part of it, as float32 samples in [-1, 1], shape (samples,).

    Args:
        sample_rate: of the result, in Hz.
        speed: how many times as fast to play it, by resampling, so that pitch and formants move with the tempo (Ko et al., "Audio
            augmentation for speech recognition", 2015).
        start, duration: of the part in seconds; None: up to the end.
        max_seconds: a longer part is refused before it is decoded.
        channel: counted from 0, or ANY_CHANNEL; None: all of them, mixed.
        length: seconds of the whole recording by a table, where it gives them.

    Raises:
        DataError: the file is missing, not audio, cut off, joined of several, too long, silent, without samples or with impossible ones, or
            has not the part or the channel; its `rule` is the reason.
    """
    if not os.path.isfile(path):
        raise DataError("recording", str(path), "is not there.")
    try:
        if path.stat().st_size == 0:
            raise DataError("recording", str(path), "is an empty file.")
        if duration is None and (rule := find_wrong_count(path)):
            raise DataError("recording", str(path), f"{rule}.", "Write it again.")
        with soundfile.SoundFile(path) as source:
            samples, rate = _read(source, path, _Part(start, duration, channel, length), max_seconds), source.samplerate
    except (OSError, soundfile.SoundFileError) as error:
        if path.suffix.lower() in UNREAD:
            raise DataError("recording", str(path), _unread(path.suffix)) from error
        raise DataError("recording", str(path), f"cannot be read as audio ({error}).") from error
    mono = _mix(samples, path)
    if rate * speed != sample_rate:
        mono = soxr.resample(mono, rate * speed, sample_rate)
    return np.ascontiguousarray(mono, dtype=np.float32)


def _unread(suffix: str) -> str:
    return f"is {suffix.lower()}, a format that is not read: convert it to WAV or FLAC."


def _mix(samples: np.ndarray, path: Path) -> np.ndarray:
    """One channel, float32 (samples,), of float32 (samples, channels). Raises DataError where that is no sound."""
    if samples.shape[0] == 0:
        raise DataError("recording", str(path), "holds no samples.")
    if not np.isfinite(samples).all():
        raise DataError("recording", str(path), "holds samples that are not finite.")
    if (peak := float(np.abs(samples).max())) > _LOUDEST:
        raise DataError("recording", str(path), f"holds samples up to {peak:.3g}, where sound is between -1 and 1.")
    mono: np.ndarray = samples.mean(axis=1)
    if (samples.min(axis=0) == samples.max(axis=0)).all():
        raise DataError("recording", str(path), "is silence: all its samples are equal.")
    if samples.shape[1] > 1 and (mono.min() == mono.max() or _power(mono) < _CANCELLED * _power(samples)):
        rule = f"has {count_of(samples.shape[1], 'channel')} that cancel each other out, as in opposite phase: keep one of them."
        raise DataError("recording", str(path), rule)
    return mono


def _power(samples: np.ndarray) -> float:
    return float(np.square(samples, dtype=np.float64).mean())


def audio_seconds(path: Path, duration: float | None = None) -> float | None:
    """The seconds of a recording by its header, or `duration` if it is given; None where the header cannot be read."""
    try:
        return float(soundfile.info(path).duration) if duration is None else duration
    except (OSError, soundfile.SoundFileError):
        return None


def _read(source: soundfile.SoundFile, path: Path, part: _Part, max_seconds: float) -> np.ndarray:
    """The part's samples, float32 (samples, channels)."""
    rate, total = source.samplerate, source.frames
    if rate < _LEAST_HZ or rate * source.channels > _MOST_A_SECOND:
        many = count_of(source.channels, "channel")
        raise DataError("recording", str(path), f"has {many} at {rate} Hz, which is no recording of speech.")
    first, count = _range(path, part, rate, total, max_seconds)
    if part.duration is None and (rule := find_hidden_audio(path, source.format, total, rate)):
        raise DataError("recording", str(path), f"{rule}.", "Write it again.")
    ahead = min(first, _PAGE * rate) if source.subtype == "VORBIS" else 0
    if first:
        source.seek(first - ahead)
    try:
        samples: np.ndarray = source.read(ahead + count, dtype="float32", always_2d=True)[ahead:]
        missing = 0 if source.format in _EXACT else _INEXACT * rate if part.duration is not None else count
        short = len(samples) < count - missing
        found = len(samples)
    except soundfile.SoundFileError:
        short, samples, found = True, np.zeros((0, 1), np.float32), _count_until_damage(path, first)
    if notes := source.extra_info:
        chunk = _CUT_CHUNK.search(notes)
        short = short or bool(_CUT_OGG.search(notes)) or (chunk is not None and int(chunk[1]) > int(chunk[2]))
        if part.duration is None and any(int(size[1]) + _SLACK * rate < int(size[2]) for size in _LONG_RIFF.finditer(notes)):
            raise DataError("recording", str(path), "is longer than its header announces.", "Write it again.")
    if short:
        raise DataError("recording", str(path), f"is cut off or damaged: it can be read up to {(first + found) / rate:.2f} s.")
    return _channel(samples, part.channel, path)


def _range(path: Path, part: _Part, rate: int, total: int, max_seconds: float) -> tuple[int, int]:
    """The part's first sample and the number of its samples, of `total` ones at `rate` Hz. Raises DataError where they are not there."""
    start, duration = part.start, part.duration
    first = round(start * rate)
    count = total - first if duration is None else round(duration * rate)
    if total > _UNKNOWN and duration is None:
        raise DataError("recording", str(path), "does not say how long it is, as a FLAC that was written to a pipe.", "Write it again.")
    if not 0 <= first <= total or count < 0 or first + count > total + round(_SLACK * rate):
        asked = f"from {start:g} s" if duration is None else f"{start:g} to {start + duration:g} s"
        raise DataError("recording", str(path), f"is {total / rate:.2f} s long and has no part {asked}.")
    count = min(count, total - first)
    if count > max_seconds * rate:
        raise DataError("recording", str(path), f"is {count / rate:,.1f} s long, beyond the {max_seconds:g} s of an utterance.")
    if part.length is not None and part.length < _LEAST_SHARE * total / rate - _AND_SECONDS:
        rule = f"is {total / rate:.2f} s long, but its table gives it {part.length:g} s: where a part is meant, give its start."
        raise DataError("recording", str(path), rule)
    return first, count


def _channel(samples: np.ndarray, channel: int | None, path: Path) -> np.ndarray:
    """The channel's samples, (samples, 1), or all of them. Raises DataError if there is no such channel."""
    if channel is None or (channel == ANY_CHANNEL and samples.shape[1] == 1):
        return samples
    if channel == ANY_CHANNEL:
        rule = f"has {count_of(samples.shape[1], 'channel')}, and its row means one of them: which one is not known."
        raise DataError("recording", str(path), rule, "Give each channel a file of its own.")
    if channel >= samples.shape[1]:
        raise DataError("recording", str(path), f"has {count_of(samples.shape[1], 'channel')} and no channel {channel}, counted from 0.")
    return samples[:, channel : channel + 1]


def _count_until_damage(path: Path, first: int) -> int:
    """The number of samples from `first` on that can be decoded."""
    count = 0
    with soundfile.SoundFile(path) as source, contextlib.suppress(soundfile.SoundFileError):  # the damage ends the loop
        source.seek(first)
        while block := len(source.read(source.samplerate // 10, dtype="float32", always_2d=True)):
            count += block
    return count
