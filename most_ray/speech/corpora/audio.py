"""Reads recordings: any format of libsndfile, mixed down to one channel, resampled, optionally played faster or slower."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import numpy as np
import soundfile
import soxr

from most_ray.errors import DataError

MAX_SECONDS = 120.0  # of an utterance: a longer one is likely a recording that was not cut into utterances
_SLACK = 0.05  # seconds by which a part may end after its recording: tables round
_EXACT = ("FLAC",)  # formats whose header gives the exact number of samples
_PAGE = 10  # seconds, more than an Ogg page: libsndfile misses a position in the last page of Vorbis by the samples that its end cuts off
_UNKNOWN = 1 << 50  # samples: what libsndfile reports for a FLAC that was written to a pipe is larger
# What libsndfile notes about a file that ends too soon: for WAV, AIFF, AU and W64 the size of the chunk of samples (4 GB stand for "not
# known"), for Ogg the stream's last page. For an MP3 it notes nothing.
_CUT_CHUNK = re.compile(r"^ *(?:data|SSND|Data Size|riff) *: (\d{1,9}) \(should be (\d+)\)", re.MULTILINE)
_CUT_OGG = re.compile(r"Last page lacks an end-of-stream bit|Junk after the last page|without an End-Of-Stream flag")


def load_audio(
    path: Path, sample_rate: int, speed: float = 1.0, start: float = 0.0, duration: float | None = None, max_seconds: float = MAX_SECONDS
) -> np.ndarray:
    """Read a recording, or a part of it, as float32 samples in [-1, 1], shape (samples,).

    Args:
        sample_rate: of the result, in Hz.
        speed: how many times as fast to play it, by resampling, so that pitch and formants move with the tempo (Ko et al., "Audio
            augmentation for speech recognition", 2015).
        start, duration: of the part in seconds; None: up to the end.
        max_seconds: a longer part is refused before it is decoded.

    Raises:
        DataError: the file is missing, not audio, cut off, too long, silent, or without samples; its `rule` is the reason.
    """
    if not path.is_file():
        raise DataError("recording", str(path), "is not there.")
    if path.stat().st_size == 0:
        raise DataError("recording", str(path), "is an empty file.")
    try:
        with soundfile.SoundFile(path) as source:
            samples, rate = _read(source, path, start, duration, max_seconds), source.samplerate
    except (OSError, soundfile.SoundFileError) as error:
        raise DataError("recording", str(path), f"cannot be read as audio ({error}).") from error
    if samples.shape[0] == 0:
        raise DataError("recording", str(path), "holds no samples.")
    mono = samples.mean(axis=1)
    if not np.isfinite(mono).all():
        raise DataError("recording", str(path), "holds samples that are not finite.")
    if mono.min() == mono.max():
        raise DataError("recording", str(path), "is silence: all its samples are equal.")
    if rate * speed != sample_rate:
        mono = soxr.resample(mono, rate * speed, sample_rate)
    return np.ascontiguousarray(mono, dtype=np.float32)


def audio_seconds(path: Path, duration: float | None = None) -> float | None:
    """The seconds of a recording by its header, or `duration` if it is given; None where the header cannot be read."""
    try:
        return float(soundfile.info(path).duration) if duration is None else duration
    except (OSError, soundfile.SoundFileError):
        return None


def _read(source: soundfile.SoundFile, path: Path, start: float, duration: float | None, max_seconds: float) -> np.ndarray:
    """The part's samples, float32 (samples, channels)."""
    rate, total = source.samplerate, source.frames
    first = round(start * rate)
    count = total - first if duration is None else round(duration * rate)
    if total > _UNKNOWN and duration is None:
        raise DataError("recording", str(path), "does not say how long it is, as a FLAC that was written to a pipe.", "Write it again.")
    if not 0 <= first <= total or count < 0 or first + count > total + round(_SLACK * rate):
        part = f"from {start:g} s" if duration is None else f"{start:g} to {start + duration:g} s"
        raise DataError("recording", str(path), f"is {total / rate:.2f} s long and has no part {part}.")
    count = min(count, total - first)
    if count > max_seconds * rate:
        raise DataError("recording", str(path), f"is {count / rate:,.1f} s long, beyond the {max_seconds:g} s of an utterance.")
    ahead = min(first, _PAGE * rate) if source.subtype == "VORBIS" else 0
    if first:
        source.seek(first - ahead)
    try:
        samples: np.ndarray = source.read(ahead + count, dtype="float32", always_2d=True)[ahead:]
        short = len(samples) < count and source.format in _EXACT
    except soundfile.SoundFileError:
        short, samples = True, _read_until_damage(path, first)
    if notes := source.extra_info:
        chunk = _CUT_CHUNK.search(notes)
        short = short or bool(_CUT_OGG.search(notes)) or (chunk is not None and int(chunk[1]) > int(chunk[2]))
    if short:
        raise DataError("recording", str(path), f"is cut off or damaged: it can be read up to {(first + len(samples)) / rate:.2f} s.")
    return samples


def _read_until_damage(path: Path, first: int) -> np.ndarray:
    """The samples from `first` on that can be decoded, float32 (samples, channels)."""
    blocks = []
    with soundfile.SoundFile(path) as source, contextlib.suppress(soundfile.SoundFileError):  # the damage ends the loop
        source.seek(first)
        while len(block := source.read(source.samplerate // 10, dtype="float32", always_2d=True)):
            blocks.append(block)
    return np.concatenate(blocks) if blocks else np.zeros((0, 1), np.float32)
