"""`most-ray prepare tts`: ASR records to TTS records."""

from __future__ import annotations

import datetime as dt
import gzip
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from most_ray.cli import main
from most_ray.errors import ConfigError
from most_ray.records.record import TTS_INSTRUCTION, asr_to_tts, parse_record
from most_ray.records.tts_records import Conversion, prepare_tts, read_conversions
from tests.support.audio import contents, lines_of, refused
from tests.support.builders import asr, tts, write_records


def convert(source: Path, output: Path, *words: str) -> list[dict[str, Any]]:
    """The records of all files that the command makes."""
    assert main(["prepare", "tts", "--input_dir", str(source), "--output_dir", str(output), *words]) == 0
    return [record for path in sorted(output.rglob("*.jsonl.gz")) for record in lines_of(path)]


def config(folder: Path, value: Any) -> str:
    (folder / "convert.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return str(folder / "convert.json")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_records(tmp_path / "speech", [asr(i) for i in range(5)])


def test_the_sides_are_swapped_and_the_rest_is_kept(source: Path, tmp_path: Path) -> None:
    """As the original's converter has it; the data set is called as its directory where nobody names it."""
    for words, name in (((), "speech"), (("--dataset_name", "mine"), "mine")):
        made = convert(source, tmp_path / f"{name}-tts", *words)
        for index, record in enumerate(made):
            before = asr(index)
            assert parse_record(record).task == "tts"
            stamp = record["metadata"].pop("conversion_timestamp")
            assert stamp.endswith("+00:00")
            assert record == {
                "id": f"tts_utt_{index}",
                "instruction": TTS_INSTRUCTION,
                "input": before["output"],
                "output": before["input"],
                "metadata": {**before["metadata"], "task": "tts", "original_task": "asr", "dataset": name},
            }
        assert len(made) == 5


def test_a_folder_is_called_by_its_own_name(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it is written."""
    monkeypatch.chdir(source)
    assert {record["metadata"]["dataset"] for record in convert(Path("."), tmp_path / "out")} == {"speech"}


def test_conversion_is_repeatable(digits: Path, tmp_path: Path) -> None:
    """To the byte, into a new folder and over what is there: the time stamp is the source's."""
    for name in ("one", "two", "two"):
        convert(digits / "test_takes", tmp_path / name, "--dataset_name", "d")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert contents(tmp_path / "one").keys() >= {"records.jsonl.gz", "units.json"}


def test_every_form_and_folder_is_read(tmp_path: Path) -> None:
    """A file for each file, in the same folders; what comes first in the name stays."""
    root = tmp_path / "in"
    (root / "deep").mkdir(parents=True)
    (root / "list.json").write_text(json.dumps([asr(0), asr(1)]))
    (root / "data.json").write_text(json.dumps({"data": [asr(2)]}))
    (root / "deep" / "train.clean.100.json").write_text(json.dumps([asr(3)]))
    (root / "packed.jsonl.gz").write_bytes(gzip.compress(json.dumps(asr(4)).encode()))
    (root / "notes.txt").write_text("no records")
    made = convert(root, tmp_path / "out")
    assert sorted(record["id"] for record in made) == [f"tts_utt_{i}" for i in range(5)]
    assert sorted(contents(tmp_path / "out")) == [
        "converted.json",
        "data.jsonl.gz",
        "deep/train.clean.100.jsonl.gz",
        "list.jsonl.gz",
        "packed.jsonl.gz",
    ]
    assert [r["id"] for r in convert(root, tmp_path / "some", "--file_pattern", "train.*")] == ["tts_utt_3"]


def test_one_file_can_be_named(source: Path, tmp_path: Path) -> None:
    (source / "units.json").write_text('{"identity": {}}')
    assert len(convert(source / "records.jsonl", tmp_path / "out")) == 5
    assert sorted(contents(tmp_path / "out")) == ["converted.json", "records.jsonl.gz", "units.json"]


def test_what_goes_with_the_units_goes_along(source: Path, tmp_path: Path) -> None:
    """What they mean and how they sound; not the notes of the command that made them."""
    for name in ("units.json", "kmeans.npy", "vocoder.safetensors", "rejected.jsonl", "prepared.json", "README.md"):
        (source / name).write_text(f"the {name}")
    convert(source, tmp_path / "out")
    made = contents(tmp_path / "out")
    assert sorted(made) == ["converted.json", "kmeans.npy", "records.jsonl.gz", "units.json", "vocoder.safetensors"]
    assert made["kmeans.npy"] == b"the kmeans.npy"


def test_what_is_no_asr_record_is_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its file, place and reason; the rest goes on. A later run without any leaves no list of them."""
    bad = [tts(1), {"id": "x"}, {**asr(2), "output": ""}, {**asr(3), "input": "[Hu500]"}, 7]
    source = write_records(tmp_path / "in", [asr(0), *bad, asr(9)])
    with (source / "records.jsonl").open("a") as lines:
        lines.write('{"id": \n')
    made = convert(source, tmp_path / "out")
    assert [record["id"] for record in made] == ["tts_utt_0", "tts_utt_9"]
    aside = lines_of(tmp_path / "out" / "rejected.jsonl")
    assert [entry["index"] for entry in aside] == [1, 2, 3, 4, 5, 7] and {entry["file"] for entry in aside} == {
        str(source / "records.jsonl")
    }
    for entry, reason in zip(
        aside, ("not an ASR record", "no field", "empty output", "outside 0..499", "JSON int", "not JSON"), strict=True
    ):
        assert reason in entry["reason"]
    assert "6 records were rejected" in capsys.readouterr().out
    write_records(source, [asr(0)])
    convert(source, tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == ["converted.json", "records.jsonl.gz"]
    write_records(source, bad)
    assert "holds no ASR record; 5 others are in" in refused(
        capsys, "prepare", "tts", "--input_dir", str(source), "--output_dir", str(tmp_path / "o")
    )


def test_conversion_never_writes_two_files_into_one(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names that differ behind a dot are two; those that differ in the form only would be one."""
    content = json.dumps(lines_of(digits / "test_takes" / "records.jsonl.gz")[0])
    source = tmp_path / "in"
    source.mkdir()
    for name in ("train.clean.100.json", "train.clean.360.json"):
        (source / name).write_text(content)
    convert(source, tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == ["converted.json", "train.clean.100.jsonl.gz", "train.clean.360.jsonl.gz"]
    (source / "train.clean.100.jsonl").write_text(content)
    assert "as train.clean.100.json would" in refused(
        capsys, "prepare", "tts", "--input_dir", str(source), "--output_dir", str(tmp_path / "out")
    )


def test_the_input_is_never_written_to(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by its name nor by another name of it; and what is written would not be read the next time."""
    monkeypatch.chdir(source)
    (tmp_path / "link").symlink_to(source)
    before = contents(source)
    for given, output in (
        (source, source),
        (source, Path(".")),
        (source, tmp_path / "x" / ".." / "speech"),
        (source, tmp_path / "link"),
        (source / "records.jsonl", source),
        (source, source / "tts"),
        (tmp_path / "link", source / "deep" / "tts"),
    ):
        with pytest.raises(ConfigError, match=r"is (inside )?the input_dir") as refused_it:
            prepare_tts(Conversion(given, output))
        assert refused_it.value.field == "output_dir" and refused_it.value.value == str(output)
        assert contents(source) == before and sorted(os.listdir(source)) == ["records.jsonl"]


def test_a_config_converts_many(tmp_path: Path) -> None:
    """In the original's form: a list, or one object; a name and a pattern where they are given."""
    for name in ("a", "b"):
        write_records(tmp_path / name, [asr(i) for i in range(3)], "train.jsonl")
        write_records(tmp_path / name, [asr(i) for i in range(10, 12)], "test.jsonl")
    entries = [
        {"dataset_name": "first", "input_dir": str(tmp_path / "a"), "output_dir": str(tmp_path / "ta"), "file_pattern": "train*"},
        {"input_dir": str(tmp_path / "b"), "output_dir": str(tmp_path / "tb")},
    ]
    assert main(["prepare", "tts", "--config", config(tmp_path, entries)]) == 0
    made = [[r for path in sorted((tmp_path / name).glob("*.gz")) for r in lines_of(path)] for name in ("ta", "tb")]
    assert [len(records) for records in made] == [3, 5]
    assert [{r["metadata"]["dataset"] for r in records} for records in made] == [{"first"}, {"b"}]
    assert read_conversions(Path(config(tmp_path, entries[1]))) == [Conversion(tmp_path / "b", tmp_path / "tb")]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[{", "cannot be read as JSON"),
        ([], "names no data set"),
        ([7], "entry 0 is a JSON int"),
        ({"input_dirs": "a", "output_dir": "b"}, "Did you mean 'input_dir'"),
        ([{"input_dir": "a", "output_dir": "b"}, {"input_dir": "a", "output_dir": "c", "datasetname": "n"}], "Did you mean 'dataset_name'"),
        ({"input_dir": 3, "output_dir": "b"}, "is not a string"),
        ({"output_dir": "b"}, "input_dir: is missing in entry 0"),
        ([{"input_dir": "a", "output_dir": "b"}, {"input_dir": "a"}], "output_dir: is missing in entry 1"),
        ({"input_dir": "", "output_dir": "b"}, "input_dir: is missing"),
        ([{"input_dir": "a", "output_dir": "t"}, {"input_dir": "b", "output_dir": "./t"}], "is named by two entries"),
        ({"input_dir": "nowhere", "output_dir": "t"}, "does not exist"),
    ],
)
def test_wrong_configs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: Any, message: str
) -> None:
    """One line that names the key or the entry; nothing is converted."""
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, "prepare", "tts", "--config", config(tmp_path, value))
    assert os.listdir(tmp_path) == ["convert.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "output_dir are needed"),
        (["--input_dir", "speech"], "output_dir are needed"),
        (["--config", "none.json"], "cannot be read as JSON"),
        (["--config", "c.json", "--input_dir", "speech"], "lists the directories"),
        (["--config", "c.json", "--file_pattern", "*.json"], "lists the directories"),
        (["--input_dir", "nowhere", "--output_dir", "o"], "does not exist"),
        (["--input_dir", "speech", "--output_dir", "s3://bucket/x"], "is not a local path"),
        (["--input_dir", "speech", "--output_dir", "o", "--file_pattern", "x*"], "holds no records"),
        (["--input_dir", "speech", "--outputdir", "o"], "Did you mean 'output_dir'"),
    ],
)
def test_wrong_flags(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, "prepare", "tts", *words)
    assert os.listdir(tmp_path) == [source.name]


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """A list and lines of 8 MB each."""
    record = json.dumps(asr(0, units=400))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(f"{record}\n" * 3000)
    (tmp_path / "in" / "b.json").write_text(f"[{','.join([record] * 3000)}]")
    tracemalloc.start()
    try:
        counts = prepare_tts(Conversion(tmp_path / "in", tmp_path / "out"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert counts == {"records": 6000, "rejected": 0, "files": 2}
    assert (tmp_path / "in" / "a.jsonl").stat().st_size > 8_000_000 and peak < 4 << 20


def test_a_conversion_that_fails_leaves_the_old_files(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is put in place when it is whole."""
    convert(source, tmp_path / "out")
    before = contents(tmp_path / "out")["records.jsonl.gz"]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("most_ray.records.tts_records.asr_to_tts", full)
    with pytest.raises(OSError, match="No space left"):
        prepare_tts(Conversion(source, tmp_path / "out"))
    assert contents(tmp_path / "out")["records.jsonl.gz"] == before


def test_a_record_without_metadata(tmp_path: Path) -> None:
    source = write_records(tmp_path / "in", [{**asr(0), "metadata": None}])
    (made,) = convert(source, tmp_path / "out")
    stamp = dt.datetime.fromisoformat(made["metadata"]["conversion_timestamp"])
    assert made == asr_to_tts(asr(0) | {"metadata": {}}, "in", stamp)


def test_half_a_surrogate_pair_in_metadata_is_kept(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    line = json.dumps({"id": "a", "instruction": "T.", "input": "[Hu1]", "output": "one", "metadata": {"name": "\ud83d"}})
    (tmp_path / "in" / "r.jsonl").write_text(line)
    assert prepare_tts(Conversion(tmp_path / "in", tmp_path / "out"))["records"] == 1
    with gzip.open(tmp_path / "out" / "r.jsonl.gz") as stream:
        assert json.loads(stream.read())["metadata"]["name"] == "\ud83d"
