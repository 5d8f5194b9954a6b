"""Thousands of mutations of recordings' headers and bodies, through the reader that every command uses: a reason, or samples that can be
used, and nothing else."""

from __future__ import annotations

import io
import random
import resource
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from most_ray.errors import DataError
from most_ray.speech.corpora.audio import load_audio

COUNT = 1500  # mutations of each format
SLOWEST = 5.0  # seconds of one
MEMORY = 1 << 31  # bytes that all of them may add to the process
KINDS = (
    ("WAV", "PCM_16", 44),
    ("WAV", "FLOAT", 80),
    ("WAVEX", "PCM_24", 80),
    ("FLAC", "PCM_16", 120),
    ("OGG", "VORBIS", 200),
    ("OGG", "OPUS", 200),
    ("MP3", "MPEG_LAYER_III", 200),
    ("AIFF", "PCM_16", 64),
    ("AU", "PCM_16", 32),
    ("CAF", "PCM_16", 96),
)  # format, subtype, bytes in which most mutations fall
TOKENS = (
    b"RIFF",
    b"data",
    b"fmt ",
    b"fLaC",
    b"OggS",
    b"ID3",
    b"TAG",
    b"Xing",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    bytes(4),
    b"\xff\xfb",
)


def recording(form: str, subtype: str) -> bytes:
    """A third of a second, stereo."""
    time = np.arange(5333) / 16000
    samples = np.stack([0.3 * np.sin(2000 * time), 0.2 * np.sin(5000 * time)], axis=1).astype(np.float32)
    with io.BytesIO() as sink:
        soundfile.write(sink, samples, 16000, format=form, subtype=subtype)
        return sink.getvalue()


def mutated(content: bytes, head: int, rng: random.Random) -> bytes:
    """One to four changes: bytes, numbers and marks, cut, repeated, moved; mostly in the header."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(min(head, len(data)) if rng.random() < 0.7 else len(data))
        match rng.randrange(7):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                data[at] ^= 1 << rng.randrange(8)
            case 2:
                token = rng.choice(TOKENS)
                data[at : at + len(token)] = token
            case 3:
                data[at : at + 4] = rng.choice((0, 1, 2, 0x7F, 0x8000, 0xFFFF, 1 << 31)).to_bytes(4, rng.choice(("little", "big")))
            case 4:
                del data[at : at + rng.choice((1, 4, 100, 5000))]
            case 5:
                data[at:at] = data[at : at + rng.choice((1, 8, 500))]
            case _:
                data += rng.choice((bytes(9), content[: rng.randrange(1, 300)], content))
        data = data or bytearray(1)
    return bytes(data)


@pytest.mark.parametrize(("form", "subtype", "head"), KINDS, ids=lambda value: str(value))
def test_mutations_are_refused_or_read(form: str, subtype: str, head: int, tmp_path: Path) -> None:
    rng, content, path = random.Random(f"{form} {subtype}"), recording(form, subtype), tmp_path / "a.wav"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = {"read": 0, "refused": 0}
    for number in range(COUNT):
        path.write_bytes(data := mutated(content, head, rng))
        part = {"start": rng.choice((0.1, 1e6)), "duration": rng.choice((0.1, 1e6))} if number % 5 == 0 else {}
        began = time.monotonic()
        samples, error = attempt(path, **part)
        assert time.monotonic() - began < SLOWEST, data[:head].hex()
        if error is not None:
            assert error.field == "recording" and error.rule and "\n" not in str(error)
            outcomes["refused"] += 1
        else:
            assert samples.dtype == np.float32 and samples.ndim == 1 and np.isfinite(samples).all(), data[:head].hex()
            assert len(samples) <= 120 * 16000 + 1
            outcomes["read"] += 1
    assert min(outcomes.values()) > 5, outcomes
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


def attempt(path: Path, **part: float) -> tuple[np.ndarray, DataError | None]:
    """The samples, or why there are none; anything else is a fault."""
    try:
        return load_audio(path, 16000, **part), None
    except DataError as error:
        return np.zeros(0, np.float32), error
