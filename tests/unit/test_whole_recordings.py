"""A recording is read whole, in the channel that is meant, or refused: what its header announces is not all that counts."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from most_ray.errors import DataError
from most_ray.speech.corpora.audio import ANY_CHANNEL, load_audio
from most_ray.speech.corpora.containers import find_hidden_audio
from tests.support.audio import tone

ONE, TWO = tone(1.0, 300, 16000), tone(0.6, 500, 16000)
FORMS = [
    ("WAV", "PCM_16"),
    ("WAV", "FLOAT"),
    ("WAVEX", "PCM_24"),
    ("RF64", "PCM_16"),
    ("W64", "PCM_16"),
    ("FLAC", "PCM_16"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
    ("AIFF", "PCM_16"),
    ("AU", "PCM_16"),
    ("CAF", "PCM_16"),
    ("NIST", "PCM_16"),
]


def encoded(samples: np.ndarray, form: str, subtype: str | None = None) -> bytes:
    with io.BytesIO() as sink:
        soundfile.write(sink, samples, 16000, format=form, subtype=subtype)
        return sink.getvalue()


@pytest.fixture
def rule(tmp_path: Path) -> Callable[..., str]:
    """Why a recording with some content is refused; "" where it is read."""

    def why(content: bytes | np.ndarray, **part: float) -> str:
        path = tmp_path / "a.wav"
        path.write_bytes(content if isinstance(content, bytes) else encoded(content, "WAV", "FLOAT"))
        try:
            load_audio(path, 16000, **part)  # type: ignore[arg-type]
        except DataError as error:
            return error.rule
        return ""

    return why


@pytest.mark.parametrize(("form", "subtype"), FORMS)
def test_joined_files_are_refused_and_whole_ones_read(rule: Callable[..., str], form: str, subtype: str) -> None:
    """By `cat a b`: a player may play both, libsndfile reads the first or takes the second's header for sound."""
    one, two = encoded(ONE, form, subtype), encoded(TWO, form, subtype)
    assert rule(one) == rule(two) == ""
    assert rule(one + two) and rule(two + one) and rule(one + one)


@pytest.mark.parametrize(("form", "subtype"), FORMS)
def test_files_that_end_early_are_refused(rule: Callable[..., str], form: str, subtype: str) -> None:
    content = encoded(ONE, form, subtype)
    assert rule(content[: len(content) // 2]) and rule(content[: len(content) * 4 // 5])


@pytest.mark.parametrize("announced", [8000, 15000, 15999])
def test_a_flac_that_announces_too_little(rule: Callable[..., str], announced: int) -> None:
    """Parts of it that are announced can be used."""
    content = bytearray(encoded(ONE, "FLAC"))
    content[18:26] = (int.from_bytes(content[18:26], "big") >> 36 << 36 | announced).to_bytes(8, "big")
    assert "1.00 s of audio" in rule(bytes(content))
    assert rule(bytes(content), start=0.1, duration=0.3) == ""


def test_a_flac_behind_a_tag(rule: Callable[..., str]) -> None:
    assert rule(b"ID3\x04\0\0\0\0\0\x14" + bytes(20) + encoded(ONE, "FLAC")) == ""


def test_an_mp3_by_its_frames(rule: Callable[..., str]) -> None:
    """What its first frame announces, or, without that frame, what libsndfile makes of its size; tags are no frames."""
    content = encoded(ONE, "MP3")
    mark = content.find(b"Xing")
    assert mark > 0
    assert "header announces" in rule(content[: mark + 8] + (15).to_bytes(4, "big") + content[mark + 12 :])
    assert "cut off" in rule(content[: mark + 8] + (60).to_bytes(4, "big") + content[mark + 12 :])
    tagged = b"ID3\x04\0\0\0\0\0\x14" + bytes(20) + content + b"TAG" + bytes(125)
    assert rule(tagged) == ""
    with io.BytesIO() as other:
        soundfile.write(other, ONE, 44100, format="MP3")
        assert "header announces 1.0" in rule(content + other.getvalue())


def test_a_wav_that_announces_too_little(rule: Callable[..., str]) -> None:
    """Other chunks, padding and tags behind the samples are no samples."""
    content = bytearray(encoded(ONE, "WAV", "PCM_16"))
    assert content[36:40] == b"data"
    for behind in (b"LIST\x04\0\0\0INFO", b"junk\x03\0\0\0abc\0", bytes(5000), b"TAG" + bytes(125), b"ID3" + b"x" * 5000):
        assert rule(bytes(content) + behind) == "", behind[:8]
    content[40:44] = (16000).to_bytes(4, "little")
    assert "holds 1.00 s of audio, but its header announces 0.50 s" in rule(bytes(content))
    for unknown in (0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000 - 36):  # what programs write to a pipe
        content[40:44] = unknown.to_bytes(4, "little")
        assert rule(bytes(content)) == ""


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        (ONE * 1e29, "samples up to"),
        (np.where(np.arange(16000) == 9, np.float32(1e10), ONE), "samples up to 1e+10"),
        (np.stack([ONE, -ONE], axis=1) * 1e30, "samples up to"),
        (np.stack([ONE, np.full_like(ONE, np.nan)], axis=1), "not finite"),
        (np.stack([ONE, -ONE], axis=1), "2 channels that cancel each other out"),
        (np.stack([ONE, -0.999 * ONE], axis=1), "2 channels that cancel each other out"),
        (np.zeros((16000, 2), np.float32), "is silence"),
        (np.stack([ONE, 0 * ONE], axis=1), ""),
        (ONE * 8, ""),
        (ONE * 32768, ""),
        (ONE * 1e-20, ""),
    ],
)
def test_samples_that_are_no_sound(rule: Callable[..., str], samples: np.ndarray, reason: str) -> None:
    found = rule(samples.astype(np.float32))
    assert reason in found and bool(found) == bool(reason)


def test_channels(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "two.flac", np.stack([ONE, 0.5 * ONE[::-1]], axis=1), 16000)
    soundfile.write(tmp_path / "one.flac", ONE, 16000)
    soundfile.write(tmp_path / "other.flac", 0.5 * ONE[::-1], 16000)
    one, other = (load_audio(tmp_path / f"{name}.flac", 16000) for name in ("one", "other"))
    assert np.array_equal(load_audio(tmp_path / "two.flac", 16000, channel=0), one)
    assert np.array_equal(load_audio(tmp_path / "two.flac", 16000, channel=1), other)
    assert np.array_equal(load_audio(tmp_path / "one.flac", 16000, channel=ANY_CHANNEL), one)
    for name, channel in (("two", ANY_CHANNEL), ("two", 2), ("one", 1)):
        with pytest.raises(DataError, match="channel"):
            load_audio(tmp_path / f"{name}.flac", 16000, channel=channel)


def test_a_length_of_another_recording(tmp_path: Path) -> None:
    """Tables round and count differently; a recording much longer than its row says is not the row's."""
    path = tmp_path / "a.flac"
    soundfile.write(path, np.tile(ONE, 3), 16000)
    for length in (3.0, 2.9, 2.2, 3.2, 3000.0):
        assert len(load_audio(path, 16000, length=length)) == 48000
    with pytest.raises(DataError, match=r"is 3\.00 s long, but its table gives it 1 s"):
        load_audio(path, 16000, length=1.0)


@pytest.mark.parametrize("rate", [7, 999, 2_100_000])
def test_rates_that_no_recording_has(tmp_path: Path, rate: int) -> None:
    soundfile.write(tmp_path / "a.wav", ONE[:800], rate)
    with pytest.raises(DataError, match=rf"at {rate} Hz"):
        load_audio(tmp_path / "a.wav", 16000)


def test_what_is_looked_at_has_an_end(tmp_path: Path) -> None:
    """Files whose structure is endless: millions of empty chunks, of the smallest frames and pages."""
    contents = {"WAV": encoded(ONE, "WAV") + b"junk\0\0\0\0" * (2 << 20), "MP3": b"\xff\xff\x14\xc4" + bytes(28)}
    contents["MP3"] *= 1 << 19
    contents["OGG"] = (b"OggS" + bytes(23)) * (1 << 19)
    for kind, content in contents.items():
        path = tmp_path / kind
        path.write_bytes(content)
        began = time.process_time()
        find_hidden_audio(path, kind, 16000, 16000)
        assert time.process_time() - began < 2.0, kind
