"""A record's recording, where it is at hand, as samples and as a picture."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from most_ray.errors import DataError
from most_ray.speech.corpora.corpus import LAYOUTS, CorpusOptions
from most_ray.speech.corpora.recordings import load_recording, recordings_folders, spectrogram_png
from most_ray.speech.units.corpus_parts import run_in_process
from most_ray.speech.units.prepare import UnitsJob, prepare_units

RATE = 16_000


def tone(hertz: float, seconds: float) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def write(path: Path, wave: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, RATE)
    return path


def load(folder: Path, name: str = "x", about: Any = None, metadata: Any = None) -> tuple[np.ndarray, float] | None:
    return load_recording(name, about or {}, metadata or {}, recordings_folders(str(folder)), RATE, 10)


@pytest.mark.parametrize("place", ["", "recordings", "audio", "wav"])
def test_a_recording_beside_the_records_is_found_by_its_path_and_by_the_records_id(tmp_path: Path, place: str) -> None:
    write(tmp_path / place / "0_ann_3.wav", tone(440, 0.5))
    for name, about, metadata in (
        ("anything", {"recording": "0_ann_3.wav"}, {}),
        ("anything", {"recording": "elsewhere/0_ann_3.wav"}, {}),  # the corpus' own folders are not there
        ("0_ann_3", {}, {}),
        ("digits_0_ann_3", {}, {"dataset": "digits"}),
    ):
        found = load(tmp_path, name, about, metadata)
        assert found and found[1] == pytest.approx(0.5)
    assert load(tmp_path, "1_ann_3") is None and load(tmp_path, "x", {"recording": "1.wav"}) is None
    assert load(tmp_path, "other_0_ann_3") is None  # which data set an id begins with is not guessed


def test_the_corpus_that_records_were_prepared_from_is_looked_in(tmp_path: Path) -> None:
    write(tmp_path / "corpus" / "a" / "b.wav", tone(440, 0.5))
    records = tmp_path / "records"
    records.mkdir()
    assert load(records, "x", {"recording": "a/b.wav"}) is None
    (records / "prepared.json").write_text(json.dumps({"corpus": str(tmp_path / "corpus")}))
    assert load(records, "x", {"recording": "a/b.wav"})
    (records / "prepared.json").write_text("[")
    assert load(records, "x", {"recording": "a/b.wav"}) is None


def test_a_stretch_at_another_speed_is_played_as_it_was_trained_on(tmp_path: Path) -> None:
    """`duration` is that of the speech as the record has it, faster or slower."""
    write(tmp_path / "long.wav", np.concatenate([tone(200, 2), tone(1000, 2)]))
    found = load(tmp_path, about={"recording": "long.wav", "start": 2.0, "duration": 1.0, "speed": 2.0})
    assert found and found[1] == pytest.approx(1.0, abs=0.01)
    assert np.abs(np.fft.rfft(found[0][:RATE])).argmax() == pytest.approx(2000, abs=5)


def test_of_a_long_utterance_the_beginning_is_loaded(tmp_path: Path) -> None:
    write(tmp_path / "x.wav", tone(440, 12))
    found = load(tmp_path)
    assert found and (len(found[0]), found[1]) == (10 * RATE, pytest.approx(12))


@pytest.mark.parametrize("name", ["../x", "/x", "a\0b", "", ".", "x" * 500])
def test_an_id_is_no_path(tmp_path: Path, name: str) -> None:
    write(tmp_path / "x.wav", tone(440, 0.5))
    (tmp_path / "records").mkdir()
    assert load(tmp_path / "records", name) is None


def test_what_is_no_sound_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    (tmp_path / "x.wav").write_text("no sound")
    write(tmp_path / "silent.wav", np.zeros(RATE, np.float32))
    assert load(tmp_path) is None and load(tmp_path, "silent") is None
    assert load(tmp_path, about={"recording": "x.wav", "start": float("inf"), "channel": "left"}) is None
    assert recordings_folders("s3://bucket/records") == []


def levels(png: bytes) -> np.ndarray:
    """The colours of a PNG by their number, uint8 (rows, columns)."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(png):
        (length,) = struct.unpack(">I", png[place : place + 4])
        kind, content = png[place + 4 : place + 8], png[place + 8 : place + 8 + length]
        assert struct.unpack(">I", png[place + 8 + length : place + 12 + length])[0] == zlib.crc32(kind + content)
        chunks[kind], place = content, place + 12 + length
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    return np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)[:, 1:]


def test_a_spectrogram_has_low_tones_at_the_bottom_and_time_from_left_to_right() -> None:
    found = levels(spectrogram_png(np.concatenate([tone(300, 1), tone(5000, 1)]), RATE))
    assert found.shape == (64, found.shape[1]) and 200 <= found.shape[1] <= 240
    left, right = (int(found[:, column].argmax()) for column in (20, -20))
    assert left > 45 and right < 20


@pytest.mark.parametrize("samples", [0, 1, 399, 400, 16_000, 16_000 * 60])
def test_any_length_gives_a_picture_of_bounded_size(samples: int) -> None:
    wave = np.random.default_rng(0).standard_normal(samples).astype(np.float32)
    png = spectrogram_png(wave, RATE)
    assert levels(png).shape[1] <= 240 and len(png) < 16_000
    assert spectrogram_png(np.zeros(samples, np.float32), RATE)  # silence


def test_prepared_records_name_their_recordings_and_their_licence(tmp_path: Path) -> None:
    for name, hertz in (("a", 300), ("b", 500)):
        write(tmp_path / "corpus" / "deep" / f"{name}.wav", tone(hertz, 1))
        (tmp_path / "corpus" / "deep" / f"{name}.txt").write_text(name)
    (tmp_path / "records").mkdir()
    corpus = CorpusOptions("folder", tmp_path / "records" / ".." / "corpus")
    for licence in (None, "CC BY 4.0"):
        job = UnitsJob(corpus, tmp_path / "records", fit_kmeans=4, form="jsonl", licence=licence)
        result = prepare_units(job, lambda parts, *_: parts, lambda _: run_in_process)
        assert not result.get("unchanged")
        assert json.loads((tmp_path / "records" / "units.json").read_text()).get("licence") == licence
    records = [json.loads(line) for line in (tmp_path / "records" / "records.jsonl").read_text().splitlines()]
    assert [record["metadata"]["recording"] for record in records] == ["deep/a.wav", "deep/b.wav"]
    for record in records:
        assert load(tmp_path / "records", record["id"], record["metadata"])


def test_published_corpora_have_a_licence() -> None:
    assert all(layout.licence for name, layout in LAYOUTS.items() if name != "folder") and not LAYOUTS["folder"].licence


def test_a_manifest_whose_licence_is_no_text_is_refused(tmp_path: Path) -> None:
    from most_ray.records.units_manifest import load_units_manifest

    (tmp_path / "units.json").write_text(json.dumps({"licence": 4}))
    with pytest.raises(DataError, match="licence that is no text"):
        load_units_manifest(str(tmp_path))
