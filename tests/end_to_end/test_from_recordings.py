"""As a user does it, command by command: recordings and published units in, word error rates out."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from most_ray.cli import main
from most_ray.config import config_from
from most_ray.io.journal import read_journal
from most_ray.records.files import read_raw, record_files
from most_ray.records.record import units_to_text
from most_ray.train.run import main as train_without_ray
from tests.support.builders import asr
from tests.support.runs import run_on_ranks
from tests.support.speech import spoken_folder


def test_from_a_folder_of_recordings_to_a_word_error_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Promise 28 of docs/promises.md: recordings, units fitted on them, both tasks, a run, a score; the whole way in a new folder."""
    monkeypatch.chdir(tmp_path)
    source = "recordings"
    spoken_folder(Path(source), ["george", "jackson"], range(5))
    units = ["prepare", "units", "--corpus", "folder", "--input", source, "--features", "mfcc"]
    assert main([*units, "--output", "asr", "--fit_kmeans", "50", "--where", "speaker=george", "split=train"]) == 0
    assert main([*units, "--output", "val", "--kmeans", "asr/kmeans.npy", "--where", "speaker=george", "split=test"]) == 0
    assert main(["prepare", "tts", "--input_dir", "asr", "--output_dir", "tts", "--dataset_name", "george"]) == 0
    data = ["--train_asr_dirs", "asr", "--train_tts_dirs", "tts", "--val_asr_dirs", "val", "--val_tts_dirs", "tts", "--name", "mine"]
    small = [
        "--max_steps",
        "12",
        "--global_batch_size",
        "32",
        "--max_seq_length",
        "256",
        "--learning_rate",
        "3e-3",
        "--train_batch_size",
        "8",
    ]
    assert train_without_ray([*data, *small]) == 0
    shown = capsys.readouterr().out
    assert "Word error rate" in shown and "Expert load" in shown and "Checkpoint:" in shown
    summary = json.loads(Path("runs/mine/summary.json").read_text())
    assert set(summary["wer"]) == {"val"} and summary["sets"]["tts/tts"]["perplexity"] > 1
    assert main(["evaluate", "--model", "runs/mine/export", "--asr_dirs", "val", "--output", "e.json"]) == 0
    assert json.loads(Path("e.json").read_text())["wer"] == summary["wer"]


def test_other_units_than_the_ones_trained_on_are_refused(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Promise 27 of docs/promises.md."""
    monkeypatch.chdir(tmp_path)
    spoken_folder(Path("recordings"), ["jackson"], [0])
    assert main(["prepare", "units", "--input", "recordings", "--output", "other", "--fit_kmeans", "30"]) == 0
    train = ["--train_asr_dirs", str(digits / "test_takes"), *["--max_steps", "1", "--global_batch_size", "8", "--max_seq_length", "256"]]
    assert train_without_ray([*train, "--name", "one"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "--model", "runs/one/export", "--asr_dirs", "other", "--output", "e.json"]) == 2
    assert "units" in capsys.readouterr().err
    assert main(["train", *train, "--name", "two", "--train_asr_dirs", str(digits / "test_takes"), "other"]) == 2
    assert "made differently" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["written", pytest.param("published", marks=pytest.mark.shared)])
def test_long_records_of_units_train(source: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of units per record, repeats kept, one JSON list; long rows. Published: LibriSpeech's, of another project's encoder."""
    monkeypatch.chdir(tmp_path)
    if source == "published":
        source = str(request.getfixturevalue("shared") / "data" / "librispeech_units")
    else:
        rng = np.random.default_rng(0)
        units = [np.repeat(rng.integers(0, 500, count), rng.integers(1, 5, count)).tolist() for count in range(100, 300, 10)]
        records = [{**asr(index, text="A LONGER SENTENCE"), "input": units_to_text(each)} for index, each in enumerate(units)]
        Path(source).mkdir()
        (Path(source) / "train_instructions.json").write_text(json.dumps(records))
    keys = {"train_asr_dirs": [source], "name": "libri", "max_steps": 2, "global_batch_size": 4, "max_seq_length": 2048}
    run_on_ranks(config_from({**keys, "ep_size": 2, "gradient_checkpointing": True, "threads_per_worker": 1}), workers=2)
    lines = read_journal(Path("runs/libri/metrics.jsonl"), "train")
    assert [line["step"] for line in lines] == [1, 2] and lines[0]["tokens"] > 1500


def test_one_command_from_a_folder_of_recordings(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Promise 28 of docs/promises.md: units, both tasks, a run, speech out and in again; the commands that it shows are those it ran."""
    monkeypatch.chdir(tmp_path)
    source = Path("my recordings")
    chosen = spoken_folder(source, ["george", "jackson", "nicolas", "yweweler"], range(2))
    lines = [f"{row['path']}\t{row['text']}\t{row['speaker']}" for row in chosen]
    (source / "transcripts.tsv").write_text("\n".join(["path\ttext\tspeaker", *lines]) + "\n")
    flags = ["--max_steps", "6", "--global_batch_size", "16", "--name", "mine"]
    assert main(["train", "--from_audio", str(source), *flags]) == 0
    shown = capsys.readouterr().out
    commands = [shlex.split(line)[1:] for line in shown.splitlines() if line.startswith("most-ray ")]
    assert [words[:2] for words in commands] == [
        *([["prepare", "units"]] * 2),
        ["prepare", "vocoder"],
        *([["prepare", "tts"]] * 2),
        ["train", "--config"],
    ]
    assert "Word error rate" in shown and "cycle WER" in shown
    held_out = {row["speaker"] for row in chosen} - {raw["metadata"]["speaker"] for raw in records_of("runs/mine-data/train_asr")}
    assert len(held_out) == 1 and {raw["metadata"]["speaker"] for raw in records_of("runs/mine-data/val_asr")} == held_out
    report = Path("runs/mine/report.html").read_text(encoding="utf-8")
    assert "data:audio/wav" in report
    export = "runs/mine/export"
    recording = str(source / "0_george_1.flac")
    assert main(["transcribe", "--model", export, recording]) == 0
    checkpoint = str(next(Path("runs/mine/checkpoints").glob("step-*")))
    assert main(["transcribe", "--model", checkpoint, recording, recording, "--one_speaker", "--output", "heard.jsonl"]) == 0
    assert len(Path("heard.jsonl").read_text().splitlines()) == 2
    said = main(["synthesize", "--model", export, "--text", "seven", "--output", "seven.wav"])
    assert said in (0, 2)  # after six steps it may answer without a unit, and says so
    assert main(["synthesize", "--model", export, "--units", "[Hu1][Hu5][Hu9]", "--output", "units.wav"]) == 0
    assert soundfile.info("units.wav").frames > 100
    # The same again: nothing is made anew. And by the commands that were shown.
    assert main(["train", "--from_audio", str(source), *flags]) == 0
    again = capsys.readouterr().out
    assert again.count("nothing has changed") == 3 and "complete" in again
    assert main(commands[-1]) == 0


def records_of(folder: str) -> list[dict[str, Any]]:
    return [raw for entry in record_files(folder) for _, raw in read_raw(entry.uri) if isinstance(raw, dict)]
