"""Recordings, features, k-means and units. `prepare units` as a whole is in test_prepare.py."""

from __future__ import annotations

import os
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from most_ray.errors import ConfigError, DataError
from most_ray.records.record import parse_record, units_hash
from most_ray.speech.corpora.audio import audio_seconds, load_audio
from most_ray.speech.units.clustering import (
    SpeakerStatistics,
    assign,
    default_unit_count,
    fit_kmeans,
    kmeans_hash,
    load_kmeans,
    nearest_units,
    remove_repeats,
    save_kmeans,
)
from most_ray.speech.units.extractors import parse_features
from most_ray.speech.units.features import EncoderSettings
from most_ray.speech.units.mfcc import MfccSettings, loud_range, mfcc
from tests.support.audio import cut, hours_of_silence, lines_of, prepare, tone
from tests.support.speech import RATE, spoken


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    """Speech of 8.82 s, 16 kHz, in 16-bit steps."""
    return spoken("george", 4 * ["seven", "three", "zero", "nine", "eight", "six"])[: round(8.82 * RATE)]


def refusal(path: Path, *args: Any, **options: Any) -> str:
    with pytest.raises(DataError) as refused:
        load_audio(path, 16000, *args, **options)
    assert refused.value.field == "recording" and refused.value.value == str(path) and "\n" not in str(refused.value)
    return refused.value.rule


# Recordings


@pytest.mark.parametrize("suffix", ["flac", "wav", "ogg"])
def test_a_part_is_a_slice_of_the_whole(speech: np.ndarray, tmp_path: Path, suffix: str) -> None:
    """To the sample, wherever it begins: units of a cut are those of the utterance."""
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, speech, 16000)
    whole = load_audio(path, 16000)
    assert whole.dtype == np.float32 and whole.shape == speech.shape
    for start, duration in ((0.0, 0.5), (0.5, 1.0), (1.23456, 2.000031), (3.3, None), (8.2, None), (8.8, 0.02)):
        first = round(start * 16000)
        expected = whole[first:] if duration is None else whole[first : first + round(duration * 16000)]
        assert np.array_equal(load_audio(path, 16000, start=start, duration=duration), expected), (start, duration)


def test_a_part_may_end_a_little_late_but_not_begin_beyond_the_end(speech: np.ndarray, tmp_path: Path) -> None:
    """Tables round; but a table of another recording is told."""
    soundfile.write(tmp_path / "a.flac", speech, 16000)  # 8.82 s
    assert len(load_audio(tmp_path / "a.flac", 16000, start=8.0, duration=0.86)) == len(speech) - 128000
    for start, duration in ((8.0, 0.9), (100.0, 1.0), (100.0, None), (8.83, 0.01), (-1.0, 0.5)):
        rule = refusal(tmp_path / "a.flac", start=start, duration=duration)
        assert rule.startswith(f"is 8.82 s long and has no part {'from ' if duration is None else ''}{start:g}")


def test_channels_are_mixed_and_rates_brought_to_one(speech: np.ndarray, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "stereo.wav", np.stack([speech, np.zeros_like(speech)], axis=1), 16000)
    assert np.allclose(load_audio(tmp_path / "stereo.wav", 16000), speech / 2, atol=1e-4)
    t = np.arange(48000) / 48000
    low, high = 0.3 * np.sin(2 * np.pi * 500 * t), 0.3 * np.sin(2 * np.pi * 15000 * t)  # the high one has no place in 16 kHz
    soundfile.write(tmp_path / "fast.wav", low + high, 48000, subtype="FLOAT")
    heard = load_audio(tmp_path / "fast.wav", 16000)
    assert len(heard) == 16000
    assert np.abs(heard - low[::3])[500:-500].max() < 1e-3


def test_speed_changes_duration(tmp_path: Path) -> None:
    """Played faster it is shorter, and higher."""
    soundfile.write(tmp_path / "a.wav", np.stack([tone(1.0, 300)] * 2, axis=1), 8000)
    assert len(load_audio(tmp_path / "a.wav", 16000)) == pytest.approx(16000, abs=2)
    assert len(load_audio(tmp_path / "a.wav", 16000, speed=1.25)) == pytest.approx(12800, abs=2)
    t = np.arange(16000) / 16000
    soundfile.write(tmp_path / "b.wav", 0.3 * np.sin(2 * np.pi * 400 * t), 16000)
    faster = np.abs(np.fft.rfft(load_audio(tmp_path / "b.wav", 16000, speed=1.25)))
    assert faster.argmax() * 16000 / 12800 == pytest.approx(500, abs=2)


def _samples(samples: np.ndarray, **how: Any) -> Callable[[Path], object]:
    return lambda path: soundfile.write(path, samples, 16000, **{"format": "WAV", "subtype": "FLOAT", **how})


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "is not there"),
        (lambda path: path.mkdir(), "is not there"),
        (lambda path: path.touch(), "is an empty file"),
        (lambda path: path.write_text("no audio at all\n" * 50), "cannot be read as audio"),
        (lambda path: path.write_bytes(os.urandom(4000)), "cannot be read as audio"),
        (_samples(np.zeros(0)), "holds no samples"),
        (_samples(np.array([0.1, np.nan, 0.2] * 500)), "holds samples that are not finite"),
        (_samples(np.array([0.1, np.inf, 0.2] * 500)), "holds samples that are not finite"),
        (_samples(np.zeros(8000)), "is silence: all its samples are equal"),
        (_samples(np.full(8000, 0.25)), "is silence: all its samples are equal"),
        (lambda path: hours_of_silence(path, 8), "is 28,800.0 s long, beyond the 120 s of an utterance"),
    ],
)
def test_what_is_no_utterance_is_refused_with_its_reason(tmp_path: Path, make: Callable[[Path], object], reason: str) -> None:
    make(tmp_path / "a.wav")
    assert reason in refusal(tmp_path / "a.wav")


def test_an_unreadable_recording_is_told_by_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions do not stop root, who runs tests in containers; libsndfile's answer does."""

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.wav").write_bytes(b"x")
    monkeypatch.setattr(soundfile, "SoundFile", denied)
    assert "Permission denied" in refusal(tmp_path / "a.wav")


@pytest.mark.parametrize("part", [0.97, 0.6])
@pytest.mark.parametrize(
    "kind", [("flac", "PCM_16"), ("ogg", "VORBIS"), ("ogg", "OPUS"), ("wav", "PCM_16"), ("aiff", "PCM_16"), ("au", "PCM_16")]
)
def test_cut_off_recordings_are_refused(speech: np.ndarray, tmp_path: Path, kind: tuple[str, str], part: float) -> None:
    """A copy that ended too soon holds fewer words than its text, even where only its end is missing."""
    suffix, subtype = kind
    whole = tmp_path / f"whole.{suffix}"
    soundfile.write(whole, speech, 16000, subtype=subtype)
    assert len(load_audio(whole, 16000)) == len(speech)
    assert "is cut off or damaged: it can be read up to " in refusal(cut(whole, tmp_path / f"cut.{suffix}", part))


def test_damage_inside_is_told_where_it_is(speech: np.ndarray, tmp_path: Path) -> None:
    """A FLAC with a hole, as a failing disk leaves it."""
    soundfile.write(tmp_path / "a.flac", speech, 16000)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 9000] = bytes(9000)
    (tmp_path / "a.flac").write_bytes(content)
    assert "is cut off or damaged: it can be read up to 4." in refusal(tmp_path / "a.flac")


def test_a_recording_is_known_by_its_content(speech: np.ndarray, tmp_path: Path) -> None:
    """Whatever its name says."""
    for name, how in (("mp3.wav", "MP3"), ("flac.wav", "FLAC"), ("wav.flac", "WAV"), ("none", "WAV")):
        soundfile.write(tmp_path / name, speech, 16000, format=how)
        assert len(load_audio(tmp_path / name, 16000)) == pytest.approx(len(speech), abs=2000), name


def test_headers_that_were_never_finished(speech: np.ndarray, tmp_path: Path) -> None:
    """Programs that write to a pipe cannot go back: a WAV is read to its end, a FLAC would not be known to be whole."""
    soundfile.write(tmp_path / "a.wav", speech, 16000)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[4:8] = content[40:44] = b"\xff" * 4
    (tmp_path / "a.wav").write_bytes(content)
    assert len(load_audio(tmp_path / "a.wav", 16000)) == len(speech)
    soundfile.write(tmp_path / "a.flac", speech, 16000)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    (tmp_path / "a.flac").write_bytes(content)
    assert "does not say how long it is" in refusal(tmp_path / "a.flac")


def test_too_long_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    """Eight hours cost neither time nor memory, but a part of them can be heard."""
    path = hours_of_silence(tmp_path / "day.wav", 8)
    tracemalloc.start()
    try:
        assert "28,800.0 s" in refusal(path)
        assert "121.0 s long" in refusal(path, start=3600.0, duration=121.0)
        assert "is silence" in refusal(path, start=20000.0, duration=30.0)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert "beyond the 10 s" in refusal(path, max_seconds=10.0, duration=11.0)


def test_seconds_by_the_header(speech: np.ndarray, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", speech, 16000)
    assert audio_seconds(tmp_path / "a.flac") == pytest.approx(8.82) and audio_seconds(tmp_path / "a.flac", 2.5) == 2.5
    assert audio_seconds(tmp_path / "none.flac") is None


# Features


def test_features_of_short_silent_and_loud() -> None:
    settings = MfccSettings()
    assert mfcc(np.zeros(10, np.float32), settings).values.shape[1] == 39
    for samples in (np.zeros(16000, np.float32), np.ones(16000, np.float32), tone(1.0, 300, 16000)):
        frames = mfcc(samples, settings)
        assert np.isfinite(frames.values).all() and len(frames.values) > 0
        assert np.array_equal(frames.values, mfcc(samples, settings).values)


def test_ends_are_trimmed_and_the_middle_is_not(speech: np.ndarray) -> None:
    assert loud_range(np.array([0, 0, 10, 1, 10, 9, 0, 0], dtype=float), 5.0) == (2, 6)
    quiet = np.zeros(16000, np.float32)
    alone, padded = mfcc(speech, MfccSettings()), mfcc(np.concatenate([quiet, speech, quiet]), MfccSettings())
    assert abs(len(alone.values) - len(padded.values)) <= 1 and padded.first == pytest.approx(alone.first + 50, abs=1)
    kept = mfcc(speech, MfccSettings(trim=None))
    assert kept.first == 0 and len(kept.values) == pytest.approx(8.82 * MfccSettings().rate_hz, abs=1)


def test_features_are_named_in_one_word() -> None:
    assert parse_features("mfcc") == MfccSettings()
    assert parse_features("hubert:hf:facebook/hubert-base-ls960:9") == EncoderSettings("hubert", "hf:facebook/hubert-base-ls960", 9)
    assert parse_features("wavlm:/a:b/c:0") == EncoderSettings("wavlm", "/a:b/c", 0)
    for text in ("", "hubert", "hubert:x", "hubert:x:", "hubert:x:nine", "hubert::9", ":x:9", "hubert:x:²", "hubert:x:-1"):
        with pytest.raises(ConfigError, match="neither mfcc nor KIND"):
            parse_features(text)


# Units


def test_statistics_of_parts_add_up() -> None:
    frames = np.random.default_rng(0).normal(3.0, 2.0, (1000, 4)).astype(np.float32)
    parts = SpeakerStatistics.from_frames(frames[:300]) + SpeakerStatistics.from_frames(frames[300:])
    assert (
        parts.count == 1000
        and np.allclose(parts.mean, frames.mean(0), atol=1e-5)
        and np.allclose(parts.deviation, frames.std(0), atol=1e-4)
    )
    normal = parts.normalise(frames)
    assert np.abs(normal.mean(0)).max() < 1e-5 and np.abs(normal.std(0) - 1).max() < 1e-4
    constant = SpeakerStatistics.from_frames(np.full((5, 4), 7.0, np.float32))
    assert np.isfinite(constant.normalise(np.full((1, 4), 8.0, np.float32))).all()


def test_a_short_recording_leans_on_the_corpus() -> None:
    """With no frames of its own it is the corpus; with many it is itself."""
    mean, deviation = np.full(3, 2.0), np.full(3, 0.5)
    few = SpeakerStatistics.from_frames(np.zeros((0, 3), np.float32)).map_adapt(mean, deviation)
    assert np.allclose(few.mean, mean) and np.allclose(few.deviation, deviation)
    frames = np.random.default_rng(0).normal(0.0, 1.0, (200_000, 3))
    many = SpeakerStatistics.from_frames(frames).map_adapt(mean, deviation)
    assert np.allclose(many.mean, 0.0, atol=0.01) and np.allclose(many.deviation, 1.0, atol=0.01)


@pytest.mark.parametrize("algorithm", ["minibatch", "lloyd"])
def test_kmeans_is_seeded(algorithm: Any) -> None:
    """The same frames and seed give the same bytes; another seed others."""
    frames = np.random.default_rng(0).normal(size=(3000, 5)).astype(np.float32)
    one, two, other = (fit_kmeans(frames, 20, seed, algorithm) for seed in (3, 3, 4))
    assert one.shape == (20, 5) and one.dtype == np.float32
    assert one.tobytes() == two.tobytes() != other.tobytes()


def test_how_many_units_so_many_frames_tell_apart() -> None:
    assert [default_unit_count(n) for n in (0, 150, 5000, 49_999, 50_000, 10**9)] == [2, 2, 50, 499, 500, 500]


def test_kmeans_files(tmp_path: Path) -> None:
    """Anything but a table of finite centroids is refused, with its reason."""
    np.save(tmp_path / "flat.npy", np.zeros(3))
    np.save(tmp_path / "whole.npy", np.zeros((3, 2), np.int64))
    np.save(tmp_path / "many.npy", np.zeros((501, 2)))
    np.save(tmp_path / "nan.npy", np.array([[0.0, np.nan]]))
    np.savez(tmp_path / "several.npz", a=np.zeros((3, 2)))
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "empty.npy").touch()
    cut(tmp_path / "nan.npy", tmp_path / "short.npy", 0.95)
    (tmp_path / "text.safetensors").write_text("no array")
    for name, message in (
        ("flat.npy", "no table"),
        ("whole.npy", "no table"),
        ("several.npz", "cannot be read as an array"),
        ("empty.npy", "cannot be read as an array"),
        ("short.npy", "cannot be read as an array"),
        ("many.npy", "not 1..500"),
        ("nan.npy", "not 1..500 finite"),
        ("text.npy", "cannot be read as an array"),
        ("text.safetensors", "cannot be read as an array"),
        ("none.npy", "cannot be read as an array"),
        ("none.safetensors", "cannot be read as an array"),
    ):
        with pytest.raises(DataError, match=message):
            load_kmeans(tmp_path / name)
    with pytest.raises(DataError, match="more units than there are frames"):
        fit_kmeans(np.zeros((3, 2), np.float32), 5, 0)


class Harmful:
    """An object whose unpickling leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("name", ["km.joblib", "km.pkl", "km.bin", "km.npy", "km.npz", "km.safetensors", "km"])
def test_a_pickle_is_never_opened(tmp_path: Path, name: str) -> None:
    """Whatever its name: what stands in it would be run."""
    content = pickle.dumps(Harmful(tmp_path / "run"))
    if name == "km.npy":
        np.save(tmp_path / name, np.array([Harmful(tmp_path / "run")], dtype=object), allow_pickle=True)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as refused:
        load_kmeans(tmp_path / name)
    assert not (tmp_path / "run").exists()
    if name.endswith((".joblib", ".pkl", ".bin")):
        assert "pickled object" in refused.value.rule and "numpy.save" in refused.value.remedy
    pickle.loads(content)
    assert (tmp_path / "run").exists(), "the trap would have worked"


def test_centroids_say_what_they_were_fitted_on(tmp_path: Path) -> None:
    centroids = np.random.default_rng(0).normal(size=(7, 39)).astype(np.float32)
    for name in ("k.npy", "k.safetensors"):
        save_kmeans(tmp_path / name, centroids, {"features": "mfcc"})
        assert load_kmeans(tmp_path / name, {"features": "mfcc"}).tobytes() == centroids.tobytes()
    with pytest.raises(DataError, match="fitted on other features"):
        load_kmeans(tmp_path / "k.safetensors", {"features": "hubert"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k.npy", "k.safetensors"]
    assert kmeans_hash(centroids) != kmeans_hash(centroids.reshape(39, 7)) and kmeans_hash(centroids) == kmeans_hash(centroids.copy())


def test_units_of_frames() -> None:
    centroids = np.array([[0.0, 0.0], [1.0, 1.0], [5.0, 5.0]], np.float32)
    assert assign(np.array([[0.1, 0], [4, 4], [0.9, 1.2]], np.float32), centroids).tolist() == [0, 2, 1]
    assert remove_repeats(np.array([1, 1, 2, 2, 2, 1])).tolist() == [1, 2, 1] and remove_repeats(np.zeros(0, int)).tolist() == []
    assert nearest_units(centroids) == [[1, 2], [0, 2], [1, 0]]


# The shipped digits


def test_the_shipped_digits_are_what_the_recordings_give(shared: Path, digits: Path, tmp_path: Path) -> None:
    """Real speech: anyone's recordings become the units that the digits model was trained on."""
    words = ["--name", "fsdd", "--kmeans", str(digits / "train_asr/kmeans.npy"), "--where", "speaker=george", "split=test"]
    made = prepare(shared / "data" / "fsdd", tmp_path / "out", *words)
    shipped = [record for record in lines_of(digits / "test_takes" / "records.jsonl.gz") if record["metadata"]["speaker"] == "george"]
    assert len(shipped) == 50
    assert [record["id"] for record in made] == [record["id"] for record in shipped]
    assert [record["output"] for record in made] == [record["output"] for record in shipped]
    different = sum(one["input"] != two["input"] for one, two in zip(made, shipped, strict=True))
    assert different <= 2, "another machine's rounding may move a frame that lies between two centroids"
    assert all(isinstance(parse_record(record).input, np.ndarray) for record in made)
    manifests = [lines_of(folder / "units.json")[0] for folder in (tmp_path / "out", digits / "test_takes")]
    assert units_hash(manifests[0]) == units_hash(manifests[1])


def test_nobody_heard_the_unheard_speaker(digits: Path) -> None:
    speakers = {}
    for name in ("train_asr", "train_tts", "test_takes", "test_speaker"):
        records = lines_of(digits / name / "records.jsonl.gz")
        speakers[name] = {record["metadata"]["speaker"] for record in records}
        takes = {int(record["metadata"]["take"]) for record in records}
        assert (min(takes) >= 5) == name.startswith("train")
    assert speakers["test_speaker"] == {"lucas"}
    assert "lucas" not in speakers["train_asr"] | speakers["train_tts"] | speakers["test_takes"]
