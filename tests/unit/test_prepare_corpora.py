"""`most-ray prepare units` on published corpora, with speech, and on what is damaged; wrong uses of its neighbours."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from most_ray.records.record import parse_record
from tests.support.audio import cut, hours_of_silence, lines_of, prepare, refused, table, tone, tones, units_command
from tests.support.corpora import cut_of, libriheavy
from tests.support.speech import published_corpora

FIT = ("--fit_kmeans", "12")


# Published corpora, on speech


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of published corpora, of synthesised speech."""
    return published_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(params=["synthesised", pytest.param("recorded", marks=pytest.mark.shared)])
def published(request: pytest.FixtureRequest) -> Path:
    """A folder of published corpora, of synthesised speech and of the recordings as they were published."""
    if request.param == "recorded":
        return Path(request.getfixturevalue("shared")) / "data"
    return Path(request.getfixturevalue("corpora"))


def few_clips(data: Path, folder: Path) -> Path:
    rows = (data / "common_voice_en/validated.tsv").read_text(encoding="utf-8").splitlines()
    folder.mkdir()
    (folder / "validated.tsv").write_text("\n".join(rows[:9]) + "\n", encoding="utf-8")
    (folder / "clips").symlink_to(data / "common_voice_en/clips")
    return folder


def voices(data: Path) -> list[tuple[Path, str]]:
    """LibriSpeech's recordings of two speakers with their texts."""
    found = []
    for speaker in ("1867", "3526"):
        for transcript in sorted((data / "LibriSpeech/train-clean-5" / speaker).glob("*/*.trans.txt")):
            lines = (line.split(" ", 1) for line in transcript.read_text().splitlines())
            found += [(transcript.with_name(f"{name}.flac"), text) for name, text in lines if transcript.with_name(f"{name}.flac").exists()]
    assert len(found) >= 4
    return found


def parliament(data: Path, folder: Path) -> Path:
    """VoxPopuli's layout of LibriSpeech's recordings."""
    rows = {split: ["id\traw_text\tnormalized_text\tspeaker_id\tsplit\tgender\tis_gold_transcript\taccent"] for split in ("train", "test")}
    (folder / "transcribed_data/en/2012").mkdir(parents=True)
    for index, (path, text) in enumerate(voices(data)):
        name, split = f"2012-{path.stem}", "test" if index == 0 else "train"
        soundfile.write(folder / f"transcribed_data/en/2012/{name}.ogg", *soundfile.read(path))
        rows[split].append(f"{name}\t\t{text.lower()}\t{path.stem.split('-')[0]}\t{split}\tfemale\tTrue\tNone")
    for split, lines in rows.items():
        (folder / f"transcribed_data/en/asr_{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def test_librispeech(published: Path, tmp_path: Path) -> None:
    source = published / "LibriSpeech"
    made = prepare(source, tmp_path / "out", *FIT, "--where", "speaker=1867,3526", corpus="librispeech")
    expected = {f"librispeech_train-clean-5_{path.stem}": (path, text) for path, text in voices(published)}
    told = check(made, expected)
    assert all((one["split"], one["speaker"]) == ("train-clean-5", path.stem.split("-")[0]) for one, (path, _) in told)


def test_common_voice(published: Path, tmp_path: Path) -> None:
    source = few_clips(published, tmp_path / "cv")
    made = prepare(source, tmp_path / "out", *FIT, corpus="common_voice")
    with (source / "validated.tsv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream, delimiter="\t"))[1:]  # this release quotes its quotes
    expected = {f"common_voice_en_{Path(row[1]).stem.split('_')[-1]}": (source / "clips" / row[1], row[2]) for row in rows}
    told = check(made, expected)
    assert [one["speaker"] for one, _ in told] == [row[0] for row in rows] and {one["split"] for one, _ in told} == {"validated"}


def test_an4(published: Path, tmp_path: Path) -> None:
    source = published / "an4"
    made = prepare(source, tmp_path / "out", *FIT, "--where", "speaker=mkem", corpus="an4")
    expected = {}
    for fileid, line in zip(*((source / f"etc/an4_train.{s}").read_text().splitlines() for s in ("fileids", "transcription")), strict=True):
        if fileid.split("/")[1] == "mkem":
            text, _, name = line.strip().rpartition(" ")
            assert name == f"({Path(fileid).name})"
            expected[f"an4_{Path(fileid).name}"] = (source / f"wav/{fileid}.ogg", text.removeprefix("<s>").removesuffix("</s>").strip())
    told = check(made, expected)
    assert {(one["speaker"], one["split"]) for one, _ in told} == {("mkem", "train")}


def test_voxpopuli(corpora: Path, tmp_path: Path) -> None:
    source = parliament(corpora, tmp_path / "vp")
    made = prepare(source, tmp_path / "out", *FIT, corpus="voxpopuli")
    paths = {p.stem: p for p in source.rglob("*.ogg")}
    said = [(f"2012-{path.stem}", text.lower()) for path, text in voices(corpora)]
    expected = {f"voxpopuli_{name}": (paths[name], text) for name, text in (*said[1:], said[0])}  # train comes before test
    told = check(made, expected)
    assert [one["split"] for one, _ in told] == ["train"] * (len(said) - 1) + ["test"]
    assert all(one["speaker"] == path.stem.split("-")[1] for one, (path, _) in told)


def check(made: list[dict[str, Any]], expected: dict[str, tuple[Path, str]]) -> list[tuple[dict[str, Any], tuple[Path, str]]]:
    """Ids, texts and durations (to the millisecond) are the corpus' own. Returns each one's metadata beside what was expected."""
    assert [record["id"] for record in made] == list(expected)
    for record in made:
        path, text = expected[record["id"]]
        samples, rate = soundfile.read(path)
        assert record["output"] == text
        assert record["metadata"]["duration"] == pytest.approx(len(samples) / rate, abs=0.001)
        units = parse_record(record).input
        assert isinstance(units, np.ndarray) and 1 < len(units) <= 50 * len(samples) / rate + 1
    return [(record["metadata"], expected[record["id"]]) for record in made]


def test_a_cut_of_a_long_recording_is_its_utterance(corpora: Path, tmp_path: Path) -> None:
    """LibriHeavy: the units of a stretch inside a long recording are those of the recording that was put there."""
    said, pause, joined, cuts, begin = voices(corpora), np.zeros(12345, np.float32), [], [], 0
    for index, (path, text) in enumerate(said):
        samples = soundfile.read(path, dtype="float32")[0]
        joined += [pause, samples]
        begin += len(pause)
        speaker = path.stem.split("-")[0]
        words = {"start": 0, "duration": len(samples) / 16000, "speaker": speaker, "custom": {"texts": [text.capitalize(), text]}}
        times = {"start": begin / 16000, "duration": len(samples) / 16000}
        cuts.append(cut_of(f"small/1/a_{index}", supervisions=[words], **times))
        begin += len(samples)
    heavy = libriheavy(tmp_path / "heavy" / "download", cuts).parent
    (heavy / "librilight/small/1").mkdir(parents=True)
    soundfile.write(heavy / "librilight/small/1/a.flac", np.concatenate(joined), 16000)
    made = prepare(heavy, tmp_path / "cuts", "--fit_kmeans", "40", corpus="libriheavy")
    whole = table(tmp_path / "whole", [])
    rows = "".join(f"{path}\t{text}\t{path.stem.split('-')[0]}\n" for path, text in said)
    (whole / "transcripts.tsv").write_text(f"path\ttext\tspeaker\n{rows}")
    alone = prepare(whole, tmp_path / "alone", "--kmeans", str(tmp_path / "cuts/kmeans.npy"))
    assert [record["input"] for record in made] == [record["input"] for record in alone]
    assert [record["metadata"]["duration"] for record in made] == [record["metadata"]["duration"] for record in alone]
    assert [record["output"] for record in made] == [text.capitalize() for _, text in said]
    upper = prepare(heavy, tmp_path / "upper", "--kmeans", str(tmp_path / "cuts/kmeans.npy"), "--casing", "upper", corpus="libriheavy")
    assert [record["output"] for record in upper] == [text for _, text in said]
    assert {record["metadata"]["split"] for record in made} == {"small"}


# Damage


def test_every_bad_recording_is_set_aside_once_with_its_reason(corpora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rest become records, whatever their paths look like."""
    source, (good, _) = tmp_path / "mixed", voices(corpora)[0]
    (source / "mit Leerzeichen und 録音").mkdir(parents=True)
    texts = ("zero", "cut", "text only", "word", "day", "good", "mit Leerzeichen und 録音/größe 3")
    for name in texts:
        (source / f"{name}.txt").write_text(f"says {name}", encoding="utf-8")
    (source / "zero.wav").touch()
    cut(good, source / "cut.flac")
    shutil.copy(good, source / "no text.flac")
    (source / "word.wav").write_text("not audio")
    hours_of_silence(source / "day.wav", 8)
    for name in texts[-2:]:
        shutil.copy(good, source / f"{name}.flac")
    records = prepare(source, tmp_path / "out", *FIT)
    assert {(r["id"], r["output"]) for r in records} == {
        ("mixed_good", "says good"),
        ("mixed_mit Leerzeichen und 録音_größe 3", "says mit Leerzeichen und 録音/größe 3"),
    }
    aside = lines_of(tmp_path / "out" / "rejected.jsonl")
    reasons = {Path(entry["file"]).name: entry["reason"] for entry in aside}
    assert len(aside) == len(reasons) == 6 and "6 entries were rejected" in capsys.readouterr().out
    for name, reason in {
        "zero.wav": "is an empty file",
        "cut.flac": "is cut off or damaged",
        "text only.txt": "has text but no recording",
        "no text.flac": "has no text",
        "word.wav": "cannot be read as audio",
        "day.wav": "is 28,800.0 s long",
    }.items():
        assert reasons[name].startswith(reason), name


def test_bad_recordings_of_a_table_are_set_aside(tmp_path: Path) -> None:
    """In its order, with the number of the row or of the utterance."""
    corpus = tones(tmp_path / "corpus")
    soundfile.write(corpus / "0.flac", tone(0.005, 300), 8000)
    (corpus / "1.flac").unlink()
    soundfile.write(corpus / "2.flac", np.zeros(0, np.float32), 8000, format="WAV")  # an empty FLAC cannot be opened
    (corpus / "3.flac").write_bytes(b"no audio")
    records = prepare(corpus, tmp_path / "out", "--fit_kmeans", "5")
    assert [record["id"] for record in records] == [f"corpus_{i}" for i in range(4, 8)]
    found = {entry["id"]: entry["reason"] for entry in lines_of(tmp_path / "out" / "rejected.jsonl")}
    assert list(found) == ["corpus_1", "corpus_0", "corpus_2", "corpus_3"], "what the table tells comes first"
    assert "not there" in found["corpus_1"] and "shorter than one frame" in found["corpus_0"]
    assert "no samples" in found["corpus_2"] and "cannot be read as audio" in found["corpus_3"]


def test_nothing_usable_is_an_error_that_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = table(tmp_path / "c", [("a.wav", "a"), ("b.wav", "b")])
    for name in ("a", "b"):
        soundfile.write(source / f"{name}.wav", np.zeros(9000), 16000)
    said = refused(capsys, *units_command(source, tmp_path / "o", *FIT))
    assert "holds no usable recording; the first one is silence" in said
    (source / "a.wav").unlink()
    (source / "b.wav").unlink()
    said = refused(capsys, *units_command(source, tmp_path / "o", *FIT))
    assert "holds no utterance; the first entry" in said and "names a recording that is not there" in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no transcripts.tsv"),
        ("file\ttext\n", "no column 'path'"),
        ("path\ttext\n", "holds no utterance"),
        ("path\ttext\n0.flac\t\n", "has no text"),
    ],
)
def test_bad_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str) -> None:
    """A table that cannot be used is an error that names it."""
    corpus = tones(tmp_path / "corpus")
    (corpus / "transcripts.tsv").unlink()
    if content is None:
        for path in corpus.glob("*.flac"):
            path.unlink()
    else:
        (corpus / "transcripts.tsv").write_text(content)
    assert message in refused(capsys, *units_command(corpus, tmp_path / "o", *FIT))


def test_a_second_recording_of_that_name_has_an_id_of_its_own(tmp_path: Path) -> None:
    """Ids are names; the first keeps its. The same recording again is rejected."""
    corpus = tones(tmp_path / "corpus")
    (corpus / "x").mkdir()
    shutil.copy(corpus / "1.flac", corpus / "x" / "0.flac")
    with (corpus / "transcripts.tsv").open("a") as rows:
        rows.write("x/0.flac\ta\tanother\ttrain\n./0.flac\ta\tagain\ttrain\n")
    found = {record["id"]: record["output"] for record in prepare(corpus, tmp_path / "o", *FIT)}
    assert len(found) == 9 and (found["corpus_0"], found["corpus_x_0"]) == ("word 0", "another")
    (entry,) = lines_of(tmp_path / "o" / "rejected.jsonl")
    assert entry["index"] == 11 and "'corpus_0' a second time" in entry["reason"]


# Wrong uses of what goes with it


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "k.pkl"], "neither a .npy nor a .safetensors"),
        (["--output", "k"], "neither a .npy nor a .safetensors"),
        (["--output", "k.npy", "--k", "x"], "k = 'x': is neither a number"),
        (["--output", "k.npy", "--k", "501"], "k = 501: must be in 2..500"),
        (["--output", "s3://bucket/k.npy"], "is not a local path"),
        (["--output", "k.npy", "--kmeans", "x"], "is no known flag"),
    ],
)
def test_wrong_flags_of_kmeans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    """One line, and nothing is written."""
    corpus = tones(tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, "prepare", "kmeans", "--input", str(corpus), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seconds", "0"], "seconds = 0.0: must be above 0"),
        (["--seconds", "nan"], "is not finite"),
        (["--records", "nowhere"], "holds no units.json"),
        (["--where", "speker=a"], "Did you mean 'speaker'"),
        (["--where", "speaker=z"], "recording"),
        (["--max_seconds", "0.01"], "recording"),
        (["--input", "nowhere"], "does not exist"),
        (["--features", "mfcc"], "is no known flag"),
    ],
)
def test_wrong_flags_of_a_vocoder(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    """One line, and no vocoder."""
    corpus = tones(tmp_path / "corpus")
    prepare(corpus, tmp_path / "records", *FIT)
    assert message in refused(capsys, "prepare", "vocoder", "--input", str(corpus), "--records", str(tmp_path / "records"), *words)
    assert not (tmp_path / "records" / "vocoder.safetensors").exists()


# The share that is rejected


def test_too_many_rejected_entries_end_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was there stays as it was; a larger share can be allowed, and a finished command is held to a smaller one."""
    corpus = tones(tmp_path / "corpus", 12)
    for index in range(8):
        (corpus / f"{index}.flac").write_bytes(b"no audio")
    command = units_command(corpus, tmp_path / "o", "--fit_kmeans", "5")
    assert "max_rejected_fraction = 0.5: is exceeded: 8 entries" in refused(capsys, *command)
    assert [path.name for path in (tmp_path / "o").iterdir() if not path.name.startswith(".")] == ["rejected.jsonl"]
    assert len(prepare(corpus, tmp_path / "o", "--fit_kmeans", "5", "--max_rejected_fraction", "0.67")) == 4
    assert "is exceeded" in refused(capsys, *command, "--max_rejected_fraction", "0.6")
    assert "must be in 0..1" in refused(capsys, *command, "--max_rejected_fraction", "1.5")


def test_the_share_is_that_of_what_was_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Recordings of a folder that its table does not list are no failures, and rows that were not chosen are no part of those that were."""
    corpus = tones(tmp_path / "corpus", 10)
    rows = (corpus / "transcripts.tsv").read_text().splitlines()
    (corpus / "transcripts.tsv").write_text("\n".join([*rows[:3], "gone.flac\ta\tx\ttrain", *rows[-2:]]) + "\n")
    chosen = ("--fit_kmeans", "5", "--where", "split=test", "--max_rejected_fraction")
    assert len(prepare(corpus, tmp_path / "o", *chosen, "0.2")) == 2
    assert "1 entry cannot be used" in refused(capsys, *units_command(corpus, tmp_path / "p", *chosen, "0.19"))
    assert not (tmp_path / "p").exists()
