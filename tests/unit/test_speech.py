from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from most_ray.cli import main
from most_ray.data.plan import units_identity
from most_ray.errors import DataError
from most_ray.records import parse_record
from most_ray.speech.audio import load_audio
from most_ray.speech.corpora import parse_condition, read_folder
from most_ray.speech.features import MfccSettings, mfcc, trim_ends
from most_ray.speech.units import assign, fit_kmeans, load_kmeans, neighbours_of, remove_repeats


def tone(seconds: float, pitch: float, rate: int = 8000) -> np.ndarray:
    t = np.arange(int(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * pitch * t * (1 + 0.3 * t)) + 0.01 * np.sin(2 * np.pi * 3000 * t)).astype(np.float32)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = ["path\tspeaker\ttext\tsplit"]
    for index in range(8):
        soundfile.write(folder / f"{index}.flac", tone(0.4 + 0.05 * index, 200 + 90 * index), 8000)
        rows.append(f"{index}.flac\t{'ab'[index % 2]}\tword {index}\t{'train' if index < 6 else 'test'}")
    (folder / "transcripts.tsv").write_text("\n".join(rows) + "\n")
    return folder


def prepare(corpus: Path, output: Path, *words: str) -> list[dict[str, Any]]:
    assert main(["prepare", "units", "--corpus", "folder", "--input", str(corpus), "--output", str(output), *words]) == 0
    with gzip.open(output / "records.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line in lines]


def test_a_folder_becomes_records(corpus: Path, tmp_path: Path) -> None:
    """Promise 28's first half."""
    records = prepare(corpus, tmp_path / "out", "--fit_kmeans", "12", "--where", "split=train", "--perturb", "0.9,1.0")
    assert [record["id"] for record in records] == [*(f"corpus_{i}_sp0.9" for i in range(6)), *(f"corpus_{i}" for i in range(6))]
    first = records[6]
    assert first["output"] == "word 0"
    assert first["metadata"]["speaker"] == "a" and first["metadata"]["unit_rate_hz"] == 50.0 and first["metadata"]["deduplicated"] is True
    for record in records:
        units = parse_record(record).input
        assert isinstance(units, np.ndarray) and units.max() < 12
        assert (units[1:] != units[:-1]).all()
    manifest = json.loads((tmp_path / "out" / "units.json").read_text())
    assert manifest["identity"]["n_units"] == 12 and manifest["identity"]["repeats_removed"] is True
    assert load_kmeans(tmp_path / "out" / "kmeans.npy").shape == (12, 39)


def test_the_same_command_gives_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        prepare(corpus, tmp_path / name, "--fit_kmeans", "12")
    for name in ("records.jsonl.gz", "units.json", "kmeans.npy"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_other_recordings_get_the_same_units(corpus: Path, tmp_path: Path) -> None:
    prepare(corpus, tmp_path / "train", "--fit_kmeans", "12", "--where", "split=train")
    prepare(corpus, tmp_path / "test", "--kmeans", str(tmp_path / "train" / "kmeans.npy"), "--where", "split=test")
    prepare(corpus, tmp_path / "kept", "--kmeans", str(tmp_path / "train" / "kmeans.npy"), "--keep_repeats")
    manifests = [json.loads((tmp_path / name / "units.json").read_text()) for name in ("train", "test", "kept")]
    assert units_identity(manifests[0]) == units_identity(manifests[1]) != units_identity(manifests[2])


def test_bad_recordings_are_set_aside(corpus: Path, tmp_path: Path) -> None:
    (corpus / "0.flac").write_bytes(b"no audio")
    (corpus / "1.flac").unlink()
    soundfile.write(corpus / "2.flac", np.zeros(0, np.float32), 8000, format="WAV")  # an empty FLAC cannot be opened
    records = prepare(corpus, tmp_path / "out", "--fit_kmeans", "5")
    assert len(records) == 5
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert len(reasons) == 3 and "cannot be read as audio" in reasons[0] and "holds no samples" in reasons[2]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (None, "no transcripts.tsv"),
        ("file\ttext\n", "no column 'path'"),
        ("path\ttext\n", "no rows"),
        ("path\ttext\n0.flac\t\n", ":2.*no path or no text"),
        ("path\ttext\n0.flac\ta\nx/0.flac\tb\n", "second time"),
    ],
)
def test_bad_tables(corpus: Path, table: str | None, message: str) -> None:
    (corpus / "transcripts.tsv").unlink()
    if table is not None:
        (corpus / "transcripts.tsv").write_text(table)
    with pytest.raises(DataError, match=message):
        read_folder(corpus, "c")


def test_conditions(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    utterance = read_folder(corpus, "c")[0]
    assert parse_condition("speaker=a,c").holds(utterance) and not parse_condition("speaker!=a").holds(utterance)
    words = ["prepare", "units", "--input", str(corpus), "--output", str(tmp_path / "o"), "--fit_kmeans", "5", "--where"]
    for condition, message in (
        ("speker=a", "Did you mean 'speaker'"),
        ("speaker=z", "leaves no recording"),
        ("speaker", "not of the form"),
    ):
        assert main([*words, condition]) == 2
        assert message in capsys.readouterr().err


def test_features_of_short_silent_and_loud(tmp_path: Path) -> None:
    settings = MfccSettings()
    assert mfcc(np.zeros(10, np.float32), settings).shape[1] == 39
    for samples in (np.zeros(16000, np.float32), np.ones(16000, np.float32), tone(1.0, 300, 16000)):
        frames = mfcc(samples, settings)
        assert np.isfinite(frames).all() and len(frames) > 0
        assert np.array_equal(frames, mfcc(samples, settings))


def test_ends_are_trimmed_and_the_middle_is_not() -> None:
    energy = np.array([0, 0, 10, 1, 10, 9, 0, 0], dtype=float)
    assert trim_ends(np.arange(8)[:, None], energy, 5.0).ravel().tolist() == [2, 3, 4, 5]


def test_speed_changes_duration(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.stack([tone(1.0, 300)] * 2, axis=1), 8000)
    assert len(load_audio(tmp_path / "a.wav", 16000)) == pytest.approx(16000, abs=2)
    assert len(load_audio(tmp_path / "a.wav", 16000, speed=1.25)) == pytest.approx(12800, abs=2)


def test_kmeans_files(tmp_path: Path) -> None:
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "flat.npy", np.zeros(3))
    np.save(tmp_path / "many.npy", np.zeros((501, 2)))
    for name, message in (("object.npy", "cannot be read"), ("flat.npy", "not 1..500"), ("many.npy", "not 1..500"), ("none.npy", "cannot")):
        with pytest.raises(DataError, match=message):
            load_kmeans(tmp_path / name)
    with pytest.raises(DataError, match="more units than there are frames"):
        fit_kmeans(np.zeros((3, 2), np.float32), 5, 0)


def test_units_of_frames() -> None:
    centroids = np.array([[0.0, 0.0], [1.0, 1.0], [5.0, 5.0]], np.float32)
    assert assign(np.array([[0.1, 0], [4, 4], [0.9, 1.2]], np.float32), centroids).tolist() == [0, 2, 1]
    assert remove_repeats(np.array([1, 1, 2, 2, 2, 1])).tolist() == [1, 2, 1] and remove_repeats(np.zeros(0, int)).tolist() == []
    assert neighbours_of(centroids) == [[1, 2], [0, 2], [1, 0]]


def test_the_shipped_digits_are_what_the_recordings_give(shared: Path, digits: Path, tmp_path: Path) -> None:
    """Real speech: anyone's recordings become the units that the digits model was trained on."""
    words = ["--name", "fsdd", "--kmeans", str(digits / "kmeans.npy"), "--where", "speaker!=lucas", "split=test"]
    made = prepare(shared / "data" / "fsdd", tmp_path / "out", *words)
    with gzip.open(digits / "test_takes" / "records.jsonl.gz", "rt") as lines:
        shipped = [json.loads(line) for line in lines]
    assert [record["id"] for record in made] == [record["id"] for record in shipped]
    different = sum(one["input"] != two["input"] for one, two in zip(made, shipped, strict=True))
    assert different <= 2, "another machine's rounding may move a frame that lies between two centroids"
    assert units_identity(json.loads((tmp_path / "out/units.json").read_text())) == units_identity(
        json.loads((digits / "test_takes" / "units.json").read_text())
    )


def test_nobody_heard_the_unheard_speaker(digits: Path) -> None:
    speakers = {}
    for name in ("train_asr", "train_tts", "test_takes", "test_speaker"):
        with gzip.open(digits / name / "records.jsonl.gz", "rt") as lines:
            records = [json.loads(line) for line in lines]
        speakers[name] = {record["metadata"]["speaker"] for record in records}
        takes = {int(record["metadata"]["take"]) for record in records}
        assert (min(takes) >= 5) == name.startswith("train")
    assert speakers["test_speaker"] == {"lucas"}
    assert "lucas" not in speakers["train_asr"] | speakers["train_tts"] | speakers["test_takes"]


def test_conversion_never_writes_two_files_into_one(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    source.mkdir()
    with gzip.open(digits / "test_takes" / "records.jsonl.gz", "rt") as lines:
        content = next(lines)
    for name in ("train.clean.100.json", "train.clean.360.json"):
        (source / name).write_text(content)
    words = ["prepare", "tts", "--input_dir", str(source), "--output_dir", str(tmp_path / "out"), "--dataset_name", "d"]
    assert main(words) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train.clean.100.jsonl.gz", "train.clean.360.jsonl.gz"]
    (source / "train.clean.100.jsonl").write_text(content)
    assert main(words) == 2
    assert "another file" in capsys.readouterr().err


def test_conversion_is_repeatable(digits: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        words = ["prepare", "tts", "--input_dir", str(digits / "test_takes"), "--output_dir", str(tmp_path / name), "--dataset_name", "d"]
        assert main(words) == 0
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["records.jsonl.gz", "units.json"]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
